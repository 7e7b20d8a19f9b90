"""Which training labels look wrong: a list of all examples, and a page of the worst."""

import base64
import csv
import html
import io
import pathlib
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from train import evidence, trainer
from train.config import ConfigError

_LARGEST_SIDE = 160  # pixels of a picture on the page; larger images are scaled down


class Suspects(NamedTuple):
    """Every training example of a run, the most suspicious first.

    Attributes:
        positions: where they are in the split that the run trained on, int [n].
        suggested: the labels that the network gives, int [n]; often the given ones.
        means: the evidence, [n] each.
        problem: what the run trained on.
    """

    positions: np.ndarray
    suggested: np.ndarray
    means: evidence.Means
    problem: trainer.Problem

    @property
    def given(self) -> np.ndarray:
        """The given labels, int [n]."""
        return self.problem.dataset.train.labels[self.positions]

    @property
    def true(self) -> np.ndarray:
        """The true labels, int [n]: the given ones, but where the run made label noise."""
        return self.problem.true[self.positions]


def rank(directory: pathlib.Path) -> Suspects:
    """Ranks the training examples of a run by the evidence of its newest checkpoint.

    Examples are sorted by `train.evidence.Means.score`; those never seen come last. The suggested
    label is the network's prediction for the image without augmentation.

    Raises:
        ConfigError: if there is no run or no checkpoint, or if images have several labels.
    """
    config, problem, program, state = trainer.open_run(directory)
    if state.evidence is None:
        raise ConfigError(
            f"{config.dataset} has several labels per example: suspects are for one label each"
        )
    means = evidence.means(state.evidence)
    order = np.argsort(-means.score, kind="stable")  # NaN last
    suggested = np.argmax(trainer.predict(program, state, problem.dataset.train), axis=-1)
    return Suspects(order, suggested[order], jax.tree.map(lambda x: x[order], means), problem)


def measure(suspects: Suspects) -> dict[str, float]:
    """How well the ranking finds the wrong labels, where they are known; in percent.

    Returns:
        ``auc``: area under the ROC curve, the chance that a wrong label ranks before a right one.
        ``precision``: share of wrong labels among the first m, if m labels are wrong.
        ``recall``: share of the wrong labels that have a score above 0.
        ``suggested``: share of the wrong labels whose suggested label is the true one.

    Raises:
        ValueError: if all labels are right, or all wrong.
    """
    from sklearn.metrics import roc_auc_score

    wrong = suspects.given != suspects.true
    if wrong.all() or not wrong.any():
        raise ValueError("needs right and wrong labels to tell apart")
    return {
        "auc": 100 * float(roc_auc_score(wrong, -np.arange(len(wrong)))),
        "precision": 100 * float(wrong[: wrong.sum()].mean()),
        "recall": 100 * float((suspects.means.score[wrong] > 0).mean()),
        "suggested": 100 * float((suspects.suggested == suspects.true)[wrong].mean()),
    }


def write_csv(suspects: Suspects, file: pathlib.Path) -> None:
    """Writes a line per training example, the most suspicious first.

    Columns: ``example``, its number in the training split of the data set; ``file``, for data from
    a folder; ``given`` and ``suggested``, names of classes; ``score``, ``loss``, ``agreement`` and,
    where it was gathered, ``alignment``, as in `train.evidence.Means`, empty for an example never
    seen.
    """
    problem, means = suspects.problem, suspects.means
    names, files = problem.dataset.class_names, problem.dataset.train_files
    with open(file, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        gathered = {name: x for name, x in means._asdict().items() if x is not None}
        columns = ("given", "suggested", *gathered)
        writer.writerow(["example", *(["file"] if files else []), *columns])
        for i, example in enumerate(problem.examples[suspects.positions]):
            figures = (x[i] for x in gathered.values())
            writer.writerow(
                [
                    example,
                    *([files[example]] if files else []),
                    names[suspects.given[i]],
                    names[suspects.suggested[i]],
                    *("" if np.isnan(x) else f"{x:.4f}" for x in figures),
                ]
            )


def write_page(suspects: Suspects, file: pathlib.Path, count: int, title: str) -> None:
    """Writes a page of the `count` most suspicious images; it needs no other file."""
    problem, means = suspects.problem, suspects.means
    dataset = problem.dataset
    count = min(count, int(np.isfinite(means.score).sum()))
    positions = suspects.positions[:count]
    tiles = []
    for i, pixels in enumerate(dataset.train.read(positions) if count else []):
        example = int(problem.examples[positions[i]])
        given, suggested = (
            html.escape(dataset.class_names[x]) for x in (suspects.given[i], suspects.suggested[i])
        )
        source = f"example {example}"
        if dataset.train_files:
            source = html.escape(dataset.train_files[example])
        labels = f"<s>{given}</s> → <b>{suggested}</b>" if suggested != given else given
        tiles.append(
            f'<li><img alt="{source}: {given}" '
            f'src="data:image/png;base64,{_png(pixels, dataset.max_value)}">'
            f"<p>{labels}</p><small>{source}<br>score {means.score[i]:.2f}</small></li>"
        )
    above = int((means.score > 0).sum())
    file.write_text(
        _PAGE.format(
            title=html.escape(title),
            summary=f"The {count:,} most suspicious of {len(means.score):,} training examples; "
            f"{above:,} have a score above 0.",
            tiles="\n".join(tiles),
        ),
        encoding="utf-8",
    )


def _png(pixels: np.ndarray, max_value: int) -> str:
    """An image, uint8 [h, w, c], as a PNG in base64."""
    bright = (pixels.astype(np.float32) * (255 / max_value)).round().astype(np.uint8)
    image = Image.fromarray(bright[..., 0] if bright.shape[-1] == 1 else bright)
    image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))  # never larger than it is
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --quiet: #595959; --line: #d0d0d0; --card: #f6f6f6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --quiet: #a8a8a8; --line: #404040; --card: #1f1f1f; }}
}}
body {{ font: 16px/1.4 system-ui, sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem; }}
h1 {{ font-size: 1.4rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }}
header p {{ color: var(--quiet); margin: 0 0 1rem; max-width: 60rem; }}
ol {{ display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr));
  list-style: none; margin: 0; padding: 0; }}
li {{ background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  overflow-wrap: anywhere; padding: .6rem; }}
img {{ aspect-ratio: 1; background: #000; display: block; image-rendering: pixelated;
  object-fit: contain; width: 100%; }}
li p {{ margin: .5rem 0 .2rem; }}
s, small {{ color: var(--quiet); }}
</style>
<header>
<h1>{title}</h1>
<p>{summary} Struck through: the given label; then the label that the network suggests. The score is
by how much, over all epochs, the logit of the best other label was above that of the given one.</p>
</header>
<ol>
{tiles}
</ol>
</html>
"""

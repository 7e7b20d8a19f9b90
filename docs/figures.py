"""Compares the figures that pages state with the JSON files of the results.

``python docs/figures.py`` writes `docs/suspects.txt`, the table of rankings.
"""

import functools
import json
import pathlib
import re
import statistics
from typing import Any

_DOCS = pathlib.Path(__file__).parent
SUSPECTS = _DOCS / "suspects.txt"
_RANKINGS = {
    "coherent": "suspects of a run by coherent steps",
    "bilevel": "by eq. (10)",
    "sgd": "the same score, SGD",
    "training_loss": "loss after SGD",
    "cleanlab_sgd_100": "cleanlab",
    "cleanlab_sgd_20": "cleanlab, 20 epochs",
}
_WITH_SPREAD = re.compile(r"\d+\.\d(?: ± \d+\.\d)?(?: \(\d+\.\d\))|\d+\.\d ± \d+\.\d")


def index() -> None:
    """What the front page says of the demo."""
    methods, page = _load("demo.json")["methods"], " ".join(_page("index.md").split())
    for method in ("sgd", "bilevel", "coherent"):
        for name in ("test_last", "stopped"):
            mean, spread = (methods[method][f"{name}_{what}"] for what in ("mean", "std"))
            assert f"{mean:.1f} ± {spread:.1f}" in page, (method, name)


def suspects() -> None:
    """The table of rankings, and what the page says of every seed."""
    assert SUSPECTS.read_text(encoding="utf-8") == suspects_table(), "run python docs/figures.py"
    for case, seeds in _load("suspects.json")["cases"].items():
        for seed in seeds.values():
            for name in ("sgd", "training_loss", "cleanlab_sgd_100"):
                assert seed["bilevel"]["auc"] >= seed[name]["auc"], (case, name)
            for name in ("training_loss", "cleanlab_sgd_100"):
                assert seed["coherent"]["auc"] >= seed[name]["auc"], (case, name)


def suspects_table() -> str:
    """Area under the ROC curve / precision of rankings, means over seeds, in Markdown."""
    rows = [["", *_RANKINGS.values()], ["---"] * (1 + len(_RANKINGS))]
    for case, seeds in _load("suspects.json")["cases"].items():
        data, noise = case.replace("fashion_mnist", "Fashion-MNIST").split("/")
        *kind, rate = noise.split("_")
        rows.append([f"{data}, {rate}% {' '.join(kind)}"])
        for name in _RANKINGS:
            rows[-1].append(
                " / ".join(
                    f"{statistics.mean(seed[name][figure] for seed in seeds.values()):.1f}"
                    for figure in ("auc", "precision")
                )
            )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def results() -> None:
    """What the page of results says of coherent steps; of the paper's rule `paper` sees to it."""
    page = _page("results.md")
    _coherent_steps(page, list(_load("steps.json").values()))
    assert len(_load("suspects.json")["cases"]) == 6  # of which `suspects` has checked each


def practice() -> None:
    """What the page of results says of ELR and the others, and of CleanLearning."""
    from train.experiments import practice as study

    page, table = _page("results.md"), _load("practice.json")
    mean = statistics.mean
    gains = study.gains(table, "coherent", "sgd_random")
    alone = study.gains(table, "coherent", "elr")
    elr, gce, mixup = (
        study.gains(table, "coherent_elr", rival) for rival in ("elr", "gce", "mixup")
    )
    above = sum(gain >= 0 for gain in gains)
    _states(page, f"in {above} of {len(gains)} cases; {mean(gains):.1f} points in the mean")
    _states(page, f"end {mean(gains):.1f} points above SGD stopped in time in the mean of the")
    _states(page, f"noisy cases, and at most {-min(gains):.1f} below")
    _states(page, f"ELR stopped in time is {-mean(alone):.1f} points above them in the mean")
    stopped = study.gains(table, "coherent_elr", "elr", at="stopped")
    _states(
        page,
        f"{mean(elr):.1f} points above ELR stopped in time, in the mean; "
        f"{mean(stopped):.1f} if stopped, too",
    )
    (near, of), (near_elr, _) = (study.near_first(table, x) for x in ("coherent_elr", "elr"))
    _states(
        page,
        f"Stopped, too, they are first, or within the first's deviation, in {near} of {of} cases, "
        f"ELR in {near_elr}",
    )
    _states(
        page,
        f"end {mean(elr):.1f} points above ELR stopped in time, {mean(gce):.1f} above GCE and "
        f"{mean(mixup):.1f} above mixup, at most {-min(elr + gce + mixup):.1f} below any",
    )
    readme = (_DOCS.parent / "README.md").read_text(encoding="utf-8")
    _states(readme, f"Take both: on average {mean(elr):.1f} points above ELR stopped in time")
    steps = [case for case in _load("steps.json").values() if not case["case"]["rate"]]
    pairs = [
        *((case["coherent"], case["plain"]) for case in steps),
        *((rows["coherent"], rows["sgd_random"]) for rows in study.clean_cases(table)),
    ]
    fine = sum(coherent["last"]["mean"] > sgd["last"]["mean"] - 0.5 for coherent, sgd in pairs)
    _states(page, f"{fine} of {len(pairs)} cases end within half a point")
    clean = [
        round(table[f"fashion-noise0/{method}"]["last"]["mean"], 1)
        for method in ("coherent", "sgd_random")
    ]
    _states(page, f"{clean[0]} stand beside {clean[1]}")
    bilevel, sgd, uniform = (
        f"{table[f'inception-noise50/{method}']['last']['mean']:.1f}"
        for method in ("bilevel", "sgd_random", "uniform")
    )
    _states(page, f"| in part | {bilevel}, SGD {sgd}, but {uniform} without weights |")
    appendix = _page("appendix_paper.md")
    _states(appendix, f"SGD ends at {sgd}, eq. (10) at {bilevel}.")
    _states(appendix, f"ends at {uniform}.")
    rows = _load("cleaning.json").values()
    above = [row["clean"]["test"]["mean"] - row["cleanlearning"]["test"]["mean"] for row in rows]
    better = sum(gain >= 0 for gain in above)
    _states(
        page,
        f"| holds | in {better} of {len(rows)} cases; in the seventh {-min(above):.1f} below |",
    )


def paper() -> None:
    """What the page of results and the appendix say of the paper's rule."""
    page = _page("results.md")
    _of_arms(page[page.index("## The paper's rule") :] + _page("appendix_paper.md"))


def _of_arms(text: str) -> None:
    known = set()
    for run in _load("summary.json").values():
        last = f"{run['test_last_mean']:.1f}"
        both = f"{last} ± {run['test_last_std']:.1f}"
        best = f"({run['test_best_mean']:.1f})"
        train = f"{run['train_noisy_mean']:.1f} ± {run.get('train_noisy_std', 0):.1f}"
        known |= {both, f"{both} {best}", f"{last} {best}", train}
    shown = _WITH_SPREAD.findall(text)
    assert len(shown) > 20, shown
    assert not (unknown := set(shown) - known), unknown


def _coherent_steps(page: str, cases: list[dict[str, Any]]) -> None:
    noisy = [case for case in cases if case["case"]["rate"]]
    clean = [case for case in cases if not case["case"]["rate"]]
    for what, words in (
        ("last", "In {} of {} cases with wrong labels"),
        ("stopped", "in {} of {} cases at least what held-out labels stop SGD at"),
        ("best", "in {} of the {} it is at least the best epoch"),
    ):
        count = sum(_last(case) >= _plain(case, what) for case in noisy)
        _states(page, words.format(count, len(noisy)))
    worst = min(clean, key=lambda case: _last(case) - _plain(case, "last"))
    _states(page, f"{_last(worst)} where plain training ends at {_plain(worst, 'last')}")


def _last(case: dict[str, Any]) -> float:
    return round(case["coherent"]["last"]["mean"], 1)


def _plain(case: dict[str, Any], what: str) -> float:
    return round(case["plain"][what]["mean"], 1)


def _states(page: str, words: str) -> None:
    assert words in " ".join(page.split()), f"the page does not say: {words}"


@functools.cache
def _load(name: str) -> dict[str, Any]:
    return json.loads((_DOCS / "results" / name).read_text(encoding="utf-8"))


def _page(name: str) -> str:
    return (_DOCS / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    SUSPECTS.write_text(suspects_table(), encoding="utf-8")

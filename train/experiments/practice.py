"""Against what people do today: a held-out part, ELR, GCE, mixup; with and without batch norm.

    python -m train experiment practice --scale laptop
    python -m train experiment practice --scale paper

Not in the paper. Every method trains on the same nine tenths of the images, and the given labels of
the held-out tenth pick its epoch (the column "stopped"). Plain SGD and all that changes its loss
take random batches of 64, the paper's rule and its control as many examples in mini-batches of the
same labels.

Scale laptop: digits and 4,000 or 10,000 images of Fashion-MNIST, an MLP; 2,000 images, CifarNet
without its dropout and the small residual network with batch norm; 600 images, the small Inception
and PreActResNet-18. Labels wrong by 0 to 80%, to the next class, or made by a network, whose errors
depend on the image. ``--only`` takes some arms, ``--dry-run`` tells the hours.

Scale paper, for a GPU: CIFAR-10 and CIFAR-100, PreActResNet-18 and ResNet-50, batches of 128, 120
epochs, learning rate 0.02, ÷ 10 at half and at three quarters, weight decay 1e-3, as ELR and PES
train.

Once some arms are finished, `python -m train.experiments.practice` writes
``docs/results/practice.json``, CASE/METHOD -> {last, stopped, best, fitted, seconds: {mean, std}},
and the tables of ``practice.md`` from it; rows whose runs are not here stay as they are.
"""

import dataclasses
import json
import pathlib
import statistics
from typing import Any

from train import arms
from train.config import Config
from train.experiments import table4
from train.experiments.common import (
    CIFARNET,
    LAPTOP,
    LAPTOP_CIFARNET,
    LAPTOP_INCEPTION,
    Arm,
    Experiment,
    Panel,
    Scale,
    noisy,
)

# Plain SGD is what the paper's authors ran: random batches.
METHODS: dict[str, dict[str, Any]] = {
    "sgd_random": {"method": "sgd", "sampling": "random"},
    "uniform": {"method": "uniform"},
    "bilevel": {"method": "bilevel"},
    "bilevel_k32": {"method": "bilevel"},
    "label_smoothing": {"method": "label_smoothing", "sampling": "random"},
    "bootstrapping": {"method": "bootstrapping", "sampling": "random"},
    "mixup": {"method": "mixup", "sampling": "random"},
    "gce": {"method": "gce", "sampling": "random"},
    "elr": {"method": "elr", "sampling": "random"},
    "coherent": {"method": "coherent"},
    "coherent_mixup": {"method": "coherent_mixup"},
    "coherent_elr": {"method": "coherent_elr"},
}
FEW = ("sgd_random", "uniform", "bilevel", "mixup", "elr", "coherent", "coherent_elr")
"""What is tried where a run takes minutes."""

_MLP = dataclasses.replace(LAPTOP, held_out=0.1)
_DIGITS = dataclasses.replace(
    _MLP, dataset="digits", train_size=None, hidden=(256, 256), augmentation="standardize",
    epochs=100, decay=0.98,
)  # fmt: skip
_CIFARNET = dataclasses.replace(LAPTOP_CIFARNET, held_out=0.1, train_size=2000, epochs=40)
_RESNET = dataclasses.replace(
    _MLP, network="resnet_small", hidden=None, train_size=2000, test_size=2000, learning_rate=0.05,
    epochs=30,
)  # fmt: skip
_INCEPTION = dataclasses.replace(LAPTOP_INCEPTION, held_out=0.1, train_size=600, epochs=40)
_PREACT = dataclasses.replace(_RESNET, network="preact_resnet18", train_size=600, epochs=20)
_PAPER = dataclasses.replace(
    CIFARNET, held_out=0.1, network="preact_resnet18", augmentation="preactresnet", epochs=120,
    learning_rate=0.02, schedule="steps", weight_decay=1e-3,
)  # fmt: skip
TEACHER = dataclasses.replace(
    LAPTOP, held_out=0.0, method="sgd", sampling="random", dropout_rate=0.748, epochs=5
)


def _pair_flip(base: Config) -> Config:
    return dataclasses.replace(base, noise="pair_flip", noise_rate=0.4)


@dataclasses.dataclass(frozen=True)
class Case:
    """Data, network and noise.

    Attributes:
        title: heads its table.
        config: all but the method.
        methods: that it compares.
        by_teacher: whether the labels are those of the arm `teacher`.
    """

    title: str
    config: Config
    methods: tuple[str, ...] = tuple(METHODS)
    by_teacher: bool = False


def _cases(scale: Scale) -> dict[str, Case]:
    if scale == "paper":
        return {
            f"{dataset}-{network}-{name}": Case(
                f"{dataset.replace('cifar', 'CIFAR-')}, {network}, {words}",
                change(dataclasses.replace(_PAPER, dataset=dataset, network=network)),
            )
            for dataset in ("cifar10", "cifar100")
            for network in ("preact_resnet18", "resnet50")
            for name, words, change in (
                ("clean", "clean labels", lambda base: base),
                ("noise20", "20% wrong", lambda base: noisy(base, 0.2)),
                ("noise50", "50% wrong", lambda base: noisy(base, 0.5)),
                ("noise80", "80% wrong", lambda base: noisy(base, 0.8)),
                ("pair40", "40% one class further", _pair_flip),
            )
        }
    fashion = "Fashion-MNIST, {:,} images, {}, {}".format
    cases = {}
    for data, base, title in (
        ("fashion", _MLP, "Fashion-MNIST, 4,000 images, MLP"),
        ("digits", _DIGITS, "digits, MLP"),
    ):
        for percent in (50, 0, 20, 80):
            words = f"{percent}% wrong" if percent else "clean labels"
            cases[f"{data}-noise{percent}"] = Case(f"{title}, {words}", noisy(base, percent / 100))
        cases[f"{data}-pair40"] = Case(f"{title}, 40% one class further", _pair_flip(base))
    cases["fashion-network40"] = Case(
        fashion(4000, "MLP", "40% wrong by a network"), _MLP, by_teacher=True
    )
    cases["fashion10000-noise50"] = Case(
        fashion(10_000, "MLP", "50% wrong"),
        noisy(dataclasses.replace(_MLP, train_size=10_000), 0.5),
    )
    for name, base, title in (
        ("resnet", _RESNET, "small residual network"),
        ("cifarnet", _CIFARNET, "CifarNet"),
    ):
        for percent in (50, 0):
            words = f"{percent}% wrong" if percent else "clean labels"
            cases[f"{name}-noise{percent}"] = Case(
                fashion(2000, title, words), noisy(base, percent / 100), FEW
            )
    cases["inception-noise50"] = Case(
        fashion(600, "small Inception", "50% wrong"),
        noisy(_INCEPTION, 0.5),
        ("sgd_random", "uniform", "bilevel", "coherent"),
    )
    cases["preact-noise50"] = Case(
        fashion(600, "PreActResNet-18", "50% wrong"), noisy(_PREACT, 0.5), FEW
    )
    return cases


def _arms(scale: Scale) -> list[Arm]:
    result = []
    for name, case in _cases(scale).items():
        panel = Panel(case.title)
        for method in case.methods:
            changes = METHODS[method]
            if method == "bilevel_k32":
                changes = {**changes, "k": 32, "b": case.config.k * case.config.b // 32}
            arm = Arm(
                f"{name}-{method}", dataclasses.replace(case.config, **changes), panel, method
            )
            if case.by_teacher:
                arm = dataclasses.replace(arm, after="teacher", inputs=table4.labels_of)
            result.append(arm)
    if scale == "laptop":
        panel = Panel("Fashion-MNIST, MLP, the network that labels")
        result.insert(0, Arm("teacher", TEACHER, panel, "sgd_random"))
    return result


EXPERIMENT = Experiment(
    "practice", "What practice does: a held-out part, ELR, GCE, mixup", __doc__, _arms
)


# ------------------------------------------------------------------------------- the tables

_SHOWN = {
    "Fashion-MNIST, 4,000 images, MLP": {
        "fashion-noise0": "clean",
        "fashion-noise20": "20% wrong",
        "fashion-noise50": "50% wrong",
        "fashion-noise80": "80% wrong",
        "fashion-pair40": "40% one class further",
        "fashion-network40": "40% by a network",
        "fashion10000-noise50": "10,000 images, 50% wrong",
    },
    "digits, MLP": {
        "digits-noise0": "clean",
        "digits-noise20": "20% wrong",
        "digits-noise50": "50% wrong",
        "digits-noise80": "80% wrong",
        "digits-pair40": "40% one class further",
    },
    "Fashion-MNIST, 2,000 images, convolutions": {
        "resnet-noise0": "small residual network, clean",
        "resnet-noise50": "50% wrong",
        "cifarnet-noise0": "CifarNet, clean",
        "cifarnet-noise50": "50% wrong",
    },
    "Fashion-MNIST, 600 images, convolutions, 50% wrong": {
        "inception-noise50": "small Inception",
        "preact-noise50": "PreActResNet-18",
    },
}
"""Tables of the overview: heading -> CASE -> heading of its column."""

FIGURES = {
    "last": "test_last",
    "stopped": "stopped",
    "best": "test_best",
    "fitted": "train_noisy",
    "seconds": "seconds",
}


def collect(root: pathlib.Path, scale: Scale = "laptop") -> dict[str, Any]:
    """The figures of the finished runs below `root`, as ``practice.json`` has them."""
    from train.experiments import runner

    choice = runner.Choice(EXPERIMENT, scale, root)
    table: dict[str, Any] = {}
    for arm in choice.arms():
        finished = runner.outcomes(choice, arm)
        if not finished or arm.label == "teacher":
            continue
        results = [result for result, _ in finished.values()]
        figures = arms.rounded(results, FIGURES.values())
        case = arm.label.removesuffix(f"-{arm.series}")
        table[f"{case}/{arm.series}"] = {
            "title": arm.panel.title,
            **{name: figures[figure] for name, figure in FIGURES.items()},
            "seeds": list(finished),
            "command": choice.command(arm, tuple(finished)),
        }
    return table


def merged(known: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The rows of both, those that are found in place of those that are known, in order."""
    rows = [f"{name}/{x}" for name, case in _cases("laptop").items() for x in case.methods]
    return arms.merged(known, found, rows)


def markdown(table: dict[str, Any]) -> str:
    """A table for every case; test accuracy in percent, the highest last and stopped in bold."""
    lines = []
    for rows in _by_case(table).values():
        lines += [
            f"## {next(iter(rows.values()))['title']}",
            "",
            "| method | last epoch | stopped | best epoch | given labels fitted | seconds of SGD's "
            "| seeds |",
            "|---|---|---|---|---|---|---|",
        ]
        top = {x: max(row[x]["mean"] for row in rows.values()) for x in ("last", "stopped")}
        base = rows.get("sgd_random", {}).get("seconds", {}).get("mean")
        for method, row in rows.items():
            cells = []
            for name in ("last", "stopped", "best", "fitted"):
                cell = arms.cell(row[name], len(row["seeds"]))
                cells.append(f"**{cell}**" if row[name]["mean"] == top.get(name) else cell)
            cells.append(f"{row['seconds']['mean'] / base:.1f}" if base else "")
            lines.append(f"| {label(method)} | {' | '.join(cells)} | {len(row['seeds'])} |")
        lines.append("")
    return "\n".join(lines)


def overview(table: dict[str, Any], cases: dict[str, str]) -> str:
    """Test accuracy of some cases in one table, "last epoch (stopped)"; the highest in bold.

    Args:
        table: as `collect` gives it.
        cases: CASE -> heading of its column.
    """
    methods = [m for m in METHODS if any(f"{case}/{m}" in table for case in cases)]
    top = {
        case: max(
            table[f"{case}/{m}"][x]["mean"]
            for m in methods
            if f"{case}/{m}" in table
            for x in ("last", "stopped")
        )
        for case in cases
    }

    def cell(case: str, method: str) -> str:
        row = table.get(f"{case}/{method}")
        if row is None:
            return ""
        last, stopped = (
            f"**{row[x]['mean']:.1f}**" if row[x]["mean"] == top[case] else f"{row[x]['mean']:.1f}"
            for x in ("last", "stopped")
        )
        return f"{last} ({stopped})"

    lines = [f"| | {' | '.join(cases.values())} |", "|---" * (1 + len(cases)) + "|"]
    for method in methods:
        cells = " | ".join(cell(case, method) for case in cases)
        lines.append(f"| {label(method)} | {cells} |")
    return "\n".join(lines) + "\n"


def label(method: str) -> str:
    """What tables call a method."""
    from train.plots import STYLES

    return "bilevel, k = 32" if method == "bilevel_k32" else STYLES.get(method, (method,))[0]


def gains(table: dict[str, Any], method: str, rival: str, at: str = "last") -> list[float]:
    """By how much a method, `at` which epoch, is above a rival stopped in time, by noisy case."""
    return [
        rows[method][at]["mean"] - rows[rival]["stopped"]["mean"]
        for case, rows in _by_case(table).items()
        if method in rows and rival in rows and _is_noisy(case)
    ]


def _by_case(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """CASE -> METHOD -> row."""
    cases: dict[str, dict[str, Any]] = {}
    for name, row in table.items():
        case, method = name.split("/")
        cases.setdefault(case, {})[method] = row
    return cases


def clean_cases(table: dict[str, Any]) -> list[dict[str, Any]]:
    """METHOD -> row, of every case with clean labels."""
    return [rows for case, rows in _by_case(table).items() if not _is_noisy(case)]


def _is_noisy(case: str) -> bool:
    return not case.endswith(("noise0", "clean"))


def near_first(table: dict[str, Any], method: str) -> tuple[int, int]:
    """In how many noisy cases a method is first or within the first's deviation, and of how many.

    Every method's epoch is picked by the held-out labels.
    """
    near = []
    for case, rows in _by_case(table).items():
        if method in rows and _is_noisy(case):
            stopped = {name: row["stopped"] for name, row in rows.items()}
            top = max(stopped.values(), key=lambda figure: figure["mean"])
            near.append(stopped[method]["mean"] >= top["mean"] - top["std"])
    return sum(near), len(near)


def main() -> None:
    """Writes what is finished; rows whose runs are elsewhere stay as they are."""
    from train.experiments import runner

    out = pathlib.Path("docs/results")
    file = out / "practice.json"
    table = merged(json.loads(file.read_text(encoding="utf-8")), collect(runner.ROOT))
    file.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (out / "practice.md").write_text(markdown(table))
    parts = []
    for title, cases in _SHOWN.items():
        shown = {case: words for case, words in cases.items() if f"{case}/coherent" in table}
        if shown:
            parts.append(f"{title}:\n\n{overview(table, shown)}")
    (out / "practice_overview.md").write_text("\n".join(parts))
    if each := gains(table, "coherent", "sgd_random"):
        print(f"coherent, last, over SGD, stopped: {statistics.fmean(each):+.1f} in the mean")
    for method in METHODS:
        near, of = near_first(table, method)
        print(f"{method}: first, or within the first's deviation, in {near} of {of} noisy cases")


if __name__ == "__main__":
    main()

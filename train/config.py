"""What a run is: every choice, typed, with its default; the command line is made from this."""

import dataclasses
import hashlib
import json
import math
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from train import augment, data, methods, noise, optimizers

Help = tyro.conf.arg


AUTO = "auto"


class ConfigError(ValueError):
    """A choice that does not exist or does not fit the others; the message lists the right ones."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The choices of one run. Two runs of the same config end in the same bits."""

    dataset: Annotated[str, Help(help=f"data set: {', '.join(data.NAMES)}")] = "digits"
    data_dir: Annotated[
        str | None, Help(help="where the data are, if not in the default place")
    ] = None
    image_size: Annotated[
        int | None, Help(help="side in pixels that images of different sizes are brought to")
    ] = None
    train_size: Annotated[int | None, Help(help="train on this many examples, a fixed choice")] = (
        None
    )
    test_size: Annotated[
        int | None, Help(help="measure on this many test images, a fixed choice")
    ] = None
    labels: Annotated[
        str | None,
        Help(help="a CSV file of labels (file,label[,split]) that correct those of the data set"),
    ] = None
    bad_files: Annotated[
        Literal["error", "skip"],
        Help(help="of a folder: stop where files cannot be read, or leave them out and count them"),
    ] = "error"
    held_out: Annotated[
        float,
        Help(
            help="share of each class that is never trained on: it chooses the best epoch, and "
            "judges the steps of `coherent`; 0: none"
        ),
    ] = 0.1
    network: Annotated[
        str,
        Help(help="one of `python -m train models`; auto: chosen by the size of the images"),
    ] = AUTO
    pretrained: Annotated[
        str | None,
        Help(
            help="start from the network of this run; resnet50 also from torchvision's .safetensors"
        ),
    ] = None
    hidden: Annotated[tuple[int, ...] | None, Help(help="widths of the hidden layers of `mlp`")] = (
        None
    )
    augmentation: Annotated[str, Help(help=f"one of {', '.join(augment.PRESETS)}")] = "none"

    method: Annotated[str, Help(help=f"one of {', '.join(methods.NAMES)}")] = "coherent"
    k: Annotated[int, Help(help="mini-batches per step, the validation mini-batch included")] = 8
    b: Annotated[int, Help(help="examples per mini-batch")] = 8
    lam: Annotated[float, Help(help="λ̂ of eq. (10)")] = 1.0
    mu: Annotated[float, Help(help="μ̂ of eq. (10)")] = 0.01
    num_validation: Annotated[int, Help(help="how many of the k are validation mini-batches")] = 1
    normalize: Annotated[bool, Help(help="divide ω by its L1 norm (off: ablation a)")] = True
    nonnegative: Annotated[bool, Help(help="clip ω at zero")] = False
    groups: Annotated[
        Literal["all", "layer", "leaf"],
        Help(help="one ω for all, per layer (ablation b), per leaf"),
    ] = "all"
    form: Annotated[
        Literal["auto", "streaming", "stacked", "multi_steps", "collective"],
        Help(help="which form of the rule computes the update; auto chooses and says so"),
    ] = "auto"
    smoothing: Annotated[float, Help(help="ε of label_smoothing")] = 0.1
    mixup_alpha: Annotated[float, Help(help="α of mixup and bilevel_mixup")] = 1.0
    bootstrap: Annotated[
        Literal["hard", "soft"],
        Help(help="whether bootstrapping takes the predicted class, or its probabilities"),
    ] = "hard"
    bootstrap_beta: Annotated[
        float | None, Help(help="β, weight of the given label; none: 0.8 for hard, 0.95 for soft")
    ] = None
    channel_noise: Annotated[
        float, Help(help="share of noise that the channel of noise_layer starts from")
    ] = 0.3
    loss_percentile: Annotated[
        float, Help(help="percentile of the losses that mentornet compares with")
    ] = 75.0
    group_norm: Annotated[float, Help(help="λ of azadi's regularizer")] = 10.0
    gce_q: Annotated[float, Help(help="q of gce, above 0; 1: mean absolute error")] = 0.7
    elr_beta: Annotated[float, Help(help="β of elr: what stays of an example's target")] = 0.7
    elr_lambda: Annotated[float, Help(help="λ of elr: weight of its regularizer")] = 3.0
    sampling: Annotated[
        Literal["auto", "stratified", "random"],
        Help(
            help="identical label distributions in the k mini-batches, or not (ablation c); auto: "
            "random for `coherent`, stratified for the others"
        ),
    ] = "auto"
    validation_ratio: Annotated[
        float, Help(help="share of the training set kept for validation only; 0: none is")
    ] = 0.0
    clean_validation: Annotated[
        bool, Help(help="the validation mini-batches have true labels (with validation_ratio)")
    ] = False

    noise: Annotated[
        str, Help(help="label noise: none, symmetric, uniform, pair_flip, or an .npz file")
    ] = "none"
    noise_rate: Annotated[float, Help(help="share of the training labels it touches")] = 0.5
    pixels: Annotated[
        Literal["natural", "random", "shuffled"],
        Help(help="permute pixels: differently in each image, or alike in all"),
    ] = "natural"

    epochs: Annotated[int, Help(help="passes over the training set")] = 100
    optimizer: Annotated[str, Help(help=f"one of {', '.join(optimizers.NAMES)}")] = "sgd"
    learning_rate: Annotated[
        float | None,
        Help(
            help="initial learning rate; none: "
            + ", ".join(f"{rate:g} ({name})" for name, rate in optimizers.RATES.items())
        ),
    ] = None
    schedule: Annotated[
        Literal["constant", "exponential", "steps", "linear"],
        Help(help="exponential: × decay an epoch; steps: ÷ 10 at 1/2 and 3/4; linear: to 0"),
    ] = "exponential"
    decay: Annotated[float, Help(help="factor per epoch of the exponential schedule")] = 0.95
    momentum: Annotated[float, Help(help="of SGD, not Nesterov")] = 0.9
    weight_decay: Annotated[
        float,
        Help(
            help="on kernels, after the reweighting; of "
            f"{', '.join(optimizers.DECOUPLED)} apart from the gradient, else added to it"
        ),
    ] = 0.0
    clip_norm: Annotated[float | None, Help(help="clip the reweighted gradient's norm")] = None
    dropout_rate: Annotated[float | None, Help(help="probability of dropping; none: network's")] = (
        None
    )
    dropout_masks: Annotated[
        Literal["shared", "independent"],
        Help(help="across the k mini-batches (independent: ablation d)"),
    ] = "shared"
    batch_statistics: Annotated[
        Literal["mean", "training", "validation"],
        Help(help="whose batch statistics enter the running averages: all k, T's, or V's"),
    ] = "mean"
    example_alignment: Annotated[
        bool,
        Help(
            help="add up every example's alignment with the momentum, for `suspects`; costs two or "
            "three more forward passes a step"
        ),
    ] = False
    dtype: Annotated[Literal["float32", "bfloat16"], Help(help="compute dtype")] = "float32"
    seed: Annotated[int, Help(help="of weights, noise, sampling and dropout")] = 0

    def __post_init__(self):
        """Raises ConfigError naming the field and the right values, before anything is loaded."""
        import models

        _one_of("dataset", self.dataset, data.NAMES)
        _one_of("network", self.network, (AUTO, *models.names()))
        _one_of("optimizer", self.optimizer, optimizers.NAMES)
        _one_of("method", self.method, methods.NAMES)
        _one_of("augmentation", self.augmentation, augment.PRESETS)
        if not self.noise.endswith(".npz"):
            _one_of("noise", self.noise, noise.KINDS, "or a path that ends in .npz")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                _one_of(name, getattr(self, name), get_args(kind))
        for name, low, high in (
            ("k", 2, None), ("b", 1, None), ("epochs", 1, None), ("seed", 0, None),
            ("noise_rate", 0, 1), ("validation_ratio", 0, 0.9), ("momentum", 0, 1),
            ("train_size", 1, None), ("test_size", 1, None), ("image_size", 1, None),
            ("weight_decay", 0, None), ("bootstrap_beta", 0, 1), ("loss_percentile", 0, 100),
            ("group_norm", 0, None), ("held_out", 0, 0.5), ("elr_beta", 0, 1),
            ("elr_lambda", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value <= (math.inf if high is None else high):
                bound = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ConfigError(f"{name} must be {bound}, got {value}")
        for name in (
            "lam",
            "mu",
            "learning_rate",
            "decay",
            "clip_norm",
            "mixup_alpha",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {value}")
        for name in ("smoothing", "dropout_rate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} must be from 0 to below 1, got {value}")
        if not 0 < self.gce_q <= 1:
            raise ConfigError(f"gce_q must be above 0 and at most 1, got {self.gce_q}")
        if not 0 < self.channel_noise < 1:
            raise ConfigError(f"channel_noise must be between 0 and 1, got {self.channel_noise}")
        if any(width < 1 for width in self.hidden or ()):
            raise ConfigError(f"hidden must be widths of at least 1, got {self.hidden}")
        if not 1 <= self.num_validation < self.k:
            raise ConfigError(
                f"num_validation must be from 1 to k - 1 = {self.k - 1}, got {self.num_validation}"
            )
        if self.judged:
            for name, value, right in (
                ("num_validation", self.num_validation, 1),
                ("validation_ratio", self.validation_ratio, 0.0),
            ):
                if value != right:
                    raise ConfigError(
                        f"{name} is for bilevel methods; with {self.method} all k train"
                    )
            if self.batch_statistics == "validation":
                raise ConfigError(
                    f"batch_statistics = validation: with {self.method} all k train; known: mean, "
                    "training"
                )
        if self.judged and not self.held_out:
            raise ConfigError(
                f"method {self.method} judges its steps by a held-out part of the data: give "
                "held_out 0.1 or another share, or take another method"
            )
        if self.hidden is not None and self.network not in (AUTO, "mlp"):
            raise ConfigError(f"hidden is for the network mlp, not {self.network}")
        if self.weights_file and self.network not in (AUTO, "resnet50"):
            raise ConfigError(
                f"weights in .safetensors are for the network resnet50, not {self.network}"
            )
        if self.momentum != Config.momentum and self.optimizer != "sgd":
            raise ConfigError(f"momentum is for the optimizer sgd, not {self.optimizer}")
        if self.example_alignment and not optimizers.moves_on(self):
            raise ConfigError(
                "example_alignment needs an optimizer with momentum: "
                f"{', '.join(optimizers.MOMENTUM)}, or the method coherent"
            )
        if self.validation_ratio and self.order == "random":
            raise ConfigError("validation_ratio needs sampling = stratified, not random")
        if self.clean_validation and not self.validation_ratio:
            raise ConfigError("clean_validation needs a validation_ratio above 0")
        methods.check_form(self.method, self.form)

    @property
    def judged(self) -> bool:
        """Whether held-out examples judge the steps, so that all k mini-batches train."""
        return self.method.startswith("coherent")

    @property
    def num_validation_batches(self) -> int:
        """How many of the k mini-batches are not trained on."""
        return 0 if self.judged else self.num_validation

    @property
    def order(self) -> str:
        """The sampling that is meant: "stratified" or "random"."""
        if self.sampling == AUTO:
            return "random" if self.judged else "stratified"
        return self.sampling

    @property
    def weights_file(self) -> str | None:
        """The file that `pretrained` names, where it does not name a run."""
        file = self.pretrained or ""
        return file if file.endswith(".safetensors") else None

    def to_json(self) -> dict[str, Any]:
        """The fields, as `json` writes them."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Config":
        """The inverse of `to_json`."""
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"the config has fields unknown here: {', '.join(sorted(unknown))}")
        hidden = fields.get("hidden")
        return cls(**{**fields, "hidden": None if hidden is None else tuple(hidden)})

    def flags(self) -> list[str]:
        """The options of ``python -m train run`` that differ from the defaults."""
        return flags(self)

    def digest(self) -> str:
        """Eight characters that tell configs apart."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def flags(choices: Any) -> list[str]:
    """The options of a command that differ from their defaults; what has none is left out."""
    options = []
    for field in dataclasses.fields(choices):
        value = getattr(choices, field.name)
        name = field.name.replace("_", "-")
        if field.default in (value, dataclasses.MISSING):
            continue
        if isinstance(value, bool):
            options.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            options += [f"--{name}", *map(str, value)]
        else:
            options += [f"--{name}", str(value)]
    return options


def _one_of(name: str, value: str, known: Any, more: str = "") -> None:
    if value not in known:
        tail = f" {more}" if more else ""
        raise ConfigError(f"unknown {name} {value!r}; known: {', '.join(known)}{tail}")

import dataclasses
import json
import typing
from typing import Any

import pytest

import models
from train import augment, data, methods, noise, optimizers
from train.config import Config, ConfigError

CHOICES = {
    "dataset": data.NAMES,
    "network": ("auto", *models.names()),
    "optimizer": optimizers.NAMES,
    "bad_files": ("error", "skip"),
    "method": methods.NAMES,
    "augmentation": augment.PRESETS,
    "noise": noise.KINDS,
    "groups": ("all", "layer", "leaf"),
    "form": ("auto", "streaming", "stacked", "multi_steps", "collective"),
    "bootstrap": ("hard", "soft"),
    "sampling": ("auto", "stratified", "random"),
    "pixels": ("natural", "random", "shuffled"),
    "schedule": ("constant", "exponential", "steps", "linear"),
    "dropout_masks": ("shared", "independent"),
    "batch_statistics": ("mean", "training", "validation"),
    "dtype": ("float32", "bfloat16"),
}


def made(**choices: Any) -> Config:
    return Config(**choices)


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_names_the_field_and_lists_the_known_ones(name):
    with pytest.raises(ConfigError) as error:
        made(**{name: "nonesuch"})
    message = str(error.value)
    assert message.startswith(f"unknown {name} 'nonesuch'; known: {', '.join(CHOICES[name])}")


@pytest.mark.parametrize("name", CHOICES)
def test_every_known_choice_is_taken(name):
    for choice in CHOICES[name]:
        assert getattr(made(**{"method": "bilevel", name: choice}), name) == choice


def test_the_choices_above_are_all_there_are():
    """A string field that is missing above would escape these tests."""
    kinds = typing.get_type_hints(Config)
    chosen = {
        n for n, kind in kinds.items() if kind is str or typing.get_origin(kind) is typing.Literal
    }
    assert chosen == set(CHOICES)


def test_noise_may_be_a_file():
    assert Config(noise="some/where.npz").noise == "some/where.npz"
    with pytest.raises(ConfigError, match=r"or a path that ends in \.npz"):
        Config(noise="some/where.csv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 1}, "k must be at least 2, got 1"),
        ({"b": 0}, "b must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"train_size": 0}, "train_size must be at least 1, got 0"),
        ({"noise_rate": 1.5}, "noise_rate must be from 0 to 1, got 1.5"),
        ({"noise_rate": -0.1}, "noise_rate must be from 0 to 1, got -0.1"),
        ({"noise_rate": float("nan")}, "noise_rate must be from 0 to 1, got nan"),
        ({"validation_ratio": 0.95}, "validation_ratio must be from 0 to 0.9, got 0.95"),
        ({"momentum": 1.1}, "momentum must be from 0 to 1, got 1.1"),
        ({"weight_decay": -1e-4}, "weight_decay must be at least 0, got -0.0001"),
        ({"lam": 0.0}, "lam must be positive and finite, got 0.0"),
        ({"mu": -0.01}, "mu must be positive and finite, got -0.01"),
        ({"mu": float("inf")}, "mu must be positive and finite, got inf"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"decay": 0.0}, "decay must be positive and finite, got 0.0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive and finite, got 0.0"),
        ({"smoothing": 1.0}, "smoothing must be from 0 to below 1, got 1.0"),
        ({"mixup_alpha": 0.0}, "mixup_alpha must be positive and finite, got 0.0"),
        ({"bootstrap_beta": 1.1}, "bootstrap_beta must be from 0 to 1, got 1.1"),
        ({"channel_noise": 0.0}, "channel_noise must be between 0 and 1, got 0.0"),
        ({"loss_percentile": 101.0}, "loss_percentile must be from 0 to 100, got 101.0"),
        ({"group_norm": -1.0}, "group_norm must be at least 0, got -1.0"),
        ({"gce_q": 0.0}, "gce_q must be above 0 and at most 1, got 0.0"),
        ({"elr_beta": 1.5}, "elr_beta must be from 0 to 1, got 1.5"),
        ({"elr_lambda": -1.0}, "elr_lambda must be at least 0, got -1.0"),
        (
            {"method": "coherent_elr", "held_out": 0.0},
            "method coherent_elr judges its steps by a held-out part of the data: give held_out "
            "0.1 or another share, or take another method",
        ),
        ({"dropout_rate": 1.0}, "dropout_rate must be from 0 to below 1, got 1.0"),
        ({"hidden": (16, 0)}, "hidden must be widths of at least 1, got (16, 0)"),
        ({"num_validation": 0}, "num_validation must be from 1 to k - 1 = 7, got 0"),
        ({"held_out": -0.1}, "held_out must be from 0 to 0.5, got -0.1"),
        ({"held_out": 0.6}, "held_out must be from 0 to 0.5, got 0.6"),
        (
            {"method": "coherent", "held_out": 0.0},
            "method coherent judges its steps by a held-out part of the data: give held_out 0.1 "
            "or another share, or take another method",
        ),
        (
            {"method": "coherent", "num_validation": 2},
            "num_validation is for bilevel methods; with coherent all k train",
        ),
        (
            {"method": "coherent", "validation_ratio": 0.1},
            "validation_ratio is for bilevel methods; with coherent all k train",
        ),
        (
            {"method": "coherent", "batch_statistics": "validation"},
            "batch_statistics = validation: with coherent all k train; known: mean, training",
        ),
        (
            {"optimizer": "adamw", "momentum": 0.5},
            "momentum is for the optimizer sgd, not adamw",
        ),
        (
            {"method": "sgd", "optimizer": "rmsprop", "example_alignment": True},
            "example_alignment needs an optimizer with momentum: sgd, adam, adamw, nadamw, lion, "
            "or the method coherent",
        ),
        ({"k": 4, "num_validation": 4}, "num_validation must be from 1 to k - 1 = 3, got 4"),
        (
            {"network": "cifarnet", "hidden": (8,)},
            "hidden is for the network mlp, not cifarnet",
        ),
        (
            {"pretrained": "w.safetensors", "network": "mlp"},
            "weights in .safetensors are for the network resnet50, not mlp",
        ),
        ({"clean_validation": True}, "clean_validation needs a validation_ratio above 0"),
        (
            {"method": "bilevel", "validation_ratio": 0.1, "sampling": "random"},
            "validation_ratio needs sampling = stratified, not random",
        ),
    ],
)
def test_values_out_of_range_or_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError) as error:
        Config(**changes)
    assert str(error.value) == message


def test_values_at_the_ends_of_their_ranges_are_taken():
    Config(k=2, b=1, epochs=1, noise_rate=0.0, momentum=0.0, weight_decay=0.0, dropout_rate=0.0)
    Config(method="bilevel", validation_ratio=0.9, noise_rate=1.0, k=3, num_validation=2, hidden=())


# Something else than the default in every field; what must go with it comes after.
OTHER: dict[str, Any] = {
    "dataset": "mnist", "data_dir": "somewhere", "image_size": 9, "train_size": 7, "test_size": 8,
    "network": "cifarnet", "hidden": (3, 4), "augmentation": "inception", "method": "uniform",
    "k": 9, "b": 9, "labels": "labels.csv", "bad_files": "skip", "held_out": 0.2,
    "optimizer": "adamw",
    "lam": 2.0, "mu": 0.02, "num_validation": 2, "normalize": False, "nonnegative": True,
    "smoothing": 0.2, "mixup_alpha": 0.4, "bootstrap": "soft", "bootstrap_beta": 0.9,
    "channel_noise": 0.1, "loss_percentile": 50.0, "group_norm": 1.0,
    "gce_q": 0.5, "elr_beta": 0.9, "elr_lambda": 7.0,
    "groups": "leaf", "form": "stacked", "sampling": "random", "validation_ratio": 0.1,
    "noise": "uniform", "noise_rate": 0.4, "pixels": "random", "epochs": 101,
    "learning_rate": 0.1, "schedule": "steps", "decay": 0.9, "momentum": 0.8,
    "weight_decay": 1e-4, "clip_norm": 1.0, "dropout_rate": 0.1, "dropout_masks": "independent",
    "batch_statistics": "training", "example_alignment": True, "dtype": "bfloat16", "seed": 1,
}  # fmt: skip


def others() -> dict[str, Config]:
    of_the_rule = {
        name: Config(method="bilevel", **{name: OTHER[name]})
        for name in ("num_validation", "form", "validation_ratio")
    }
    configs = {
        name: of_the_rule.get(name) or made(**{name: value}) for name, value in OTHER.items()
    }
    configs["pretrained"] = Config(network="resnet50", pretrained="w.safetensors")
    configs["clean_validation"] = Config(
        method="bilevel", validation_ratio=0.1, clean_validation=True
    )
    return configs


def test_json_round_trip_of_every_field():
    configs = others()
    assert set(configs) == {field.name for field in dataclasses.fields(Config)}
    for name, config in configs.items():
        assert getattr(config, name) != getattr(Config(), name)
        read = Config.from_json(json.loads(json.dumps(config.to_json())))
        assert read == config
        assert type(getattr(read, name)) is type(getattr(config, name))


def test_the_digest_differs_in_every_field_and_is_the_same_for_the_same_choices():
    digests = {config.digest() for config in others().values()}
    assert len(digests | {Config().digest()}) == len(dataclasses.fields(Config)) + 1
    assert all(len(digest) == 8 for digest in digests)
    assert Config(hidden=(3, 4)).digest() == Config(hidden=(3, 4)).digest()


def test_fields_of_another_version_are_named():
    with pytest.raises(ConfigError, match="fields unknown here: colour, size"):
        Config.from_json({"size": 1, "colour": 2, "k": 4})


def test_json_is_checked_too():
    with pytest.raises(ConfigError, match="unknown method 'adam'"):
        Config.from_json({"method": "adam"})


def test_every_field_has_help():
    for name, kind in typing.get_type_hints(Config, include_extras=True).items():
        texts = [part.help for part in getattr(kind, "__metadata__", ()) if hasattr(part, "help")]
        assert any(texts), name

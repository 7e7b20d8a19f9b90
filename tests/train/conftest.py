"""How the tests of training compile, and what those of data sets share."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

from tests.train.known import some


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly() -> Iterator[None]:
    """XLA optimizes what runs a few times here; processes of their own, as the demo, it does."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def publisher(monkeypatch):
    """Makes TFDS believe that our archives are those of the publisher of a data set."""
    pytest.importorskip("tensorflow")
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import checksums

    def believe(name):
        infos = some(tfds.builder_cls(name).url_infos)
        registered = {info.filename: info for info in infos.values()}
        monkeypatch.setattr(
            checksums, "compute_url_info", lambda path: registered[pathlib.Path(path).name]
        )

    return believe

"""How the tests of training compile, and what those of data sets share."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

from tests.train.known import some


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """What runs a few times is not worth optimizing; a module whose `LONG` is true runs long."""
    before = jax.config.read("jax_disable_most_optimizations")
    quickly = not getattr(request.module, "LONG", False)
    jax.config.update("jax_disable_most_optimizations", quickly)
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

"""Checkpoints of a run, by Orbax: written atomically and in the background, the latest n kept."""

import logging
import pathlib
import re
import shutil
import warnings
import zlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from train import distributed

PyTree = Any

# Orbax logs every save and restore, and a failed one in hundreds of lines; what matters is said
# here.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class CheckpointError(OSError):
    """The state of a run cannot be kept; the message says what to do."""


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: pathlib.Path, keep: int = 2, *, read_only: bool = False):
        """Opens `directory`, creating it if need be.

        Args:
            directory: the folder of the checkpoints, and of nothing else.
            keep: how many checkpoints stay, the latest ones.
            read_only: change nothing in the folder, which another process may be writing to.

        Raises:
            ValueError: if `keep` is not positive.
        """
        if keep < 1:
            raise ValueError(f"keep must be at least 1 checkpoint, got {keep}")
        self._directory = directory.absolute()
        self._read_only = read_only
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers=ocp.StandardCheckpointHandler(),  # which tells the stored shapes
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,  # left by a kill in the middle of a save
            ),
        )
        self._saved = -1
        self._failure: Exception | None = None

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        """Waits for the save under way, but not for other processes when this one has failed."""
        if kind is not None and jax.process_count() > 1:
            return
        self._finish()
        self._manager.close()

    def save(self, step: int, state: PyTree, *, wait: bool = False) -> None:
        """Saves `state` under `step`; in the background unless `wait`.

        A save that fails, for want of disk space for instance, is a warning: the run goes on and
        the checkpoints before it stay. Among several processes, which all call this, it is an
        error, for the others would wait.
        """
        self._finish()  # its failure would otherwise be taken for one of this save
        if step == self._saved:
            return
        named = _named(state)
        named[_CHECKSUM] = _checksum(named)
        self._saved, self._failure = step, None
        try:
            self._manager.save(step, args=ocp.args.StandardSave(named), force=True)
        except Exception as error:  # whatever a full disk makes Orbax raise
            self._failed(error)
        if wait:
            self._finish()

    def _finish(self) -> None:
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # likewise
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if jax.process_count() > 1:
            raise error
        self._failure = error
        for left in self._directory.glob(f"{self._saved}{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        kept = "the one before it is kept" if self._manager.all_steps() else "and there is no other"
        warnings.warn(
            f"checkpoint of step {self._saved} not written, {kept}: {_in_a_line(error)}",
            stacklevel=4,
        )
        self._saved = -1

    def restore(self, like: PyTree) -> PyTree | None:
        """The newest checkpoint that can be read, or None.

        Warns of damaged ones and, unless the folder is open for reading only, moves them out of
        it, beside it, as ``damaged-checkpoint-STEP``.

        Args:
            like: a state of the same structure, shapes, dtypes and shardings, arrays or abstract.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                named = self._read(step, abstract)
            except Exception as error:  # whatever a damaged file makes Orbax raise
                warnings.warn(
                    f"checkpoint of step {step} cannot be read, trying the one before it: "
                    f"{_in_a_line(error)}",
                    stacklevel=2,
                )
                if not self._read_only:
                    self._set_aside(step)
                continue
            self._saved = step
            return jax.tree.unflatten(jax.tree.structure(like), list(named.values()))
        return None

    def _read(self, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
        """The leaves of a checkpoint, by name; fails if they are not what was saved."""
        wanted = {**abstract, _CHECKSUM: np.zeros((), np.uint32)}
        named = dict(self._manager.restore(step, args=ocp.args.StandardRestore(wanted)))
        if named.pop(_CHECKSUM) != _checksum(named):
            raise ValueError("its checksum is wrong")
        return named

    def confirm(self, step: int, like: PyTree) -> None:
        """Makes sure that the checkpoint of this step can be read back.

        Raises:
            CheckpointError: if it was not written, or cannot be read.
        """
        self._finish()
        error = self._failure
        if error is None:
            # Into this host's memory: the devices may have no room for the state twice.
            in_host = {
                name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
                for name, leaf in _named(like).items()
            }
            try:
                self._read(step, in_host)
            except Exception as failure:  # whatever a damaged file makes Orbax raise
                error = failure
                self._set_aside(step)
        if error is not None:
            steps = self._manager.all_steps()
            after = f"step {max(steps)}" if steps else "the beginning"
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be kept in {self._directory} "
                f"({_in_a_line(error)}); make space and start the same command again, which then "
                f"goes on from {after}"
            ) from error

    def _set_aside(self, step: int) -> None:
        if distributed.writes():
            aside = self._directory.parent / f"damaged-checkpoint-{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        distributed.wait("set aside")
        self._manager.reload()


_CHECKSUM = "checksum"


def _checksum(named: dict[str, Any]) -> np.ndarray:
    """CRC-32 of all values: Orbax itself does not notice a flipped bit in an array."""
    value = 0
    for leaf in named.values():
        value = zlib.crc32(_whole(leaf).tobytes(), value)
    return np.array(value, np.uint32)


def _whole(leaf: Any) -> np.ndarray:
    """A leaf in this host's memory, the parts that other processes hold included."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        assert isinstance(leaf.sharding, NamedSharding)
        everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        leaf = jax.jit(lambda x: x, out_shardings=everywhere)(leaf)
    return np.asarray(leaf)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _named(state: PyTree) -> dict[str, Any]:
    """The leaves by the names of their places, in leaf order."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        f"{i:04d}{re.sub(r'[^0-9A-Za-z]+', '_', jax.tree_util.keystr(path))}": leaf
        for i, (path, leaf) in enumerate(leaves)
    }

"""Checkpoints of a run, by Orbax: written atomically and in the background, the latest n kept."""

import logging
import pathlib
import re
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp

PyTree = Any

# Orbax logs each save and restore at this level; what matters is said here.
logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        """Opens `directory`, creating it if need be; of older checkpoints `keep` stay."""
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(keep), create=True
            ),
        )
        self._saved = -1

    def __enter__(self) -> "Checkpoints":
        """Returns itself."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Waits for the save under way."""
        try:
            self._manager.close()
        except Exception as error:  # a failed background save must not hide what ended the run
            warnings.warn(f"the last checkpoint was not written: {error}", stacklevel=2)

    def save(self, step: int, state: PyTree, *, wait: bool = False) -> None:
        """Saves `state` under `step`; in the background unless `wait`.

        A save that fails, for want of disk space for instance, is a warning: the run goes on and
        the checkpoints before it stay.
        """
        if step == self._saved:
            return
        try:
            self._manager.save(step, args=ocp.args.StandardSave(_named(state)), force=True)
            if wait:
                self._manager.wait_until_finished()
            self._saved = step
        except (OSError, ValueError, RuntimeError) as error:
            warnings.warn(
                f"checkpoint of step {step} not written, the one before it is kept: {error}",
                stacklevel=2,
            )

    def restore(self, like: PyTree) -> PyTree | None:
        """The newest checkpoint that can be read, or None; warns of damaged ones.

        Args:
            like: a state of the same structure, shapes, dtypes and shardings.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                named = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except Exception as error:  # whatever a damaged file makes Orbax raise
                warnings.warn(
                    f"checkpoint of step {step} cannot be read, trying the one before it: "
                    f"{str(error).splitlines()[0]}",
                    stacklevel=2,
                )
                self._manager.delete(step)
                continue
            self._saved = step
            return jax.tree.unflatten(jax.tree.structure(like), list(named.values()))
        return None


def _named(state: PyTree) -> dict[str, jax.Array]:
    """The leaves by the names of their places, in leaf order."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        f"{i:04d}{re.sub(r'[^0-9A-Za-z]+', '_', jax.tree_util.keystr(path))}": leaf
        for i, (path, leaf) in enumerate(leaves)
    }

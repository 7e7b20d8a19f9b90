import errno
import gc
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.train import tiny
from tests.train.known import some
from train.checkpoints import CheckpointError, Checkpoints


def state(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "params": [jax.random.normal(keys[0], (300, 7)), jax.random.normal(keys[1], (5,))],
        "half": jax.random.normal(keys[2], (4, 4), jnp.bfloat16),
        "step": jnp.int32(seed),
        "empty": (),
    }


def like():
    return jax.tree.map(jnp.zeros_like, state())


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with the checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), wait=True)
    return folder


@pytest.fixture
def copied(two, tmp_path):
    return pathlib.Path(shutil.copytree(two, tmp_path / "checkpoints"))


def restored(folder, **options):
    with Checkpoints(folder, **options) as checkpoints:
        return checkpoints.restore(like())


def test_a_state_comes_back_bit_by_bit(two):
    result = restored(two)
    tiny.assert_same_bits(result, state(2))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(result))


def test_there_is_nothing_in_a_new_folder(tmp_path):
    assert restored(tmp_path / "new") is None


@pytest.mark.parametrize("keep", [1, 3])
def test_the_latest_stay(tmp_path, keep):
    with Checkpoints(tmp_path, keep) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, state(step))
    assert steps(tmp_path) == list(range(6 - keep, 6))


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1 checkpoint, got 0"):
        Checkpoints(tmp_path, 0)


def test_a_background_save_is_of_the_state_as_it_was(tmp_path):
    """The next step overwrites the buffers, which it is given, while the save goes on."""
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 9, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        current = {"x": jax.random.normal(jax.random.key(0), (300_000,)), "n": jnp.int32(3)}
        expected = jax.tree.map(lambda x: np.array(x, copy=True), current)
        checkpoints.save(1, current)
        for _ in range(5):
            current = overwrite(current)
    with Checkpoints(tmp_path) as checkpoints:
        result = checkpoints.restore(jax.tree.map(jnp.zeros_like, current))
    tiny.assert_same_bits(result, expected)


# ------------------------------------------------------------------------------------- damage

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "removed": lambda path: path.unlink(),
}

# Reading that fails leaves coroutines of Orbax's and callbacks of TensorStore's behind.
_leftovers = pytest.mark.filterwarnings(
    "ignore:.*was never awaited:RuntimeWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)


@pytest.fixture
def _collected():
    """They are collected in the test that made them, not in one that comes later."""
    yield
    gc.collect()


def damaged(test):
    return _leftovers(pytest.mark.usefixtures("_collected")(test))


def flipped(content):
    """One bit is different, in the middle."""
    content = bytearray(content)
    content[len(content) // 2] ^= 0x10
    return bytes(content)


def array_file(folder, step):
    """The largest file of a checkpoint: the one with the arrays."""
    files = [path for path in (folder / str(step)).rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@damaged
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(copied, damage):
    DAMAGES[damage](array_file(copied, 2))
    with pytest.warns(UserWarning, match="checkpoint of step 2 cannot be read, trying the one bef"):
        result = restored(copied)
    tiny.assert_same_bits(result, state(1))
    assert steps(copied) == [1]
    assert (copied.parent / "damaged-checkpoint-2").is_dir()


@damaged
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_values_are_right(two, tmp_path, damage):
    names = [path.relative_to(two) for path in sorted((two / "2").rglob("*")) if path.is_file()]
    assert len(names) > 5
    fallen_back = 0
    for i, name in enumerate(names):
        if damage == "flipped" and not (two / name).stat().st_size:
            continue
        folder = pathlib.Path(shutil.copytree(two, tmp_path / str(i) / "checkpoints"))
        DAMAGES[damage](folder / name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            result = restored(folder)
        assert result is not None, name
        tiny.assert_same_bits(result, state(int(result["step"])))
        fallen_back += int(result["step"]) == 1
    assert fallen_back >= 2


@damaged
def test_after_a_fall_back_the_step_can_be_saved_again(copied):
    DAMAGES["truncated"](array_file(copied, 2))
    with Checkpoints(copied, keep=1) as checkpoints:
        with pytest.warns(UserWarning, match="step 2 cannot be read"):
            checkpoints.restore(like())
        checkpoints.save(2, state(5), wait=True)
    assert steps(copied) == [2]
    tiny.assert_same_bits(restored(copied), state(5))


@damaged
def test_if_all_are_damaged_there_is_none_and_nothing_is_lost(copied):
    for step in (1, 2):
        DAMAGES["truncated"](array_file(copied, step))
    with pytest.warns(UserWarning, match="step [12] cannot be read") as warned:
        assert restored(copied) is None
    assert len([w for w in warned if "cannot be read" in str(w.message)]) == 2
    names = sorted(path.name for path in copied.parent.iterdir())
    assert names == ["checkpoints", "damaged-checkpoint-1", "damaged-checkpoint-2"]


@damaged
def test_a_state_of_another_structure_does_not_delete_checkpoints(copied):
    other = {**like(), "more": jnp.zeros(3)}
    with (
        Checkpoints(copied, read_only=True) as checkpoints,
        pytest.warns(UserWarning, match="cannot be read"),
    ):
        assert checkpoints.restore(other) is None
    assert steps(copied) == [1, 2]
    tiny.assert_same_bits(restored(copied), state(2))


@damaged
def test_reading_only_changes_nothing(copied):
    DAMAGES["flipped"](array_file(copied, 2))
    (copied / "3.orbax-checkpoint-tmp").mkdir()  # as while another process saves
    before = sorted(copied.parent.rglob("*"))
    with pytest.warns(UserWarning, match="its checksum is wrong"):
        tiny.assert_same_bits(restored(copied, read_only=True), state(1))
    assert sorted(copied.parent.rglob("*")) == before


def test_what_a_kill_in_the_middle_of_a_save_leaves_is_cleaned_up(copied):
    left = copied / "3.orbax-checkpoint-tmp"
    (left / "default").mkdir(parents=True)
    with Checkpoints(copied) as checkpoints:
        assert int(some(checkpoints.restore(like()))["step"]) == 2
        checkpoints.save(4, state(4))
    assert not left.exists()
    assert steps(copied) == [2, 4]


# ---------------------------------------------------------------------------------- full disk


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_is_a_warning(copied, monkeypatch):
    message = "checkpoint of step 3 not written, the one before it is kept: OSError.*No space left"
    with Checkpoints(copied) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(ocp.CheckpointManager, "save", full)
            with pytest.warns(UserWarning, match=message):
                checkpoints.save(3, state(3))
        assert steps(copied) == [1, 2]
        checkpoints.save(4, state(4))
    assert steps(copied) == [2, 4]


def test_a_save_that_fails_in_the_background_is_told_of_the_right_step(copied, monkeypatch):
    wait = ocp.CheckpointManager.wait_until_finished

    def fail(manager):
        wait(manager)
        monkeypatch.undo()
        full()

    with Checkpoints(copied) as checkpoints:
        checkpoints.save(3, state(3))
        monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", fail)
        with pytest.warns(UserWarning, match="checkpoint of step 3 not written") as warned:
            checkpoints.save(4, state(4))
        assert len(warned) == 1
    tiny.assert_same_bits(restored(copied), state(4))


FILE_SIZE_LIMIT = """
import pathlib, resource, sys, warnings
import jax, jax.numpy as jnp
from train.checkpoints import Checkpoints
folder = pathlib.Path(sys.argv[1])
big = {"x": jax.random.normal(jax.random.key(0), (100_000,))}
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, big, wait=True)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        checkpoints.save(2, big)
        checkpoints.save(3, big, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        checkpoints.save(4, jax.tree.map(lambda x: 2 * x, big))
    for w in warned:
        if issubclass(w.category, UserWarning):
            print(str(w.message)[:30])
    with Checkpoints(folder) as checkpoints:
        print(bool((checkpoints.restore(big)["x"] == 2 * big["x"]).all()))
print(sorted(path.name for path in folder.iterdir()))
"""


def test_a_disk_that_really_takes_no_more(tmp_path):
    """No file may grow beyond 50 kB, which the writing threads in TensorStore run into."""
    done = subprocess.run(
        [sys.executable, "-c", FILE_SIZE_LIMIT, str(tmp_path)],
        capture_output=True, text=True, timeout=120, cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "checkpoint of step 2 not writt",
        "checkpoint of step 3 not writt",
        "True",
        "['1', '4']",
    ]


@damaged
def test_what_can_be_read_back_is_confirmed_and_what_cannot_is_an_error(copied):
    with Checkpoints(copied) as checkpoints:
        checkpoints.save(3, state(3))
        checkpoints.confirm(3, like())
        checkpoints.save(4, state(4), wait=True)
        DAMAGES["flipped"](array_file(copied, 4))
        message = r"step 4 cannot be kept .*make space .* goes on from step 3"
        with pytest.raises(CheckpointError, match=message):
            checkpoints.confirm(4, like())
    tiny.assert_same_bits(restored(copied), state(3))


def test_what_was_not_written_is_not_confirmed(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.warns(UserWarning, match="step 1 not written, and there is no other"):
            checkpoints.save(1, state(1))
        with pytest.raises(CheckpointError, match=r"No space left.* goes on from the beginning"):
            checkpoints.confirm(1, like())

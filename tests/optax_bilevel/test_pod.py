"""Traffic of data-parallel steps, compiled for a TPU pod that nobody here has."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import traffic

LIBTPU = pathlib.Path(os.environ.get("LIBTPU_DIR", pathlib.Path(sys.prefix, "tpu")))
ROOT = pathlib.Path(__file__).parents[2]


@functools.cache
def texts():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(LIBTPU)]),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so that two processes may do this
    }
    # The fake CPU devices of the other tests have no place here.
    environment.pop("XLA_FLAGS", None)
    result = subprocess.run(
        [sys.executable, pathlib.Path(__file__).with_name("pod_step.py")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


needs_libtpu = pytest.mark.skipif(
    not os.environ.get("REQUIRE_PODS")  # whoever says that pods are tested wants no skip
    and not (LIBTPU / "libtpu").is_dir()
    and importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make test does that on x86-64 Linux",
)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("solver", ["diagonal", "exact"])
@pytest.mark.parametrize("case", ["even", "odd", "bfloat16", "two axes"])
def test_moves_what_pmean_moves(case, solver):
    ours = traffic.bytes_moved(texts()[case][solver], 16)
    pmean = traffic.bytes_moved(texts()[case]["pmean"], 16)
    assert set(pmean) == {"all-reduce"}
    assert ours["all-to-all"] > 0.4 * pmean["all-reduce"]
    assert sum(ours.values()) <= 1.01 * sum(pmean.values())


@needs_libtpu
@pytest.mark.slow
def test_judging_a_step_adds_a_few_scalars_to_the_traffic():
    plain, ours = (
        sum(traffic.bytes_moved(texts()["training"][name], 16).values())
        for name in ("plain", "coherent")
    )
    assert plain > 4 * 784 * 500
    assert ours <= 1.002 * plain


def test_bytes_moved_counts_ring_traffic():
    text = """
  %a = f32[100]{0} all-reduce(f32[100]{0} %x), replica_groups={{0,1,2,3}}, to_apply=%add
  %b = (bf16[8,4]{1,0}, f32[2]{0}) all-reduce(%y, %z), replica_groups=[1,16]<=[16], to_apply=%add
  %c = f32[16,10]{1,0} all-to-all(f32[16,10]{1,0} %x), dimensions={0}
  %d = f32[160]{0} all-gather(f32[10]{0} %x), dimensions={0}
  %e = (f32[10]{0}, f32[160]{0}) all-gather-start(f32[10]{0} %x), dimensions={0}
  %f = f32[160]{0} all-gather-done(%e)
  %g = f32[10]{0} reduce-scatter(f32[160]{0} %x), dimensions={0}
  %i = f32[10]{0} all-gather(f32[5]{0} %x), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  %h = f32[5]{0} add(f32[5]{0} %x, f32[5]{0} %x)
"""
    moved = traffic.bytes_moved(text, 16)
    assert moved == {
        "all-reduce": 2 * 3 / 4 * 400 + 2 * 15 / 16 * (64 + 8),
        "all-to-all": 15 / 16 * 640,
        "all-gather": 2 * 15 / 16 * 640 + 1 / 2 * 40,
        "reduce-scatter": 15 * 40,
    }

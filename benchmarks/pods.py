"""ResNet-50's training step, compiled for TPU pods that nobody here has: traffic and memory.

libtpu compiles ahead of time for a pod's topology on any x86-64 Linux machine. One compilation
takes a core three to nine minutes; each runs in a process of its own, for libtpu wants to be on the
path before JAX starts.
"""

import concurrent.futures
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import traffic
from train import mesh
from train.config import Config
from train.program import build
from train.state import Examples, RawBatch

IMAGES = 1_281_167  # of ImageNet's training split
IMAGES_PER_CHIP = 32


class Pod(NamedTuple):
    """A TPU v5e topology, the mini-batches of a step there, and the training method.

    `sgd` and `coherent` take them as one batch.
    """

    topology: str
    k: int
    method: str = "bilevel"


PODS = {f"v5e_{topology}_k{k}": Pod(topology, k) for topology in ("4x4", "16x16") for k in (8, 32)}
PODS["v5e_4x4_coherent"] = Pod("4x4", 16, "coherent")


def available() -> bool:
    """Whether libtpu is there to compile with."""
    return (libtpu() / "libtpu").is_dir() or importlib.util.find_spec("libtpu") is not None


def libtpu() -> pathlib.Path:
    """Where libtpu is, if not among the installed packages."""
    return pathlib.Path(os.environ.get("LIBTPU_DIR", pathlib.Path(sys.prefix, "tpu")))


def measure(names: Sequence[str], processes: int = 2) -> dict[str, dict[str, Any]]:
    """Figures of a step and of plain data-parallel SGD on the same images, by pod.

    Args:
        names: of `PODS`.
        processes: how many compilations may run at a time.

    Returns:
        For each name ``{"sgd": …, "bilevel": …}``, or the method that it is, as `compile_step`
        gives them, "traffic_vs_sgd" (a ratio of bytes), and "extra_gradients": how many gradients'
        worth of memory per chip the step needs beyond SGD.
    """
    pods = {name: PODS[name] for name in names}
    sgds = {name: Pod(pod.topology, chips(pod.topology), "sgd") for name, pod in pods.items()}
    wanted = dict.fromkeys([*sgds.values(), *pods.values()])
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        compiled = dict(zip(wanted, pool.map(lambda step: _in_process(*step), wanted), strict=True))
    results = {}
    for name, pod in pods.items():
        sgd, step = compiled[sgds[name]], compiled[pod]
        results[name] = {
            "sgd": sgd,
            pod.method: step,
            "traffic_vs_sgd": sum(step["moved"].values()) / sum(sgd["moved"].values()),
            "extra_gradients": (step["memory"] - sgd["memory"]) / sgd["gradient"],
        }
    return results


def chips(topology: str) -> int:
    """How many a topology has."""
    return math.prod(map(int, topology.split("x")))


def _in_process(topology: str, k: int, method: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(libtpu())]),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is used, so that several processes may do this
    }
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.pods", topology, str(k), method],
        capture_output=True,
        text=True,
        env=environment,
        cwd=pathlib.Path(__file__).parents[1],
    )
    if result.returncode:
        raise RuntimeError(f"compiling for v5e:{topology} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def compile_step(topology: str, k: int, method: str) -> dict[str, Any]:
    """Compiles the trainer's step of ResNet-50 on ImageNet, all of it, for a pod.

    From uint8 images of 256×256, with augmentation, batch norm of whole mini-batches, SGD with
    momentum and weight decay, the epoch's sums and the evidence about each example, in float32.
    Every chip has `IMAGES_PER_CHIP` images a step, whatever k: the layouts are `train.mesh`'s.

    Args:
        topology: of TPU v5e, for example "4x4".
        k: mini-batches a step.
        method: of `train.methods`.

    Returns:
        "moved": bytes that each chip sends, by kind of collective; "memory": bytes a chip holds
        while the step runs, arguments and temporaries; "arguments" and "temporary" of these;
        "gradient": bytes of one gradient; "flops" of a chip; "compile_seconds".
    """
    # Forms are chosen by the backend at hand, which is not the one compiled for.
    jax.default_backend = lambda: "tpu"
    devices = topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{topology}").devices
    b = IMAGES_PER_CHIP * len(devices) // k
    config = Config(
        method=method,
        dataset="imagenet2012",
        network="resnet50",
        augmentation="imagenet",
        k=k,
        b=b,
        weight_decay=5e-4,
    )
    layout = mesh.on(devices, k, b)
    program = build(
        config,
        image_shape=(256, 256, 3),
        max_value=255,
        num_classes=1000,
        multi_label=False,
        steps_per_epoch=IMAGES // (k * b),
        layout=layout,
        num_train=IMAGES,
    )
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=layout.replicated)
    state = jax.tree.map(
        lambda x: x.update(sharding=layout.replicated), jax.eval_shape(program.init, key)
    )
    labels = jax.ShapeDtypeStruct((k, b), jnp.int32, sharding=layout.data_sharding(2))
    images = labels.update(shape=(k, b, 256, 256, 3), dtype=jnp.uint8)
    batch = RawBatch(images, labels, labels, labels)
    if program.copies:
        first = (program.copies, b)
        copies = jax.tree.map(
            lambda x: x.update(shape=(*first, *x.shape[2:]), sharding=layout.replicated), batch
        )
        batch = batch._replace(copies=copies)
    if program.judges:
        held_out = labels.update(shape=(program.judges,), sharding=layout.replicated)
        pictures = held_out.update(shape=(program.judges, 256, 256, 3), dtype=jnp.uint8)
        batch = batch._replace(judges=Examples(pictures, held_out))
    started = time.perf_counter()
    compiled = program.step.lower(state, batch, key).compile()
    seconds = time.perf_counter() - started
    memory, text, cost = compiled.memory_analysis(), compiled.as_text(), compiled.cost_analysis()
    arguments = memory.argument_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "moved": traffic.bytes_moved(text, len(devices)),
        "memory": arguments + results + memory.temp_size_in_bytes,
        "arguments": arguments,
        "temporary": memory.temp_size_in_bytes,
        "gradient": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params)),
        "flops": cost["flops"],
        "compile_seconds": seconds,
    }


if __name__ == "__main__":
    print(json.dumps(compile_step(sys.argv[1], int(sys.argv[2]), sys.argv[3])))

"""Bytes that a compiled program moves between devices, read off its text."""

import math
import re

# Bytes each device sends, as a multiple of the instruction's *result*, on a ring of n devices.
_RING = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "collective-permute": lambda n: 1,
}
_INSTRUCTION = re.compile(
    rf"= (?P<result>.*?) (?P<kind>{'|'.join(_RING)})(?P<start>-start)?\((?P<rest>.*)"
)
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


def bytes_moved(text: str, num_devices: int) -> dict[str, float]:
    """Bytes that each device sends, by kind of collective.

    Args:
        text: the compiled program, ``jax.jit(f).lower(...).compile().as_text()``.
        num_devices: how many devices take part where an instruction does not say.
    """
    moved: dict[str, float] = {}
    for line in text.splitlines():
        match = _INSTRUCTION.search(line)
        if match is None:
            continue
        kind = match["kind"]
        arrays = [_size(*array) for array in _ARRAY.findall(match["result"])]
        if match["start"] and kind in ("all-gather", "collective-permute"):
            # The result of a start is (operands, results, contexts).
            operands = len(_ARRAY.findall(match["rest"].partition(")")[0])) or 1
            arrays = arrays[operands : 2 * operands]
        n = _group_size(match["rest"]) or num_devices
        moved[kind] = moved.get(kind, 0.0) + _RING[kind](n) * sum(arrays)
    return moved


def _size(dtype: str, bits: str, shape: str) -> float:
    count = math.prod(int(size) for size in shape.split(",") if size)
    return count * (1 if dtype == "pred" else int(bits) / 8)


def _group_size(attributes: str) -> int | None:
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if iota:
        return int(iota[1])
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)  # jax 0.12
    if named:
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'\w+'", named[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    return listed and len(listed[1].split(","))

#!/usr/bin/env python3
"""Fashion-MNIST through TFDS without a download, from Debian's package.

    apt-get install dataset-fashion-mnist
    python .ci/prepare_fashion_mnist.py DATA_DIR

Debian ships the publisher's four gzip files with the name and the time stamp taken out of their
headers. This puts them back, which gives the bytes whose checksums TFDS has on record, and lets
`train.data.prepare` (hence TFDS's own builder, which verifies them) do the rest. Needs the extra
`prepare`. Exits with status 1 where the package is missing or a checksum differs.
"""

import pathlib
import struct
import sys
import tempfile

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from train import data

PACKAGE = pathlib.Path("/usr/share/datasets/fashion-mnist")
STAMPS = {"train": 1504176606, "t10k": 1504176627}  # 31 August 2017


def with_header(stripped: bytes, name: str, stamp: int) -> bytes:
    """Gives a gzip stream without optional header fields its file name and time stamp back."""
    magic, flags = stripped[:3], stripped[3]
    if magic != b"\x1f\x8b\x08" or flags:
        raise SystemExit(f"{name}.gz: not a gzip stream with a bare header")
    # RFC 1952: magic, flag FNAME, time stamp, no extra flags, Unix, the name
    return magic + struct.pack("<BIBB", 8, stamp, 0, 3) + name.encode() + b"\0" + stripped[10:]


def main() -> None:
    """Prepares the data set into the folder named on the command line, and reads it back."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    if not PACKAGE.is_dir():
        raise SystemExit(f"{PACKAGE} is missing: apt-get install dataset-fashion-mnist")
    with tempfile.TemporaryDirectory() as archives:
        for part, stamp in STAMPS.items():
            for kind in ("images-idx3", "labels-idx1"):
                name = f"{part}-{kind}-ubyte"
                stripped = (PACKAGE / f"{name}.gz").read_bytes()
                restored = with_header(stripped, name, stamp)
                (pathlib.Path(archives) / f"{name}.gz").write_bytes(restored)
        print(data.prepare("fashion_mnist", sys.argv[1], archives))

    prepared = data.load("fashion_mnist", sys.argv[1])
    direct = data.load("fashion_mnist", PACKAGE)
    for split in ("train", "test"):
        # TFDS stores the examples in an order of its own.
        ours, theirs = getattr(prepared, split), getattr(direct, split)
        sums = [
            np.sort(s.images.astype(int).sum((1, 2, 3)) * 10 + s.labels) for s in (ours, theirs)
        ]
        np.testing.assert_array_equal(*sums)
        print(split, ours.images.shape, np.bincount(ours.labels))


if __name__ == "__main__":
    main()

"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): 28 x 28 grey images, read from the official IDX files."""

import gzip
import hashlib
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data.dataset import ArrayDataset, DataError
from engine.data.download import fetch

FOLDER = "fashion-mnist"
SIDE = 28
CLASSES = 10


@dataclass(frozen=True)
class Digests:
    """Of one file: as it is downloaded, and of what is compressed in it, which other copies have in common."""

    md5: str
    content_sha256: str


@dataclass(frozen=True)
class Source:
    """Where the files come from, and how many images each part has."""

    url: str = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    installed: Path = Path("/usr/share/datasets/fashion-mnist")  # by Debian's package dataset-fashion-mnist
    counts: Mapping[str, int] = field(default_factory=lambda: {"train": 60_000, "t10k": 10_000})
    digests: Mapping[str, Digests] = field(
        default_factory=lambda: {
            "train-images-idx3-ubyte.gz": Digests(
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
            ),
            "train-labels-idx1-ubyte.gz": Digests(
                "25c81989df183df01b3e8a0aad5dffbe", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
            ),
            "t10k-images-idx3-ubyte.gz": Digests(
                "bef4ecab320f06d8554ea6380940ec79", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
            ),
            "t10k-labels-idx1-ubyte.gz": Digests(
                "bb300cfdad3c16e7a12a480ee83cd310", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
            ),
        }
    )


def fashion_mnist(root: str | Path, train: bool, *, source: Source = Source()) -> ArrayDataset:
    """Fashion-MNIST: 60,000 or 10,000 images [28, 28, 3] of three equal channels, with labels 0..9.

    Args:
        root: holds `fashion-mnist/` with the `.gz` files; one that neither it nor the system has is downloaded there.
        train: the training images, else the test images.
        source: address, folder of the system, sizes and digests.

    Raises:
        DataError: it cannot be downloaded, or a file is damaged or another one than it should be.
    """
    part = "train" if train else "t10k"
    count, folder = source.counts[part], Path(root) / FOLDER
    _, images = _read(folder, f"{part}-images-idx3-ubyte.gz", (count, SIDE, SIDE), source)
    path, labels = _read(folder, f"{part}-labels-idx1-ubyte.gz", (count,), source)
    if labels.max(initial=0) >= CLASSES:
        raise DataError(f"{path}: labels up to {labels.max()}, expected 0 to {CLASSES - 1}; {_advice(path, folder)}")
    return ArrayDataset(FOLDER if train else f"{FOLDER}-test", images, labels, num_classes=CLASSES)


def _read(folder: Path, name: str, shape: tuple[int, ...], source: Source) -> tuple[Path, np.ndarray]:
    """One file and what it holds, uint8 of this shape, read-only."""
    path, digests = folder / name, source.digests[name]
    if not path.exists():
        system = source.installed / name
        path = system if system.exists() else fetch([source.url + name], path, md5=digests.md5)
    return path, _array(path, shape, digests.content_sha256, _advice(path, folder))


def _array(path: Path, shape: tuple[int, ...], sha256: str, advice: str) -> np.ndarray:
    header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)  # 8: of bytes; the sizes big-endian
    expected = len(header) + int(np.prod(shape))
    try:
        with gzip.open(path) as file:
            raw = file.read(expected + 1)  # to the end, where the checksum stands, or one byte more than there may be
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: no whole gzip file ({error}); {advice}") from error
    if (found := raw[: len(header)]) != header:
        raise DataError(
            f"{path}: begins with {found.hex(' ', -4) or 'nothing'}, expected {header.hex(' ', -4)}, the IDX header of "
            f"uint8 {list(shape)}; {advice}"
        )
    if len(raw) != expected:
        size = f"{len(raw)} bytes" if len(raw) < expected else "more bytes"
        raise DataError(f"{path}: {size} of content, expected {expected}; {advice}")
    if (digest := hashlib.sha256(raw).hexdigest()) != sha256:
        raise DataError(f"{path}: sha256 of the content is {digest}, expected {sha256}; {advice}")
    return np.frombuffer(raw, np.uint8, offset=len(header)).reshape(shape)


def _advice(path: Path, folder: Path) -> str:
    if path.parent == folder:
        return "delete the file so that it is fetched anew"
    return f"install the system's package again, or put the official file into {folder}"

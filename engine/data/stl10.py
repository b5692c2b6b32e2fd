"""STL-10: 96 x 96 images, 100,000 of them without labels, memory-mapped from the official binary files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from engine.data.dataset import ArrayDataset, DataError
from engine.data.download import archive, extract, locked

FOLDER = "stl10_binary"
SIDE = 96
CLASSES = 10


@dataclass(frozen=True)
class Source:
    """The official archive, and how many images each split has."""

    url: str = "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz"
    md5: str = "91f7769df0f17e558f3565bffb0c7dfb"
    counts: Mapping[str, int] = field(default_factory=lambda: {"unlabeled": 100_000, "train": 5_000, "test": 8_000})


def stl10(root: str | Path, split: Literal["train", "bank", "test"], *, source: Source = Source()) -> ArrayDataset:
    """One split as images [N, 96, 96, 3] and labels 0..9.

    Args:
        root: holds `stl10_binary/`, downloaded and unpacked on the first call.
        split: 'train' is the 100,000 images without labels, 'bank' the 5,000 labelled for training, 'test' the 8,000.
        source: address, digest and sizes.

    Raises:
        DataError: it cannot be downloaded, or a file has another size or other labels than it should.
    """
    folder = _prepared(Path(root), source)
    part = {"train": "unlabeled", "bank": "train", "test": "test"}[split]
    count = source.counts[part]
    path = _sized(folder / f"{part}_X.bin", count * 3 * SIDE * SIDE)
    # Each plane is stored column by column: [N, C, W, H].
    images = np.memmap(path, np.uint8, mode="r", shape=(count, 3, SIDE, SIDE)).transpose(0, 3, 2, 1)
    if part == "unlabeled":
        return ArrayDataset("stl10", images, None)
    path = _sized(folder / f"{part}_y.bin", count)
    labels = np.fromfile(path, np.uint8).astype(np.int64) - 1
    if not np.isin(labels, range(CLASSES)).all():
        raise DataError(
            f"{path}: labels from {labels.min() + 1} to {labels.max() + 1}, expected 1 to 10; {_advice(folder)}"
        )
    return ArrayDataset(f"stl10-{split}", images, labels, num_classes=CLASSES)


def _prepared(root: Path, source: Source) -> Path:
    folder = root / FOLDER
    names = {f"{FOLDER}/{name}.bin" for name in ("unlabeled_X", "train_X", "train_y", "test_X", "test_y")}
    if not folder.exists():
        with locked(folder):
            if not folder.exists():
                with archive(root, source.url, md5=source.md5) as path:
                    extract(path, root, FOLDER, lambda name: name in names)
    return folder


def _sized(path: Path, expected: int) -> Path:
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        raise DataError(f"{path}: {found} bytes, expected {expected}; {_advice(path.parent)}")
    return path


def _advice(folder: Path) -> str:
    return f"delete the folder {folder} so that it is prepared again"

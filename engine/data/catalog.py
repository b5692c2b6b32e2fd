"""Datasets by the name they have in a configuration."""

from pathlib import Path
from typing import Literal

import numpy as np

from engine.data.cifar import cifar10, cifar100
from engine.data.dataset import DataError, FileDataset, ImageDataset
from engine.data.folder import open_folder
from engine.data.stl10 import stl10
from engine.data.tiny_imagenet import tiny_imagenet

Split = Literal["train", "bank", "test"]

# Side of the images as they are; for a folder, the customary side to train at.
NATIVE_SIZE = {"cifar10": 32, "cifar100": 32, "stl10": 96, "tiny-imagenet": 64, "folder": 224}

HELD_OUT_EVERY = 10  # of a folder without val/: every tenth image of a class is a kNN query


def open_dataset(dataset: str, root: str | Path, split: Split) -> ImageDataset | None:
    """Opens one split, after a download where there is one to be had.

    Args:
        dataset: a key of NATIVE_SIZE.
        root: the folder of this dataset, or the folder that downloads go to.
        split: 'train' to pre-train on; 'bank', the labelled training images that kNN looks in; 'test', the labelled
            images that it asks for. A folder with classes but without labelled val/ or test/ is split for the two.

    Returns:
        The split; None for 'bank' and 'test' of data without labels.

    Raises:
        DataError: unknown name, or the data is missing, damaged or does not match.
    """
    if dataset not in NATIVE_SIZE or split not in ("train", "bank", "test"):
        raise DataError(
            f"dataset {dataset!r}, split {split!r}: give one of {', '.join(NATIVE_SIZE)}; train, bank or test"
        )
    root = Path(root).expanduser()
    if dataset == "folder":
        return _folder(root, split)
    if dataset == "stl10":
        return stl10(root, split)
    if dataset == "tiny-imagenet":
        return tiny_imagenet(root, split != "test")
    return (cifar10 if dataset == "cifar10" else cifar100)(root, split != "test")


def _folder(root: Path, split: Split) -> FileDataset | None:
    train, val = open_folder(root)
    if split == "train":
        return train
    if train.labels is None:
        return None
    if val is not None:
        return train if split == "bank" else val
    queries = _held_out(train.labels)
    if not queries.any():
        return None
    return train.subset(f"folder-{split}", np.flatnonzero(queries == (split == "test")))


def _held_out(labels: np.ndarray) -> np.ndarray:
    """bool [N]: every tenth image of each class in its order, or the last where there are 2 to 9, none where 1."""
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        chosen = members[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
        held[chosen if len(chosen) else members[1:][-1:]] = True
    return held

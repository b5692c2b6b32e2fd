"""The labelled images and labels that the protocols of an evaluation need; what is missing is found before any work."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

from engine.data.arrays import open_arrays
from engine.data.catalog import Split, open_dataset
from engine.data.class_names import class_map, class_names
from engine.data.dataset import DataError, ImageDataset
from engine.data.human_labels import KINDS, cifar10n
from engine.evaluation_config import EvaluationConfig, LabelledData, OtherData
from engine.label_sets import Labels, class_balanced, pairflip_noise, symmetric_noise

LEFT_OUT = -1  # label of an image whose class the training data do not have


def numbers(seed: int, draw: int, purpose: str) -> np.random.Generator:
    """Random numbers of a draw that depend on what they are for, not on what else is asked."""
    return np.random.default_rng((seed, draw, zlib.crc32(purpose.encode())))


def percent(share: float) -> str:
    """0.125 -> 12.5%: two shares never have one name."""
    return f"{100 * share:.10g}%"


def check(cfg: EvaluationConfig) -> None:
    """Opens everything once: a missing file must not cost the scores, or the training, before it.  Raises DataError."""
    train, test = opened(cfg.data, "bank"), opened(cfg.data, "test")
    if "few" in cfg.protocols:
        for share in cfg.few.shares:
            class_balanced(labels_of(train), share, numbers(0, 0, ""))
    if "noisy" in cfg.protocols:
        human_labels(cfg, labels_of(train))
    for other in cfg.ood if "ood" in cfg.protocols else ():
        translation(cfg, other, test)
    for other in cfg.transfer if "transfer" in cfg.protocols else ():
        opened(other, "bank"), opened(other, "test")


def opened(data: LabelledData | OtherData, split: Split) -> ImageDataset:
    """A split with labels; raises DataError where there is none."""
    if isinstance(data, OtherData) and data.file is not None:
        return open_arrays(data.file)
    assert data.dataset is not None
    found = open_dataset(data.dataset, data.root, split, manifest=data.manifest, shards=data.shards)
    if found is None or found.labels is None:
        raise DataError(f"{data.root}: has no labels, which an evaluation needs")
    return found


def labels_of(dataset: ImageDataset) -> Labels:
    """The labels of a split that was `opened`."""
    assert dataset.labels is not None
    return dataset.labels


def human_labels(cfg: EvaluationConfig, official: Labels) -> dict[str, Labels]:
    """Sets of labels by people, one for each training image; none where no file is given."""
    file = cfg.noisy.human
    if file is None:
        return {}
    if cfg.data.dataset != "cifar10":
        raise DataError(f"noisy.human: {file} labels cifar10's images, and data.dataset is {cfg.data.dataset}")
    return {f"human {kind}": cifar10n(file, kind, official) for kind in KINDS}


def noisy_labels(cfg: EvaluationConfig, clean: Labels, classes: int, draw: int) -> dict[str, Labels]:
    """Sets of labels with noise of every kind and rate."""
    made = {}
    for kind in cfg.noisy.kinds:
        noise = symmetric_noise if kind == "symmetric" else pairflip_noise
        for rate in cfg.noisy.rates:
            name = f"{kind} {percent(rate)}"
            made[name] = noise(clean, rate, classes, numbers(cfg.seed, draw, name))
    return made


def translation(cfg: EvaluationConfig, other: OtherData, ours: ImageDataset) -> tuple[ImageDataset, Tensor]:
    """Other images, and the training data's label of each of their labels, LEFT_OUT where there is none.

    Raises DataError: less than two classes are left, so that there is nothing to choose between, or labels of a file
    that the training data do not have.
    """
    dataset, classes = opened(other, "test"), ours.num_classes
    theirs = np.unique(labels_of(dataset))
    assert classes is not None
    label_of = torch.full((int(theirs.max()) + 1,), LEFT_OUT, dtype=torch.int64)
    if other.dataset is None:
        if theirs.max() >= classes:
            raise DataError(
                f"{other.file}: has label {theirs.max()}, and {cfg.data.dataset} has classes 0 to {classes - 1}; "
                "labels must be those of the training data"
            )
        label_of[theirs] = torch.from_numpy(theirs)
    else:
        shared = class_map(class_names(cfg.data.dataset, ours), class_names(other.dataset, dataset))
        for label in theirs.tolist():
            label_of[label] = shared.get(label, LEFT_OUT)
    left = int((label_of >= 0).sum())
    if left < 2:
        raise DataError(f"ood: {other.name} has images of {left} of the training data's classes; two are the least")
    return dataset, label_of

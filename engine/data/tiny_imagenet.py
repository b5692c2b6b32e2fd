"""Tiny-ImageNet-200: 64 x 64 JPEGs of 200 classes, read from the official folder."""

import os
from pathlib import Path

import numpy as np

from engine.data.dataset import DataError
from engine.data.download import archive, extract, locked
from engine.data.encoded import FileDataset
from engine.data.manifest import facts_of, is_listed, scan, warn_of_rejected

FOLDER = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def tiny_imagenet(
    root: str | Path, train: bool, *, manifest: Path | None = None, url: str = URL, md5: str = MD5
) -> FileDataset:
    """The 100,000 training or 10,000 validation images; a label is the rank of the WordNet id among the sorted ones.

    Args:
        root: holds `tiny-imagenet-200/`, downloaded and unpacked on the first call.
        train: the training images, else the validation images.
        manifest: the file that keeps what the scan found; by default in that folder.
        url, md5: of the official archive.

    Raises:
        DataError: it cannot be downloaded, or a list of classes or annotations does not match the images.
    """
    folder = _prepared(Path(root), url, md5)
    classes = _classes(folder)
    both = _train_entries(folder, classes), _val_entries(folder, classes)
    files = [os.path.relpath(path, folder) for entries in both for path, _ in entries]  # both in one manifest
    records = scan(folder, files, kind="tiny-imagenet", manifest=manifest)
    entries = both[0] if train else both[1]
    records = records[: len(entries)] if train else records[-len(entries) :]
    found = [(path, label, (record, record.images[0])) for (path, label), record in zip(entries, records, strict=True)]
    rejected = [(path, image.problem or "") for path, _, (_, image) in found if not is_listed(image)]
    warn_of_rejected(os.fspath(folder), rejected, len(found))
    usable = [(path, label, image) for path, label, image in found if is_listed(image[1])]
    if not usable:
        raise DataError(f"{rejected[0][0]}: none of the images can be read ({rejected[0][1]}); {_advice(folder)}")
    paths, labels, images = zip(*usable, strict=True)
    name = "tiny-imagenet" if train else "tiny-imagenet-val"
    return FileDataset(name, paths, facts_of(images), np.array(labels, np.int64), classes, rejected=rejected)


def _prepared(root: Path, url: str, md5: str) -> Path:
    folder = root / FOLDER
    if not folder.exists():
        with locked(folder):
            if not folder.exists():
                with archive(root, url, md5=md5) as path:
                    extract(path, root, FOLDER, _wanted)
    return folder


def _wanted(name: str) -> bool:
    """The training and validation images and their lists; not the test images, which have no labels, nor the boxes."""
    if name in (f"{FOLDER}/wnids.txt", f"{FOLDER}/val/val_annotations.txt"):
        return True
    return name.startswith((f"{FOLDER}/train/", f"{FOLDER}/val/")) and name.endswith(".JPEG")


def _classes(folder: Path) -> list[str]:
    listed = sorted(_text(folder / "wnids.txt").split())
    found = sorted(_names(folder / "train"))
    if listed != found:
        odd = sorted(set(listed) ^ set(found)) or listed
        raise DataError(
            f"{folder / 'wnids.txt'}: lists {len(listed)} classes, train/ has {len(found)} (difference: {odd[0]}); "
            f"{_advice(folder)}"
        )
    return listed


def _train_entries(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    entries = []
    for label, wnid in enumerate(classes):
        images = folder / "train" / wnid / "images"
        names = _names(images)
        if not names:
            raise DataError(f"{images}: no images; {_advice(folder)}")
        entries += [(os.path.join(images, name), label) for name in names]
    return entries


def _val_entries(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Lines are `val_0.JPEG<tab>wnid<tab>box`; each names one image, and each image has one."""
    path = folder / "val" / "val_annotations.txt"
    images = folder / "val" / "images"
    unlabelled = set(_names(images))
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    entries = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        name, wnid, *_ = [*line.split("\t"), "", ""]
        if name not in unlabelled:
            raise DataError(
                f"{path}: line {number} names {name!r}, which is not in images/ or named before; {_advice(folder)}"
            )
        if wnid not in label_of:
            raise DataError(f"{path}: line {number} has the class {wnid!r}, which is not in train/; {_advice(folder)}")
        unlabelled.remove(name)
        entries.append((os.path.join(images, name), label_of[wnid]))
    if unlabelled or not entries:
        missing = min(unlabelled, default="none at all")
        raise DataError(f"{path}: {len(unlabelled)} images have no line (first {missing}); {_advice(folder)}")
    return sorted(entries)


def _names(folder: Path) -> list[str]:
    """Names in a folder, sorted, hidden ones left out. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {_advice(folder)}")
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _text(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_advice(path)}")
    return path.read_text()


def _advice(path: Path) -> str:
    parts = path.parts
    top = Path(*parts[: parts.index(FOLDER) + 1])
    return f"delete the folder {top} so that it is prepared again"

"""A user's own images: `root/train` with `root/val` or `root/test`, or just `root`; with class folders or without."""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.dataset import DataError
from engine.data.encoded import FileDataset
from engine.data.manifest import Found, facts_of, is_listed, scan, warn_of_rejected

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

_log = logging.getLogger(__name__)


class Folder(NamedTuple):
    """What a folder holds: its training images, and its validation images where it has a folder of them."""

    train: FileDataset
    val: FileDataset | None


def open_folder(root: str | Path, *, manifest: Path | None = None) -> Folder:
    """Lists the images below `root`, in sorted order; files that are no images are left out and reported once.

    The first time each image is decoded in full, and what is found kept in `manifest`, by default in `root`.

    `root/train` is used where there is one, else all of `root`; beside `train`, `val` or else `test`. The names of the
    first-level folders are the classes, sorted. There are no labels where an image lies at the top level, or where
    there is one first-level folder only, as one class tells nothing. Hidden files and folders are skipped.
    The listing is kept until another folder is opened, so that each split of one run is the same.

    Raises:
        DataError: missing, empty or without a readable image; `val` without `train`, or with a class that it lacks.
    """
    return _list(os.path.abspath(Path(root).expanduser()), manifest)


@functools.lru_cache(maxsize=1)
def _list(root: str, manifest: Path | None) -> Folder:
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; set data.root to the folder of your images")
    train = os.path.join(root, "train")
    held = [os.path.join(root, name) for name in ("val", "test") if os.path.isdir(os.path.join(root, name))]
    if not os.path.isdir(train):
        if held:
            name = os.path.basename(held[0])
            raise DataError(f"{root}: has {name}/ but no train/; move the training images to {train}")
        return Folder(_dataset("folder", root, _scan(root, [root], manifest)[0], None), None)
    found, *found_held = _scan(root, [train, *held[:1]], manifest)
    dataset = _dataset("folder", train, found, None)
    if not held:
        return Folder(dataset, None)
    val = _dataset(f"folder-{os.path.basename(held[0])}", held[0], found_held[0], dataset.classes)
    if dataset.labels is not None and val.labels is None:
        _log.warning("%s has no class folders as train/ has: it is not used", held[0])
        return Folder(dataset, None)
    return Folder(dataset, val)


def _scan(root: str, folders: Sequence[str], manifest: Path | None) -> list[dict[str, Found]]:
    """What was found of the images below each folder, by path."""
    listed = [list(_images(folder, ())) for folder in folders]
    files = [os.path.relpath(path, root) for paths in listed for path in paths]
    records = iter(scan(root, files, kind="folder", manifest=manifest))
    return [{path: ((record := next(records)), record.images[0]) for path in paths} for paths in listed]


def _dataset(name: str, folder: str, found: dict[str, Found], known: Sequence[str] | None) -> FileDataset:
    """The images below one folder, with labels into `known`, or into its own class folders where that is None."""
    usable = {path: (record, image) for path, (record, image) in found.items() if is_listed(image)}
    rejected = [(path, image.problem or "") for path, (_, image) in found.items() if not is_listed(image)]
    if not usable:
        first = f" (first: {rejected[0][0]}: {rejected[0][1]})" if rejected else ""
        raise DataError(
            f"{folder}: no readable image among {len(found)} files ending in "
            f"{' '.join(EXTENSIONS)}{first}; set data.root to the folder of your images"
        )
    warn_of_rejected(folder, rejected, len(found))
    facts = facts_of(list(usable.values()))
    tops = [os.path.relpath(path, folder).split(os.sep) for path in usable]
    own = sorted({parts[0] for parts in tops if len(parts) > 1})
    if min(map(len, tops)) == 1 or (known is None and len(own) < 2):
        return FileDataset(name, list(usable), facts, None, None, rejected=rejected)
    classes = own if known is None else known
    if unknown := sorted(set(own) - set(classes)):
        raise DataError(
            f"{os.path.join(folder, unknown[0])}: a class that train/ lacks ({len(unknown)} such); "
            "give val/ the class folders of train/, or fewer"
        )
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    labels = np.array([label_of[parts[0]] for parts in tops], np.int64)
    return FileDataset(name, list(usable), facts, labels, classes, rejected=rejected)


def _images(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Files with the name of an image, depth first, by name; links are followed, but not in a circle."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable or remove it") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _images(entry.path, (*above, here))
        elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
            yield entry.path  # a link to nothing is listed too, to be reported

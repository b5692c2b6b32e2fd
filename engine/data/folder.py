"""A user's own images: `root/train` with `root/val` or `root/test`, or just `root`; with class folders or without."""

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.dataset import DataError, FileDataset, header_problem

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")

_SCAN_THREADS = 16  # the scan waits for storage more than it computes
_NAMED = 3  # rejected files in the warning

_log = logging.getLogger(__name__)


class Folder(NamedTuple):
    """What a folder holds: its training images, and its validation images where it has a folder of them."""

    train: FileDataset
    val: FileDataset | None


def open_folder(root: str | Path) -> Folder:
    """Lists the images below `root`, in sorted order; files that are no images are left out and reported once.

    `root/train` is used where there is one, else all of `root`; beside `train`, `val` or else `test`. The names of the
    first-level folders are the classes, sorted. There are no labels where an image lies at the top level, or where
    there is one first-level folder only, as one class tells nothing. Hidden files and folders are skipped.
    The listing is kept for the life of the process, so that each split of one run is the same.

    Raises:
        DataError: missing, empty or without a readable image; `val` without `train`, or with a class that it lacks.
    """
    return _list(os.path.abspath(Path(root).expanduser()))


@functools.lru_cache(maxsize=1)
def _list(root: str) -> Folder:
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; set data.root to the folder of your images")
    train = os.path.join(root, "train")
    held = [name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))]
    if not os.path.isdir(train):
        if held:
            raise DataError(f"{root}: has {held[0]}/ but no train/; move the training images to {train}")
        return Folder(_dataset("folder", root, None), None)
    dataset = _dataset("folder", train, None)
    if not held:
        return Folder(dataset, None)
    val = _dataset(f"folder-{held[0]}", os.path.join(root, held[0]), dataset.classes)
    if dataset.labels is not None and val.labels is None:
        _log.warning("%s has no class folders as train/ has: it is not used", os.path.join(root, held[0]))
        return Folder(dataset, None)
    return Folder(dataset, val)


def _dataset(name: str, folder: str, known: Sequence[str] | None) -> FileDataset:
    """The images below one folder, with labels into `known`, or into its own class folders where that is None."""
    listed = list(_images(folder, ()))
    readable, rejected = _scan(listed)
    if not readable:
        first = f" (first: {rejected[0][0]}: {rejected[0][1]})" if rejected else ""
        raise DataError(
            f"{folder}: no readable image among {len(listed)} files ending in "
            f"{' '.join(EXTENSIONS)}{first}; set data.root to the folder of your images"
        )
    if rejected:
        some = "; ".join(f"{os.path.relpath(path, folder)}: {reason}" for path, reason in rejected[:_NAMED])
        _log.warning("%s: left out %d of %d files that are no images (%s)", folder, len(rejected), len(listed), some)
    tops = [os.path.relpath(path, folder).split(os.sep) for path in readable]
    own = sorted({parts[0] for parts in tops if len(parts) > 1})
    if min(map(len, tops)) == 1 or (known is None and len(own) < 2):
        return FileDataset(name, readable, None, None, rejected=rejected)
    classes = own if known is None else known
    if unknown := sorted(set(own) - set(classes)):
        raise DataError(
            f"{os.path.join(folder, unknown[0])}: a class that train/ lacks ({len(unknown)} such); "
            "give val/ the class folders of train/, or fewer"
        )
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    labels = np.array([label_of[parts[0]] for parts in tops], np.int64)
    return FileDataset(name, readable, labels, classes, rejected=rejected)


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


def _scan(paths: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Splits files into those whose header is that of an image, and the others with the reason."""
    with ThreadPoolExecutor(_SCAN_THREADS) as threads:
        problems = list(threads.map(header_problem, paths, chunksize=64))
    readable = [path for path, problem in zip(paths, problems, strict=True) if problem is None]
    rejected = [(path, problem) for path, problem in zip(paths, problems, strict=True) if problem is not None]
    return readable, rejected

"""Images in shards, whatever their format: files that hold many encoded images, read one by one at their place."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.data.dataset import DataError
from engine.data.encoded import EncodedDataset, Facts, Names, Read, read_file
from engine.data.manifest import FileRecord, Located, facts_of, is_listed, scan, warn_of_rejected
from engine.data.shard_files import INDEX, ShardFormat, ShardIndex, check_numbers, find_shards, read_index

_MOST_CLASSES = 1 << 20  # beyond it a label is an identifier, and a name for each would fill the memory

_log = logging.getLogger(__name__)


class Places(NamedTuple):
    """Where N images lie."""

    shards: Names  # paths of the files
    shard: NDArray[np.int32]  # [N] the file of each image
    offsets: NDArray[np.int64]  # [N] where in it the image begins
    keys: Names  # [N] its name in the file

    def of(self, indices: NDArray[np.integer]) -> Places:
        """The places of some images."""
        keys = Names(self.keys[index] for index in indices)
        return Places(self.shards, self.shard[indices], self.offsets[indices], keys)


class ShardDataset(EncodedDataset):
    """Images that lie one behind the other in files.

    Args:
        places: of every image, in the order of the indices; the others as of EncodedDataset.
    """

    def __init__(
        self,
        name: str,
        places: Places,
        facts: Facts,
        labels: np.ndarray | None,
        classes: Sequence[str] | None,
        *,
        rejected: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(name, facts, labels, classes, rejected=rejected)
        self.places = places

    def describe(self, index: int) -> str:
        return f"{self.places.shards[self.places.shard[index]]}:{self.places.keys[index]}"

    def read(self, index: int) -> Read:
        path = self.places.shards[self.places.shard[index]]
        # Opening costs 2 us of 8, and decoding 600: files kept open would be worth little and shared by forks.
        return read_file(path, int(self.places.offsets[index]), int(self.facts.lengths[index]))

    def fingerprint(self) -> str:
        paths = list(self.places.shards)
        below = os.path.commonpath([os.path.dirname(path) for path in paths])  # the folder may be moved
        names = [os.path.relpath(path, below) for path in paths]
        digest = hashlib.sha256()
        for shard, key in zip(self.places.shard, self.places.keys, strict=True):
            digest.update(f"{names[shard]}:{key}\0".encode(errors="surrogateescape"))
        return f"{self.name}, {len(self)} images, names {digest.hexdigest()[:16]}"

    def subset(self, name: str, indices: np.ndarray) -> ShardDataset:
        labels = None if self.labels is None else self.labels[indices]
        places, facts = self.places.of(indices), self.facts.of(indices)
        return ShardDataset(name, places, facts, labels, self.classes, rejected=self.rejected)


class Shards(NamedTuple):
    """What the shards hold: the training images, and the validation images where there are shards of them."""

    train: ShardDataset
    val: ShardDataset | None


def open_shards(
    root: str | Path, form: ShardFormat, *, manifest: Path | None = None, shards: int | None = None
) -> Shards:
    """Lists the images of all shards of `root`, in the order of the shards' names.

    Training shards are those in `root/train`, with `root/val`, `root/validation` or `root/test` beside it; else those
    in `root` with the word train in their names, with val, validation or test in others; else all in `root`.
    There are no labels where an image of the split has none.  Classes have the names of the index that engine/pack.py
    writes, else their numbers.  The listing is kept until other shards are opened.

    Raises:
        DataError: no shards, a wrong number of them, a damaged one, or one without any image.
    """
    return _open(os.path.abspath(Path(root).expanduser()), form, manifest, shards)


@functools.lru_cache(maxsize=1)
def _open(root: str, form: ShardFormat, manifest: Path | None, count: int | None) -> Shards:
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; set data.root to the folder of your shards")
    train, val = find_shards(root, form)
    _check_count(train, val, count)
    folders = sorted({os.path.dirname(path) for path in (*train, *val)})
    indices = {folder: index for folder in folders if (index := read_index(folder, form)) is not None}
    files = [os.path.relpath(path, root) for path in (*train, *val)]
    locate = functools.partial(_locate, form)
    records = scan(root, files, kind=form.name, locate=locate, manifest=manifest)
    records = [record._replace(path=os.path.join(root, record.path)) for record in records]
    _check_images(records, indices)
    names = next((index.classes for index in indices.values()), None)
    parts = [_part(form.name, records[: len(train)])]
    if val:
        parts.append(_part(f"{form.name}-val", records[len(train) :]))
        if parts[0].labels is not None and parts[1].labels is None:
            _log.warning("%s: not every validation image has a label, as those of train have: not used", root)
            parts.pop()
    classes = _classes(root, parts, names)
    datasets = [ShardDataset(p.name, p.places, p.facts, p.labels, classes, rejected=p.rejected) for p in parts]
    return Shards(datasets[0], datasets[1] if len(datasets) > 1 else None)


def _check_count(train: list[str], val: list[str], count: int | None) -> None:
    if count is None:
        check_numbers(train)
    elif len(train) != count:
        raise DataError(
            f"{os.path.dirname(train[0])}: {len(train)} training shards, and data.shards is {count}; copy those that "
            "are missing, remove those too many, or correct data.shards"
        )
    check_numbers(val)


def _locate(form: ShardFormat, path: str) -> list[Located]:
    images = list(form.locate(path))
    if not images:
        raise DataError(f"{path}: a {form.name} shard without any image; remove it, or pack the data anew")
    return images


def _check_images(records: Sequence[FileRecord], indices: dict[str, ShardIndex]) -> None:
    packed = {
        os.path.join(folder, entry.name): entry.images for folder, index in indices.items() for entry in index.shards
    }
    for record in records:
        if packed.get(record.path, len(record.images)) != len(record.images):
            raise DataError(
                f"{record.path}: {len(record.images)} images, {packed[record.path]} by {INDEX} beside it; copy the "
                "shard and the index again"
            )


class _Part(NamedTuple):
    name: str
    places: Places
    facts: Facts
    labels: NDArray[np.int64] | None
    rejected: list[tuple[str, str]]


def _part(name: str, records: Sequence[FileRecord]) -> _Part:
    """One split's readable images, with a warning where others are left out.  Raises DataError: not one is readable."""
    every = [(shard, image) for shard, record in enumerate(records) for image in record.images]
    used = [(shard, image) for shard, image in every if is_listed(image)]
    rejected = [
        (f"{records[shard].path}:{image.name}", image.problem or "") for shard, image in every if not is_listed(image)
    ]
    folder = os.path.dirname(records[0].path)
    if not used:
        first = f"{rejected[0][0]}: {rejected[0][1]}"
        raise DataError(
            f"{folder}: no readable image among {len(every)} (first: {first}); set data.root to other shards"
        )
    warn_of_rejected(folder, rejected, len(every), what="images")
    places = Places(
        Names(record.path for record in records),
        np.array([shard for shard, _ in used], np.int32),
        np.array([image.offset for _, image in used], np.int64),
        Names(image.name for _, image in used),
    )
    labels = _labels(folder, [image.label for _, image in used])
    return _Part(name, places, facts_of([(records[shard], image) for shard, image in used]), labels, rejected)


def _labels(folder: str, labels: list[int | None]) -> NDArray[np.int64] | None:
    known = [label for label in labels if label is not None]
    if len(known) == len(labels):
        return np.array(known, np.int64)
    if known:
        _log.warning("%s: %d of %d images have no label: none is used", folder, len(labels) - len(known), len(labels))
    return None


def _classes(root: str, parts: list[_Part], names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """A name for each label of all parts."""
    largest = max((int(part.labels.max()) for part in parts if part.labels is not None), default=None)
    if largest is None:
        return None
    if names is not None and largest >= len(names):
        raise DataError(f"{root}: label {largest}, and {INDEX} names {len(names)} classes; pack the data anew")
    if largest >= _MOST_CLASSES:
        raise DataError(f"{root}: label {largest} is no class number; pack the data anew with classes counted from 0")
    return names or tuple(map(str, range(largest + 1)))

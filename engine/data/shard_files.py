"""The files of a sharded data set: which are for training, whether any is missing, and the index of packed ones."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from engine.data.dataset import DataError
from engine.data.manifest import Located

INDEX = "dogo-shards.json"

_HELD_OUT = ("val", "validation", "test")  # the first that is there is used
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|test)(?:ing|id|idation)?(?=[-_.\d]|$)")
_NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>\d+)(?:-of-(?P<total>\d+))?(?P<after>\D*)", re.DOTALL)
_PACKED = re.compile(r"\.(gz|bz2|xz|zst|zip)$|\.tgz$")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x78\x01": "zlib",
          b"\x78\x9c": "zlib", b"\x78\xda": "zlib"}  # fmt: skip


class ShardFormat(NamedTuple):
    """A format of shards: its name, what its files are called, and the function that finds the images in one."""

    name: str
    pattern: re.Pattern[str]
    locate: Callable[[str], Iterable[Located]]


class IndexEntry(NamedTuple):
    """One shard as it was packed."""

    name: str
    images: int
    bytes: int


class ShardIndex(NamedTuple):
    """What a folder of packed shards must hold."""

    classes: tuple[str, ...] | None
    shards: tuple[IndexEntry, ...]


def compression_of(head: bytes) -> str | None:
    """The compression of a file that begins with these bytes."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


# -- layout ----------------------------------------------------------------------------------------------------------


def find_shards(root: str, form: ShardFormat) -> tuple[list[str], list[str]]:
    """The paths of the training shards and of the validation shards, which may be none, in the order of their names.

    Raises DataError: no training shards.
    """
    below = {split: _paths(os.path.join(root, split), form) for split in ("train", *_HELD_OUT)}
    if below["train"]:
        return below["train"], _first_held_out(below)
    flat: dict[str, list[str]] = {"train": [], "val": [], "test": [], "": []}
    for path in _paths(root, form):
        match = _SPLIT.search(os.path.basename(path).lower())
        flat[match[1] if match else ""].append(path)
    if train := flat["train"] or ([] if flat["val"] or flat["test"] else flat[""]):
        return train, _first_held_out(flat)
    if held := _first_held_out(below) or _first_held_out(flat):
        raise DataError(f"{held[0]}: validation shards without any for training; put those into {root}/train")
    packed = [name for folder in (root, f"{root}/train") for name in _names(folder) if _PACKED.search(name)]
    note = f"; {packed[0]} is compressed, which allows no random access: decompress it" if packed else ""
    raise DataError(
        f"{root}: no {form.name} shards there or in train/{note}; set data.root to the folder of your shards"
    )


def _first_held_out(found: dict[str, list[str]]) -> list[str]:
    return next((found[split] for split in _HELD_OUT if found.get(split)), [])


def _paths(folder: str, form: ShardFormat) -> list[str]:
    return [os.path.join(folder, name) for name in _names(folder) if form.pattern.search(name)]


def _names(folder: str) -> list[str]:
    """The files of a folder that are not hidden; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    try:
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); make it readable or remove it") from error


# -- completeness ----------------------------------------------------------------------------------------------------


def check_numbers(paths: list[str]) -> None:
    """Raises DataError where the numbers in the names of shards tell that some are missing.

    Names with `-of-01024` tell how many there must be; others are numbered without a gap, from 0 or 1.
    """
    numbers: dict[tuple[str, str, str], dict[int, str]] = {}
    for path in paths:
        if match := _NUMBERED.fullmatch(os.path.basename(path)):
            alike = (match["before"], match["after"], match["total"] or "")
            numbers.setdefault(alike, {})[int(match["number"])] = match["number"]
    folder = os.path.dirname(paths[0]) if paths else ""
    totals: dict[tuple[str, str], str] = {}
    for (before, after, total), found in numbers.items():
        other = totals.setdefault((before, after), total)
        if total and other and total != other:
            raise DataError(f"{folder}: shards of a set of {other} and of a set of {total}; remove one of the two sets")
        _check_run(folder, before, f"-of-{total}{after}" if total else after, int(total or 0), found)


def _check_run(folder: str, before: str, after: str, total: int, found: dict[int, str]) -> None:
    texts = list(found.values())
    if not total and len(found) == 1 and not texts[0].startswith("0"):
        return  # a year, a size: no number of a shard
    first = 0 if 0 in found or (total and total not in found) else 1
    expected = total or max(found) - first + 1
    if len(found) != expected or max(found) != first + expected - 1:
        number = next(number for number in itertools.count(first) if number not in found)
        missing = expected - sum(first <= number < first + expected for number in found)
        gap = f"{before}{number:0{min(map(len, texts))}d}{after}"
        if missing < 1:
            raise DataError(f"{folder}: {len(found)} shards are there, {expected} by their names; remove the others")
        raise DataError(
            f"{folder}: {missing} of {expected} shards are missing, the first is {gap}; copy them there, or set "
            "data.shards to the number of training shards where these are all"
        )


# -- index -----------------------------------------------------------------------------------------------------------


def write_index(folder: Path, index: ShardIndex) -> Path:
    """Writes the index of a folder of shards."""
    plain = {
        "version": 1,
        "classes": None if index.classes is None else list(index.classes),
        "shards": [entry._asdict() for entry in index.shards],
    }
    path = folder / INDEX
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return path


def read_index(folder: str, form: ShardFormat) -> ShardIndex | None:
    """The index of a folder, where it has one, with the same shards of the same sizes beside it.  Raises DataError."""
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):
        return None
    index = _parsed(path)
    listed, there = {entry.name for entry in index.shards}, {os.path.basename(p) for p in _paths(folder, form)}
    for names, what in ((listed - there, "missing"), (there - listed, "not in it")):
        if names:
            raise DataError(
                f"{path}: lists {len(listed)} shards, of which {len(there & listed)} are there; {len(names)} are {what}"
                f", as {min(names)}; copy all shards of the set, and no others, with their index"
            )
    for entry in index.shards:
        size = os.path.getsize(os.path.join(folder, entry.name))
        if size != entry.bytes:
            raise DataError(
                f"{os.path.join(folder, entry.name)}: {size} bytes, {entry.bytes} when it was packed; copy it again"
            )
    return index


def _parsed(path: str) -> ShardIndex:
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
        entries = tuple(IndexEntry(str(e["name"]), int(e["images"]), int(e["bytes"])) for e in plain["shards"])
        classes = plain["classes"]
        return ShardIndex(None if classes is None else tuple(map(str, classes)), entries)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({error!r}); copy it again, or remove it to do without its checks") from error

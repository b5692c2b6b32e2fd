"""WebDataset shards: tar archives whose members are grouped into samples by their names."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO, NamedTuple

from engine.data.dataset import DataError
from engine.data.folder import EXTENSIONS
from engine.data.manifest import Located
from engine.data.shard_files import ShardFormat, compression_of
from engine.data.shards import Shards, open_shards

_BLOCK = 512  # bytes; a tar archive is made of these, and an empty one ends it
_AGAIN = "copy the shard again from where it came from, or pack it anew"


def open_webdataset(root: str | Path, *, manifest: Path | None = None, shards: int | None = None) -> Shards:
    """The samples of all `.tar` shards below `root`; see `open_shards` for the layouts.

    Args:
        root: the folder of the shards.
        manifest: the file that remembers the scan; None chooses one.
        shards: how many training shards there must be, where that is known.

    Raises:
        DataError: no shards, too few or too many, a damaged one, or one that holds no images.
    """
    return open_shards(root, WEBDATASET, manifest=manifest, shards=shards)


def locate_webdataset(path: str) -> Iterator[Located]:
    """The image of each sample, with its label, in the order of the shard.

    A member's key is its path up to the first dot of the base name, and its ending is the rest; neighbours with one key
    are a sample.  The image is the member whose ending is that of an image (`jpg`), or else ends like one (`left.jpg`).
    The label is the integer in `.cls`, or else "label" or "cls" in `.json`.  Samples without an image are left out.

    Raises:
        DataError: no whole and plain tar archive; a sample with two images, in two places or with a strange label.
    """
    seen: set[str] = set()
    with open(path, "rb") as file:
        for key, members in groupby(_members(path, file), lambda member: member.key):
            if key in seen:
                raise DataError(
                    f"{path}: the sample {key!r} is there twice; the files of a sample lie together, and no other has "
                    "its key: pack the shard with tar --sort=name, and names that differ before their first dot"
                )
            seen.add(key)
            sample = list(members)
            image = _image(path, sample)
            if image is not None:
                yield Located(key, image.offset, image.length, _label(path, file, sample))


WEBDATASET = ShardFormat("webdataset", re.compile(r"\.tar$"), locate_webdataset)


class _Member(NamedTuple):
    key: str
    ending: str
    offset: int
    length: int


def _image(path: str, sample: list[_Member]) -> _Member | None:
    whole = [member for member in sample if f".{member.ending}" in EXTENSIONS]
    found = whole or [member for member in sample if member.ending.endswith(EXTENSIONS)]
    if len(found) > 1:
        names = " and ".join(f"{member.key}.{member.ending}" for member in found[:2])
        raise DataError(
            f"{path}: one sample has two images, {names}, as a key ends at the first dot of a name; "
            "give each image a key of its own"
        )
    return found[0] if found else None


def _label(path: str, file: IO[bytes], sample: list[_Member]) -> int | None:
    by_ending = {member.ending: member for member in sample}
    if (member := by_ending.get("cls")) is not None:
        text = _content(file, member)
        if re.fullmatch(rb"\s*\d{1,18}\s*", text) is None:
            raise _no_label(path, member, text)
        return int(text)
    if (member := by_ending.get("json")) is None:
        return None
    text = _content(file, member)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: {member.key}.json is no JSON ({error}); pack the shard anew") from error
    if not isinstance(fields, dict):
        return None
    label = fields.get("label", fields.get("cls"))
    if label is not None and (type(label) is not int or not 0 <= label < 1 << 63):
        raise _no_label(path, member, text)
    return label


def _no_label(path: str, member: _Member, text: bytes) -> DataError:
    shown = repr(text[:40])[1:]
    return DataError(
        f"{path}: {member.key}.{member.ending} holds {shown}, and a label is an integer from 0; pack the shard anew "
        "with class numbers, or without labels"
    )


def _content(file: IO[bytes], member: _Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.length)


def _members(path: str, file: IO[bytes]) -> Iterator[_Member]:
    """The files of a whole archive that take part in samples."""
    size = os.fstat(file.fileno()).st_size
    if (packed := compression_of(file.read(8))) is not None:
        raise DataError(
            f"{path}: compressed with {packed}, which allows no random access; decompress it to a plain .tar"
        )
    file.seek(0)
    at = -1  # where the last whole header stands
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all, a kilobyte each
                at = info.offset
                if info.size < 0 or (info.isreg() and info.offset_data + info.size > size):
                    raise _truncated(path, size, f"within {info.name!r}, of which {info.size} bytes were announced")
                if (member := _member(path, info)) is not None:
                    yield member
            _check_end(path, file, tar.offset, size)
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if at < 0 and size >= _BLOCK:
            raise DataError(f"{path}: no tar archive ({error}); {_AGAIN}") from error
        raise _truncated(path, size, f"after the member at byte {at} ({error})") from error


def _member(path: str, info: tarfile.TarInfo) -> _Member | None:
    folder, slash, base = info.name.rpartition("/")
    stem, dot, ending = base.partition(".")
    ending = ending.lower()
    if info.isdir() or not stem or not dot:
        return None
    if info.issparse() or not info.isreg():
        if f".{ending}".endswith(EXTENSIONS):
            kind = "sparse" if info.issparse() else "a link or a device"
            raise DataError(f"{path}: {info.name!r} is {kind}; pack with tar --hard-dereference -h, without --sparse")
        return None
    return _Member(folder + slash + stem, ending, info.offset_data, info.size)


def _check_end(path: str, file: IO[bytes], offset: int, size: int) -> None:
    """tarfile takes a shard that was cut between two members for whole, and leaves out all behind a damaged header."""
    file.seek(offset)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise _truncated(path, size, "without the mark that ends an archive")
    if block.strip(b"\0"):
        raise DataError(f"{path}: damaged at byte {offset}, where a member's header should be; {_AGAIN}")
    if file.read(32 * _BLOCK).strip(b"\0"):
        raise DataError(
            f"{path}: more data after the archive's end at byte {offset}; of archives that were concatenated, "
            "make one shard each"
        )


def _truncated(path: str, size: int, where: str) -> DataError:
    return DataError(f"{path}: truncated: it ends at byte {size}, {where}; {_AGAIN}")

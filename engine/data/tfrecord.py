"""TFRecord files of `tf.train.Example`, read without TensorFlow: framing, checksums and the place of each image.

A record is its length (uint64), the length's checksum, the data and the data's checksum, all little-endian.  The data
is a protobuf message `Example{features{feature: map<string, bytes_list | float_list | int64_list>}}`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from engine.data.crc32c import masked_crc32c
from engine.data.dataset import DataError
from engine.data.manifest import Located
from engine.data.shard_files import ShardFormat, compression_of
from engine.data.shards import Shards, open_shards

# Features that hold the encoded image and its label, the first that is there: TensorFlow's ImageNet, TFDS, converters.
IMAGES = ("image/encoded", "image", "jpg", "jpeg", "png", "webp")
LABELS = ("image/class/label", "label", "cls")

_HEAD = struct.Struct("<QI")
_TAIL = struct.Struct("<I")
_AGAIN = "copy the file again from where it came from"


def open_tfrecord(root: str | Path, *, manifest: Path | None = None, shards: int | None = None) -> Shards:
    """The records of all TFRecord files below `root`; see `open_shards` for the layouts.

    Labels are those of the files: TensorFlow's ImageNet counts its 1,000 classes from 1.

    Args:
        root: the folder of the files, `*.tfrecord`, `*.tfrecords` or `*-00000-of-01024`.
        manifest: the file that remembers the scan; None chooses one.
        shards: how many training files there must be, where that is known.

    Raises:
        DataError: no files, too few or too many, a damaged one, or one that holds no images.
    """
    return open_shards(root, TFRECORD, manifest=manifest, shards=shards)


def locate_tfrecord(path: str) -> Iterator[Located]:
    """The image of each record, with its label; the name is the record's number, from 0.

    Raises:
        DataError: no whole TFRecord file; a record that is no Example, without an image or with a strange label.
    """
    with open(path, "rb") as file:
        for number, (offset, data) in enumerate(_records(path, file)):
            record = f"{path}: record {number}, at byte {offset - _HEAD.size},"
            try:
                features = _features(data)
                image, label = _image(data, features), _label(data, features)
            except ValueError as error:
                raise DataError(f"{record} {error}; write the file anew") from error
            yield Located(str(number), offset + image.start, image.stop - image.start, label)


TFRECORD = ShardFormat("tfrecord", re.compile(r"\.tfrecords?$|-\d+-of-\d+$"), locate_tfrecord)


def _records(path: str, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Where each record's data begins, and the data."""
    size = os.fstat(file.fileno()).st_size
    number, at = 0, 0
    while at < size:
        record = f"{path}: record {number}, at byte {at},"
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise DataError(f"{record} is truncated: the file ends at byte {size}; {_AGAIN}")
        length, checksum = _HEAD.unpack(head)
        if masked_crc32c(head[:8]) != checksum:
            raise _no_record(path, record, head, number)
        end = at + _HEAD.size + length + _TAIL.size
        if end > size:
            raise DataError(f"{record} is truncated: it ends at byte {end}, the file at byte {size}; {_AGAIN}")
        data = file.read(length)
        if masked_crc32c(data) != _TAIL.unpack(file.read(_TAIL.size))[0]:  # a JPEG decodes with most flipped bits
            raise DataError(f"{record} is damaged: its {length} bytes do not match their checksum; {_AGAIN}")
        yield at + _HEAD.size, data
        number, at = number + 1, end


def _no_record(path: str, record: str, head: bytes, number: int) -> DataError:
    if number:
        return DataError(f"{record} is damaged: its length does not match its checksum; {_AGAIN}")
    if (packed := compression_of(head)) is not None:
        return DataError(f"{path}: compressed with {packed}, which allows no random access; write it uncompressed")
    return DataError(f"{path}: no TFRecord file, or damaged at its first byte; {_AGAIN}, or remove it")


# -- the Example -----------------------------------------------------------------------------------------------------

_BYTES_LIST, _INT64_LIST = 1, 3  # fields of Feature
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5  # wire types
_UNLABELLED = (1 << 64) - 1  # -1, the custom of TFDS
_NO_EXAMPLE = "is no tf.train.Example"


class _Feature(NamedTuple):
    kind: int
    where: range  # of the list's message, within the record


class _Field(NamedTuple):
    number: int
    value: int  # of a varint, else 0
    where: range | None  # of a delimited value, within the record


def _features(data: bytes) -> dict[str, _Feature]:
    """The features by name; of one that is there twice the last, as protobuf has it for maps."""
    found: dict[str, _Feature] = {}
    for features in _delimited(data, range(len(data)), 1):
        for entry in _delimited(data, features, 1):
            name = b"".join(bytes(data[key.start : key.stop]) for key in _delimited(data, entry, 1))
            for feature in _delimited(data, entry, 2):
                for kind, _, where in _fields(data, feature):
                    if where is not None:
                        found[name.decode("utf-8", "replace")] = _Feature(kind, where)
    return found


def _image(data: bytes, features: dict[str, _Feature]) -> range:
    for name in IMAGES:
        if name in features and features[name].kind == _BYTES_LIST:
            images = list(_delimited(data, features[name].where, 1))
            if len(images) != 1:
                raise ValueError(f"has {len(images)} images in {name!r}, not one")
            return images[0]
    there = ", ".join(sorted(features)[:12]) or "none"
    raise ValueError(f"has no encoded image: none of the features {', '.join(IMAGES)} holds bytes (it has: {there})")


def _label(data: bytes, features: dict[str, _Feature]) -> int | None:
    name = next((name for name in LABELS if name in features), None)
    if name is None:
        return None
    kind, where = features[name]
    if kind != _INT64_LIST:
        raise ValueError(f"has a label in {name!r} that is no int64")
    labels: list[int] = []
    for number, value, packed in _fields(data, where):
        if number == 1:
            labels += [value] if packed is None else _varints(data, packed)
    if labels == [_UNLABELLED] or not labels:
        return None
    if len(labels) > 1 or labels[0] >= 1 << 63:
        raise ValueError(f"has the labels {labels[:3]} in {name!r}, not one integer from 0")
    return labels[0]


def _delimited(data: bytes, where: range, number: int) -> Iterator[range]:
    """The values of one field of a message that are bytes, strings or messages."""
    for field in _fields(data, where):
        if field.number == number and field.where is not None:
            yield field.where


def _fields(data: bytes, where: range) -> Iterator[_Field]:
    """The fields of a message in protobuf's wire format, but for those of fixed width, which nothing here has.

    Raises ValueError: it is none.
    """
    at = where.start
    while at < where.stop:
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (_VARINT, _FIXED64, _DELIMITED, _FIXED32):
            raise ValueError(_NO_EXAMPLE)
        value, content = 0, None
        if wire == _VARINT:
            value, at = _varint(data, at)
        elif wire == _DELIMITED:
            length, at = _varint(data, at)
            content = range(at, at + length)
            at += length
        else:
            at += 8 if wire == _FIXED64 else 4
        if at > where.stop:
            raise ValueError(_NO_EXAMPLE)
        if wire in (_VARINT, _DELIMITED):
            yield _Field(number, value, content)


def _varints(data: bytes, where: range) -> list[int]:
    values, at = [], where.start
    while at < where.stop:
        value, at = _varint(data, at)
        values.append(value)
    if at > where.stop:
        raise ValueError(_NO_EXAMPLE)
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError(_NO_EXAMPLE)

"""Encoded images by index, each as the scan found it, and the one way in which every loader reads them.

A scan (engine/data/manifest.py) has decoded every image in full and left its facts; a reader holds what it reads to
them, so that a file that changed since then is unreadable to every loader alike.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import warnings
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from engine.data.dataset import ImageDataset, UnreadableImage, as_labels, labels_without_class

# Nothing else is tried: some of Pillow's other plugins start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

MAX_PIXELS = (1 << 30) // 12  # where Pillow begins to warn of decompression bombs: 256 MiB as RGB
MAX_BYTES = 6 * MAX_PIXELS  # an encoded image: the largest one, uncompressed, in 16-bit colour
MIN_SIDE = 4  # the smallest random crop, 8 % of the area at an aspect of 3:4, is a quarter of the sides: one pixel

# The machine is at its limit; calling the image unreadable would silently drop good data.
_NOT_THE_IMAGE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

_TOO_LARGE = f"more than {MAX_PIXELS:,} pixels"
_PILLOW = re.compile(r"PIL\.")


SPOILED = -1


class Facts(NamedTuple):
    """What the scan found of N images."""

    lengths: NDArray[np.int64]  # [N] bytes of the encoded image
    sizes: NDArray[np.int32]  # [N, 2] width and height in pixels
    direct: NDArray[np.bool_]  # [N] a plain JPEG or PNG, of which every decoder makes the same picture
    stamps: NDArray[np.int64]  # [N] when the file last changed, in ns; SPOILED where it is an image no more

    def of(self, indices: NDArray[np.integer]) -> Facts:
        """The facts of some images."""
        return Facts(*(column[indices] for column in self))


class Names(Sequence[str]):
    """Strings in one block of bytes: the reference counts of a million str would be copied into every forked worker."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):  # one index, no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._block[self._ends[index] : self._ends[index + 1]])


class EncodedDataset(ImageDataset):
    """Images that loaders decode themselves.

    Args:
        name: short name for logs.
        facts: of every image, in the order of the indices.
        labels: integers [N], or None.
        classes: names of the labels, by label; None where there are no labels.
        rejected: images left out when the dataset was listed, with the reason.

    Raises:
        DataError: labels do not match the images or the classes.
    """

    def __init__(
        self,
        name: str,
        facts: Facts,
        labels: np.ndarray | None,
        classes: Sequence[str] | None,
        *,
        rejected: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.facts = facts
        self.labels = as_labels(name, labels, len(facts.lengths))
        self.classes = None if classes is None else tuple(classes)
        if self.labels is not None and (self.classes is None or self.labels.max(initial=-1) >= len(self.classes)):
            raise labels_without_class(name)
        self.rejected = list(rejected)

    def __len__(self) -> int:
        return len(self.facts.lengths)

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None or self.classes is None else len(self.classes)

    @abstractmethod
    def read(self, index: int) -> Read:
        """What stands where the scan found the image.  Raises OSError, UnreadableImage."""

    @abstractmethod
    def subset(self, name: str, indices: np.ndarray) -> EncodedDataset:
        """The images of these indices (integers [n]), with the same classes."""

    def encoded(self, index: int) -> bytes:
        """The encoded image, of the size and kind that the scan found.  Raises IndexError, UnreadableImage.

        A file that has changed since then is decoded first: a decoder that trusts the scan may crash on what it was
        not told of (DALI 2.4 does, in most batches of 50 that hold one image without a header).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, no index {index}")
        with unreadable_where_it_fails(self.describe(index)):
            data, stamp = self.read(index)
        if stamp != self.facts.stamps[index] or len(data) != self.facts.lengths[index]:
            self._check(index, data)
        return data

    def _check(self, index: int, data: bytes) -> None:
        look = inspect(data, self.describe(index))
        width, height = self.facts.sizes[index]
        if (look.width, look.height) != (width, height):
            reason = f"{look.width} x {look.height} px, {width} x {height} when it was scanned"
            raise UnreadableImage(self.describe(index), reason)
        if self.facts.direct[index] and not look.direct:
            raise UnreadableImage(self.describe(index), "of another form than when it was scanned")

    def image(self, index: int) -> Image.Image:
        return decode(self.encoded(index), self.describe(index))

    def picture(self, index: int, *, convert: bool = False) -> bytes:
        """An encoding of which every decoder makes the same picture: the image's own, or PPM where it is not direct.

        `convert` takes PPM for a direct image too.  Raises UnreadableImage.
        """
        if self.facts.direct[index] and not convert:
            return self.encoded(index)
        buffer = io.BytesIO()
        self.image(index).save(buffer, format="PPM")
        return buffer.getvalue()


class FileDataset(EncodedDataset):
    """One image a file.

    Args:
        paths: the files, in the order of the indices; the others as of EncodedDataset.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        facts: Facts,
        labels: np.ndarray | None,
        classes: Sequence[str] | None,
        *,
        rejected: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(name, facts, labels, classes, rejected=rejected)
        self._paths = Names(paths)

    def path(self, index: int) -> str:
        """The file of this index. Raises IndexError."""
        return self._paths[index]

    def describe(self, index: int) -> str:
        return self.path(index)

    def read(self, index: int) -> Read:
        return read_file(self.path(index))

    def fingerprint(self) -> str:
        below = os.path.commonpath([os.path.dirname(path) for path in self._paths])  # the folder may be moved
        names = "\0".join(os.path.relpath(path, below) for path in self._paths)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
        return f"{self.name}, {len(self)} images, names {digest}"

    def subset(self, name: str, indices: np.ndarray) -> FileDataset:
        labels = None if self.labels is None else self.labels[indices]
        paths = [self.path(index) for index in indices]
        return FileDataset(name, paths, self.facts.of(indices), labels, self.classes, rejected=self.rejected)


class Read(NamedTuple):
    """Bytes of a file."""

    data: bytes
    stamp: int  # when the file last changed, in ns


def read_file(path: str, offset: int = 0, length: int | None = None) -> Read:
    """A file, or `length` bytes of it from `offset`, fewer where it ends before.

    Raises OSError.  ValueError: no regular file, or more than MAX_BYTES, which no image needs.
    """
    # Half the time of open() for small files; and a pipe, not being waited for, is refused.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        length = status.st_size if length is None else length
        if length > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES:,} bytes")
        return Read(os.pread(descriptor, length, offset), status.st_mtime_ns)
    finally:
        os.close(descriptor)


# -- decoding --------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What decoding an image in full tells of it."""

    width: int
    height: int
    direct: bool


def decode(data: bytes, name: str) -> Image.Image:
    """The whole image as RGB; the first frame of several; orientation is not applied, but to TIFF, where Pillow does.

    Raises:
        UnreadableImage: empty, no image, truncated, damaged, a decompression bomb, or without 8-bit meaning.
    """
    with _opened(data, name) as image:
        return _rgb(image)


def inspect(data: bytes, name: str) -> Look:
    """Decodes the image in full and tells what loaders need to know of it.  Raises UnreadableImage, as `decode`."""
    with _opened(data, name) as image:
        direct = _is_direct(image, data)
        picture = image if direct else _rgb(image)
        picture.load()
        return Look(picture.width, picture.height, direct)


def describe_form(data: bytes, name: str) -> str:
    """What the header tells people, as 'PNG RGBA'.  Raises UnreadableImage."""
    with _opened(data, name) as image:
        deep = image.format == "PNG" and _png_depth(data) == 16
        return f"{image.format} {image.mode.partition(';')[0]}{' of 16 bits' if deep else ''}"


def _is_direct(image: Image.Image, data: bytes) -> bool:
    """Whether decoders agree on it; alpha, palettes, CMYK and 16 bits each of them has a way with."""
    if image.mode not in ("RGB", "L") or "transparency" in image.info:
        return False
    if image.format == "PNG":  # Pillow opens colour of 16 bits as RGB too, so the depth is read from the header
        return _png_depth(data) == 8 and getattr(image, "n_frames", 1) == 1
    as_ycc = image.mode == "L" or image.info.get("adobe_transform", 1) == 1  # else the file holds RGB, which is rare
    return image.format == "JPEG" and as_ycc


def _png_depth(data: bytes) -> int:
    return data[24]  # bits; behind signature, length and type of the header, width and height


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range of values; convert it to 8 bits a channel")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 and return a white image
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    image.load()
    return image.convert("RGB")


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """The image with its header read; what fails inside is an UnreadableImage."""
    with unreadable_where_it_fails(name):
        if not data:
            raise ValueError("the file is empty")
        _silence_pillow()
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(_TOO_LARGE)
            if min(image.size) < MIN_SIDE:
                raise ValueError(f"a side is shorter than {MIN_SIDE} pixels")
            yield image


def _silence_pillow() -> None:
    """Pillow's warnings are of odd metadata, which no loader reads, and of sizes, which have one limit here.

    One filter for the process: warnings.catch_warnings would take other threads' filters away.
    """
    if ("ignore", None, Warning, _PILLOW, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=_PILLOW.pattern)


@contextmanager
def unreadable_where_it_fails(name: str) -> Iterator[None]:
    """What fails inside is an UnreadableImage of this name, unless the machine is at its limit."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, f"not an image of a known format: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(name, _TOO_LARGE) from error
    except Exception as error:  # on damaged bytes Pillow's plugins raise nearly anything
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _NOT_THE_IMAGE):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(name, reason or type(error).__name__) from error

"""What every source of images offers to the loaders: length, labels, one decoded image by its index."""

import errno
import hashlib
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

# Nothing else is tried: some of Pillow's other plugins start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")

# The machine is at its limit; calling the image unreadable would silently drop good data.
_NOT_THE_IMAGE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class DataError(ValueError):
    """The data cannot be used as it is; one line naming the file, what was found and what to do."""


class UnreadableImage(DataError):
    """One image that cannot be decoded. Loaders report it, count it and go on.

    Attributes:
        path: the file, as given to the dataset.
        reason: why, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: unreadable image ({reason}); replace or remove the file")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # The default would call the class with the message alone, which fails on the way out of a worker.
        return type(self), (self.path, self.reason)


class ImageDataset(ABC):
    """Images by index, picklable and cheap to fork.

    Attributes:
        name: short, for logs, e.g. 'cifar10'.
        labels: int64 [len], or None where the data has no labels.
        rejected: files left out when the dataset was listed, with the reason.
    """

    name: str
    labels: np.ndarray | None
    rejected: Sequence[tuple[str, str]] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, index: int) -> np.ndarray | Image.Image:
        """The image as RGB: a uint8 array [H, W, 3] of its own memory, or a PIL image.

        Raises:
            IndexError: no such index.
            UnreadableImage: the file cannot be decoded.
        """

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where this image comes from: a path, or 'cifar10[17]'."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Tells two sets of images apart by their number and names, not by their content."""

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """How many classes the labels count from 0; None where there are no labels."""


class ArrayDataset(ImageDataset):
    """Images of one size in one array.

    Args:
        name: short name for logs.
        images: uint8 [N, H, W, 3]; a read-only memory map stays one, also in worker processes.
        labels: integers [N], or None.
        num_classes: where it is more than the largest label tells.

    Raises:
        DataError: shapes or dtypes are not these.
    """

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray | None, *, num_classes: int | None = None
    ) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise DataError(f"{name}: images are {images.dtype} {list(images.shape)}; give uint8 [N, H, W, 3]")
        self.name = name
        self.images = images
        self.labels = _as_labels(name, labels, len(images))
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> np.ndarray:
        return np.array(self.images[index], order="C", subok=False)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        return f"{self.name}, {len(self)} images"

    @property
    def num_classes(self) -> int | None:
        if self.labels is None:
            return None
        return self._num_classes or int(self.labels.max(initial=-1)) + 1

    def __getstate__(self) -> dict:
        # numpy pickles a memory map as a copy of its content; a worker gets the place in the file instead.
        state = dict(self.__dict__)
        if (place := _place_in_file(self.images)) is not None:
            state["images"] = place
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if isinstance(self.images, tuple):
            filename, offset, shape, strides = self.images
            whole = np.memmap(filename, np.uint8, mode="r")
            self.images = np.ndarray(shape, np.uint8, buffer=whole, offset=offset, strides=strides)


class FileDataset(ImageDataset):
    """One image a file, decoded in full by Pillow.

    Args:
        name: short name for logs.
        paths: the files, in the order of the indices.
        labels: integers [N], or None.
        classes: names of the labels, by label; None where there are no labels.
        rejected: files left out when the dataset was listed, with the reason.

    Raises:
        DataError: labels do not match the paths or the classes.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[str | os.PathLike[str]],
        labels: np.ndarray | None,
        classes: Sequence[str] | None,
        *,
        rejected: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.labels = _as_labels(name, labels, len(paths))
        self.classes = None if classes is None else tuple(classes)
        if self.labels is not None and (self.classes is None or self.labels.max(initial=-1) >= len(self.classes)):
            raise DataError(f"{name}: labels without a class name for each; give `classes`, one name a label")
        self.rejected = list(rejected)
        # One block of bytes: a list of a million strings would be copied into every forked worker as its
        # reference counts are touched.
        encoded = [os.fsencode(path) for path in paths]
        self._block = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def path(self, index: int) -> str:
        """The file of this index. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} images, no index {index}")
        return os.fsdecode(self._block[self._ends[index] : self._ends[index + 1]])

    def image(self, index: int) -> Image.Image:
        return decode(self.path(index))

    def describe(self, index: int) -> str:
        return self.path(index)

    def fingerprint(self) -> str:
        paths = [self.path(index) for index in range(len(self))]
        below = os.path.commonpath([os.path.dirname(path) for path in paths])  # the folder may be moved
        names = "\0".join(os.path.relpath(path, below) for path in paths)
        digest = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()[:16]
        return f"{self.name}, {len(self)} images, names {digest}"

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None or self.classes is None else len(self.classes)

    def subset(self, name: str, indices: np.ndarray) -> "FileDataset":
        """The images of these indices (integers [n]), with the same classes."""
        labels = None if self.labels is None else self.labels[indices]
        return FileDataset(name, [self.path(index) for index in indices], labels, self.classes, rejected=self.rejected)


def decode(path: str) -> Image.Image:
    """The whole file as an RGB image; the first frame of several; EXIF orientation is not applied.

    Raises:
        UnreadableImage: missing, empty, no image, truncated, damaged, a decompression bomb, or without 8-bit meaning.
    """
    with _opened(path) as image:
        if image.mode in ("I", "F"):
            raise ValueError(f"mode {image.mode} has no fixed range of values; convert it to 8 bits a channel")
        if image.mode.startswith("I;16"):  # Pillow would clip at 255 and return a white image
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:  # Pillow warns when this goes straight to RGB
            return image.convert("RGBA").convert("RGB")
        image.load()
        return image.convert("RGB")


def header_problem(path: str) -> str | None:
    """Why this file cannot be an image, from its header alone; None where it may be one."""
    try:
        with _opened(path):
            return None
    except UnreadableImage as error:
        return error.reason


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image with its header read; what fails inside is an UnreadableImage."""
    try:
        if os.stat(path).st_size == 0:
            raise ValueError("the file is empty")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, f"not an image of a known format: {', '.join(FORMATS)}") from error
    except Exception as error:  # on damaged bytes Pillow's plugins raise nearly anything
        if isinstance(error, OSError) and error.errno in _NOT_THE_IMAGE:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(path, reason or type(error).__name__) from error


def _as_labels(name: str, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise DataError(
            f"{name}: labels are {labels.dtype} {list(labels.shape)} for {count} images; give integers from 0, one each"
        )
    return labels.astype(np.int64)


def _place_in_file(array: np.ndarray) -> tuple[str, int, tuple[int, ...], tuple[int, ...]] | None:
    """(file, byte offset, shape, strides) of a view into a read-only memory map; None for other arrays."""
    root: object = array
    while isinstance(root, np.ndarray):
        if isinstance(root, np.memmap) and isinstance(root.base, mmap.mmap):
            break
        root = root.base
    if not isinstance(root, np.memmap) or root.mode != "r" or root.filename is None:
        return None
    offset = root.offset + array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    return os.fspath(root.filename), offset, array.shape, array.strides

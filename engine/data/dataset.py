"""What every source of images offers to the loaders: length, labels, one decoded image by its index."""

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from PIL import Image


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
        images: uint8 [N, H, W, 3], or [N, H, W] of grey ones, which are given as RGB; a read-only memory map stays one,
            also in worker processes.
        labels: integers [N], or None.
        num_classes: where it is more than the largest label tells.

    Raises:
        DataError: shapes or dtypes are not these.
    """

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray | None, *, num_classes: int | None = None
    ) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
            raise DataError(
                f"{name}: images are {images.dtype} {list(images.shape)}; give uint8 [N, H, W, 3], or [N, H, W] of "
                "grey ones"
            )
        self.name = name
        self.images = images if images.ndim == 4 else _rgb(images)
        self.labels = as_labels(name, labels, len(images))
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
        elif self.images.strides[3] == 0:
            state["images"] = self.images[..., 0]  # one of three equal channels
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if isinstance(self.images, tuple):
            filename, offset, shape, strides = self.images
            whole = np.memmap(filename, np.uint8, mode="r")
            self.images = np.ndarray(shape, np.uint8, buffer=whole, offset=offset, strides=strides)
        elif self.images.ndim == 3:
            self.images = _rgb(self.images)


def as_labels(name: str, labels: np.ndarray | None, count: int) -> np.ndarray | None:
    """Labels as int64 [count]; None stays None.  Raises DataError: not integers from 0, or not one an image."""
    if labels is None:
        return None
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer) or labels.min(initial=0) < 0:
        raise DataError(
            f"{name}: labels are {labels.dtype} {list(labels.shape)} for {count} images; give integers from 0, one each"
        )
    return labels.astype(np.int64)


def labels_without_class(name: str) -> DataError:
    """The error of labels that have no name each."""
    return DataError(f"{name}: labels without a class name for each; give `classes`, one name a label")


def _rgb(grey: np.ndarray) -> np.ndarray:
    """[N, H, W, 3], read-only, of grey images [N, H, W]: the channels share their memory."""
    return np.broadcast_to(grey[..., None], (*grey.shape, 3))


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

"""A user's labelled images in one .npz archive of numpy arrays."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from engine.data.dataset import ArrayDataset, DataError

_AGAIN = "copy the file again from where it came from, or make it anew (numpy.savez)"


def open_arrays(file: Path) -> ArrayDataset:
    """The images and labels of an archive, in memory, under the file's name without its ending.

    Args:
        file: holds `images`, uint8 [N, H, W, 3] or [N, H, W] of grey ones, and `labels`, integers from 0 [N]; other
            keys are left alone.

    Raises:
        DataError: no such file, no .npz archive, damaged, without one of the two, or one is something else.
    """
    images, labels = read_npz(file, "images", "labels")
    grey = images.ndim == 3
    if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)) or 0 in images.shape:
        raise DataError(
            f"{file}: `images` is {_form(images)}; give uint8 [N, H, W, 3], or [N, H, W] of grey images, at least one"
        )
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"{file}: `labels` is {_form(labels)} for {len(images)} images; give integers from 0, one an image"
        )
    if labels.astype(np.int64).min() < 0:  # also what is too large for int64
        raise DataError(f"{file}: `labels` go from {labels.min()} to {labels.max()}; give integers from 0")
    return ArrayDataset(file.stem, images, labels)


def read_npz(file: Path, *keys: str) -> list[np.ndarray]:
    """The arrays under these keys; one that needs pickle is refused, so that no code runs.

    Raises:
        DataError: no such file, no .npz archive, damaged, or without one of the keys.
    """
    wanted = _named(keys)
    if not file.is_file():
        raise DataError(f"{file}: no such file; give an .npz archive with {wanted}")
    try:
        archive = np.load(file, allow_pickle=False)
    except Exception as error:  # a damaged archive can raise nearly anything
        raise DataError(f"{file}: no whole .npz archive ({_said(error)}); {_AGAIN} with {wanted}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{file}: a single array; make an .npz archive with {wanted} of it (numpy.savez)")
    with archive:
        if missing := [key for key in keys if key not in archive.files]:
            found = _named(archive.files) or "nothing"
            raise DataError(f"{file}: holds {found}, not {_named(missing)}; {_AGAIN} with {wanted}")
        return [_member(file, archive, key) for key in keys]


def _member(file: Path, archive: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    try:
        return np.asarray(archive[key])
    except Exception as error:  # as above
        raise DataError(f"{file}: `{key}` cannot be read ({_said(error)}); {_AGAIN} with arrays of numbers") from error


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__


def _form(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _named(keys: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in keys)

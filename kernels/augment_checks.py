"""What `augment_views` takes: arguments brought to one form, and the reasons for refusing them.

Legend
  n  images      m  views      S  side of a view in pixels
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 16384  # S; scratch memory grows with its square
LARGEST_SIGMA = 10_000
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_DTYPES = {"b": np.bool_, "i": np.int64, "f": np.float64}
_ALLOWED = {"b": "b", "i": "iu", "f": "fiu"}
_SAID = {"b": "True or False", "i": "whole numbers", "f": "numbers"}


def rows(name: str, value: Any, kind: str, shape: tuple[int, ...] | None) -> NDArray[Any]:
    """A parameter as a contiguous array of its kind; `shape` None: any vector."""
    shared = _shared(name, value)
    try:
        array = np.asarray(shared)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"{name}: {_SAID[kind]} are expected, found {value!r}") from error
    if array.dtype.kind not in _ALLOWED[kind] and array.size:  # an empty list has no kind of its own
        raise ValueError(f"{name}: {_SAID[kind]} are expected, found {array.dtype}")
    if array.ndim != 1 if shape is None else array.shape != shape:
        wanted = "[m]" if shape is None else list(shape)
        raise ValueError(f"{name}: shape {wanted} is expected, found {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=_DTYPES[kind])


def _shared(name: str, value: Any) -> Any:
    """A tensor as an array of the same memory; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu" or value.layout != torch.strided:
        raise ValueError(f"{name}: a dense CPU tensor is expected, found {value.layout} on {value.device}")
    try:
        return value.detach().numpy()
    except TypeError as error:  # no such type there
        raise ValueError(f"{name}: {value.dtype} is not supported") from error


def side(size: Any) -> int:
    """S."""
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
        raise ValueError(f"size: a whole number from 1 to {LARGEST} is expected, found {size!r}")
    return size


def statistics(mean: Any, std: Any) -> tuple[list[float], list[float]]:
    """Both as lists of three."""
    found = rows("mean", mean, "f", (3,)), rows("std", std, "f", (3,))
    if not np.isfinite(found[0]).all():
        raise ValueError(f"mean: finite numbers are expected, found {found[0].tolist()}")
    if not (np.isfinite(found[1]) & (found[1] > 0)).all():
        raise ValueError(f"std: numbers > 0 are expected, found {found[1].tolist()}")
    return found[0].tolist(), found[1].tolist()


def image_array(i: int, image: Any) -> NDArray[np.uint8]:
    """An image as an array that shares its memory; what it holds, the core checks."""
    array = _shared(f"images[{i}]", image)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"images[{i}]: a uint8 tensor or array is expected, found {type(image).__name__}")
    return array


def image_batch(images: Any, backend: str) -> Tensor:
    """Images of one size, contiguous."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images: backend {backend} takes one tensor [n, H, W, 3 or 4], found {type(images).__name__}")
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape[1:3]:
        raise ValueError(f"images: uint8 [n, H, W, 3 or 4] is expected, found {images.dtype} {list(images.shape)}")
    return images.contiguous()


def output(out: Any, dtype: torch.dtype | None) -> tuple[Tensor | None, torch.dtype]:
    """Where views go, and their type."""
    if out is not None and not isinstance(out, Tensor):
        raise ValueError(f"out: a tensor or None is expected, found {type(out).__name__}")
    found = dtype or (torch.float32 if out is None else out.dtype)
    if found not in FLOATS:
        raise ValueError(f"{'dtype' if dtype else 'out'}: float32, float16 or bfloat16 is expected, found {found!r}")
    if out is not None and out.dtype != found:
        raise ValueError(f"out: {found} is expected, found {out.dtype}")
    return out, found


def memory(out: Tensor, m: int, size: int, device: torch.device) -> None:
    """Refuses memory that does not fit the views."""
    if (
        out.shape != (m, 3, size, size)
        or out.device != device
        or not out.is_contiguous(memory_format=torch.channels_last)
    ):
        raise ValueError(
            f"out: a tensor of {[m, 3, size, size]} with channels_last strides on {device} is expected, found "
            f"{list(out.shape)} with strides {list(out.stride())} on {out.device}"
        )


def values(params: dict[str, NDArray[Any]], batch: Tensor) -> None:
    """Refuses what would read outside of an image, or has no meaning; the native core checks for itself."""
    n, H, W, _ = batch.shape
    source, box, order, factors, sigma = (params[name] for name in ("source", "box", "order", "factors", "sigma"))
    for i in np.flatnonzero((source < 0) | (source >= n))[:1]:
        raise ValueError(f"source[{i}]: one of {n} images is expected, found {source[i]}")
    left, top, width, height = box.T
    inside = (left >= 0) & (top >= 0) & (width >= 1) & (height >= 1)
    # Each bounded before the difference: it must not overflow.
    inside &= (left <= W) & (top <= H) & (width <= W - left) & (height <= H - top)
    for i in np.flatnonzero(~inside)[:1]:
        raise ValueError(
            f"box[{i}]: left {left[i]}, top {top[i]}, {width[i]} x {height[i]} px is not inside of an image of "
            f"{W} x {H}"
        )
    for i in np.flatnonzero(~np.isfinite(factors).all(axis=1))[:1]:
        raise ValueError(f"factors[{i}]: finite numbers are expected, found {factors[i].tolist()}")
    for i in np.flatnonzero(np.abs(factors[:, 3]) > 0.5)[:1]:
        raise ValueError(f"factors[{i}]: a hue from -0.5 to 0.5 is expected, found {factors[i, 3]}")
    for i in np.flatnonzero((np.sort(order, axis=1) != np.arange(4)).any(axis=1))[:1]:
        raise ValueError(f"order[{i}]: 0, 1, 2 and 3 are expected, found {order[i].tolist()}")
    for i in np.flatnonzero(~((sigma >= 0) & (sigma <= LARGEST_SIGMA)))[:1]:
        raise ValueError(f"sigma[{i}]: from 0 to {LARGEST_SIGMA} is expected, found {sigma[i]}")

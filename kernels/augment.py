"""All augmented views of decoded images in one call, on the CPU (csrc/augment.cpp).

Legend
  n  images      m  views      S  side of a view in pixels

A view is what Pillow makes of its parameters, in this order: crop, bilinear resize (antialiased) to S x S, flip, colour
jitter, greyscale, Gaussian blur, solarise at 128; then normalised.  Bytes in between are Pillow's own (resize, blur and
hue among them), for any number of threads and any instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kernels import native

LARGEST = 16384  # S; the core's scratch memory grows with its square

_DTYPES = {"b": np.bool_, "i": np.int64, "f": np.float64}
_ALLOWED = {"b": "b", "i": "iu", "f": "fiu"}
_SAID = {"b": "True or False", "i": "whole numbers", "f": "numbers"}


def augment_views(
    images: Sequence[Tensor | NDArray[np.uint8]],
    *,
    source: ArrayLike | Tensor,
    box: ArrayLike | Tensor,
    flip: ArrayLike | Tensor,
    jitter: ArrayLike | Tensor,
    factors: ArrayLike | Tensor,
    order: ArrayLike | Tensor,
    grayscale: ArrayLike | Tensor,
    sigma: ArrayLike | Tensor,
    solarize: ArrayLike | Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    out: Tensor | None = None,
) -> Tensor:
    """m views of n images: float32 [m, 3, S, S] with channels_last strides, (v / 255 - mean) / std.

    images      n of uint8 [height, width, 3], contiguous, in CPU memory, each of its own size
    source      [m] which image a view comes from
    box         [m, 4] crop: left, top, width, height in source pixels
    flip        [m] left to right
    jitter      [m] whether `factors` apply
    factors     [m, 4] of brightness, contrast and saturation; hue in turns, -0.5 to 0.5
    order       [m, 4] order of those four, by index
    grayscale   [m]
    sigma       [m] of the blur in view pixels, 0 without
    solarize    [m] whether values from 128 on are inverted
    size        S
    mean, std   of the channels, of values in [0, 1]
    out         where the views go, as returned; new memory costs a seventh on one thread, and more on several
    """
    if native.core is None:
        raise RuntimeError(f"augment_views: {native.missing}")
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST:
        raise ValueError(f"size: a whole number from 1 to {LARGEST} is expected, found {size!r}")
    views = _rows("source", source, "i", None)
    m = len(views)
    pixels = native.core.augment_views(
        [_pixels(i, image) for i, image in enumerate(images)],
        source=views,
        box=_rows("box", box, "i", (m, 4)),
        flip=_rows("flip", flip, "b", (m,)),
        jitter=_rows("jitter", jitter, "b", (m,)),
        factors=_rows("factors", factors, "f", (m, 4)),
        order=_rows("order", order, "i", (m, 4)),
        grayscale=_rows("grayscale", grayscale, "b", (m,)),
        sigma=_rows("sigma", sigma, "f", (m,)),
        solarize=_rows("solarize", solarize, "b", (m,)),
        size=size,
        mean=_rows("mean", mean, "f", (3,)).tolist(),
        std=_rows("std", std, "f", (3,)).tolist(),
        out=_output(out),
    )
    assert isinstance(pixels, Tensor)
    return pixels


def _pixels(i: int, image: Any) -> NDArray[np.uint8]:
    """An image as an array that shares its memory; what it holds, the core checks."""
    array = _shared(f"images[{i}]", image)
    if not isinstance(array, np.ndarray):
        raise ValueError(f"images[{i}]: a uint8 tensor or array is expected, found {type(image).__name__}")
    return array


def _rows(name: str, value: Any, kind: str, shape: tuple[int, ...] | None) -> NDArray[Any]:
    """A parameter as a contiguous array of its kind; `shape` None: any vector."""
    shared = _shared(name, value)
    try:
        array = np.asarray(shared)
    except ValueError as error:  # rows of unequal length
        raise ValueError(f"{name}: {_SAID[kind]} are expected, found {value!r}") from error
    if array.dtype.kind not in _ALLOWED[kind]:
        raise ValueError(f"{name}: {_SAID[kind]} are expected, found {array.dtype}")
    if array.ndim != 1 if shape is None else array.shape != shape:
        wanted = "[m]" if shape is None else list(shape)
        raise ValueError(f"{name}: shape {wanted} is expected, found {list(array.shape)}")
    return np.ascontiguousarray(array, dtype=_DTYPES[kind])


def _output(out: Any) -> Tensor | None:
    if out is not None and not isinstance(out, Tensor):
        raise ValueError(f"out: a tensor or None is expected, found {type(out).__name__}")
    return out


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

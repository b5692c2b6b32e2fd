"""All augmented views of decoded images in one call.

Legend
  n  images      m  views      S  side of a view in pixels

A view is what Pillow makes of its parameters, in this order: crop, bilinear resize (antialiased) to S x S, flip, colour
jitter, greyscale, Gaussian blur, solarise at 128; then normalised.  Bytes in between are Pillow's own (resize, blur and
hue among them) in every backend, for any number of threads and any instruction set:

  native  images in CPU memory, each of its own size (csrc/augment.cpp)
  triton  images of one size on a GPU (augment_triton.py)
  torch   images of one size anywhere (augment_torch.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from kernels import augment_checks, augment_torch, native
from kernels.augment_table import table_of

BACKENDS = ("auto", "triton", "native", "torch")


def augment_views(
    images: Tensor | Sequence[Tensor | NDArray[np.uint8]],
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
    dtype: torch.dtype | None = None,
    backend: Literal["auto", "triton", "native", "torch"] = "auto",
) -> Tensor:
    """m views of n images: [m, 3, S, S] with channels_last strides, (v / 255 - mean) / std.

    images      n of uint8 [height, width, 3], contiguous, in CPU memory, each of its own size; or images of one size on
                any device as one tensor, uint8 [n, H, W, 3] or [n, H, W, 4], of which the last channel is not read
    source      [m] which image a view comes from; this and all other parameters are in CPU memory
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
    out         where the views go, as returned; new memory costs a seventh on one thread of a CPU, and more on several
    dtype       float32, float16 or bfloat16; by default that of `out`, or float32, which alone `native` gives
    backend     auto: triton for a tensor on a GPU; else native, or torch where that does not fit

    Raises ValueError for an argument that does not fit, RuntimeError for native where it was not built.
    """
    size, statistics = augment_checks.side(size), augment_checks.statistics(mean, std)
    out, dtype = augment_checks.output(out, dtype)
    params = _parameters(source, box, flip, jitter, factors, order, grayscale, sigma, solarize)
    if _backend(backend, images, dtype) == "native":
        return _native(images, params, size, statistics, out)
    batch = augment_checks.image_batch(images, backend)
    augment_checks.values(params, batch)
    m = len(params["source"])
    if out is None:
        out = new_views(m, size, dtype, batch.device)
    augment_checks.memory(out, m, size, batch.device)
    table: Tensor = table_of(**params).to(batch.device, non_blocking=True)
    scales = scale_and_shift(*statistics).to(batch.device, non_blocking=True)
    if batch.is_cuda or backend == "triton":
        from kernels import augment_triton  # triton is not imported where nothing needs it

        augment_triton.launch(batch, table, scales, out, blur=bool((params["sigma"] > 0).any()))
        return out
    return _torch(batch, table, scales, out)


def new_views(m: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for m views: [m, 3, S, S] with channels_last strides."""
    return torch.empty((m, size, size, 3), dtype=dtype, device=device).permute(0, 3, 1, 2)


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Float32 [6]: what bytes of each channel are multiplied with, then what is added, for (v / 255 - mean) / std."""
    scale, shift = [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    return torch.tensor(scale + shift, dtype=torch.float32)


def _parameters(*given: Any) -> dict[str, Any]:
    """Arrays of the parameters, in the order of the signature, each of its kind and of m rows."""
    kinds = {"source": "i", "box": "i4", "flip": "b", "jitter": "b", "factors": "f4", "order": "i4", "grayscale": "b",
             "sigma": "f", "solarize": "b"}  # fmt: skip
    found: dict[str, NDArray[Any]] = {}
    for (name, kind), value in zip(kinds.items(), given, strict=True):
        shape = None if name == "source" else (len(found["source"]), *map(int, kind[1:]))
        found[name] = augment_checks.rows(name, value, kind[0], shape)
    return found


def _backend(name: str, images: Any, dtype: torch.dtype) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: one of {', '.join(BACKENDS)} is expected, found {name!r}")
    if name == "native" and dtype != torch.float32:
        raise ValueError(f"dtype: native gives float32, found {dtype}; use backend='torch'")
    if name != "auto":
        return name
    if not isinstance(images, Tensor):
        return "native"
    if images.is_cuda:
        return "triton"
    fits = native.core is not None and dtype == torch.float32 and images.shape[-1:] != (4,)
    return "native" if fits else "torch"


def _native(
    images: Any,
    params: dict[str, NDArray[Any]],
    size: int,
    statistics: tuple[list[float], list[float]],
    out: Tensor | None,
) -> Tensor:
    if native.core is None:
        raise RuntimeError(f"augment_views: {native.missing}")
    if isinstance(images, Tensor):
        images = images.contiguous()
    pixels = native.core.augment_views(
        [augment_checks.image_array(i, image) for i, image in enumerate(images)],
        size=size, mean=statistics[0], std=statistics[1], out=out, **params,
    )  # fmt: skip
    assert isinstance(pixels, Tensor)
    return pixels


def _torch(batch: Tensor, table: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    scale, shift = scales.view(2, 1, 3, 1, 1)
    return out.copy_(augment_torch.views(batch, table, size=out.shape[2]).permute(0, 3, 1, 2) * scale + shift)

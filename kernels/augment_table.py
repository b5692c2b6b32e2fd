"""The parameters of views as one table of whole numbers, a row a view: what a GPU gets of them, in one copy.

Legend
  m  views      S  side of a view in pixels

All that is decided in float64 is decided here, so that kernels differ in nothing that matters: how far a hue turns,
which box stands for a blur.  Pillow's own roundings (csrc/augment.cpp, csrc/resample.cpp have the same).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BOX_BITS = 24  # of the weights of a blur's box, after the point
BLUR_PASSES = 3
FACTOR_LIMIT = 1e6  # what differs by a level at least differs by more than 255 times one of these


class Column(IntEnum):
    """Columns of the table, int32 [m, WIDTH]."""

    SOURCE = 0  # image
    LEFT = 1  # of the crop, in source pixels
    TOP = 2
    CROP_WIDTH = 3
    CROP_HEIGHT = 4
    FLAGS = 5  # Flag
    ORDER = 6  # two bits an operation, the first one lowest: brightness 0, contrast 1, saturation 2, hue 3
    BRIGHTNESS = 7  # the bits of a float32
    CONTRAST = 8
    SATURATION = 9
    HUE = 10  # of 256 steps
    RADIUS = 11  # of the blur's box; -1 without
    INSIDE = 12  # weight of its 2 RADIUS + 1 pixels, of 2^BOX_BITS
    EDGE = 13  # weight of one pixel more on either side


WIDTH = 16  # columns, the last two unused: rows of 64 bytes


class Flag(IntEnum):
    """Bits of Column.FLAGS."""

    FLIP = 1
    JITTER = 2
    GRAYSCALE = 4
    SOLARIZE = 8


def table_of(
    source: NDArray[np.int64],  # [m]
    box: NDArray[np.int64],  # [m, 4] left, top, width, height
    flip: NDArray[np.bool_],  # [m]
    jitter: NDArray[np.bool_],
    factors: NDArray[np.float64],  # [m, 4] brightness, contrast, saturation, hue
    order: NDArray[np.int64],  # [m, 4]
    grayscale: NDArray[np.bool_],  # [m]
    sigma: NDArray[np.float64],
    solarize: NDArray[np.bool_],
    *,
    out: Tensor | None = None,  # int32 [m, WIDTH] on the CPU
) -> Tensor:
    """The table, int32 [m, WIDTH] on the CPU; parameters as of `augment_views`, already checked."""
    if out is None:
        out = torch.empty((len(source), WIDTH), dtype=torch.int32)
    table = out.numpy()
    table[:, Column.SOURCE] = source
    table[:, Column.LEFT : Column.CROP_HEIGHT + 1] = box
    flags = zip(Flag, (flip, jitter, grayscale, solarize), strict=True)
    table[:, Column.FLAGS] = sum(flag * values.astype(np.int32) for flag, values in flags)
    table[:, Column.ORDER] = order @ np.array([1, 4, 16, 64])
    strengths = np.clip(factors[:, :3], -FACTOR_LIMIT, FACTOR_LIMIT).astype(np.float32)
    table[:, Column.BRIGHTNESS : Column.SATURATION + 1] = strengths.view(np.int32)
    table[:, Column.HUE] = np.trunc(factors[:, 3] * 255)
    table[:, Column.RADIUS : Column.EDGE + 1] = _boxes(sigma)
    table[:, Column.EDGE + 1 :] = 0
    return out


def _boxes(sigma: NDArray[np.float64]) -> NDArray[Any]:
    """[m, 3]: radius, inside, edge of the extended box (Gwosdek et al. 2011) of which three have variance sigma^2."""
    one, two, three, six = (np.float32(value) for value in (1, 2, 3, 6))  # float32 alone, as Pillow
    variance = sigma.astype(np.float32) ** 2 / np.float32(BLUR_PASSES)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    spread = variance - (whole + one) * (whole + one)
    rest = (two * whole + one) * (whole * (whole + one) - three * variance) / (six * spread)
    radius = whole + rest
    inner = radius.astype(np.int64)
    inside = (np.float32(1 << BOX_BITS) / (two * radius + one)).astype(np.int64)
    edge = ((1 << BOX_BITS) - (2 * inner + 1) * inside) // 2
    inner[sigma <= 0] = -1
    return np.stack((inner, inside, edge), axis=1)

"""The resize of views, for augment_triton.py.

Legend
  S  side of a view      W  width of an image      length  source pixels of a crop along an axis

Weights of source pixels have 22 bits after the point, and bytes are rounded after each of the two passes, as Pillow has
it.  Where no crop is larger than a view (`grown`, small images at their own size) pixel i of an axis lies
t / 2S = ((2i + 1) length - S) / 2S between two source pixels, so that its two weights are whole numbers by right; else
(`resized`) they are a triangle's, in float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST_GROWN = 256  # S: above, 2S weights times 2^22 leave 32 bits


@triton.jit
def _pixel(image, index, CHANNELS: tl.constexpr):
    """Red, green and blue of source pixels, int32."""
    if CHANNELS == 4:  # four bytes are one load
        four = tl.load(image + index)
        return four & 255, (four >> 8) & 255, (four >> 16) & 255
    else:
        r = tl.load(image + 3 * index).to(tl.int32)
        g = tl.load(image + 3 * index + 1).to(tl.int32)
        b = tl.load(image + 3 * index + 2).to(tl.int32)
        return r, g, b


@triton.jit
def _two_taps(i, length, S: tl.constexpr):
    """The two source pixels that pixel i of an axis lies between, and their weights; length <= S."""
    place = ((2 * i + 1) * length + S).to(tl.uint32)  # from the pixel before the first, in steps of 1 / 2S
    after = place // (2 * S)
    rest = place - after * (2 * S)
    weight = (((rest << 22) + S) // (2 * S)).to(tl.int32)
    first = tl.maximum(after.to(tl.int32) - 1, 0)
    second = tl.minimum(after.to(tl.int32), length - 1)
    return first, second, (1 << 22) - weight, weight


@triton.jit
def _rounded(total):
    return tl.minimum((total + (1 << 21)) >> 22, 255)


@triton.jit
def grown(image, x, y, left, top, width, height, W, S: tl.constexpr, CHANNELS: tl.constexpr):
    """Pixels (x, y) of a view of a crop that is no larger."""
    x0, x1, u0, u1 = _two_taps(x, width, S)
    y0, y1, v0, v1 = _two_taps(y, height, S)
    above, below = (top + y0) * W + left, (top + y1) * W + left
    r00, g00, b00 = _pixel(image, above + x0, CHANNELS)
    r01, g01, b01 = _pixel(image, above + x1, CHANNELS)
    r10, g10, b10 = _pixel(image, below + x0, CHANNELS)
    r11, g11, b11 = _pixel(image, below + x1, CHANNELS)
    r = _rounded(_rounded(r00 * u0 + r01 * u1) * v0 + _rounded(r10 * u0 + r11 * u1) * v1)
    g = _rounded(_rounded(g00 * u0 + g01 * u1) * v0 + _rounded(g10 * u0 + g11 * u1) * v1)
    b = _rounded(_rounded(b00 * u0 + b01 * u1) * v0 + _rounded(b10 * u0 + b11 * u1) * v1)
    return r, g, b


@triton.jit
def _span(i, length, S: tl.constexpr):
    """Of pixel i of an axis: step between centres' reach, centre, first source pixel and how many, total weight."""
    step = length.to(tl.float64) / S
    reach = tl.maximum(step, 1.0)
    center = (i.to(tl.float64) + 0.5) * step
    first = tl.maximum((center - reach + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + reach + 0.5).to(tl.int32), length) - first
    total = tl.zeros_like(center)
    for k in range((2 * reach).to(tl.int32) + 2):
        total += tl.where(k < count, _triangle(first + k, center, reach), 0.0)
    return reach, center, first, count, total


@triton.jit
def _triangle(k, center, reach):
    return tl.maximum(1.0 - tl.abs((k.to(tl.float64) - center + 0.5) * (1.0 / reach)), 0.0)


@triton.jit
def _weight(k, reach, center, first, count, total):
    """Of the k-th of the source pixels of `_span`, 0 behind the last."""
    exact = _triangle(first + k, center, reach) / total
    return tl.where(k < count, (exact * (1 << 22) + 0.5).to(tl.int32), 0)


@triton.jit
def resized(image, x, y, left, top, width, height, W, S: tl.constexpr, CHANNELS: tl.constexpr):
    """Pixels (x, y) of a view of any crop: along rows and then along columns, or the other way round as Pillow 13."""
    reach_x, center_x, first_x, count_x, total_x = _span(x, width, S)
    reach_y, center_y, first_y, count_y, total_y = _span(y, height, S)
    columns_first = (height > S) & (height - S > 2 * (width - S))
    taps_x, taps_y = (2 * reach_x).to(tl.int32) + 2, (2 * reach_y).to(tl.int32) + 2
    outer = tl.where(columns_first, taps_x, taps_y)
    inner = tl.where(columns_first, taps_y, taps_x)
    r, g, b = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
    for i in range(outer):
        r_line, g_line, b_line = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        for j in range(inner):
            k_x, k_y = tl.where(columns_first, i, j), tl.where(columns_first, j, i)
            from_x = left + tl.minimum(first_x + k_x, width - 1)
            from_y = top + tl.minimum(first_y + k_y, height - 1)
            red, green, blue = _pixel(image, from_y * W + from_x, CHANNELS)
            if columns_first:
                weight = _weight(k_y, reach_y, center_y, first_y, count_y, total_y)
            else:
                weight = _weight(k_x, reach_x, center_x, first_x, count_x, total_x)
            r_line += weight * red
            g_line += weight * green
            b_line += weight * blue
        if columns_first:
            weight = _weight(i, reach_x, center_x, first_x, count_x, total_x)
        else:
            weight = _weight(i, reach_y, center_y, first_y, count_y, total_y)
        r += weight * _rounded(r_line)
        g += weight * _rounded(g_line)
        b += weight * _rounded(b_line)
    return _rounded(r), _rounded(g), _rounded(b)

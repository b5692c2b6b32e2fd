"""Augmented views of images of one size on a GPU: one launch, and a second one where views are blurred.

Legend
  n  images      m  views      S  side of a view      H, W  sides of an image      p  pixel of a view, row by row

A program makes one view.  Bytes are Pillow's own after every operation (the plain form is augment_torch.py, the native
one csrc/augment.cpp): whole numbers, or float32 rounded as there, so no product is contracted with a sum
(enable_fp_fusion).

Contrast needs the mean of the whole view at its place among the colour operations.  A view of at most `MOST_WHOLE`
pixels is held by its program; a larger one is made twice, tile by tile: for the mean, then for the pixels.

A blur is three passes of a box along rows and three along columns, each on the bytes of the one before, which lie in
global memory: its kernel reads what the first one wrote, and a barrier separates passes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.augment_table import WIDTH, Column, Flag
from kernels.resample_triton import LARGEST_GROWN, grown, resized

MOST_WHOLE = 4096  # pixels of a view that its program holds; 16384 (96 px) would spill
TILE = 2048  # pixels of a larger view that are worked on at once
PIXELS_A_THREAD = 8
MOST_WARPS = 16
LARGEST = 2048  # S: above, twice the sum of a view's luminances leaves 32 bits

_WIDTH = tl.constexpr(WIDTH)
_FLIP, _JITTER, _GRAYSCALE, _SOLARIZE = (tl.constexpr(int(flag)) for flag in Flag)
(
    _SOURCE,
    _LEFT,
    _TOP,
    _CROP_WIDTH,
    _CROP_HEIGHT,
    _FLAGS,
    _ORDER,
    _BRIGHTNESS,
    _CONTRAST,
    _SATURATION,
    _HUE,
    _RADIUS,
    _INSIDE,
    _EDGE,
) = (tl.constexpr(int(column)) for column in Column)


# -- colours ---------------------------------------------------------------------------------------------------------


@triton.jit
def _clipped(v):
    return tl.minimum(tl.maximum(v, 0), 255)


@triton.jit
def _blended(low, v, factor):
    """low + factor (v - low), truncated; `low` and `v` whole numbers."""
    low = low.to(tl.float32)
    return _clipped((low + factor * (v.to(tl.float32) - low)).to(tl.int32))


@triton.jit
def _luminance(r, g, b):
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


@triton.jit
def _shaded(value, step, share):
    """A channel: `share` steps of 255 taken off the value."""
    return ((value + 0.5) - step * _clipped(share).to(tl.float32)).to(tl.int32)


@triton.jit
def _hue(r, g, b, turn):
    """To hue, saturation and value in bytes, and back; divisions are rounded one by one, as Pillow's."""
    value = tl.maximum(r, tl.maximum(g, b))
    spread = value - tl.minimum(r, tl.minimum(g, b))
    ahead = tl.where(r == value, g - b, tl.where(g == value, b - r, r - g))
    base = tl.where(r == value, 0, tl.where(g == value, 2, 4))
    sign = tl.where(ahead < 0, -1, 1)
    middle = tl.div_rn((spread - tl.abs(ahead)).to(tl.float32), tl.maximum(spread, 1).to(tl.float32))
    sixth = tl.div_rn((base + sign).to(tl.float32) - sign.to(tl.float32) * middle, 6.0)
    steps = ((sixth + tl.where(sixth < 0, 1.0, 0.0)) * 255.0).to(tl.int32)
    saturation = tl.div_rn((255 * spread).to(tl.float32), tl.maximum(value, 1).to(tl.float32)).to(tl.int32)
    turned = 6 * ((steps + turn) & 255)
    bright = value.to(tl.float32)
    step = bright * saturation.to(tl.float32) * (1.0 / 65025)
    red = _shaded(bright, step, tl.minimum(turned - 255, 1275 - turned))
    green = _shaded(bright, step, tl.maximum(255 - turned, turned - 765))
    blue = _shaded(bright, step, tl.maximum(765 - turned, turned - 1275))
    return red, green, blue


@triton.jit
def _factor(row, column):
    return tl.load(row + column).to(tl.float32, bitcast=True)


@triton.jit
def _mean(r, g, b, inside, PIXELS: tl.constexpr):
    """The mean luminance of all pixels of a view, to the nearest whole number."""
    total = tl.sum(tl.where(inside, _luminance(r, g, b), 0))
    return (2 * total + PIXELS) // (2 * PIXELS)


@triton.jit
def _jittered(r, g, b, row, inside, mean, until_contrast: tl.constexpr, held: tl.constexpr, PIXELS: tl.constexpr):
    """The four colour operations in the order of the view; `held`: these are all its pixels, else `mean` is given.

    `until_contrast` stops before it.
    """
    order = tl.load(row + _ORDER)
    going = True
    for slot in range(4):
        operation = (order >> (2 * slot)) & 3
        if until_contrast:
            going = going & (operation != 1)
        if going:
            if operation == 0:
                factor = _factor(row, _BRIGHTNESS)
                zero = tl.zeros_like(r)
                r, g, b = _blended(zero, r, factor), _blended(zero, g, factor), _blended(zero, b, factor)
            elif operation == 1:
                factor = _factor(row, _CONTRAST)
                low = mean
                if held:
                    low = _mean(r, g, b, inside, PIXELS)
                low = tl.zeros_like(r) + low
                r, g, b = _blended(low, r, factor), _blended(low, g, factor), _blended(low, b, factor)
            elif operation == 2:
                factor = _factor(row, _SATURATION)
                grey = _luminance(r, g, b)
                r, g, b = _blended(grey, r, factor), _blended(grey, g, factor), _blended(grey, b, factor)
            else:
                r, g, b = _hue(r, g, b, tl.load(row + _HUE))
    return r, g, b


# -- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _store(out, statistics, p, inside, r, g, b, solarize):
    """Normalises and writes pixels; `statistics`: scale and shift of each channel."""
    if solarize:
        r, g, b = tl.where(r < 128, r, 255 - r), tl.where(g < 128, g, 255 - g), tl.where(b < 128, b, 255 - b)
    kind = out.dtype.element_ty
    red = r.to(tl.float32) * tl.load(statistics) + tl.load(statistics + 3)
    green = g.to(tl.float32) * tl.load(statistics + 1) + tl.load(statistics + 4)
    blue = b.to(tl.float32) * tl.load(statistics + 2) + tl.load(statistics + 5)
    tl.store(out + 3 * p, red.to(kind), mask=inside)
    tl.store(out + 3 * p + 1, green.to(kind), mask=inside)
    tl.store(out + 3 * p + 2, blue.to(kind), mask=inside)


@triton.jit
def _source_pixels(images, row, p, H, W, S: tl.constexpr, CHANNELS: tl.constexpr, GROW: tl.constexpr):
    """The resized pixels p of a view."""
    words: tl.constexpr = 1 if CHANNELS == 4 else 3
    image = images + tl.load(row + _SOURCE).to(tl.int64) * (H * W * words)
    left, top = tl.load(row + _LEFT), tl.load(row + _TOP)
    width, height = tl.load(row + _CROP_WIDTH), tl.load(row + _CROP_HEIGHT)
    y = tl.minimum(p // S, S - 1)
    x = p % S
    x = tl.where((tl.load(row + _FLAGS) & _FLIP) != 0, S - 1 - x, x)
    if GROW:
        return grown(image, x, y, left, top, width, height, W, S, CHANNELS)
    else:
        return resized(image, x, y, left, top, width, height, W, S, CHANNELS)


@triton.jit
def _views_kernel(
    images,  # uint8 [n, H, W, 3], or its pixels of four bytes as int32 [n, H, W]
    table,  # int32 [m, WIDTH]
    statistics,  # float32 [6]
    out,  # [m, S, S, 3]
    passes,  # uint8 [2, m, S, S, 3]: views to be blurred go to the first half; unused without BLUR
    H, W,
    S: tl.constexpr, CHANNELS: tl.constexpr, GROW: tl.constexpr, BLUR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = S * S
    view = tl.program_id(0).to(tl.int64)
    row = table + view * _WIDTH
    flags = tl.load(row + _FLAGS)
    jitter, gray, solarize = (flags & _JITTER) != 0, (flags & _GRAYSCALE) != 0, (flags & _SOLARIZE) != 0
    held: tl.constexpr = BLOCK >= PIXELS
    mean = 0
    if not held:  # noqa: SIM102  this one is the compiler's
        if jitter:
            total = 0
            for start in range(0, PIXELS, BLOCK):
                p = start + tl.arange(0, BLOCK)
                r, g, b = _source_pixels(images, row, p, H, W, S, CHANNELS, GROW)
                r, g, b = _jittered(r, g, b, row, p < PIXELS, 0, True, False, PIXELS)
                total += tl.sum(tl.where(p < PIXELS, _luminance(r, g, b), 0))
            mean = (2 * total + PIXELS) // (2 * PIXELS)
    for start in range(0, PIXELS, BLOCK):
        p = start + tl.arange(0, BLOCK)
        inside = p < PIXELS
        r, g, b = _source_pixels(images, row, p, H, W, S, CHANNELS, GROW)
        if jitter:
            r, g, b = _jittered(r, g, b, row, inside, mean, False, held, PIXELS)
        if gray:
            r = _luminance(r, g, b)
            g, b = r, r
        blurred = False
        if BLUR:
            blurred = tl.load(row + _RADIUS) >= 0
        if blurred:
            own = passes + view * (3 * PIXELS) + 3 * p
            tl.store(own, r.to(tl.uint8), mask=inside)
            tl.store(own + 1, g.to(tl.uint8), mask=inside)
            tl.store(own + 2, b.to(tl.uint8), mask=inside)
        else:
            _store(out + view * (3 * PIXELS), statistics, p, inside, r, g, b, solarize)


@triton.jit
def _boxed(line, start, step, i, radius, inside, edge, S: tl.constexpr):
    """One pass at place i of lines of S bytes, `step` apart; outside of a line stands its nearest byte."""
    total = tl.zeros_like(i)
    for d in range(-radius, radius + 1):
        total += tl.load(line + start + step * tl.minimum(tl.maximum(i + d, 0), S - 1)).to(tl.int32)
    before = tl.load(line + start + step * tl.maximum(i - radius - 1, 0)).to(tl.int32)
    after = tl.load(line + start + step * tl.minimum(i + radius + 1, S - 1)).to(tl.int32)
    weighed = total.to(tl.uint32) * inside + (before + after).to(tl.uint32) * edge
    return ((weighed + (1 << 23)) >> 24).to(tl.int32)


@triton.jit
def _blur_kernel(
    table,  # int32 [m, WIDTH]
    statistics,  # float32 [6]
    out,  # [m, S, S, 3]
    passes,  # uint8 [2, m, S, S, 3], the first half written
    half,  # elements of a half
    S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = S * S
    view = tl.program_id(0).to(tl.int64)
    row = table + view * _WIDTH
    radius = tl.load(row + _RADIUS)
    if radius < 0:
        return
    weight, edge = tl.load(row + _INSIDE).to(tl.uint32), tl.load(row + _EDGE).to(tl.uint32)
    solarize = (tl.load(row + _FLAGS) & _SOLARIZE) != 0
    source = passes + view * (3 * PIXELS)
    for number in range(6):
        there = source + (number % 2) * half
        back = source + (1 - number % 2) * half
        for start in range(0, PIXELS, BLOCK):
            p = start + tl.arange(0, BLOCK)
            inside = p < PIXELS
            y, x = tl.minimum(p // S, S - 1), p % S
            along_rows = number < 3
            first = tl.where(along_rows, 3 * S * y, 3 * x)
            step = tl.where(along_rows, 3, 3 * S)
            i = tl.where(along_rows, x, y)
            r = _boxed(there, first, step, i, radius, weight, edge, S)
            g = _boxed(there, first + 1, step, i, radius, weight, edge, S)
            b = _boxed(there, first + 2, step, i, radius, weight, edge, S)
            if number < 5:
                tl.store(back + 3 * p, r.to(tl.uint8), mask=inside)
                tl.store(back + 3 * p + 1, g.to(tl.uint8), mask=inside)
                tl.store(back + 3 * p + 2, b.to(tl.uint8), mask=inside)
            else:
                _store(out + view * (3 * PIXELS), statistics, p, inside, r, g, b, solarize)
        tl.debug_barrier()


# -- launcher --------------------------------------------------------------------------------------------------------


def launch(
    images: Tensor,  # uint8 [n, H, W, C], C 3 or 4, contiguous
    table: Tensor,  # int32 [m, WIDTH]
    statistics: Tensor,  # float32 [6]: scale and shift of each channel
    out: Tensor,  # [m, 3, S, S], channels_last strides
    *,
    blur: bool,  # whether any view may be blurred
    passes: Tensor | None = None,  # uint8 [2, m, S, S, 3], of any content; only for a blur
) -> None:
    """Writes the views of `table` to `out`; nothing here waits for the device, and all of it can be captured.

    Raises ValueError: views larger than LARGEST.
    """
    m, _, S, _ = out.shape
    if S > LARGEST:
        raise ValueError(f"size: the GPU's kernels make views of up to {LARGEST} px, found {S}; use backend='torch'")
    if m == 0:
        return
    _, H, W, channels = images.shape
    if channels == 4:
        images = images.view(torch.int32)
    pixels = S * S
    block = triton.next_power_of_2(pixels) if pixels <= MOST_WHOLE else TILE
    warps = min(MOST_WARPS, max(1, block // (32 * PIXELS_A_THREAD)))
    if blur and passes is None:
        passes = torch.empty((2, m, S, S, 3), dtype=torch.uint8, device=out.device)
    flat = out.permute(0, 2, 3, 1)
    small = min(block, TILE)
    with torch.cuda.device_of(out):  # Triton launches on the current one
        _views_kernel[(m,)](
            images, table, statistics, flat, passes if blur else table, H, W,
            S=S, CHANNELS=channels, GROW=max(H, W) <= S <= LARGEST_GROWN, BLUR=blur, BLOCK=block,
            num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
        if blur:
            assert passes is not None
            _blur_kernel[(m,)](
                table, statistics, flat, passes, passes[0].numel(),
                S=S, BLOCK=small, num_warps=min(8, max(1, small // (32 * PIXELS_A_THREAD))), enable_fp_fusion=False,
            )  # fmt: skip

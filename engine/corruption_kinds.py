"""What each corruption does to images, and the random fields, kernels and resampling that they are made of.

Legend
  n  images     H, W  their sides in pixels     S  = min(H, W)     C  channels     K  uniform numbers an image
  x  pixels in [0, 1]     y  corrupted pixels, not yet clipped     u  uniform in [0, 1)     * is convolution

Lengths are shares of S, and random fields lie on grids of cells that are shares of S too, so that an image is hurt
alike at any size.  Noise, a number a pixel, and JPEG, whose blocks are 8 px, have no such length.

Whatever depends on an image must not depend on those beside it, to the bit: sums over pixels are of integers, and all
else is done pixel by pixel or line by line.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Images = NDArray[np.uint8]  # [n, H, W, 3]
Pixels = NDArray[np.floating[Any]]  # [n, H, W, C]
Draw = Callable[[int], NDArray[np.float64]]  # K -> [n, K] uniform numbers in [0, 1), the same at every severity

FINEST = 32  # cells along S of the finest fields: a pixel each at 32 px
FLAKE_GAIN = 1.6  # what streaks lose in brightness when a flake is drawn out
AIRLIGHT = np.array([0.88, 0.9, 0.92], np.float32)  # of fog
ICE = np.array([0.84, 0.92, 1.0], np.float32)
SUBSAMPLES = 8  # a pixel's side, for the share of it that a disc covers


# Noise.


def gaussian_noise(images: Images, sigma: float, draw: Draw) -> Pixels:
    """y = x + sigma e with e standard normal, for every value."""
    count = math.prod(images.shape[1:])
    u = draw(2 * ((count + 1) // 2)).reshape(len(images), 2, -1)
    # Box & Muller 1958: two normals of two uniforms.  1 - u is never 0.
    length, angle = np.sqrt(-2.0 * np.log(1.0 - u[:, 0])), 2.0 * math.pi * u[:, 1]
    normals = np.concatenate((length * np.cos(angle), length * np.sin(angle)), axis=1)[:, :count]
    return _unit(images) + np.float32(sigma) * normals.reshape(images.shape).astype(np.float32)


def shot_noise(images: Images, photons: float, draw: Draw) -> Pixels:
    """y = k / c with k ~ Poisson(c x), for every value: c photons make white."""
    # The least k whose distribution function exceeds u.  One sorted list for all 256 values: v + P(k' <= k | v).
    longest = math.ceil(photons + 8.0 * math.sqrt(photons) + 8.0)
    mean = photons * np.arange(256)[:, None] / 255.0
    ratios = np.concatenate((np.ones((256, 1)), mean / np.arange(1, longest)), axis=1)
    below = np.minimum(np.cumsum(np.exp(-mean) * np.cumprod(ratios, axis=1), axis=1), 1.0)
    below[:, -1] = 1.0
    values = images.reshape(len(images), -1).astype(np.int64)
    counts = np.searchsorted((below + np.arange(256)[:, None]).ravel(), values + draw(values.shape[1]), side="right")
    return ((counts - longest * values) / photons).reshape(images.shape)


def impulse_noise(images: Images, share: float, draw: Draw) -> Pixels:
    """This share of the pixels is black or white, half of them each: u < p / 2 and u >= 1 - p / 2."""
    u = draw(math.prod(images.shape[1:3])).reshape(*images.shape[:3], 1)
    return np.where(u < share / 2, 0.0, np.where(u >= 1.0 - share / 2, 1.0, _unit(images)))


# Blur.


def defocus_blur(images: Images, radius: float, draw: Draw) -> Pixels:
    """y = x * a disc of this radius."""
    return _convolved(_unit(images), _disc(radius * _shorter(images))[None])


def glass_blur(images: Images, reach: float, draw: Draw) -> Pixels:
    """y = G * x(p + d(p)): every facet of the glass shows another place up to `reach` away along each axis, and what is
    seen is softened by a Gaussian G of 0.7 reach."""
    S = _shorter(images)
    cells = _cells(images, FINEST)
    facets = draw(2 * math.prod(cells)).reshape(len(images), *cells, 2)
    rows, columns = (_nearest(side, count) for side, count in zip(images.shape[1:3], cells, strict=True))
    shift = (2.0 * facets[:, rows][:, :, columns] - 1.0) * (reach * S)
    return _convolved(_displaced(_unit(images), shift), _gaussian(0.7 * reach * S)[None])


def motion_blur(images: Images, length: float, draw: Draw) -> Pixels:
    """y = x * a line of this length, in a direction of the image's own."""
    return _convolved(_unit(images), _lines(length * _shorter(images), math.pi * draw(1)[:, 0]))


def zoom_blur(images: Images, excess: float, draw: Draw) -> Pixels:
    """y = the mean of x seen at zooms from 1 to 1 + `excess`, so many that the border moves a pixel from one to the
    next."""
    x, (H, W) = _unit(images), images.shape[1:3]
    zooms = np.linspace(1.0, 1.0 + excess, 2 + int(excess * max(H, W) / 2))
    total = np.zeros_like(x)
    for zoom in zooms:
        total += _resampled(x, _zoomed(H, zoom), _zoomed(W, zoom))
    return total / len(zooms)


# Weather.


def snow(images: Images, share: float, draw: Draw) -> Pixels:
    """y = x + (1 - x) f: flakes f fall in this share of the cells, drawn out along the image's wind."""
    cells = _cells(images, FINEST)
    u = draw(1 + math.prod(cells))
    flakes = np.clip(1.0 - (1.0 - u[:, 1:]) / share, 0.0, 1.0).reshape(len(images), *cells, 1)
    angle = math.pi * (0.5 + (u[:, 0] - 0.5) / 2.0)  # 45 degrees to either side of straight down
    streaks = _convolved(_grown(np.sqrt(flakes), images), _lines(0.07 * _shorter(images), angle))
    x = _unit(images)
    return x + (1.0 - x) * np.clip(FLAKE_GAIN * streaks, 0.0, 1.0)


def frost(images: Images, cover: float, draw: Draw) -> Pixels:
    """y = x + a (ice - x), a = min(1, cover m): m are needles, the ridges of a fractal field, more at the borders."""
    field = _fractal(images, (4, 8, 16, FINEST), draw)
    needles = np.exp(-((np.abs(field - 0.5) / 0.06) ** 2))
    # 0 in the middle, 1 at the borders: the crystals grow from there.
    down, across = (np.abs(2.0 * (np.arange(side) + 0.5) / side - 1.0) for side in images.shape[1:3])
    border = np.maximum(down[:, None], across[None, :]).astype(np.float32)[None, :, :, None]
    mask = (0.15 + 0.85 * border) * (0.35 * field + 0.65 * needles)
    x = _unit(images)
    return x + np.minimum(cover * mask, 1.0) * (ICE - x)


def fog(images: Images, density: float, draw: Draw) -> Pixels:
    """y = x t + A (1 - t), t = exp(-density d): light A that the air scatters (Koschmieder's law) over depths d, a
    fractal field of mean 1."""
    through = np.exp(-density * 2.0 * _fractal(images, (2, 4, 8, 16), draw))
    return _unit(images) * through + AIRLIGHT * (1.0 - through)


def brightness(images: Images, stops: float, draw: Draw) -> Pixels:
    """y = 2^stops x: exposed longer, as photographers count it."""
    return _unit(images) * np.float32(2.0**stops)


# Digital.


def contrast(images: Images, share: float, draw: Draw) -> Pixels:
    """y = m + share (x - m), m the mean of all of the image's values."""
    mean = images.reshape(len(images), -1).mean(axis=1) / 255.0  # float64 sums of bytes are exact
    mean = mean.astype(np.float32)[:, None, None, None]
    return mean + np.float32(share) * (_unit(images) - mean)


def elastic(images: Images, reach: float, draw: Draw) -> Pixels:
    """y(p) = x(p + d(p)): d varies smoothly over five cells, up to `reach` along each axis."""
    cells = _cells(images, 5)
    field = draw(2 * math.prod(cells)).reshape(len(images), *cells, 2)
    return _displaced(_unit(images), _grown(2.0 * field - 1.0, images) * (reach * _shorter(images)))


def pixelate(images: Images, blocks: float, draw: Draw) -> Pixels:
    """y = the mean of x over blocks, so many along S."""
    x, area, where = images, np.ones((1, *images.shape[1:3], 1)), []
    for axis, count in zip((1, 2), _cells(images, int(blocks)), strict=True):
        side = images.shape[axis]
        block = np.arange(side) * min(count, side) // side  # of every line
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        x, area = (np.add.reduceat(a, starts, axis=axis, dtype=np.float64) for a in (x, area))
        where.append(block)
    return (x / (255.0 * area))[:, where[0]][:, :, where[1]]


def jpeg(images: Images, quality: float, draw: Draw) -> Pixels:
    """y = x after JPEG at this quality (Pillow's encoder, half as many colours along each axis)."""
    out = np.empty_like(images)
    for image, decoded in zip(images, out, strict=True):
        with io.BytesIO() as file:
            Image.fromarray(image).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
            decoded[:] = np.asarray(Image.open(file))
    return _unit(out)


# Sides, cells and fields.


def _unit(images: Images) -> Pixels:
    return images.astype(np.float32) / np.float32(255.0)


def _shorter(images: Images) -> int:
    return min(images.shape[1:3])


def _cells(images: Images, along: int) -> tuple[int, int]:
    """Cells down and across where `along` of them lie along S."""
    down, across = (max(1, round(along * side / _shorter(images))) for side in images.shape[1:3])
    return down, across


def _nearest(side: int, cells: int) -> NDArray[np.int64]:
    """The cell of every pixel's centre."""
    return (2 * np.arange(side) + 1) * cells // (2 * side)


def _grown(field: Pixels, images: Images) -> Pixels:
    """A field of cells [n, h, w, C] -> [n, H, W, C]: the cells' values at their centres, eased between them."""
    down, across = (
        (np.arange(side) + 0.5) * cells / side - 0.5
        for side, cells in zip(images.shape[1:3], field.shape[1:3], strict=True)
    )
    return _resampled(field.astype(np.float32), down, across, ease=True)


def _fractal(images: Images, octaves: tuple[int, ...], draw: Draw) -> Pixels:
    """[n, H, W, 1] in [0, 1): fields of so many cells along S, each of half the weight of the one before."""
    cells = [_cells(images, octave) for octave in octaves]
    ends = list(itertools.accumulate(math.prod(c) for c in cells))
    parts = np.split(draw(ends[-1]), ends[:-1], axis=1)
    total, weights = np.zeros((len(images), *images.shape[1:3], 1), np.float32), [0.5**k for k in range(len(octaves))]
    for part, (down, across), weight in zip(parts, cells, weights, strict=True):
        total += np.float32(weight / sum(weights)) * _grown(part.reshape(-1, down, across, 1), images)
    return total


# Kernels, each of sum 1.  Discs and lines have the variance of their shape with that of a pixel, 1 / 12 along an axis,
# taken out, or small images would be blurred more than large ones.


def _convolved(x: Pixels, kernels: Pixels) -> Pixels:
    """x * kernels [n or 1, k, k], images mirrored at their borders; by Fourier transforms, whatever the size of k."""
    (H, W), reach = x.shape[1:3], kernels.shape[-1] // 2
    channels = np.ascontiguousarray(np.moveaxis(x, -1, 1), np.float32)
    padded = np.pad(channels, ((0, 0), (0, 0), (reach, reach), (reach, reach)), mode="symmetric")
    size = [_fast(H + 2 * reach), _fast(W + 2 * reach)]
    spectrum = np.fft.rfft2(padded, size) * np.fft.rfft2(kernels.astype(np.float32), size)[:, None]
    inside = np.fft.irfft2(spectrum, size)[:, :, 2 * reach : 2 * reach + H, 2 * reach : 2 * reach + W]
    return np.ascontiguousarray(np.moveaxis(inside, 1, -1))


def _fast(length: int) -> int:
    """The next length that has no factor above 5."""
    while True:
        rest = length
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return length
        length += 1


def _disc(radius: float) -> Pixels:
    """[k, k]: the share of every pixel that a disc covers."""
    radius = math.sqrt(max(radius**2 - 4 / 12, 0.25))  # variance r^2 / 4; 1 / 2 is the middle pixel alone
    reach = math.ceil(radius)
    k = 2 * reach + 1
    at = (np.arange(k * SUBSAMPLES) + 0.5) / SUBSAMPLES - k / 2
    inside = at[:, None] ** 2 + at**2 <= radius**2
    kernel = inside.reshape(k, SUBSAMPLES, k, SUBSAMPLES).mean(axis=(1, 3))
    return kernel / kernel.sum()


def _gaussian(sigma: float) -> Pixels:
    """[k, k], k for three sigma to either side."""
    at = np.arange(-math.ceil(3.0 * sigma), math.ceil(3.0 * sigma) + 1)
    line = np.exp(-0.5 * (at / sigma) ** 2)
    return line[:, None] * line / line.sum() ** 2


def _lines(length: float, angles: NDArray[np.float64]) -> Pixels:
    """[n, k, k]: lines through the middle, a pixel wide, in these directions."""
    length = math.sqrt(max(length**2 - 12 / 12, 0.0))  # variance l^2 / 12
    at = np.arange(-math.ceil(length / 2), math.ceil(length / 2) + 1)
    cos, sin = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    along, across = at * cos + at[:, None] * sin, at[:, None] * cos - at * sin
    kernels = np.clip(length / 2 + 0.5 - np.abs(along), 0.0, 1.0) * np.clip(1.0 - np.abs(across), 0.0, 1.0)
    return kernels / kernels.sum(axis=(1, 2), keepdims=True)


# Resampling; places beyond the borders show the border.


def _zoomed(side: int, zoom: float) -> Pixels:
    """Where the pixels of a line lie in one that is seen `zoom` times as large."""
    middle = (side - 1) / 2
    return middle + (np.arange(side) - middle) / zoom


def _resampled(x: Pixels, down: Pixels, across: Pixels, ease: bool = False) -> Pixels:
    """x at the rows `down` and the columns `across`, linearly between pixels, or eased by 3 f^2 - 2 f^3."""
    for axis, at in ((1, down), (2, across)):
        low = np.clip(np.floor(at), 0, x.shape[axis] - 1).astype(np.int64)
        f = np.clip(at - low, 0.0, 1.0).astype(np.float32)
        f = f * f * (3.0 - 2.0 * f) if ease else f
        a, b = x.take(low, axis), x.take(np.minimum(low + 1, x.shape[axis] - 1), axis)
        x = a + f.reshape([-1 if k == axis else 1 for k in range(4)]) * (b - a)
    return x


def _displaced(x: Pixels, shift: Pixels) -> Pixels:
    """x(p + shift(p)), shift [n, H, W, 2] in pixels down and across, bilinear."""
    n, H, W, C = x.shape
    at = np.mgrid[:H, :W].transpose(1, 2, 0) + shift
    at = np.clip(at, 0.0, [H - 1.0, W - 1.0])
    low = at.astype(np.int64)
    f = (at - low).astype(np.float32)
    top = (np.arange(n)[:, None, None] * H + low[..., 0]) * W
    bottom = top + W * (low[..., 0] < H - 1)
    left, right = low[..., 1], low[..., 1] + (low[..., 1] < W - 1)
    flat = x.reshape(-1, C)
    upper, lower = ((1.0 - f[..., 1:]) * flat[row + left] + f[..., 1:] * flat[row + right] for row in (top, bottom))
    return (1.0 - f[..., :1]) * upper + f[..., :1] * lower

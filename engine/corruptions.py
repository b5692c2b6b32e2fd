"""Common corruptions of images at five severities: how much accuracy a backbone keeps when pictures get worse.

Legend
  n  images      H, W  their sides in pixels      S  = min(H, W)

These corruptions are this project's own: their kinds follow the taxonomy of Hendrycks & Dietterich 2019, arXiv
1903.12261, but what each does (engine/corruption_kinds.py) and how strong it is at each severity (the table below) were
made here, so that numbers are **not comparable with CIFAR-10-C or ImageNet-C**.

The random numbers of an image come from a counter-based generator keyed by (seed, kind) with the image's index as
counter: an image is corrupted the same way whatever batch it is in.  Its severities share them, so that they differ in
strength alone.  Made for sides from 32 px.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine import corruption_kinds as kinds
from kernels.philox import philox_uniforms

SEVERITIES = (1, 2, 3, 4, 5)
STREAM = 2  # of the generator: 0 and 1 are views and orders (engine/data/augment.py)
PART = 2**16  # pixels of the images that are corrupted together: their working memory stays in the cache


class Kind(NamedTuple):
    """One corruption."""

    group: str
    apply: Callable[[kinds.Images, float, kinds.Draw], kinds.Pixels]
    levels: tuple[float, float, float, float, float]  # what `apply` is given at each severity


KINDS = {
    # standard deviation, of values in [0, 1]
    "gaussian_noise": Kind("noise", kinds.gaussian_noise, (0.03, 0.05, 0.085, 0.13, 0.19)),
    # photons of a white value
    "shot_noise": Kind("noise", kinds.shot_noise, (200, 90, 42, 20, 10)),
    # share of the pixels
    "impulse_noise": Kind("noise", kinds.impulse_noise, (0.01, 0.025, 0.05, 0.1, 0.18)),
    # radius as a share of S
    "defocus_blur": Kind("blur", kinds.defocus_blur, (0.036, 0.047, 0.061, 0.079, 0.102)),
    # reach along each axis as a share of S
    "glass_blur": Kind("blur", kinds.glass_blur, (0.022, 0.029, 0.038, 0.05, 0.066)),
    # length as a share of S
    "motion_blur": Kind("blur", kinds.motion_blur, (0.09, 0.125, 0.165, 0.215, 0.28)),
    # zoom beyond 1
    "zoom_blur": Kind("blur", kinds.zoom_blur, (0.08, 0.14, 0.21, 0.29, 0.4)),
    # share of the cells with a flake
    "snow": Kind("weather", kinds.snow, (0.04, 0.075, 0.12, 0.18, 0.26)),
    # opacity at the thickest needles, before it is cut at 1
    "frost": Kind("weather", kinds.frost, (0.35, 0.55, 0.8, 1.1, 1.5)),
    # optical depth on average
    "fog": Kind("weather", kinds.fog, (0.25, 0.42, 0.65, 0.95, 1.35)),
    # stops of exposure
    "brightness": Kind("weather", kinds.brightness, (0.25, 0.45, 0.65, 0.9, 1.2)),
    # share of the contrast that is left
    "contrast": Kind("digital", kinds.contrast, (0.7, 0.5, 0.35, 0.22, 0.12)),
    # reach along each axis as a share of S
    "elastic": Kind("digital", kinds.elastic, (0.02, 0.032, 0.047, 0.065, 0.09)),
    # blocks along S
    "pixelate": Kind("digital", kinds.pixelate, (20, 15, 12, 9, 7)),
    # Pillow's quality
    "jpeg": Kind("digital", kinds.jpeg, (50, 30, 19, 12, 8)),
}
CORRUPTIONS = {name: kind.group for name, kind in KINDS.items()}  # name -> noise, blur, weather or digital


def corrupt(images: kinds.Images, name: str, severity: int, *, seed: int, first: int = 0) -> NDArray[np.uint8]:
    """Images uint8 [n, H, W, 3] corrupted, as new ones; the first has index `first` in its data set.

    A function of image, name, severity, seed and index.  Raises ValueError naming the argument that is wrong.
    """
    _check(images, name, severity, seed, first)
    n, H, W, _ = images.shape
    kind, key = KINDS[name], (seed, zlib.crc32(name.encode()))  # not its place in the table, which may change
    out, part = np.empty(images.shape, np.uint8), max(1, PART // (H * W))
    for i in range(0, n, part):
        some = np.ascontiguousarray(images[i : i + part])
        draw = partial(_uniforms, key, first + i + np.arange(len(some)))
        pixels = kind.apply(some, kind.levels[severity - 1], draw)
        out[i : i + part] = np.rint(255.0 * np.clip(pixels, 0.0, 1.0))
    return out


def _uniforms(key: tuple[int, int], indices: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    return philox_uniforms(key, indices, stream=STREAM, count=count)


def _check(images: kinds.Images, name: str, severity: int, seed: int, first: int) -> None:
    if name not in KINDS:
        raise ValueError(f"name: one of {', '.join(KINDS)} is expected, found {name!r}")
    if not isinstance(severity, int | np.integer) or severity not in SEVERITIES:
        raise ValueError(f"severity: a whole number from 1 to 5 is expected, found {severity!r}")
    found = f"{getattr(images, 'dtype', type(images).__name__)} {list(getattr(images, 'shape', ()))}"
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise ValueError(f"images: a uint8 array is expected, found {found}")
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:]:
        raise ValueError(f"images: [n, H, W, 3] is expected, found {found}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: 0 to 2^63 - 1 is expected, found {seed}")
    if not 0 <= first < 2**63 - len(images):
        raise ValueError(f"first: an index from 0 up is expected, found {first}")

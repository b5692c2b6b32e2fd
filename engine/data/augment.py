"""The augmentation policy: what a random view is, for every loader.

Legend
  n  views drawn together      K  uniform numbers a view      S  side of a view in pixels

A policy turns K uniform numbers a view into its parameters (`draw`), and applies them (`apply`).  The numbers of an
image's views come from a counter-based generator keyed by (seed, epoch) with the image's index as counter (Philox,
Salmon et al. 2011), so that a view depends on nothing else: not on workers, ranks or the batch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode

from engine.data_config import AugmentConfig
from kernels.philox import philox_uniforms

Array = NDArray[np.floating]
Range = tuple[float, float]

BLUR_FROM_PX = 100  # below this the authors' code leaves the blur out: it removes what little detail there is
CROP_TRIES = 10  # as torchvision's RandomResizedCrop
ORDERS = np.array(list(itertools.permutations(range(4))))  # [24, 4] orders of the four colour operations
UNIFORMS = 2 * CROP_TRIES + 13  # K

# Channel mean and standard deviation by view side, as in the authors' code; any other side: ImageNet's.
STATISTICS = {
    32: ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
    64: ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
    96: ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class ViewParams(NamedTuple):
    """Parameters of n views; each array has n rows."""

    box: NDArray[np.int64]  # [n, 4] crop: left, top, width, height in source pixels
    flip: NDArray[np.bool_]  # [n]
    jitter: NDArray[np.bool_]  # [n]
    factors: Array  # [n, 4] brightness, contrast, saturation, hue
    order: NDArray[np.int64]  # [n, 4] order of the four, by index
    grayscale: NDArray[np.bool_]  # [n]
    sigma: Array  # [n] of the Gaussian blur in view pixels, 0 without
    solarize: NDArray[np.bool_]  # [n]


@dataclass(frozen=True)
class AugmentPolicy:
    """Random-resized crop, flip, colour jitter in random order, greyscale, blur, solarise, normalise.

    Probabilities `flip`, `jitter`, `grayscale`, `blur`, `solarize`; strengths as in AugmentConfig.
    """

    size: int
    crop_scale: Range
    crop_ratio: Range
    flip: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    grayscale: float
    blur: float
    blur_sigma: Range
    solarize: float

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Channel mean and standard deviation that views are normalised with, of values in [0, 1]."""
        return STATISTICS.get(self.size, IMAGENET_STATISTICS)

    def draw(self, uniforms: Array, widths: Array, heights: Array) -> ViewParams:
        """Parameters of n views from uniforms [n, K] in [0, 1) and the source sizes in pixels, [n] each."""
        area, ratio, u = np.split(uniforms, (CROP_TRIES, 2 * CROP_TRIES), axis=1)
        strengths = np.array([self.brightness, self.contrast, self.saturation])
        low, high = np.maximum(0.0, 1.0 - strengths), 1.0 + strengths
        color = low + (high - low) * u[:, 4:7]
        hue = self.hue * (2.0 * u[:, 7:8] - 1.0)
        sigma = self.blur_sigma[0] + (self.blur_sigma[1] - self.blur_sigma[0]) * u[:, 11]
        return ViewParams(
            box=self._crop(area, ratio, u[:, 0], u[:, 1], widths, heights),
            flip=u[:, 2] < self.flip,
            jitter=u[:, 3] < self.jitter,
            factors=np.concatenate((color, hue), axis=1),
            order=ORDERS[(u[:, 8] * len(ORDERS)).astype(np.int64)],
            grayscale=u[:, 9] < self.grayscale,
            sigma=np.where(u[:, 10] < self.blur, sigma, 0.0),
            solarize=u[:, 12] < self.solarize,
        )

    def _crop(
        self, area: Array, ratio: Array, left: Array, top: Array, widths: Array, heights: Array
    ) -> NDArray[np.int64]:
        """The first of the tries that fits, else the largest central crop within the ratios (as torchvision does)."""
        source_w, source_h = widths[:, None], heights[:, None]
        target = source_w * source_h * (self.crop_scale[0] + (self.crop_scale[1] - self.crop_scale[0]) * area)
        log_low, log_high = math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1])
        aspect = np.exp(log_low + (log_high - log_low) * ratio)
        w, h = np.rint(np.sqrt(target * aspect)), np.rint(np.sqrt(target / aspect))
        fits = (w > 0) & (w <= source_w) & (h > 0) & (h <= source_h)
        first = fits.argmax(axis=1)[:, None]
        w, h = (np.take_along_axis(side, first, axis=1)[:, 0] for side in (w, h))
        none = ~fits.any(axis=1)
        if none.any():
            own = np.clip(widths / heights, *self.crop_ratio)
            w = np.where(none, np.minimum(widths, np.rint(heights * own)), w)
            h = np.where(none, np.minimum(heights, np.rint(widths / own)), h)
        x = np.where(none, (widths - w) // 2, np.floor(left * (widths - w + 1)))
        y = np.where(none, (heights - h) // 2, np.floor(top * (heights - h + 1)))
        return np.stack((x, y, w, h), axis=1).astype(np.int64)

    def apply(self, image: Image.Image, params: ViewParams, i: int) -> NDArray[np.uint8]:
        """View i of `params` of an RGB image: uint8 [S, S, 3], not yet normalised."""
        left, top, width, height = (int(v) for v in params.box[i])
        size = [self.size, self.size]
        view = F.resized_crop(image, top, left, height, width, size, InterpolationMode.BILINEAR, antialias=True)
        if params.flip[i]:
            view = F.horizontal_flip(view)
        if params.jitter[i]:
            for operation in params.order[i]:
                view = _COLOR_OPERATIONS[operation](view, float(params.factors[i, operation]))
        if params.grayscale[i]:
            view = view.convert("L").convert("RGB")
        if params.sigma[i] > 0:
            view = view.filter(ImageFilter.GaussianBlur(float(params.sigma[i])))
        if params.solarize[i]:
            view = ImageOps.solarize(view, 128)
        return np.asarray(view)


_COLOR_OPERATIONS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def build_policy(cfg: AugmentConfig, image_size: int) -> AugmentPolicy:
    """The preset for this image size with the configuration's changes.

    simclr: Chen et al. 2020, arXiv 2002.05709 (strength s = 1).  simsiam: Chen & He 2020, arXiv 2011.10566 (s = 0.5;
    the authors' code of DoGo draws greyscale twice there, which is grayscale: 0.36).
    """
    strength = 1.0 if cfg.preset == "simclr" else 0.5
    preset = AugmentPolicy(
        size=image_size,
        crop_scale=(0.08, 1.0) if cfg.preset == "simclr" else (0.2, 1.0),
        crop_ratio=(3 / 4, 4 / 3),
        flip=0.5,
        jitter=0.8,
        brightness=0.8 * strength,
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        grayscale=0.2,
        blur=0.5 if image_size >= BLUR_FROM_PX else 0.0,
        blur_sigma=(0.1, 2.0),
        solarize=0.0,
    )
    changes = cfg.model_dump(exclude={"preset"}, exclude_none=True)
    return replace(preset, **changes)


def uniforms(seed: int, epoch: int, indices: NDArray[np.int64], views: int) -> Array:
    """The uniform numbers [views, n, K] of the views of n images in one epoch."""
    numbers = philox_uniforms((seed, epoch), indices, stream=0, count=views * UNIFORMS)
    return numbers.reshape(len(indices), views, UNIFORMS).transpose(1, 0, 2)


def draw_views(
    policy: AugmentPolicy,
    *,
    seed: int,
    epoch: int,
    indices: NDArray[np.int64],
    sizes: NDArray[np.integer],
    views: int,
    first: int = 0,
) -> ViewParams:
    """Parameters of views `first` to `first + views` - 1 of n images, [views * n] rows, those of a view together.

    `sizes` [n, 2]: width, height.  A view is the same whatever others are drawn.
    """
    numbers = uniforms(seed, epoch, indices, first + views)[first:]
    width, height = np.tile(sizes, (views, 1)).T.astype(float)
    return policy.draw(numbers.reshape(-1, UNIFORMS), width, height)


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order of the n images in one epoch."""
    # The counter's lowest word counts the draws; the third, 0 for views, keeps the streams apart.
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 1, 0])).permutation(n)

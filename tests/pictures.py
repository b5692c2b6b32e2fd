"""Images and parameters of views that several tests use."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import pytest
from PIL import Image

from engine.data.augment import ORDERS, ViewParams, build_policy
from engine.data_config import AugmentConfig

exact = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13, reason="Pillow before 13 always resizes along rows first"
)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height, width):
    """Gradients with few levels between neighbours, where a rounding more or less shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack((x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)), axis=-1).astype(np.uint8)


def photos(height, width) -> np.ndarray:
    """Five crops of the photograph that comes with matplotlib, averaged down: uint8 [5, height, width, 3]."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    if not path.exists():
        pytest.skip(f"this matplotlib comes without its photograph {path}")
    crops = [(0, 0, 500, 500), (100, 50, 400, 350), (150, 150, 350, 350), (0, 100, 500, 600), (50, 250, 400, 600)]
    with Image.open(path) as photo:
        parts = [photo.convert("RGB").crop(box) for box in crops]
    return np.stack([np.asarray(part.resize((width, height), Image.Resampling.BOX)) for part in parts])


def plain(box, **changes) -> ViewParams:
    """Parameters that change nothing but for the crop, and the changes."""
    m = len(box)
    fields = {
        "box": np.asarray(box, dtype=np.int64), "flip": np.zeros(m, bool), "jitter": np.zeros(m, bool),
        "factors": np.tile([1.0, 1.0, 1.0, 0.0], (m, 1)), "order": np.tile(np.arange(4), (m, 1)),
        "grayscale": np.zeros(m, bool), "sigma": np.zeros(m), "solarize": np.zeros(m, bool),
    }  # fmt: skip
    return ViewParams(**{**fields, **changes})


def mixed(m, sizes, rng, largest_sigma=3.0) -> tuple[np.ndarray, ViewParams]:
    """m views of images of these (height, width), with everything in them."""
    source = rng.integers(0, len(sizes), m)
    height, width = np.array(sizes)[source].T
    w, h = rng.integers(1, width + 1), rng.integers(1, height + 1)
    params = ViewParams(
        box=np.stack((rng.integers(0, width - w + 1), rng.integers(0, height - h + 1), w, h), axis=1),
        flip=rng.random(m) < 0.5,
        jitter=rng.random(m) < 0.8,
        factors=np.column_stack((rng.uniform(0, 2.5, (m, 3)), rng.uniform(-0.5, 0.5, m))),
        order=ORDERS[rng.integers(0, 24, m)],
        grayscale=rng.random(m) < 0.2,
        sigma=np.where(rng.random(m) < 0.5, rng.uniform(0.05, largest_sigma, m), 0.0),
        solarize=rng.random(m) < 0.2,
    )
    return source, params


def pillows(images, source, params, size) -> np.ndarray:
    policy = replace(build_policy(AugmentConfig(), 224), size=size)
    pictures = [Image.fromarray(np.asarray(image)) for image in images]
    return np.stack([policy.apply(pictures[k], params, i) for i, k in enumerate(source)])

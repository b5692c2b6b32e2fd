"""The augmentation policy as a DALI graph: all views of a batch from one decode, on a GPU or on a CPU.

Legend
  n  images of a batch      V  views of an image      S  side of a view in pixels      x  pixels [H, W, 3] in 0 ... 255

DALI draws nothing: the policy draws the parameters of every view as it does for each loader (augment.py), and they
enter the graph beside the encoded images.

A colour operation is an affine map of a pixel, clipped to 0 ... 255 as torchvision does after each,

    y = A x + b.mean(x)        A [3, 3], b [3]; mean over the pixels of the view; b is zero but for contrast

with, g being the weights of luminance (ITU-R BT.601) and f the factor: brightness f x, contrast
f x + (1 - f) g.mean(x), saturation f x + (1 - f) g.x, greyscale g.x.  So every view goes through the same maps,
whatever the order of its operations.  One thing differs from torchvision, which shifts the hue in HSV: here a shift h
is a rotation by 2 pi h around the grey axis of RGB, as HSV has it at multiples of a third.  (DALI's own hsv rotates the
chroma of YIQ, which is further from HSV: over real photos 8 to 12 levels of 255 in the mean at |h| = 0.2, here 5.)
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import ConfigError
from engine.data.augment import AugmentPolicy, ViewParams

Floats = NDArray[np.float32]

LUMA = np.array([0.299, 0.587, 0.114])
JITTER = 4  # brightness, contrast, saturation, hue: as ViewParams has them
CONTRAST = 1
LARGEST_HINT = (5980, 6430)  # px; decoders reserve no more than that, whatever a stray image has (MLPerf's ResNet-50)


class GraphParams(NamedTuple):
    """What the graph takes of one view of n images; each array has n rows.  `used_fields` says which it needs."""

    low: Floats  # [n, 2] top and left of the crop in pixels
    high: Floats  # [n, 2] bottom and right
    matrices: Floats  # [n, 5, 3, 3] A of each operation in its order, greyscale last
    weights: Floats  # [n, 5, 3] b
    window: NDArray[np.int32]  # [n] taps of the blur, 1 without
    sigma: Floats  # [n] of the blur; any where there is none
    mirror: NDArray[np.int32]  # [n] 1 to flip
    solarize: Floats  # [n] threshold; 256 without


def used_fields(policy: AugmentPolicy) -> list[str]:
    """The fields of GraphParams that a graph of this policy takes, in order."""
    unused = set() if operations(policy) else {"matrices", "weights"}
    unused |= {"window", "sigma"} if policy.blur == 0 else set()
    unused |= {"solarize"} if policy.solarize == 0 else set()
    return [name for name in GraphParams._fields if name not in unused]


def operations(policy: AugmentPolicy) -> list[int]:
    """Which of the five colour operations a view may need."""
    return [*range(JITTER)] * (policy.jitter > 0) + [JITTER] * (policy.grayscale > 0)


def require_dali() -> None:
    """Raises ConfigError where DALI is not installed."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise ConfigError(
            "data.loader: dali is not installed; pip install nvidia-dali-cuda130 (CUDA 13) or nvidia-dali-cuda120 "
            "(CUDA 12), or use data.loader=torchvision"
        )


def graph_params(params: ViewParams) -> GraphParams:
    """The policy's parameters in the graph's terms."""
    left, top, width, height = params.box.astype(np.float32).T
    matrices, weights = color_maps(params)
    blurred = params.sigma > 0
    return GraphParams(
        low=np.stack((top, left), axis=1),
        high=np.stack((top + height, left + width), axis=1),
        matrices=matrices,
        weights=weights,
        window=np.where(blurred, 2 * np.ceil(3 * params.sigma) + 1, 1).astype(np.int32),
        sigma=np.where(blurred, params.sigma, 1).astype(np.float32),
        mirror=params.flip.astype(np.int32),
        solarize=np.where(params.solarize, 128, 256).astype(np.float32),
    )


def color_maps(params: ViewParams) -> tuple[Floats, Floats]:
    """A [n, 5, 3, 3] and b [n, 5, 3] of every view's operations in their order, greyscale last; identity where none."""
    n = len(params.flip)
    operation = np.where(params.jitter[:, None], params.order, -1)
    factor = np.take_along_axis(params.factors, params.order, axis=1)
    A, b = np.tile(np.eye(3), (n, JITTER + 1, 1, 1)), np.zeros((n, JITTER + 1, 3))
    A[:, :JITTER] = _linear(operation, factor)
    b[:, :JITTER] = np.where(operation == CONTRAST, 1 - factor, 0)[..., None] * LUMA
    A[params.grayscale, JITTER] = _GREY
    return A.astype(np.float32), b.astype(np.float32)


_GREY = np.outer(np.ones(3), LUMA)


def _linear(operation: NDArray[np.integer], factor: NDArray[np.floating]) -> NDArray[np.floating]:
    """What operations [...] do to a pixel by itself, [..., 3, 3]."""
    f = factor[..., None, None]
    c, s = np.cos(2 * np.pi * f), np.sin(2 * np.pi * f)
    # Around (1, 1, 1) by Rodrigues' formula, from red to green to blue.
    turn = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    rotation = c * np.eye(3) + (1 - c) / 3 + s / np.sqrt(3) * turn
    choices = [f * np.eye(3), f * np.eye(3), f * np.eye(3) + (1 - f) * _GREY, rotation]
    which = [(operation == k)[..., None, None] for k in range(JITTER)]
    return np.select(which, choices, np.eye(3))


# -- the graph -------------------------------------------------------------------------------------------------------


def build_pipeline(
    policy: AugmentPolicy,
    source: Callable[[int], list[Any]],  # the i-th batch: n encoded images, then the used fields of V GraphParams
    *,
    views: int,  # V, or 0: the decoded images alone
    batch_size: int,  # n
    threads: int,
    device_id: int | None,  # None: on the CPU
    sizes: NDArray[np.integer],  # [N, 2] width and height of the images there are
    ahead: int = 2,  # batches that it begins before they are asked for
) -> Any:
    """A built DALI pipeline whose outputs are V times [n, S, S, 3], normalised: float16 on a GPU, float32 on a CPU.

    Without views its outputs are n images uint8 [H, W, 3].
    """
    from nvidia.dali import Pipeline

    pipeline = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, exec_dynamic=True, prefetch_queue_depth=ahead
    )
    with pipeline:
        pipeline.set_outputs(*outputs_of(policy, source, views=views, device_id=device_id, sizes=sizes))
    pipeline.build()
    return pipeline


def outputs_of(
    policy: AugmentPolicy, source: Callable[[int], list[Any]], *, views: int, device_id: int | None,
    sizes: NDArray[np.integer],
) -> list[Any]:  # fmt: skip
    """The graph's output nodes, as of `build_pipeline`."""
    from nvidia.dali import fn

    fields = used_fields(policy)
    # Copied: on a GPU nothing tells when the decoder has read the bytes, and its own buffers are pinned.
    encoded, *params = fn.external_source(source=source, num_outputs=1 + len(fields) * views, batch=True, no_copy=False)
    images = decoded(encoded, device_id=device_id, sizes=sizes)
    if not views:
        return [images]
    per_view = [params[len(fields) * v : len(fields) * (v + 1)] for v in range(views)]
    return [
        view(images, dict(zip(fields, nodes, strict=True)), policy, gpu=device_id is not None) for nodes in per_view
    ]


def decoded(encoded: Any, *, device_id: int | None, sizes: NDArray[np.integer]) -> Any:
    """RGB images [H, W, 3], as Pillow decodes them on a CPU: fancy upsampling, EXIF orientation not applied."""
    from nvidia.dali import fn, types

    options: dict[str, Any] = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if device_id is not None:
        width, height = (min(int(side), most) for side, most in zip(sizes.max(axis=0), LARGEST_HINT, strict=True))
        # The hardware decoder's share as in MLPerf's ResNet-50; hints, so that few buffers grow during the run: the
        # largest image for the decoder's own, the mean one for a batch of pictures.
        options.update(
            hw_decoder_load=0.9, preallocate_width_hint=width, preallocate_height_hint=height,
            bytes_per_sample_hint=int(3 * sizes.astype(np.int64).prod(axis=1).mean()),
        )  # fmt: skip
    return fn.decoders.image(encoded, device="cpu" if device_id is None else "mixed", **options)


def view(images: Any, params: dict[str, Any], policy: AugmentPolicy, *, gpu: bool) -> Any:
    """One view of every image: [n, S, S, 3], normalised.  `params` are nodes of the graph by field of GraphParams."""
    from nvidia.dali import fn, math, types

    side = policy.size
    hint: dict[str, Any] = {"bytes_per_sample_hint": side * side * 3 * 4}
    x: Any = fn.resize(
        images, size=[side, side], roi_start=params["low"], roi_end=params["high"], interp_type=types.INTERP_LINEAR,
        antialias=True, **hint,
    )  # fmt: skip
    for k in operations(policy):
        offset = fn.reductions.sum(_placed(params["weights"][k], gpu) * fn.reductions.mean(x, axes=[0, 1]), axes=[0])
        x = math.clamp(fn.coord_transform(x, M=params["matrices"][k], dtype=types.FLOAT, **hint) + offset, 0, 255)
    if policy.blur > 0:
        x = fn.gaussian_blur(x, window_size=params["window"], sigma=params["sigma"], dtype=types.FLOAT, **hint)
    if policy.solarize > 0:
        inverted = x >= _placed(params["solarize"], gpu)
        x = inverted * (255 - x) + (1 - inverted) * x
    mean, std = (255 * np.array(statistic) for statistic in policy.statistics)
    return fn.crop_mirror_normalize(
        x, dtype=types.FLOAT16 if gpu else types.FLOAT, output_layout="HWC", mirror=params["mirror"],
        mean=mean.tolist(), std=std.tolist(), **hint,
    )  # fmt: skip


def _placed(node: Any, gpu: bool) -> Any:
    return node.gpu() if gpu else node

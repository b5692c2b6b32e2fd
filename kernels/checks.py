"""Argument checks of the public losses: ValueError that names the argument, what was found, and what is allowed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.collectives import world_size
from kernels.reference import KL_REDUCTIONS

BACKENDS = ("auto", "triton", "native", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
QUEUE_DTYPES = (torch.float32, torch.float64)


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; allowed: {', '.join(BACKENDS)}")


def check_positive(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value < float("inf")):  # not math.isfinite: torch.compile
        raise ValueError(f"{name}: must be positive and finite, found {value!r}")


def check_reduction(kl_reduction: str) -> None:
    if kl_reduction not in KL_REDUCTIONS:
        raise ValueError(f"kl_reduction: {kl_reduction!r} is unknown; allowed: {', '.join(KL_REDUCTIONS)}")


def check_weights(weights: tuple[float, float]) -> None:
    pair = isinstance(weights, tuple | list) and len(weights) == 2
    if not (pair and all(isinstance(w, int | float) and 0 <= w < float("inf") for w in weights)):
        raise ValueError(f"weights: two finite numbers >= 0 (one a peer), found {weights!r}")


def check_weight(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 <= value < float("inf")):
        raise ValueError(f"{name}: must be finite and >= 0, found {value!r}")


def check_views(group: dist.ProcessGroup | None, **views: Tensor) -> None:
    """Both views of one peer, and enough images for a negative."""
    check_pair(**views)
    check_two_images(group, "negatives", **views)


def check_pair(**views: Tensor) -> None:
    """Both views of one network: [n, D], same shape, dtype and device."""
    for name, z in views.items():
        check_rows(name, z, "N")
        if z.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {z.dtype} is not supported; allowed: {_names(DTYPES)}")
    x, y = views.items()
    _check_same(x, y, "shape", "dtype", "device")


def check_targets(**tensors: Tensor) -> None:
    """What rows are compared with: the first tensor's rows with the two views that follow; dtypes may differ."""
    rows, *targets = tensors.items()
    check_pair(**dict(targets))
    _check_same(rows, targets[0], "shape", "device")


def check_two_images(group: dist.ProcessGroup | None, lacks: str, **views: Tensor) -> None:
    name, x = next(iter(views.items()))
    if x.shape[0] * world_size(group) < 2:
        raise ValueError(f"{name}: N = 1 has no {lacks}; at least 2 images over all ranks are needed")


def check_queue(queue: Tensor, **rows: Tensor) -> None:
    """[K, D] keys of earlier batches, as wide as `rows` and on their device."""
    check_rows("queue", queue, "K")
    if queue.dtype not in QUEUE_DTYPES:
        raise ValueError(f"queue: dtype {queue.dtype} is not supported; allowed: {_names(QUEUE_DTYPES)}")
    name, z = next(iter(rows.items()))
    if queue.shape[1] != z.shape[1]:
        raise ValueError(f"queue: width {queue.shape[1]} differs from {name}'s {z.shape[1]}")
    _check_same((name, z), ("queue", queue), "device")


def check_position(position: Tensor, queue: Tensor) -> None:
    if not isinstance(position, Tensor):
        raise ValueError(f"position: an int64 tensor of one number is expected, found {type(position).__name__}")
    if position.ndim or position.dtype != torch.int64:
        found = f"{position.dtype} {list(position.shape)}"
        raise ValueError(f"position: an int64 tensor of one number, shape [], is expected, found {found}")
    _check_same(("queue", queue), ("position", position), "device")


def check_rows(name: str, z: Tensor, count: str) -> None:
    """A matrix of rows, none empty; `count` is the letter of their number."""
    if not isinstance(z, Tensor):
        raise ValueError(f"{name}: a tensor [{count}, D] is expected, found {type(z).__name__}")
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"{name}: shape [{count}, D] with {count}, D >= 1 is expected, found {list(z.shape)}")


def _check_same(first: tuple[str, Tensor], second: tuple[str, Tensor], *properties: str) -> None:
    (name_x, x), (name_y, y) = first, second
    for what in properties:
        if getattr(x, what) != getattr(y, what):
            raise ValueError(f"{name_y}: {what} {getattr(y, what)} differs from {name_x}'s {getattr(x, what)}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_peers(x_a: Tensor, x_b: Tensor) -> None:
    if x_a.shape[0] != x_b.shape[0]:
        raise ValueError(f"x_b: {x_b.shape[0]} images, but x_a holds {x_a.shape[0]}; peers see the same images")
    if x_a.device != x_b.device:
        raise ValueError(f"x_b: device {x_b.device} differs from x_a's {x_a.device}")

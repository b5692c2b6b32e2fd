"""Argument checks of the public losses: ValueError that names the argument, what was found, and what is allowed."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.collectives import world_size
from kernels.reference import KL_REDUCTIONS

BACKENDS = ("auto", "triton", "native", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def check_views(group: dist.ProcessGroup | None, **views: Tensor) -> None:
    """Both views of one peer: [n, D], same shape, dtype and device, and enough images for a negative."""
    (name_x, x), (name_y, y) = views.items()
    for name, z in views.items():
        if not isinstance(z, Tensor):
            raise ValueError(f"{name}: a tensor [N, D] is expected, found {type(z).__name__}")
        if z.ndim != 2 or 0 in z.shape:
            raise ValueError(f"{name}: shape [N, D] with N, D >= 1 is expected, found {list(z.shape)}")
        if z.dtype not in DTYPES:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"{name}: dtype {z.dtype} is not supported; allowed: {allowed}")
    for what in ("shape", "dtype", "device"):
        if getattr(x, what) != getattr(y, what):
            raise ValueError(f"{name_y}: {what} {getattr(y, what)} differs from {name_x}'s {getattr(x, what)}")
    if x.shape[0] * world_size(group) < 2:
        raise ValueError(f"{name_x}: N = 1 has no negatives; at least 2 images over all ranks are needed")


def check_peers(x_a: Tensor, x_b: Tensor) -> None:
    if x_a.shape[0] != x_b.shape[0]:
        raise ValueError(f"x_b: {x_b.shape[0]} images, but x_a holds {x_a.shape[0]}; peers see the same images")
    if x_a.device != x_b.device:
        raise ValueError(f"x_b: device {x_b.device} differs from x_a's {x_a.device}")

"""Which backend computes a loss of embeddings.

  triton   NVIDIA GPUs from compute capability 8.0: fused kernels (mutual_triton.py), no similarity matrix in memory
           (wider than 256 over both peers: strips of 256 MiB of it, or of 512 images where that is more).
           Cosines are of unit vectors in float16, sums in float32; widths up to 2048; inputs up to float32.
  native   CPUs: C++ (mutual_native.py), no similarity matrix in memory; float32 and float64.
  torch    any device, float32 and float64; holds matrices of similarities.

Half inputs are computed in float32 by both of the latter.  `auto` is triton on a GPU where it fits, native on a CPU
where the core is built, and torch elsewhere: on a GPU in float64, for wider embeddings, on older GPUs.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import forward_gradients, native
from kernels.tiles import BY_CAPABILITY, WIDEST

HAS_TRITON = importlib.util.find_spec("triton") is not None  # torch's builds for CPUs come without
if HAS_TRITON:
    from kernels import mutual_triton


class Choice(NamedTuple):
    """A backend, and for `auto` why it is none of the fused ones; empty where it is one."""

    name: str
    unfit: str


def choose_backend(backend: str, *views: Tensor) -> Choice:
    """`backend`, or for `auto` the best that fits; raises ValueError where the one asked for does not."""
    if backend == "torch":
        return Choice("torch", "")
    best = "native" if views[0].device.type == "cpu" else "triton"
    asked = best if backend == "auto" else backend
    unfit = _unfit_for_native(*views) if asked == "native" else _unfit_for_triton(*views)
    unfit = unfit or forward_gradients.unfit(*views)
    if unfit and backend != "auto":
        raise ValueError(f"backend: {backend!r} does not fit: {unfit}; use 'torch' or 'auto'")
    return Choice("torch" if unfit else asked, unfit)


def _unfit_for_native(*views: Tensor) -> str:
    """Why the native backend cannot take these embeddings; empty where it can."""
    if views[0].device.type != "cpu":
        return f"embeddings on {views[0].device}, a CPU is needed"
    if native.broken:
        warnings.warn(native.missing, RuntimeWarning, stacklevel=4)
    return native.missing


def _unfit_for_triton(*views: Tensor) -> str:
    """Why the triton backend cannot take these embeddings; empty where it can."""
    if not HAS_TRITON:
        return "triton is not installed"
    device = views[0].device
    if device.type == "cuda" and torch.version.hip is None:
        found, needed = torch.cuda.get_device_capability(device), divmod(min(BY_CAPABILITY), 10)
        if found < needed:
            return f"compute capability {found[0]}.{found[1]}, at least {needed[0]}.{needed[1]} is needed"
    elif not (device.type == "cpu" and mutual_triton.INTERPRETED):
        return f"embeddings on {device}, an NVIDIA GPU is needed"
    if any(z.dtype == torch.float64 for z in views):
        return "float64 embeddings, at most float32 is computed"
    widest = max(z.shape[1] for z in views)
    return f"embeddings of width {widest}, at most {WIDEST}" if widest > WIDEST else ""

"""In what precision losses compute: at least float32, whatever the embeddings come in and whatever autocast is on."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import reference


def full_precision(x: Tensor) -> torch.autocast:
    """Losses never run in the reduced precision of a surrounding autocast."""
    return torch.autocast(x.device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x: Tensor) -> Tensor:
    """`reference.normalize` in at least float32."""
    return reference.normalize(at_least_float32(x))

"""Losses whose gradients forward has made: backward only scales them.

Each loss is a node of its own in autograd's graph, so that either peer's can be sent backward without the other's
(not where torch.compile took both into one graph: such graphs go backward as a whole).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


def wanted(*views: Tensor) -> bool:
    """Whether forward is to make gradients."""
    return torch.is_grad_enabled() and any(view.requires_grad for view in views)


def unfit(*views: Tensor) -> str:
    """Why a loss of these views cannot have its gradients made in forward; empty where it can."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func's transforms do not reach into it"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(view).tangent is not None for view in views):
        return "it has no forward-mode derivative"
    return ""


def computed_in(*views: Tensor) -> torch.dtype:
    """In what a loss of these views and its gradients are made: the widest of their dtypes, at least float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in views) else torch.float32


def fake(x: Tensor, gradients: bool, dtype: torch.dtype) -> Tensor:
    """What a fake kernel returns for the gradient [2, n, D] of one peer's views."""
    return x.new_empty((2, *x.shape) if gradients else (0,), dtype=dtype)


def attach(loss: Tensor, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """`loss` with its gradient [2, n, D] of the views x and y [n, D], at least float32; itself where there is none."""
    return _Attach.apply(loss, x, y, gradient) if gradient.numel() else loss


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return loss.clone()

    # Once: a second derivative would take the gradient for a constant, silently.
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # Converted last, since float16 gradients of a mean over M rows vanish.
        x, y = (gradient * upstream[0]).to(ctx.dtype).unbind()
        return None, x, y, None

"""The `native` backend: losses on CPUs, tile by tile in C++ (csrc/loss.cpp, where the maths and the order stand).

Between the steps of the core, ranks exchange unit vectors once, three float64 a row and peer, and the KLs' values.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import forward_gradients
from kernels.collectives import gather_rows, group_called, name_of, rank_in, world_size
from kernels.native import core


def _compute(
    views: list[tuple[Tensor, Tensor]],  # [n, D] a peer
    tau_contrast: float | None,
    tau_distill: float | None,
    weights: list[float],
    mean: bool,
    group: dist.ProcessGroup | None,
    gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """[peers, 2] NT-Xent and KL of the global batch, and gradients [2, n, D] a peer, in the dtype they were made in."""
    assert core is not None
    dtype = forward_gradients.computed_in(*(x for x, _ in views))
    own = [core.normalize(x.to(dtype), y.to(dtype)) for x, y in views]
    z = [
        unit if world_size(group) == 1 else gather_rows(unit.transpose(0, 1), group).transpose(0, 1).contiguous()
        for unit, _ in own
    ]
    loss = core.Loss(
        z, world=world_size(group), rank=rank_in(group), tau_contrast=tau_contrast, tau_distill=tau_distill,
        weights=weights, mean=mean,
    )  # fmt: skip
    if loss.needs_maxima:
        _reduce(loss.maxima(), group, dist.ReduceOp.MAX)
    _reduce(loss.sums(), group)
    values, made = loss.finish([inverse_norm for _, inverse_norm in own] if gradients else [])
    if tau_distill is not None:
        _reduce(values[:, 1:], group)
    return values.to(dtype), made


def _reduce(values: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduces in place over the ranks."""
    if world_size(group) > 1:
        total = values.contiguous()
        dist.all_reduce(total, op=op, group=group)
        values.copy_(total)


# -- operators -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("dogo::native_ntxent", mutates_args=())
def ntxent_op(x: Tensor, y: Tensor, tau: float, group: str, gradients: bool) -> tuple[Tensor, Tensor]:
    values, made = _compute([(x, y)], tau, None, [0.0], False, group_called(group), gradients)
    return values[0, 0].clone(), *(made or [values.new_empty(0)])  # type: ignore[return-value]


@ntxent_op.register_fake
def _(x, y, tau, group, gradients):
    dtype = forward_gradients.computed_in(x)
    return x.new_empty((), dtype=dtype), forward_gradients.fake(x, gradients, dtype)


@torch.library.custom_op("dogo::native_mutual", mutates_args=())
def mutual_op(
    x_a: Tensor, y_a: Tensor, x_b: Tensor, y_b: Tensor,
    tau_contrast: float | None, tau_distill: float, weight_a: float, weight_b: float, mean: bool,
    group: str, gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    weights = [weight_a, weight_b]
    ranks = group_called(group)
    values, made = _compute([(x_a, y_a), (x_b, y_b)], tau_contrast, tau_distill, weights, mean, ranks, gradients)
    ntxent, kl = values.unbind(dim=1)
    loss = ntxent + kl * kl.new_tensor(weights)
    terms = torch.cat((ntxent, kl))
    empty = values.new_empty(0)
    return loss[0].clone(), loss[1].clone(), terms, *(made or [empty, empty.clone()])  # type: ignore[return-value]


@mutual_op.register_fake
def _(x_a, y_a, x_b, y_b, tau_contrast, tau_distill, weight_a, weight_b, mean, group, gradients):
    dtype = forward_gradients.computed_in(x_a, x_b)
    scalars = [x_a.new_empty(shape, dtype=dtype) for shape in ((), (), (4,))]
    return *scalars, *(forward_gradients.fake(x, gradients, dtype) for x in (x_a, x_b))


# -- what mutual.py calls ------------------------------------------------------------------------------------------


def ntxent(x: Tensor, y: Tensor, tau: float, group: dist.ProcessGroup | None) -> Tensor:
    """NT-Xent of the global batch; gradients W times the true ones."""
    loss, gradient = ntxent_op(x.detach(), y.detach(), tau, name_of(group), forward_gradients.wanted(x, y))
    return forward_gradients.attach(loss, x, y, gradient)


def mutual(
    views: list[tuple[Tensor, Tensor]],
    tau_contrast: float | None,
    tau_distill: float,
    weights: tuple[float, float],
    mean: bool,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_a, loss_b, [ntxent_a, ntxent_b, kl_a, kl_b]); the KLs alone where `tau_contrast` is None."""
    inputs = [view for peer in views for view in peer]
    loss_a, loss_b, terms, gradient_a, gradient_b = mutual_op(
        *(view.detach() for view in inputs), tau_contrast, tau_distill, float(weights[0]), float(weights[1]), mean,
        name_of(group), forward_gradients.wanted(*inputs),
    )  # fmt: skip
    loss_a = forward_gradients.attach(loss_a, *views[0], gradient_a)
    return loss_a, forward_gradients.attach(loss_b, *views[1], gradient_b), terms

"""Collectives with gradients over a process group; `group=None` is this process alone.

W ranks, r this rank, n rows a rank.  Gradient convention of the project: every rank back-propagates its own share of a
loss that is the mean over ranks, so the gradient that reaches a tensor is W times the true one, and the mean over ranks
that data parallelism takes afterwards is exact.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group`; 1 where there is none."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`; 0 where there is none."""
    return 0 if group is None else dist.get_rank(group)


def name_of(group: dist.ProcessGroup | None) -> str:
    """The name by which a group travels through operators, which take no Python objects; empty for none."""
    return "" if group is None else group.group_name


def group_called(name: str) -> dist.ProcessGroup | None:
    """The group that `name_of` named."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None  # type: ignore[arg-type]


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [n, ...] -> [W n, ...]
    x = x.contiguous()
    gathered = [torch.empty_like(x) for _ in range(world_size(group))]
    dist.all_gather(gathered, x, group=group)
    return torch.cat(gathered)


def _total(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _summed(grad: Tensor, group: dist.ProcessGroup | None) -> Tensor:  # [W n, ...] -> [n, ...]
    """The transpose of the gather: every rank used the rows of this one, so their gradients add up."""
    total = _total(grad, group)
    n = total.shape[0] // world_size(group)
    return total.narrow(0, rank_in(group) * n, n).clone()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # x: [n, ...] -> [W n, ...]
        ctx.group = group
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _summed(grads[0], ctx.group), None


def gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks, [n, ...] -> [W n, ...] in rank order, with the gradient summed over ranks.

    Every rank must pass the same shape and dtype.  The identity where `group` is None.
    """
    if world_size(group) == 1:
        return x
    if torch.compiler.is_compiling():
        return gather_op(x, name_of(group), world_size(group))
    return _AllGather.apply(x, group)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _total(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grads[0], ctx.group), None


def sum_over_ranks(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of a tensor over ranks, equal on all of them, with the gradient summed over ranks.

    Every rank must pass the same shape and dtype.  The identity where `group` is None.
    """
    if world_size(group) == 1:
        return x
    if torch.compiler.is_compiling():
        return total_op(x, name_of(group))
    return _AllReduce.apply(x, group)


# The same for torch.compile, to which collectives of autograd functions are opaque.


@torch.library.custom_op("dogo::gather_rows", mutates_args=())
def gather_op(x: Tensor, group: str, world: int) -> Tensor:
    return _gathered(x, group_called(group))


@gather_op.register_fake
def _(x, group, world):
    return x.new_empty((world * x.shape[0], *x.shape[1:]))


@torch.library.custom_op("dogo::sum_rows", mutates_args=())
def sum_op(grad: Tensor, group: str, world: int) -> Tensor:
    return _summed(grad, group_called(group))


@sum_op.register_fake
def _(grad, group, world):
    return grad.new_empty((grad.shape[0] // world, *grad.shape[1:]))


def _keep_group(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.group, ctx.world = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return sum_op(grad, ctx.group, ctx.world), None, None


gather_op.register_autograd(_backward, setup_context=_keep_group)


@torch.library.custom_op("dogo::sum_over_ranks", mutates_args=())
def total_op(x: Tensor, group: str) -> Tensor:
    return _total(x, group_called(group))


@total_op.register_fake
def _(x, group):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_name(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, ctx.group = inputs


def _backward_of_total(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return total_op(grad, ctx.group), None


total_op.register_autograd(_backward_of_total, setup_context=_keep_name)


# -- the values of losses ------------------------------------------------------------------------------------------


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of a detached tensor over ranks, equal on all of them; the identity where `group` is None."""
    if world_size(group) == 1:
        return values.detach()
    return _total(values.detach(), group) / world_size(group)


def global_mean(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over ranks of a loss of this rank's rows, with the gradient of the latter."""
    return with_value(local, mean_over_ranks(local, group), group)


def with_value(local: Tensor, value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A scalar with the value of the global batch and the gradient of this rank's rows."""
    return local if world_size(group) == 1 else _ReplaceValue.apply(local, value)


class _ReplaceValue(torch.autograd.Function):
    # local + (value - local).detach() would round, and turn an infinite loss into NaN.
    @staticmethod
    def forward(ctx: Any, local: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

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


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # x: [n, ...] -> [W n, ...]
        ctx.group = group
        x = x.contiguous()
        gathered = [torch.empty_like(x) for _ in range(world_size(group))]
        dist.all_gather(gathered, x, group=group)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank used the rows of this one, so their gradients add up: the transpose of the gather.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        n = grad.shape[0] // world_size(ctx.group)
        return grad.narrow(0, rank_in(ctx.group) * n, n), None


def gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of all ranks, [n, ...] -> [W n, ...] in rank order, with the gradient summed over ranks.

    Every rank must pass the same shape and dtype.  The identity where `group` is None.
    """
    return x if world_size(group) == 1 else _AllGather.apply(x, group)


def mean_over_ranks(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of a detached tensor over ranks, equal on all of them; the identity where `group` is None."""
    if world_size(group) == 1:
        return values.detach()
    total = values.detach().clone()
    dist.all_reduce(total, group=group)
    return total / world_size(group)

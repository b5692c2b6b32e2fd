"""Ranks, seeds and BatchNorm over ranks; the identity when this process is alone.

Ranks come from the launcher's environment (deepspeed, torchrun, or none).  gloo on a CPU, NCCL on a GPU.
"""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine.config import ConfigError
from kernels.collectives import gather_rows, world_size


@dataclass(frozen=True)
class Ranks:
    """Where this process stands; `group` is None when it is alone."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    group: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and talks to the user."""
        return self.rank == 0


def start() -> Ranks:
    """Joins the process group that the launcher's environment describes and picks this rank's device."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn on every rank before it picks the same
    import deepspeed  # slow to import, and it probes the machine: only a run pays for it

    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(_free_port())
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        _share_cores()
        # DeepSpeed would compile its shared-memory all-reduce at start: 22 s here, and it needs a C++ compiler.
        # gloo does the same job.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    world = dist.get_world_size()
    return Ranks(dist.get_rank(), world, local_rank, device, dist.group.WORLD if world > 1 else None)


def stop() -> None:
    """Leaves the process group; without it gloo's threads abort the process at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_world_size() -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE", "1"))


def cores_per_rank() -> int:
    """This rank's share of the machine's cores, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size())


def rows_per_rank(batch_size: int, ranks: Ranks) -> int:
    """Images of the global batch that each rank takes; raises ConfigError where they do not divide."""
    if batch_size % ranks.world:
        raise ConfigError(f"data.batch_size: {batch_size} does not divide by {ranks.world} ranks")
    return batch_size // ranks.world


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch alike on every rank, so that all ranks build the same initial weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def barrier(ranks: Ranks) -> None:
    """Waits for every rank."""
    if ranks.group is not None:
        dist.barrier(group=ranks.group)


def first_rank_does(ranks: Ranks, work: Callable[[], Any]) -> Any:
    """Runs `work` on rank 0 and hands its result to all; an exception there is raised on every rank."""
    if ranks.group is None:
        return work()
    outcome: list[Any] = [None, None]
    if ranks.is_first:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=ranks.group, device=ranks.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def gather_objects(ranks: Ranks, value: Any) -> list[Any]:
    """What every rank passed, in rank order; small Python objects, not in a step."""
    if ranks.group is None:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value, group=ranks.group)
    return values


def average_buffers(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Makes floating-point buffers (BatchNorm's running statistics) equal on all ranks: their mean.

    DeepSpeed never does.  A running mean is linear in what it averages, so averaging now does not change the average
    taken later.
    """
    if world_size(group) == 1:
        return
    for buffer in module.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer, group=group)
            buffer /= world_size(group)


def convert_sync_bn(module: nn.Module, ranks: Ranks) -> nn.Module:
    """Every BatchNorm below `module` takes its statistics over all ranks; parameter names stay.

    torch's SyncBatchNorm where there is a GPU, `GlobalBatchNorm` on a CPU, which torch's refuses.
    """
    if ranks.group is None:
        return module
    if ranks.device.type == "cuda":
        from timm.layers import convert_sync_batchnorm  # unlike torch's, keeps the activation of BatchNormAct2d

        return cast(nn.Module, convert_sync_batchnorm(module, ranks.group))
    return _replace_batchnorm(module, ranks.group)


class GlobalBatchNorm(_BatchNorm):
    """BatchNorm over all ranks of a group that differentiates through the all-reduce, on any device.

    Every rank passes the same shape.  Means and variances of the ranks are combined exactly (Chan et al. 1983), so that
    W ranks give what one rank gives on the whole batch.
    """

    def __init__(self, source: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(source.num_features, source.eps, source.momentum, source.affine, source.track_running_stats)
        self.weight, self.bias = source.weight, source.bias
        self.running_mean, self.running_var = source.running_mean, source.running_var
        self.num_batches_tracked = source.num_batches_tracked
        self.group = group
        # timm's BatchNormAct2d carries these; they hold no parameters that matter for the statistics.
        self.drop = getattr(source, "drop", nn.Identity())
        self.act = getattr(source, "act", nn.Identity())
        self.train(source.training)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm expects [batch, channels, ...], found {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # [n, C, ...]
        self._check_input_dim(input)
        if not self.training:
            return self.act(self.drop(super().forward(input)))
        x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        axes = [axis for axis in range(x.ndim) if axis != 1]
        var, mean = torch.var_mean(x, dim=axes, correction=0)  # [C], of this rank
        every = gather_rows(torch.stack((mean, var))[None], self.group)  # [W, 2, C]
        mean = every[:, 0].mean(0)
        var = every[:, 1].mean(0) + every[:, 0].var(0, correction=0)
        if self.track_running_stats:
            self._track(mean.detach(), var.detach(), x.numel() // x.shape[1] * world_size(self.group))
        shape = [1, -1] + [1] * (x.ndim - 2)
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * self.weight
        y = (x - mean.view(shape)) * scale.view(shape)
        if self.affine:
            y = y + self.bias.view(shape)
        return self.act(self.drop(y.to(input.dtype)))

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        unbiased = var * (count / max(count - 1, 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def _replace_batchnorm(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return GlobalBatchNorm(module, group)
    for name, child in module.named_children():
        setattr(module, name, _replace_batchnorm(child, group))
    return module


def _share_cores() -> None:
    """torch uses every core by default; several ranks on one machine must share them."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_per_rank())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def configure_logging(*, verbose: bool) -> None:
    """Warnings of this project on the console of one rank; errors alone of DeepSpeed, which reports dozens of lines."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if verbose else logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

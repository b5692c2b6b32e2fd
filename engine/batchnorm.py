"""BatchNorm over all ranks, on GPUs and CPUs, and buffers that are equal on all of them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from engine.distributed import Ranks
from kernels.collectives import gather_rows, world_size


def average_buffers(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Makes floating-point buffers (BatchNorm's running statistics) equal on all ranks: their mean.

    DeepSpeed never does.  A running mean is linear in what it averages, so averaging now does not change the average
    taken later.
    """
    if world_size(group) == 1:
        return
    for part in module.modules():
        if getattr(part, "equal_on_ranks", False):
            continue
        for buffer in part.buffers(recurse=False):
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=group)
                buffer /= world_size(group)


def convert_sync_bn(module: nn.Module, ranks: Ranks, *, traceable: bool = False) -> nn.Module:
    """Every BatchNorm below `module` takes its statistics over all ranks; parameter names stay.

    torch's SyncBatchNorm where there is a GPU, `GlobalBatchNorm` on a CPU, which torch's refuses, and where it is to be
    `traceable` by torch.compile, whose graph torch's breaks.
    """
    if ranks.group is None:
        return module
    if ranks.device.type == "cuda" and not traceable:
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
        # torch.compile fuses what the formula says by itself, and does not see into an autograd function.
        norm = _by_formula if torch.compiler.is_compiling() else _Norm.apply
        y, mean, var = norm(x, self.weight, self.bias, self.group, self.eps)
        if self.track_running_stats:
            self._track(mean.detach(), var.detach(), x.numel() // x.shape[1] * world_size(self.group))
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


def _over_ranks(mean: Tensor, var: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] over all ranks, of those of this one (Chan et al. 1983)."""
    every = gather_rows(torch.stack((mean, var))[None], group)  # [W, 2, C]
    return every[:, 0].mean(0), every[:, 1].mean(0) + every[:, 0].var(0, correction=0)


def _by_formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, group: dist.ProcessGroup, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """weight (x - mean) / sqrt(var + eps) + bias, the mean and the variance."""
    var, mean = torch.var_mean(x, dim=[axis for axis in range(x.ndim) if axis != 1], correction=0)
    mean, var = _over_ranks(mean, var, group)
    shape = [1, -1] + [1] * (x.ndim - 2)
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    y = (x - mean.view(shape)) * scale.view(shape)
    return y if bias is None else y + bias.view(shape), mean, var


class _Norm(torch.autograd.Function):
    """The same in fewer passes over memory: torch's kernels around one exchange each way.

    With xhat = (x - mean) / sqrt(var + eps), g the gradient of y, and means taken over the batch of all ranks:

        dx = weight / sqrt(var + eps) (g - mean(g) - xhat mean(g xhat))

    With the formula left to autograd two gloo ranks trained two WRN-10-1 at 0.67 times the rate of plain DDP, whose
    BatchNorm is local (bench/results/cpu/step.jsonl).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, group: dist.ProcessGroup, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # As torch's own BatchNorm has them.  var_mean is slow over channels_last: 140 against 4.8 ms for
        # [16, 64, 112, 112] on one core of a Xeon, torch 2.14.
        mean, var = _over_ranks(*torch.batch_norm_update_stats(x, None, None, 0.0), group)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.group, ctx.eps = group, eps
        ctx.mark_non_differentiable(mean, var)
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        g = grads[0]
        # Of this rank: the sums over g xhat and over g, which are the gradients of weight and bias.
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            g, x, torch.ones_like(mean), mean, var, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack((of_weight, of_bias))
        dist.all_reduce(sums, group=ctx.group)
        g_xhat, g_mean = sums / (x.numel() // x.shape[1] * world_size(ctx.group))
        inverse = torch.rsqrt(var + ctx.eps)
        scale = inverse if weight is None else inverse * weight
        slope = -scale * inverse * g_xhat
        shape = [1, -1] + [1] * (x.ndim - 2)
        shift = -scale * g_mean - slope * mean
        dx = torch.addcmul(shift.view(shape), g, scale.view(shape)).addcmul_(x, slope.view(shape))
        return dx, None if weight is None else of_weight, None if weight is None else of_bias, None, None


def _replace_batchnorm(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return GlobalBatchNorm(module, group)
    for name, child in module.named_children():
        setattr(module, name, _replace_batchnorm(child, group))
    return module

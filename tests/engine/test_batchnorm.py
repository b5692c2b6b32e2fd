"""BatchNorm over ranks is BatchNorm over the whole batch; buffers become equal."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from engine import distributed
from engine.batchnorm import GlobalBatchNorm, average_buffers, convert_sync_bn
from ranks import run_ranks


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 6, 3), BatchNormAct2d(6), nn.Conv2d(6, 5, 3, bias=False), nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(), nn.Linear(5 * 16, 7), nn.BatchNorm1d(7, affine=False),
    )  # fmt: skip
    return module.to(dtype)


def images(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    # a mean far from zero and parts that differ: where E[x^2] - E[x]^2 would lose its digits
    offsets = torch.linspace(40, 60, 12).view(12, 1, 1, 1)
    return (torch.randn(12, 3, 8, 8, generator=generator) + offsets).to(dtype)


def one_rank(world: int, dtype: torch.dtype) -> dict:
    """Two training steps' worth of forward and backward on this rank's images, then an evaluation."""
    ranks = distributed.start() if world > 1 else None
    rank = ranks.rank if ranks else 0
    module = convert_sync_bn(network(dtype), ranks) if ranks else network(dtype)
    n = 12 // world
    own = images(dtype)[rank * n : (rank + 1) * n].clone().requires_grad_()
    module(own * 1.5)
    out = module(own)
    (out * torch.arange(7, dtype=dtype)).pow(2).mean().backward()
    module.eval()
    result = {
        "out": out.detach().numpy(), "input_grad": own.grad.numpy(), "eval": module(own).detach().numpy(),
        "grads": [p.grad.numpy() for p in module.parameters()], "keys": list(module.state_dict()),
        "buffers": {k: v.numpy() for k, v in module.named_buffers()},
    }  # fmt: skip
    distributed.stop()
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (3, torch.float64), (4, torch.float32)])
def test_batchnorm_over_ranks_is_batchnorm_over_the_whole_batch(world, dtype):
    whole = one_rank(1, dtype)
    every = run_ranks(one_rank, world, world, dtype)
    tolerance = {"rtol": 2e-4, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}

    def close(found, wanted):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), **tolerance)

    for key in ("out", "eval"):
        close(torch.cat([torch.from_numpy(r[key]) for r in every]), whole[key])
    # each rank back-propagates its own mean; the sum over ranks / W is the whole batch's
    close(torch.cat([torch.from_numpy(r["input_grad"]) for r in every]) / world, whole["input_grad"])
    for i, wanted in enumerate(whole["grads"]):
        close(sum(torch.from_numpy(r["grads"][i]) for r in every) / world, wanted)
    for r in every:
        assert r["keys"] == whole["keys"], "a checkpoint must not know how many ranks wrote it"
        for key, wanted in whole["buffers"].items():
            close(r["buffers"][key], wanted)
            assert (r["buffers"][key] == every[0]["buffers"][key]).all(), "running statistics are equal to the bit"


def running_means() -> list[float]:
    ranks = distributed.start()
    module = nn.BatchNorm1d(3)
    module.running_mean.fill_(float(ranks.rank))
    average_buffers(module, ranks.group)
    distributed.stop()
    return module.running_mean.tolist()


@pytest.mark.slow
def test_running_statistics_are_averaged():
    assert run_ranks(running_means, 3) == [[1.0] * 3] * 3


def converted() -> bool:
    ranks = distributed.start()
    frozen = convert_sync_bn(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), ranks).eval()
    distributed.stop()
    return isinstance(frozen[1], GlobalBatchNorm) and not frozen[1].training


@pytest.mark.slow
def test_every_batchnorm_below_a_module_is_converted():
    assert run_ranks(converted, 2) == [True, True]


def test_alone_nothing_is_converted(alone):
    module = nn.Sequential(nn.BatchNorm1d(3))
    assert convert_sync_bn(module, alone) is module
    assert type(module[0]) is nn.BatchNorm1d
    average_buffers(module, None)

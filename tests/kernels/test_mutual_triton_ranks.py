"""The triton backend on several gloo ranks, under Triton's interpreter."""

import pytest
import torch
import torch.distributed as dist

from embeddings import embeddings
from kernels import gather_views, mutual_loss, mutual_triton, ntxent_loss, similarity_kl
from ranks import run_ranks


def losses_of_one_rank(world: int, N: int, gathers: bool) -> tuple[list[float], list]:
    """Values on this rank and the gradients of its rows, of the sum of all losses; float32 storage."""
    mutual_triton.STORAGE = torch.float32
    if world > 1:
        dist.init_process_group("gloo")
    rank, group = (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)
    n = N // world
    whole = [*embeddings(N, 10, 34), *embeddings(N, 300, 35)]
    own = [z.detach().float()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in whole]
    options = {"group": group, "backend": "triton"}
    handles = (None, None)
    if gathers:
        handles = gather_views(*own[:2], **options), gather_views(*own[2:], **options)
    both = mutual_loss(*own, weights=(0.7, 1.3), gathered=handles, **options)
    safe = mutual_loss(*own, tau_contrast=0.01, **options)
    single = ntxent_loss(*own[:2], tau=0.2, **options)
    kl = similarity_kl(*own, kl_reduction="mean", **options)
    total = both.loss_a + both.loss_b + safe.loss_a + 2 * single + 5 * kl.kl_a + 7 * kl.kl_b
    gradients = torch.autograd.grad(total, own)
    with torch.no_grad():
        alone = mutual_loss(*own, **options)
    if world > 1:
        dist.destroy_process_group()
    return [v.item() for v in (*both, *safe, *alone, single, *kl)], [g.numpy() for g in gradients]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "N", "gathers"), [(2, 2, False), (2, 74, True), (4, 76, False)])
def test_ranks_give_the_loss_and_gradient_of_one(world, N, gathers, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # gloo ranks have no GPU
    (expected, expected_gradients), *_ = run_ranks(losses_of_one_rank, 1, 1, N, gathers)
    every = run_ranks(losses_of_one_rank, world, world, N, gathers)
    for values, _ in every:
        assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert values == every[0][0], "the losses must be equal on every rank"
    for i, wanted in enumerate(expected_gradients):
        rows = torch.cat([torch.from_numpy(gradients[i]) for _, gradients in every])
        assert (rows / world - torch.from_numpy(wanted)).norm() < 1e-4 * torch.from_numpy(wanted).norm()


def collectives_of_one_rank(world: int) -> list[tuple[str, int]]:
    """(collective, bytes) of one step, in order."""
    dist.init_process_group("gloo")
    seen = []
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "broadcast"):
        original = getattr(dist, name)

        def recorded(first, *rest, _name=name, _original=original, **options):
            seen.append((_name, first.numel() * first.element_size()))
            return _original(first, *rest, **options)

        setattr(dist, name, recorded)
    own = [z.detach().float().requires_grad_() for z in (*embeddings(64, 32, 36), *embeddings(64, 32, 37))]
    both = mutual_loss(*own, group=dist.group.WORLD, backend="triton")
    (both.loss_a + both.loss_b).backward()
    dist.destroy_process_group()
    return seen


@pytest.mark.slow
def test_what_travels_between_ranks(monkeypatch):
    """Float16 embeddings once, eight floats an image (four a row), the six values; nothing for gradients."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for seen in run_ranks(collectives_of_one_rank, 2, 2):
        gathers = [size for name, size in seen if name == "all_gather_into_tensor"]
        assert gathers == [128 * 32 * 2] * 4  # two views of two peers, 128 images of 32 float16
        assert [size for name, size in seen if name == "all_reduce"] == [2 * 4 * 128 * 4, 6 * 4]
        assert len(seen) == 6

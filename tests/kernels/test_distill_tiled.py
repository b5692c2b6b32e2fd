"""The tiled form of distillation terms: its precision, its memory, over ranks, and on a GPU."""

import itertools
import weakref

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distillation import ALL_SETTINGS, DIVERGENCES, MATRICES, TERMS, gradients, networks
from kernels import distill_strip, distill_tiled, reference_distill, similarity_distillation, strips
from kernels.reference_distill import Settings
from ranks import run_ranks


@pytest.mark.parametrize("kept", [7, 150])
@pytest.mark.parametrize("tau", [0.02, 0.1, 0.5])
@pytest.mark.parametrize(("rows", "symmetric"), MATRICES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_is_as_good_as_the_plain_formula(divergence, rows, symmetric, tau, kept, monkeypatch):
    """No further from float64 than twice what plain PyTorch in float32 is, in short strips and in one."""
    monkeypatch.setattr(strips, "CPU_ROWS", kept)
    settings = Settings(tau, divergence, rows, symmetric)
    exact, single, leaves = networks(151), networks(151, torch.float32), networks(151, torch.float32)
    wanted = reference_distill.similarity_distillation(exact, TERMS, settings)[0]
    plain = reference_distill.similarity_distillation(leaves, TERMS, settings)[0]
    found = distill_tiled.distill(single, TERMS, settings, None)[0]
    # A single plain result may be exact by luck; a few roundings of float32 are granted.
    floor = 3e-7 + 3e-8 / tau
    for f, p, w in zip(found, plain, wanted, strict=True):
        assert abs(f.double() - w) <= 2 * abs(p.double() - w) + floor * max(1e-3, w.item())
    every = (gradients(*each) for each in ((found, single), (plain, leaves), (wanted, exact)))
    for terms in zip(*every, strict=True):
        for f, p, w in zip(*terms, strict=True):
            if w is not None:
                assert (f.double() - w).norm() <= 2 * (p.double() - w).norm() + floor * w.norm()


# -- memory --------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at once, and the largest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[weakref.ref] = []
        self.most = self.largest = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        given = {z.untyped_storage().data_ptr() for z in tree_leaves((arguments, options)) if torch.is_tensor(z)}
        out = function(*arguments, **(options or {}))
        self.alive += [weakref.ref(z) for z in tree_leaves(out) if z.untyped_storage().data_ptr() not in given]
        self.alive = [ref for ref in self.alive if ref() is not None]
        sizes = {ref().untyped_storage().data_ptr(): ref().untyped_storage().nbytes() for ref in self.alive}
        self.most, self.largest = max(self.most, sum(sizes.values())), max(self.largest, *sizes.values(), 0)
        return out


@pytest.mark.parametrize(("divergence", "rows", "symmetric", "partition"), ALL_SETTINGS)
def test_memory_is_bounded(divergence, rows, symmetric, partition, monkeypatch):
    N = 400
    monkeypatch.setattr(strips, "FEWEST_ROWS", 1)
    monkeypatch.setattr(strips, "CPU_ROWS", N)
    monkeypatch.setattr(strips, "STRIP_BYTES", 500_000)
    views = [(x.detach(), y.detach()) for x, y in networks(N, torch.float32)]
    with Memory() as memory:
        distill_tiled.compute(views, TERMS, Settings(0.1, divergence, rows, symmetric, partition), None, [True] * 5)
    small = 5 * 4 * 2 * N * 9 * 4  # embeddings of four networks, gradients of five terms: 9 wide at most
    assert memory.largest <= 500_000 / distill_strip.matrices(TERMS)
    assert 250_000 < memory.most <= 500_000 + small
    assert N * N * 4 > 500_000, "a whole matrix would not fit"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_waits_for_the_device(device):
    """Tensors without data: whatever asked for a value would fail, and so would a tensor on another device."""
    with FakeTensorMode():
        views = [tuple(torch.empty(37, D, device=device) for _ in range(2)) for D in (5, 9, 3, 6)]
        for settings in ALL_SETTINGS:
            losses, shares, made = distill_tiled.compute(views, TERMS, Settings(0.1, *settings), None, [True] * 5)
            assert losses.device.type == shares.device.type == made[0].device.type == device


# -- several ranks -------------------------------------------------------------------------------------------------

OVER_RANKS = [
    {},  # two terms are fused
    {"symmetric": True, "kl_reduction": "mean"},
    {"divergence": "reverse_kl", "symmetric": True, "partition": True},
    {"divergence": "jeffreys", "partition": True},
    {"divergence": "js", "rows": "all", "kl_reduction": "mean"},
    {"rows": "all", "partition": True},
]


def terms_of_one_rank(world: int, dtype: torch.dtype) -> tuple[list[float], list]:
    """Values on this rank and the gradients of its rows, of a sum of all losses."""
    if world > 1:
        dist.init_process_group("gloo")
    rank, group = (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)
    strips.CPU_ROWS = 5
    n = 12 // world
    own = [
        tuple(z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in v) for v in networks(12, dtype)
    ]
    values, total = [], 0.0
    for options, backend in itertools.product(OVER_RANKS, ("auto", "torch")):
        losses, shares = similarity_distillation(own, TERMS, group=group, backend=backend, **options)
        values += [value.item() for value in (*losses, *shares)]
        total = total + sum((i + 1) * loss for i, loss in enumerate(losses))
    made = torch.autograd.grad(total, [z for pair in own for z in pair])
    with torch.no_grad():
        values += [loss.item() for loss in similarity_distillation(own, TERMS, group=group, rows="all").losses]
    if world > 1:
        dist.destroy_process_group()
    return values, [gradient.numpy() for gradient in made]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float64), (3, torch.float32)])
def test_ranks_give_the_loss_and_gradient_of_one(world, dtype):
    expected, expected_gradients = terms_of_one_rank(1, dtype)
    every = run_ranks(terms_of_one_rank, world, world, dtype)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    for values, _ in every:
        assert values == pytest.approx(expected, rel=tolerance)
        assert values == every[0][0], "the losses must be equal on every rank"
    for i, wanted in enumerate(expected_gradients):
        rows = torch.cat([torch.from_numpy(made[i]) for _, made in every])
        # W times the true gradient of a rank's own rows: the mean over ranks is then exact
        assert (rows / world - torch.from_numpy(wanted)).norm() < tolerance * torch.from_numpy(wanted).norm()


def collectives_of_one_rank() -> list[tuple[str, list[int]]]:
    """(collective, shape) of one step of a term that is not fused, in order."""
    dist.init_process_group("gloo")
    seen = []
    for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast"):
        original = getattr(dist, name)

        def recorded(first, second=None, *rest, _name=name, _original=original, **options):
            seen.append((_name, list((first if second is None else second).shape)))
            return _original(first, *(() if second is None else (second,)), *rest, **options)

        setattr(dist, name, recorded)
    own = networks(6)
    terms = [(0, (1, 2)), (1, (0, 2))]
    sum(similarity_distillation(own, terms, group=dist.group.WORLD).losses).backward()
    sum(similarity_distillation(own, terms, rows="all", group=dist.group.WORLD).losses).backward()
    dist.destroy_process_group()
    return seen


@pytest.mark.slow
def test_what_travels_between_ranks():
    """Columns once a network, the values, and the gradients of the columns of both students at once."""
    for seen in run_ranks(collectives_of_one_rank, 2):
        y_alone = [("all_gather", [6, 1, D]) for D in (5, 9, 3)]
        both = [("all_gather", [6, 2, D]) for D in (5, 9, 3)]
        values = ("all_reduce", [2, 2])
        assert seen == [
            *y_alone, values, ("all_reduce", [12, 5 + 9]), *both, values, ("all_reduce", [12, 2 * (5 + 9)]),
        ]  # fmt: skip


# -- on a GPU alone ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("divergence", "rows", "symmetric", "partition"), ALL_SETTINGS)
def test_a_cuda_graph_repeats_the_terms(divergence, rows, symmetric, partition):
    options = {"divergence": divergence, "rows": rows, "symmetric": symmetric, "partition": partition}
    views = networks(300, torch.float32, device="cuda")

    def step():
        losses, shares = similarity_distillation(views, TERMS[2:], **options)
        made = [g for term in gradients(losses, views) for g in term if g is not None]
        return [*losses, *shares, *made]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for z in (z for pair in views for z in pair):
            z.add_(0.3 * torch.randn_like(z))
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)
    on_cpu = [tuple(z.detach().cpu().double().requires_grad_() for z in pair) for pair in views]
    losses = similarity_distillation(on_cpu, TERMS[2:], backend="torch", **options).losses
    for found, wanted in zip(captured, losses, strict=False):
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-3, atol=1e-6)

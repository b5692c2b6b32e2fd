"""Barlow Twins and VICReg: against loops in float64, over ranks, against lightly, in float32, and on bad input."""

import math
from statistics import fmean, pvariance, variance

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings import embeddings, relative
from kernels import barlow_twins_loss, vicreg_loss
from kernels.redundancy import _OffDiagonalSquares
from ranks import run_ranks

LOSSES = (barlow_twins_loss, vicreg_loss)
SHAPES = [(2, 1), (2, 3), (13, 7), (9, 31), (37, 12)]


# -- the definitions, entry by entry -------------------------------------------------------------------------------


def barlow_by_loops(x: list[list[float]], y: list[list[float]], weight: float) -> float:
    def standardized(column):
        mean, spread = fmean(column), math.sqrt(pvariance(column) + 1e-5)
        return [(value - mean) / spread for value in column]

    columns_x, columns_y = ([standardized(column) for column in zip(*z, strict=True)] for z in (x, y))
    total = 0.0
    for i, u in enumerate(columns_x):
        for j, v in enumerate(columns_y):
            correlation = fmean(a * b for a, b in zip(u, v, strict=True))
            total += (1 - correlation) ** 2 if i == j else weight * correlation**2
    return total


def vicreg_by_loops(x: list[list[float]], y: list[list[float]], weights: tuple[float, float, float]) -> float:
    N, D = len(x), len(x[0])
    distance = sum((a - b) ** 2 for u, v in zip(x, y, strict=True) for a, b in zip(u, v, strict=True)) / (N * D)
    lacking = shared = 0.0
    for z in (x, y):
        columns = [list(column) for column in zip(*z, strict=True)]
        means = [fmean(column) for column in columns]
        lacking += fmean(max(0.0, 1 - math.sqrt(variance(column) + 1e-4)) for column in columns) / 2
        for i in range(D):
            for j in range(D):
                if i != j:
                    products = [(row[i] - means[i]) * (row[j] - means[j]) for row in z]
                    shared += (sum(products) / (N - 1)) ** 2 / D
    return weights[0] * distance + weights[1] * lacking + weights[2] * shared


@pytest.mark.parametrize(("N", "D"), SHAPES)
@pytest.mark.parametrize("weight", [0.005, 0.7, 0.0])
def test_barlow_twins_is_the_definition(N, D, weight):
    x, y = embeddings(N, D, 0)
    wanted = barlow_by_loops(x.tolist(), y.tolist(), weight)
    assert barlow_twins_loss(x, y, off_diagonal=weight).item() == pytest.approx(wanted, rel=1e-11, abs=1e-13)
    if weight == 0.005:
        assert barlow_twins_loss(x, y).item() == pytest.approx(wanted, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize(("N", "D"), SHAPES)
@pytest.mark.parametrize("weights", [(25.0, 25.0, 1.0), (2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 5.0)])
@pytest.mark.parametrize("scale", [0.3, 1.5])  # standard deviations below 1, and on both sides of it
def test_vicreg_is_the_definition(N, D, weights, scale):
    x, y = (scale * z for z in embeddings(N, D, 1))
    wanted = vicreg_by_loops(x.tolist(), y.tolist(), weights)
    options = dict(zip(("invariance", "variance", "covariance"), weights, strict=True))
    assert vicreg_loss(x, y, **options).item() == pytest.approx(wanted, rel=1e-11, abs=1e-13)
    if weights == (25.0, 25.0, 1.0):
        assert vicreg_loss(x, y).item() == pytest.approx(wanted, rel=1e-11, abs=1e-13)


# The same with matrices, for gradients by autograd; the entries off the diagonal are picked by a mask.


def barlow_plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    u, v = ((z - z.mean(dim=0)) / (z.var(dim=0, correction=0) + 1e-5).sqrt() for z in (x, y))
    C = u.T @ v / len(x)
    off = C[~torch.eye(len(C), dtype=torch.bool)]
    return ((1 - C.diagonal()) ** 2).sum() + 0.005 * (off**2).sum()


def vicreg_plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = 25 * ((x - y) ** 2).mean()
    for z in (x, y):
        C = torch.cov(z.T).reshape(z.shape[1], z.shape[1])
        off = C[~torch.eye(len(C), dtype=torch.bool)]
        spread = (C.diagonal() + 1e-4).sqrt()
        loss = loss + 25 * (1 - spread).clamp(min=0).mean() / 2 + (off**2).sum() / len(C)
    return loss


PLAIN = {barlow_twins_loss: barlow_plain, vicreg_loss: vicreg_plain}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("N", "D"), [(13, 7), (9, 31), (130, 50)])
def test_gradients_are_those_of_autograd(loss, N, D):
    exact = embeddings(N, D, 2)
    wanted = torch.autograd.grad(-3.5 * PLAIN[loss](*exact), exact)
    for gradient, expected in zip(torch.autograd.grad(-3.5 * loss(*exact), exact), wanted, strict=True):
        assert relative(gradient, expected) < 1e-12
    # In float32 at most twice as far off as autograd is.
    single = [z.detach().float().requires_grad_() for z in exact]
    by_autograd = torch.autograd.grad(-3.5 * PLAIN[loss](*single), single)
    for gradient, theirs, expected in zip(
        torch.autograd.grad(-3.5 * loss(*single), single), by_autograd, wanted, strict=True
    ):
        assert relative(gradient, expected) < 2 * relative(theirs, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss):
    inputs = embeddings(4, 3, 3)
    assert torch.autograd.gradcheck(loss, inputs)
    # A gradient that is to have a gradient takes another path, and must be the same.
    once = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(loss(*inputs), inputs, create_graph=True), once)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_view_may_be_frozen(loss):
    x, y = embeddings(6, 4, 4)
    wanted = torch.autograd.grad(loss(x, y), (x, y))
    for gradient, found in zip(
        wanted,
        (torch.autograd.grad(loss(x, y.detach()), x)[0], torch.autograd.grad(loss(x.detach(), y), y)[0]),
        strict=True,
    ):
        torch.testing.assert_close(found, gradient, rtol=1e-13, atol=1e-15)


def test_against_lightly():
    """No factor lies between lightly's losses and ours; over ranks its VICReg takes each rank's own distance."""
    lightly_loss = pytest.importorskip("lightly.loss")
    exact = embeddings(29, 17, 5)
    for theirs, ours in (
        (lightly_loss.BarlowTwinsLoss(), barlow_twins_loss),
        (lightly_loss.BarlowTwinsLoss(lambda_param=0.3), lambda x, y: barlow_twins_loss(x, y, off_diagonal=0.3)),
        (lightly_loss.VICRegLoss(), vicreg_loss),
        (
            lightly_loss.VICRegLoss(lambda_param=2.0, mu_param=3.0, nu_param=5.0),
            lambda x, y: vicreg_loss(x, y, invariance=2.0, variance=3.0, covariance=5.0),
        ),
    ):
        wanted, found = theirs(*exact), ours(*exact)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        for gradient, expected in zip(
            torch.autograd.grad(found, exact), torch.autograd.grad(wanted, exact), strict=True
        ):
            assert relative(gradient, expected) < 1e-11


# -- the entries off the diagonal ----------------------------------------------------------------------------------


def test_small_entries_beside_a_large_diagonal_keep_their_digits():
    generator = torch.Generator().manual_seed(6)
    basis = torch.linalg.qr(torch.randn(64, 40, generator=generator, dtype=torch.float64)).Q
    u = (basis + 1e-5 * torch.randn(64, 40, generator=generator, dtype=torch.float64)).float()
    C = u.double().T @ u.double()
    wanted = (C - C.diagonal().diag()).square().sum()
    assert relative(_OffDiagonalSquares.apply(u, None, 1, None), wanted) < 1e-3
    by_subtraction = (u.T @ u).square().sum() - (u.T @ u).diagonal().square().sum()
    assert relative(by_subtraction, wanted) > 0.5


def test_many_entries_are_summed_well():
    """The norm of all entries in one is off by 2e-4 here, on a CPU."""
    generator = torch.Generator().manual_seed(7)
    u, v = (torch.randn(8, 2048, generator=generator) for _ in range(2))
    C = u.double().T @ v.double() / 8
    wanted = C.square().sum() - C.diagonal().square().sum()
    assert relative(_OffDiagonalSquares.apply(u, v, 8, None), wanted) < 1e-6


class LargeTensors(TorchDispatchMode):
    """Every tensor of at least `least` elements that an operation gives, kept so that no two share their memory."""

    def __init__(self, least: int):
        super().__init__()
        self.least, self.kept = least, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, list | tuple) else [result]
        self.kept += [z for z in tensors if isinstance(z, torch.Tensor) and z.numel() >= self.least]
        return result

    def count(self) -> int:
        return len({z.untyped_storage().data_ptr() for z in self.kept})


@pytest.mark.parametrize(("loss", "matrices"), [(barlow_twins_loss, 1), (vicreg_loss, 2)])
def test_each_matrix_is_made_once(loss, matrices):
    """Forward and backward make one matrix D x D a product, and nothing else is as large."""
    inputs = [z.detach().float().requires_grad_() for z in embeddings(8, 50, 8)]
    with LargeTensors(50 * 50) as large:
        loss(*inputs).backward()
    assert large.count() == matrices


# -- dtypes and ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(loss, dtype):
    inputs = [z.detach().to(dtype).requires_grad_() for z in embeddings(33, 20, 9)]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a surrounding autocast must not reach the loss
        ours = loss(*inputs)
    assert ours.dtype == torch.float32
    assert relative(ours, loss(*(z.detach().double() for z in inputs))) < 1e-6
    assert torch.autograd.grad(ours, inputs[0])[0].dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("D", [1, 4])
def test_a_non_finite_embedding_gives_a_non_finite_loss(bad, D):
    zero = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0}
    for place in range(2):
        inputs = [z.detach().clone() for z in embeddings(6, D, 10)]
        assert all(loss(*inputs).isfinite() for loss in LOSSES)
        inputs[place][3, 0] = bad
        assert not any(loss(*inputs).isfinite() for loss in LOSSES)
        assert not barlow_twins_loss(*inputs, off_diagonal=0.0).isfinite()
        assert not vicreg_loss(*inputs, **zero).isfinite()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dimension_that_does_not_vary_stays_finite(loss):
    inputs = [z.detach().float() for z in embeddings(6, 4, 11)]
    for z in inputs:
        z[:, 2] = 5
        z.requires_grad_()
    assert loss(*inputs).isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss(*inputs), inputs))


def test_a_mean_far_from_zero_costs_few_digits():
    x, y = (z.detach() + 100 for z in embeddings(40, 9, 12))
    for loss in LOSSES:
        assert relative(loss(x.float(), y.float()), loss(x.float().double(), y.float().double())) < 1e-5


def test_views_that_are_not_contiguous():
    x, y = (z.detach() for z in embeddings(8, 6, 13))
    strided = torch.stack((x, y), dim=2).permute(1, 0, 2)
    for loss in LOSSES:
        torch.testing.assert_close(loss(strided[:, :, 0].T, strided[:, :, 1].T), loss(x, y), rtol=1e-14, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_graph_breaks(loss):
    inputs = embeddings(6, 4, 14)
    eager = loss(*inputs)
    compiled = torch.compile(lambda *z: loss(*z), fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs), torch.autograd.grad(eager, inputs))


# -- several ranks -------------------------------------------------------------------------------------------------


def losses_of_one_rank(world: int, N: int, compiled: bool = False) -> tuple[list[float], list]:
    if world > 1:
        dist.init_process_group("gloo")
    rank, group = (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)
    n = N // world
    own = [z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in embeddings(N, 5, 15)]

    def compute(x, y):
        return [loss(x, y, group=group) for loss in LOSSES]

    losses = (torch.compile(compute, fullgraph=True, backend="aot_eager") if compiled else compute)(*own)
    gradients = [gradient for loss in losses for gradient in torch.autograd.grad(3 * loss, own, retain_graph=True)]
    if world > 1:
        dist.destroy_process_group()
    return [loss.item() for loss in losses], [g.numpy() for g in gradients]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "N", "compiled"), [(2, 2, False), (2, 12, True), (3, 12, False)])
def test_ranks_give_the_loss_and_gradient_of_one(world, N, compiled):
    expected, expected_gradients = losses_of_one_rank(1, N)
    every = run_ranks(losses_of_one_rank, world, world, N, compiled)
    for values, _ in every:
        assert values == pytest.approx(expected, rel=1e-12)
        assert values == every[0][0], "the losses must be equal on every rank"
    for i, wanted in enumerate(expected_gradients):
        rows = torch.cat([torch.from_numpy(gradients[i]) for _, gradients in every])
        torch.testing.assert_close(rows / world, torch.from_numpy(wanted), rtol=1e-11, atol=1e-13)


# -- bad input -----------------------------------------------------------------------------------------------------

GOOD = torch.randn(4, 3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD, GOOD[:3]), r"y: shape torch.Size\(\[3, 3\]\) differs from x's"),
        ((GOOD[0], GOOD[0]), r"x: shape \[N, D\] with N, D >= 1 is expected, found \[3\]"),
        ((GOOD[:1], GOOD[:1]), "x: N = 1 has no variance; at least 2 images over all ranks are needed"),
        ((GOOD.int(), GOOD.int()), "x: dtype torch.int32 is not supported; allowed: float16"),
        ((GOOD, GOOD.double()), "y: dtype torch.float64 differs"),
        ((GOOD, GOOD.to("meta")), "y: device meta differs"),
        ((GOOD, None), "y: a tensor .* found NoneType"),
    ],
)
def test_bad_views_are_named(loss, arguments, message):
    with pytest.raises(ValueError, match=message):
        loss(*arguments)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (barlow_twins_loss, "off_diagonal"),
        (vicreg_loss, "invariance"),
        (vicreg_loss, "variance"),
        (vicreg_loss, "covariance"),
    ],
)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much", None])
def test_bad_weights_are_named(loss, name, value):
    with pytest.raises(ValueError, match=f"{name}: must be finite and >= 0, found {value!r}"):
        loss(GOOD, GOOD, **{name: value})

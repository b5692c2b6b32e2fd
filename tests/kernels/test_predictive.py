"""SimSiam and BYOL: against loops in float64, over ranks, against lightly, in half precision, and on bad input."""

import math

import pytest
import torch
import torch.distributed as dist

from embeddings import embeddings, relative
from kernels import byol_loss, simsiam_loss
from ranks import run_ranks

LOSSES = (simsiam_loss, byol_loss)


def inputs_of(N: int, D: int, seed: int) -> list[torch.Tensor]:
    """p_x, p_y, z_x, z_y in float64."""
    return [*embeddings(N, D, seed), *embeddings(N, D, seed + 1)]


# -- the definitions, entry by entry -------------------------------------------------------------------------------


def cosine(u: list[float], v: list[float]) -> float:
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u) * sum(b * b for b in v))


def simsiam_by_loops(p_x, p_y, z_x, z_y) -> float:
    N = len(p_x)
    return -sum(cosine(p_x[i], z_y[i]) + cosine(p_y[i], z_x[i]) for i in range(N)) / (2 * N)


def byol_by_loops(p_x, p_y, t_x, t_y) -> float:
    """Squared distances of unit vectors, as the paper's formula begins."""

    def unit(u):
        length = math.sqrt(sum(a * a for a in u))
        return [a / length for a in u]

    def distance(u, v):
        return sum((a - b) ** 2 for a, b in zip(unit(u), unit(v), strict=True))

    N = len(p_x)
    return sum(distance(p_x[i], t_y[i]) + distance(p_y[i], t_x[i]) for i in range(N)) / N


BY_LOOPS = {simsiam_loss: simsiam_by_loops, byol_loss: byol_by_loops}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("N", "D"), [(1, 1), (1, 6), (2, 3), (13, 7), (37, 19)])
def test_values_are_the_definition(loss, N, D):
    inputs = inputs_of(N, D, 0)
    wanted = BY_LOOPS[loss](*(z.tolist() for z in inputs))
    assert loss(*inputs).item() == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    single = loss(*(z.float() for z in inputs))
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def gradients_by_hand(p: torch.Tensor, z: torch.Tensor, slope: float) -> torch.Tensor:
    """slope dcos(p_i, z_i)/dp_i = slope (z_i/|z_i| - cos p_i/|p_i|) / |p_i|, row by row."""
    rows = []
    for u, v in zip(p.detach(), z.detach(), strict=True):
        u_hat, v_hat = u / u.norm(), v / v.norm()
        rows.append(slope * (v_hat - (u_hat @ v_hat) * u_hat) / u.norm())
    return torch.stack(rows)


@pytest.mark.parametrize(("loss", "slope"), [(simsiam_loss, -0.5), (byol_loss, -2.0)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_gradients_are_of_the_predictions_only(loss, slope, dtype, tolerance):
    N = 23
    exact = inputs_of(N, 11, 2)
    inputs = [z.detach().to(dtype).requires_grad_() for z in exact]
    gradients = torch.autograd.grad(3 * loss(*inputs), inputs, allow_unused=True)
    assert relative(gradients[0], gradients_by_hand(exact[0], exact[3], 3 * slope / N)) < tolerance
    assert relative(gradients[1], gradients_by_hand(exact[1], exact[2], 3 * slope / N)) < tolerance
    assert gradients[2:] == (None, None)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_against_finite_differences(loss):
    p_x, p_y, z_x, z_y = inputs_of(4, 5, 4)
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, z_x.detach(), z_y.detach()), [p_x, p_y])


def test_what_predicts_perfectly():
    z_x, z_y = (z.detach() for z in embeddings(5, 4, 6))
    assert simsiam_loss(2 * z_y, 3 * z_x, z_x, z_y).item() == pytest.approx(-1, rel=1e-14)
    assert byol_loss(2 * z_y, 3 * z_x, z_x, z_y).item() == pytest.approx(0, abs=1e-14)
    assert byol_loss(-z_y, -z_x, z_x, z_y).item() == pytest.approx(8, rel=1e-14)


def test_against_lightly():
    """lightly's loss is one direction of SimSiam's: a mean over both is the paper's, and BYOL's is 4 + 4 times it."""
    lightly_loss = pytest.importorskip("lightly.loss")
    theirs = lightly_loss.NegativeCosineSimilarity()
    p_x, p_y, z_x, z_y = inputs = inputs_of(29, 17, 8)
    wanted = (theirs(p_x, z_y.detach()) + theirs(p_y, z_x.detach())) / 2
    for loss, expected in ((simsiam_loss, wanted), (byol_loss, 4 + 4 * wanted)):
        found = loss(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(found, inputs[:2])
        expected_gradients = torch.autograd.grad(expected, inputs[:2], retain_graph=True)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-10, atol=1e-14)


# -- dtypes and ranges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(loss, dtype):
    inputs = [z.detach().to(dtype).requires_grad_() for z in inputs_of(33, 20, 10)]
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a surrounding autocast must not reach the loss
        ours = loss(*inputs)
    assert ours.dtype == torch.float32
    assert relative(ours, loss(*(z.detach().double() for z in inputs))) < 1e-6
    assert torch.autograd.grad(ours, inputs[0])[0].dtype == dtype


@pytest.mark.parametrize("loss", LOSSES)
def test_targets_may_be_of_another_dtype(loss):
    p_x, p_y, z_x, z_y = inputs_of(9, 6, 12)
    half = [p.detach().bfloat16() for p in (p_x, p_y)]
    wanted = loss(*(p.double() for p in half), z_x, z_y)
    assert relative(loss(*half, z_x.float(), z_y.float()), wanted) < 1e-6
    assert loss(*half, z_x, z_y).dtype == torch.float64


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_embedding_gives_a_non_finite_loss(loss, bad):
    for place in range(4):
        inputs = [z.detach().clone() for z in inputs_of(6, 4, 14)]
        assert loss(*inputs).isfinite()
        inputs[place][3, 2] = bad
        assert not loss(*inputs).isfinite()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_embeddings_does_not_matter(loss, scale):
    exact = inputs_of(9, 6, 16)
    scaled = [(z.detach() * scale).float().requires_grad_() for z in exact]
    assert relative(loss(*scaled), loss(*exact)) < 1e-5
    gradient = torch.autograd.grad(loss(*scaled), scaled[0])[0].double() * scale
    assert relative(gradient, torch.autograd.grad(loss(*exact), exact[0])[0]) < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_of_zeros_stays_finite(loss):
    inputs = [z.detach().float().requires_grad_() for z in inputs_of(6, 4, 18)]
    with torch.no_grad():
        inputs[0][2] = 0
        inputs[3][4] = 0
    assert loss(*inputs).isfinite()
    assert torch.autograd.grad(loss(*inputs), inputs[0])[0].isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_without_graph_breaks(loss):
    inputs = inputs_of(6, 4, 20)
    eager = loss(*inputs)
    compiled = torch.compile(lambda *z: loss(*z), fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs[:2]), torch.autograd.grad(eager, inputs[:2]))


# -- several ranks -------------------------------------------------------------------------------------------------


def losses_of_one_rank(world: int) -> tuple[list[float], list]:
    if world > 1:
        dist.init_process_group("gloo")
    rank, group = (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)
    n = 12 // world
    own = [z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in inputs_of(12, 10, 22)]
    losses = [loss(*own, group=group) for loss in LOSSES]
    gradients = torch.autograd.grad(losses[0] + 5 * losses[1], own[:2])
    if world > 1:
        dist.destroy_process_group()
    return [loss.item() for loss in losses], [g.numpy() for g in gradients]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_loss_and_gradient_of_one(world):
    expected, expected_gradients = losses_of_one_rank(1)
    every = run_ranks(losses_of_one_rank, world, world)
    for values, _ in every:
        assert values == pytest.approx(expected, rel=1e-12)
        assert values == every[0][0], "the losses must be equal on every rank"
    for i, wanted in enumerate(expected_gradients):
        rows = torch.cat([torch.from_numpy(gradients[i]) for _, gradients in every])
        torch.testing.assert_close(rows / world, torch.from_numpy(wanted), rtol=1e-12, atol=1e-14)


# -- bad input -----------------------------------------------------------------------------------------------------

GOOD = torch.randn(4, 3)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: GOOD[0]}, r"p_x: shape \[N, D\] with N, D >= 1 is expected, found \[3\]"),
        ({1: GOOD[:3]}, r"p_y: shape torch.Size\(\[3, 3\]\) differs from p_x's"),
        ({2: GOOD[:, :2], 3: GOOD[:, :2]}, r"[zt]_x: shape torch.Size\(\[4, 2\]\) differs from p_x's"),
        ({3: GOOD[:3]}, r"[zt]_y: shape torch.Size\(\[3, 3\]\) differs from"),
        ({2: None}, r"[zt]_x: a tensor \[N, D\] is expected, found NoneType"),
        ({1: GOOD.double()}, "p_y: dtype torch.float64 differs from p_x's"),
        ({3: GOOD.half()}, "[zt]_y: dtype torch.float16 differs from"),
        ({0: GOOD.int(), 1: GOOD.int()}, "p_x: dtype torch.int32 is not supported; allowed: float16, bfloat16"),
        ({2: GOOD.to("meta"), 3: GOOD.to("meta")}, "[zt]_x: device meta differs from p_x's cpu"),
    ],
)
def test_bad_input_is_named(loss, changes, message):
    arguments = [changes.get(place, GOOD) for place in range(4)]
    with pytest.raises(ValueError, match=message):
        loss(*arguments)

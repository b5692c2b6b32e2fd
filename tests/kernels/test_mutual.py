"""The public losses: against independent float64 computations, over ranks, in half precision, and on bad input."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist

import kernels
from kernels import MutualLoss, mutual_loss, native, ntxent_loss, similarity_kl
from ranks import run_ranks


@pytest.fixture(autouse=True, params=["native", "torch"])
def backend(request, monkeypatch):
    """Every test of this file runs on both backends of a CPU."""
    if request.param == "native" and native.core is None:
        pytest.skip(native.missing)
    for name in ("mutual_loss", "ntxent_loss", "similarity_kl"):
        chosen = functools.partial(getattr(kernels, name), backend=request.param)
        monkeypatch.setattr(request.module, name, chosen)
    return request.param


def embeddings(N: int, D: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(N, D, generator=generator, dtype=torch.float64)
    # views of one image resemble each other, so that rows are neither flat nor one-hot
    return [
        (base + 0.7 * torch.randn(N, D, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for _ in range(2)
    ]


# -- the official formula, written out once more from the paper's code ---------------------------------------------


def official(x_1, y_1, x_2, y_2, tau_c=0.5, tau_d=0.1, weights=(100.0, 1.0)):
    """loss_1, loss_2 as the authors' code computes them: element-mean KL, positives as class 0 of a cross-entropy."""

    def unit(z):
        return z / z.norm(dim=1, keepdim=True)

    def contrast(x, y):
        z = torch.cat((unit(x), unit(y)))
        N = len(x)
        similarity = z @ z.T / tau_c
        rows = []
        for i in range(2 * N):
            pos = (i + N) % (2 * N)
            negatives = [j for j in range(2 * N) if j not in (i, pos)]
            rows.append(similarity[i, [pos, *negatives]])
        logits = torch.stack(rows)
        return torch.nn.functional.cross_entropy(logits, torch.zeros(2 * N, dtype=torch.long), reduction="sum") / (
            2 * N
        )

    def softened(x, y):
        e = (unit(x) @ unit(y).T / tau_d).exp()
        return e / e.sum(dim=1, keepdim=True)

    p_1, p_2 = softened(x_1, y_1), softened(x_2, y_2)
    kl_1 = (p_2.detach() * (p_2.detach().log() - p_1.log())).mean()
    kl_2 = (p_1.detach() * (p_1.detach().log() - p_2.log())).mean()
    return contrast(x_1, y_1) + weights[0] * kl_1, contrast(x_2, y_2) + weights[1] * kl_2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_official_formula_values_and_gradients(dtype):
    N, D_a, D_b = 37, 48, 96
    exact = [*embeddings(N, D_a, 0), *embeddings(N, D_b, 1)]
    expected = official(*exact)
    expected_gradients = torch.autograd.grad(expected[0] + expected[1], exact)

    inputs = [z.detach().to(dtype).requires_grad_() for z in exact]
    ours = mutual_loss(*inputs, tau_contrast=0.5, tau_distill=0.1, weights=(100.0, 1.0), kl_reduction="mean")
    gradients = torch.autograd.grad(ours.loss_a + ours.loss_b, inputs)

    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(ours.loss_a.double(), expected[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(ours.loss_b.double(), expected[1], rtol=tolerance, atol=0)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < tolerance


def test_each_loss_sends_gradient_to_its_own_peer_only():
    inputs = [*embeddings(7, 5, 2), *embeddings(7, 3, 3)]
    ours = mutual_loss(*inputs)
    assert torch.autograd.grad(ours.loss_a, inputs[2:], retain_graph=True, allow_unused=True) == (None, None)
    assert torch.autograd.grad(ours.loss_b, inputs[:2], retain_graph=True, allow_unused=True) == (None, None)
    assert all(not term.requires_grad for term in ours[2:])


def test_each_loss_goes_backward_by_itself():
    """As two engines send theirs: one after the other, each through its own network, neither keeping its graph."""
    inputs = [*embeddings(7, 5, 2), *embeddings(7, 3, 3)]
    whole = mutual_loss(*inputs)
    wanted = torch.autograd.grad(whole.loss_a + whole.loss_b, inputs)
    networks = [torch.nn.Linear(D, D, dtype=torch.float64) for D in (5, 3)]
    for order in ((0, 1), (1, 0)):
        hidden = [networks[k // 2](z) for k, z in enumerate(inputs)]
        both = mutual_loss(*[z + h - h for z, h in zip(inputs, hidden, strict=True)])
        for z in inputs:
            z.grad = None
        for peer in order:
            both[peer].backward()
            assert all(
                (z.grad is None) == (p not in order[: order.index(peer) + 1])
                for p, z in zip((0, 0, 1, 1), inputs, strict=True)
            )
        for z, gradient in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(z.grad, gradient, rtol=1e-12, atol=1e-14)
    kl = similarity_kl(*inputs)
    kl.kl_b.backward()
    kl.kl_a.backward()


def test_gradients_against_finite_differences():
    inputs = [*embeddings(5, 4, 4), *embeddings(5, 3, 5)]
    frozen = [z.detach() for z in inputs]
    # The peer is a constant of each loss, so each is differentiated with the other's embeddings held.
    assert torch.autograd.gradcheck(lambda x, y: mutual_loss(x, y, *frozen[2:], weights=(3.0, 2.0)).loss_a, inputs[:2])
    assert torch.autograd.gradcheck(lambda x, y: mutual_loss(*frozen[:2], x, y, weights=(3.0, 2.0)).loss_b, inputs[2:])
    assert torch.autograd.gradcheck(lambda x, y: ntxent_loss(x, y, tau=0.2), inputs[:2])
    assert torch.autograd.gradcheck(lambda x, y: similarity_kl(x, y, *frozen[2:]).kl_a, inputs[:2])


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_terms_add_up(reduction):
    inputs = [*embeddings(9, 6, 6), *embeddings(9, 8, 7)]
    ours = mutual_loss(*inputs, tau_contrast=0.3, tau_distill=0.2, weights=(0.5, 2.0), kl_reduction=reduction)
    alone = similarity_kl(*inputs, tau=0.2, kl_reduction=reduction)
    assert isinstance(ours, MutualLoss)
    torch.testing.assert_close(ours.kl_a, alone.kl_a.detach())
    torch.testing.assert_close(ours.kl_b, alone.kl_b.detach())
    torch.testing.assert_close(ours.ntxent_b, ntxent_loss(*inputs[2:], tau=0.3).detach())
    torch.testing.assert_close(ours.loss_a.detach(), ours.ntxent_a + 0.5 * ours.kl_a)
    torch.testing.assert_close(ours.loss_b.detach(), ours.ntxent_b + 2.0 * ours.kl_b)


def test_upstream_gradients_scale():
    x, y = embeddings(6, 4, 8)
    once = torch.autograd.grad(ntxent_loss(x, y), x)[0]
    torch.testing.assert_close(torch.autograd.grad(-3.5 * ntxent_loss(x, y), x)[0], -3.5 * once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(dtype):
    inputs = [*embeddings(33, 20, 9, dtype), *embeddings(33, 12, 10, dtype)]
    exact = mutual_loss(*[z.detach().double() for z in inputs])
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a surrounding autocast must not reach the loss
        ours = mutual_loss(*inputs)
    assert ours.loss_a.dtype == torch.float32
    torch.testing.assert_close(ours.loss_a.double(), exact.loss_a, rtol=1e-5, atol=0)
    assert torch.autograd.grad(ours.loss_a, inputs[0])[0].dtype == dtype


def test_views_that_are_not_contiguous():
    x, y = (z.detach() for z in embeddings(8, 6, 11))
    strided = torch.stack((x, y), dim=2).permute(1, 0, 2)
    torch.testing.assert_close(
        ntxent_loss(strided[:, :, 0].T, strided[:, :, 1].T), ntxent_loss(x, y), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_embedding_gives_a_non_finite_loss(bad):
    inputs = [z.detach().clone() for z in (*embeddings(6, 4, 12), *embeddings(6, 4, 13))]
    inputs[1][3, 2] = bad
    ours = mutual_loss(*inputs)
    assert not ours.loss_a.isfinite()
    assert not similarity_kl(*inputs).kl_b.isfinite()
    assert not ntxent_loss(*inputs[:2]).isfinite()
    assert ntxent_loss(*inputs[2:]).isfinite()


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e12, 1e30])
def test_the_scale_of_embeddings_does_not_matter(scale):
    """Squares of float32 overflow or vanish at all of these but 1e12; directions do not."""
    exact = [*embeddings(9, 6, 16), *embeddings(9, 4, 17)]
    scaled = [(z.detach() * scale).float().requires_grad_() for z in exact]
    wanted, found = mutual_loss(*exact), mutual_loss(*scaled)
    torch.testing.assert_close(found.loss_a.double(), wanted.loss_a, rtol=1e-5, atol=0)
    wanted_gradient = torch.autograd.grad(wanted.loss_a, exact[0])[0]
    gradient = torch.autograd.grad(found.loss_a, scaled[0])[0].double() * scale
    assert (gradient - wanted_gradient).norm() < 1e-4 * wanted_gradient.norm()


def test_a_row_of_zeros_stays_finite():
    inputs = [z.detach().float().requires_grad_() for z in (*embeddings(6, 4, 18), *embeddings(6, 4, 19))]
    with torch.no_grad():
        inputs[0][2] = 0
    loss = mutual_loss(*inputs).loss_a
    assert loss.isfinite()
    assert torch.autograd.grad(loss, inputs[0])[0].isfinite().all()


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    inputs = [*embeddings(6, 4, 14), *embeddings(6, 5, 15)]
    compiled = torch.compile(lambda *z: mutual_loss(*z), fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*inputs), mutual_loss(*inputs), strict=True):
        torch.testing.assert_close(found, wanted)


# -- several ranks -------------------------------------------------------------------------------------------------


def losses_of_one_rank(world: int, dtype: torch.dtype, backend: str) -> tuple[list[float], list[torch.Tensor]]:
    """Values on this rank and the gradients of its rows, of the sum of all losses."""
    if world > 1:
        dist.init_process_group("gloo")
    rank, group = (dist.get_rank(), dist.group.WORLD) if world > 1 else (0, None)
    n = 12 // world
    whole = [*embeddings(12, 10, 20, dtype), *embeddings(12, 6, 21, dtype)]
    own = [z.detach()[rank * n : (rank + 1) * n].clone().requires_grad_() for z in whole]
    options = {"group": group, "backend": backend}
    # 0.01: with exponents that need offsets
    both = mutual_loss(*own, weights=(0.7, 1.3), **options)
    single = ntxent_loss(*own[:2], tau=0.01, **options)
    kl = similarity_kl(*own, kl_reduction="mean", **options)
    total = both.loss_a + both.loss_b + 2 * single + 5 * kl.kl_a + 7 * kl.kl_b
    gradients = torch.autograd.grad(total, own)
    if world > 1:
        dist.destroy_process_group()
    return [v.item() for v in (*both, single, *kl)], [g.numpy() for g in gradients]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float32), (4, torch.float32), (2, torch.float64)])
def test_ranks_give_the_loss_and_gradient_of_one(world, dtype, backend):
    expected, expected_gradients = losses_of_one_rank(1, dtype, backend)
    every = run_ranks(losses_of_one_rank, world, world, dtype, backend)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for values, _ in every:
        assert values == pytest.approx(expected, rel=tolerance)
        assert values == every[0][0], "the losses must be equal on every rank"
    for i, wanted in enumerate(expected_gradients):
        rows = torch.cat([torch.from_numpy(gradients[i]) for _, gradients in every])
        # W times the true gradient of a rank's own rows: the mean over ranks is then exact
        torch.testing.assert_close(rows / world, torch.from_numpy(wanted), rtol=tolerance, atol=tolerance * 0.1)


# -- bad input -----------------------------------------------------------------------------------------------------

GOOD = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((GOOD, GOOD[:3]), r"y: shape torch.Size\(\[3, 3\]\) differs from x's"),
        ((GOOD[0], GOOD[0]), r"x: shape \[N, D\] with N, D >= 1 is expected, found \[3\]"),
        ((GOOD[:0], GOOD[:0]), r"x: shape .* found \[0, 3\]"),
        ((GOOD[:1], GOOD[:1]), "x: N = 1 has no negatives"),
        ((GOOD.int(), GOOD.int()), r"x: dtype torch.int32 is not supported; allowed: float16"),
        ((GOOD, GOOD.double()), "y: dtype torch.float64 differs"),
        ((GOOD, GOOD.to("meta")), "y: device meta differs"),
        ((GOOD, None), "y: a tensor .* found NoneType"),
    ],
)
def test_bad_views_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ntxent_loss(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_contrast": 0.0}, "tau_contrast: must be positive and finite, found 0.0"),
        ({"tau_distill": float("nan")}, "tau_distill: must be positive"),
        ({"tau_distill": -0.1}, "tau_distill: must be positive"),
        ({"kl_reduction": "sum"}, "kl_reduction: 'sum' is unknown; allowed: batchmean, mean"),
        ({"backend": "cuda"}, "backend: 'cuda' is unknown; allowed: auto, triton, native, torch"),
        ({"weights": (1.0,)}, "weights: two finite numbers"),
        ({"weights": 1.0}, "weights: two finite numbers"),
        ({"tau_contrast": "warm"}, "tau_contrast: must be positive and finite, found 'warm'"),
        ({"tau_distill": None}, "tau_distill: must be positive"),
        ({"weights": (1.0, float("inf"))}, "weights: two finite numbers"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        mutual_loss(GOOD, GOOD, GOOD, GOOD, **options)


def test_peers_must_see_the_same_images():
    for loss in (mutual_loss, similarity_kl):
        with pytest.raises(ValueError, match="x_b: 3 images, but x_a holds 4"):
            loss(GOOD, GOOD, GOOD[:3], GOOD[:3])


def test_widths_may_differ_and_be_one():
    for D_a, D_b in itertools.product((1, 3), (1, 70)):
        assert mutual_loss(*embeddings(2, D_a, 1), *embeddings(2, D_b, 2)).loss_b.isfinite()

"""The triton backend against float64: on a GPU where there is one, under Triton's interpreter elsewhere."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings import DEVICE, embeddings, on_device, relative
from kernels import (
    gather_views,
    mutual_loss,
    mutual_triton,
    ntxent_loss,
    passes_triton,
    reference,
    similarity_kl,
    tiles,
)
from kernels.problem import pose


@pytest.fixture(params=[torch.float32, torch.float16], ids=["float32", "float16"])
def storage(request, monkeypatch) -> torch.dtype:
    """What unit vectors are kept in: float32 tests the arithmetic, float16 is what is shipped."""
    if request.param == torch.float32 and DEVICE.type == "cuda":
        pytest.skip("products of float32 are for the interpreter")
    monkeypatch.setattr(mutual_triton, "STORAGE", request.param)
    return request.param


class Rounded(torch.autograd.Function):
    """Unit vectors as the kernels keep them, with the gradient of exact ones."""

    @staticmethod
    def forward(ctx, u: torch.Tensor, scale: float) -> torch.Tensor:
        return (u * scale).to(mutual_triton.STORAGE).double() / scale

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):
        return grads[0], None


def formula(exact, tau_contrast, tau_distill, weights, reduction, scale=None):
    """(loss_a, loss_b) in float64 on one process; with `scale`, of unit vectors rounded to the kernels' storage."""
    unit = [reference.normalize(z) for z in exact]
    if scale is not None:
        unit = [Rounded.apply(u, scale) for u in unit]
    cosine_a, cosine_b = (reference.cosines(x, y, x, y) for x, y in (unit[:2], unit[2:]))
    kls = reference.kl_from_cosines(
        reference.cross_view(cosine_a), reference.cross_view(cosine_b), tau_distill, reduction
    )
    return [
        reference.ntxent_from_cosines(c, tau_contrast) + w * kl
        for c, w, kl in zip((cosine_a, cosine_b), weights, kls, strict=True)
    ]


def check_against_formula(exact, tau_contrast=0.5, tau_distill=0.1, weights=(0.4, 1.3), reduction="batchmean"):
    """Values and gradients are no further from float64 than twice what rounding of unit vectors alone does."""
    options = tau_contrast, tau_distill, weights, reduction
    scale = tiles.temperatures(tau_contrast, tau_distill).scale
    wanted = formula(exact, *options)
    rounded = formula(exact, *options, scale=scale)
    inputs = on_device(exact)
    found = mutual_loss(
        *inputs, tau_contrast=tau_contrast, tau_distill=tau_distill, weights=weights, kl_reduction=reduction,
        backend="triton",
    )  # fmt: skip
    # float32 sums of M terms, and exponentials whose argument is a float32 of up to 1 / tau
    floor = 3e-6 + 3e-7 / min(tau_contrast, tau_distill)
    for loss, exact_loss, rounded_loss in zip(found[:2], wanted, rounded, strict=True):
        assert abs(loss.item() - exact_loss.item()) <= 2 * abs(rounded_loss - exact_loss).item() + floor * max(
            1.0, abs(exact_loss.item())
        )
    upstream = 1.7, -0.6

    def gradients(losses, leaves):
        return torch.autograd.grad(sum(u * loss for u, loss in zip(upstream, losses, strict=True)), leaves)

    exact_gradients, rounded_gradients = gradients(wanted, exact), gradients(rounded, exact)
    for g, e, r in zip(gradients(found[:2], inputs), exact_gradients, rounded_gradients, strict=True):
        error, rounding = (g.detach().cpu().double() - e).norm(), (r - e).norm()
        # 1e-12: where all embeddings are the same, the gradient is zero
        allowed = 2 * rounding + floor * e.norm() + 1e-12
        if inputs[0].shape[1] == 1 or inputs[2].shape[1] == 1:  # zero after the projection, whose terms are 1 / |x|
            allowed += floor / min(z.detach().norm(dim=1).min().item() for z in exact)
        assert error <= allowed, (error, rounding, e.norm())
    with torch.no_grad():  # forward alone takes the KL's value in another pass
        alone = mutual_loss(
            *inputs, tau_contrast=tau_contrast, tau_distill=tau_distill, weights=weights, kl_reduction=reduction,
            backend="triton",
        )  # fmt: skip
    for a, b in zip(alone, found, strict=True):
        assert abs(a - b).item() <= 10 * floor * max(1.0, abs(b.item()))


SHAPES = [
    (2, 1, 1),
    (2, 20, 3),
    (3, 16, 17),
    (37, 20, 70),
    (64, 128, 64),
    (129, 40, 128),
    (200, 128, 128),
    (65, 300, 40),
]


@pytest.mark.parametrize(("N", "D_a", "D_b"), SHAPES)
def test_shapes(storage, N, D_a, D_b):
    check_against_formula([*embeddings(N, D_a, 0), *embeddings(N, D_b, 1)])


@pytest.mark.parametrize(
    ("tau_contrast", "tau_distill"),
    [
        (0.5, 0.5),
        (0.1, 0.2),
        (0.3, 0.17),
        (0.07, 0.21),
        (0.02, 0.02),
        (0.02, 1.0),
        (8.0, 1.0),
        (0.01, 0.02),
        (0.5, 0.003),
    ],
)
def test_temperatures(storage, tau_contrast, tau_distill):
    check_against_formula([*embeddings(50, 24, 2), *embeddings(50, 33, 3)], tau_contrast, tau_distill)


@pytest.mark.parametrize("power", [-8, -7, -6, -5, -4, -3, 2, 3, 4, 6, 7, 8])
def test_temperatures_that_share_an_exponential(power):
    tau = 0.08
    assert tiles.temperatures(*((power * tau, tau) if power > 0 else (tau, -power * tau))).power == power
    check_against_formula(
        [*embeddings(20, 16, 60), *embeddings(20, 16, 61)], *((power * tau, tau) if power > 0 else (tau, -power * tau))
    )


@pytest.mark.parametrize(("noise", "tau"), [(0.3, 0.05), (0.7, 0.02), (1.0, 0.02)])
def test_rows_that_have_learned_their_positive(noise, tau):
    """Losses down to 1e-7 and their gradients keep their digits: as good as the rounding of unit vectors lets them."""
    exact = [*embeddings(100, 64, 62, noise), *embeddings(100, 64, 63, noise)]
    check_against_formula(exact, tau, tau)
    inputs = on_device(exact)
    wanted = reference.similarity_kl(*exact, tau=tau)
    found = similarity_kl(*inputs, tau=tau, backend="triton")
    for f, w, own, own_exact in zip(found, wanted, (inputs[0], inputs[2]), (exact[0], exact[2]), strict=True):
        assert f.item() == pytest.approx(w.item(), rel=1e-2)
        gradient = torch.autograd.grad(f, own, retain_graph=True)[0]
        assert relative(gradient, torch.autograd.grad(w, own_exact, retain_graph=True)[0]) < 1e-2
    assert all(loss > 0 for loss in mutual_loss(*inputs, tau_contrast=tau, tau_distill=tau, backend="triton")[2:])


@pytest.mark.parametrize("N", [2, 3, 70])
def test_rows_without_anything_alike(storage, N):
    """All cosines but with itself far below zero: 1 / l is huge, and so is it times 2^0 of rows that are not there."""
    x = torch.cat((torch.full((1, N), -1.0), torch.eye(N)))[:N].double()
    exact = [(x * sign).requires_grad_() for sign in (1.0, -1.0, -1.0, 1.0)]
    check_against_formula(exact, 0.02, 0.1)


@pytest.mark.parametrize("weights", [(1e20, 1.0), (1.0, 1e12), (0.0, 1e4)])
def test_one_peers_weight_leaves_the_other_alone(weights):
    check_against_formula([*embeddings(40, 24, 64), *embeddings(40, 33, 65)], weights=weights)


@pytest.mark.parametrize("noise", [0.0, 0.01, 100.0], ids=["one view", "peaked", "flat"])
@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_rows_of_any_sharpness(storage, noise, tau):
    check_against_formula([*embeddings(45, 30, 4, noise), *embeddings(45, 30, 5, noise)], tau, 2 * tau)


def test_the_same_image_many_times(storage):
    exact = [
        z.detach()[torch.arange(40) % 7].clone().requires_grad_() for z in (*embeddings(7, 9, 6), *embeddings(7, 5, 7))
    ]
    check_against_formula(exact, 0.2, 0.1, reduction="mean", weights=(40.0, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize(("N", "D_a", "D_b"), [(140, 256, 2048), (650, 16, 32)])
def test_large_shapes(N, D_a, D_b):
    check_against_formula([*embeddings(N, D_a, 8), *embeddings(N, D_b, 9)])


def test_strips_of_weights(storage, monkeypatch):
    """Wide embeddings whose weights do not fit the strip's memory at once."""
    monkeypatch.setattr(passes_triton, "_strip_rows", lambda problem: 48)
    check_against_formula([*embeddings(130, 280, 10), *embeddings(130, 24, 11)])


@pytest.mark.parametrize(
    ("N", "D", "tau"), [(2, 1, 0.5), (37, 70, 0.2), (150, 256, 0.5), (40, 600, 0.02), (33, 8, 0.005)]
)
def test_one_peer(storage, N, D, tau):
    exact = embeddings(N, D, 12)
    inputs = on_device(exact)
    unit = [Rounded.apply(reference.normalize(z), tiles.temperatures(tau, None).scale) for z in exact]
    wanted = reference.ntxent(*exact, tau=tau)
    rounded = reference.ntxent_from_cosines(reference.cosines(*unit, *unit), tau)
    found = ntxent_loss(*inputs, tau=tau, backend="triton")
    floor = 3e-6 + 3e-7 / tau
    assert abs(found.item() - wanted.item()) <= 2 * abs(rounded - wanted).item() + floor * max(1.0, wanted.item())
    triples = zip(
        torch.autograd.grad(found, inputs),
        torch.autograd.grad(wanted, exact),
        torch.autograd.grad(rounded, exact),
        strict=True,
    )
    for g, e, r in triples:
        assert (g.cpu().double() - e).norm() <= 2 * (r - e).norm() + floor * e.norm() + 1e-12


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("tau", [0.1, 0.4, 0.004])
def test_the_kl_alone(storage, reduction, tau):
    exact = [*embeddings(70, 24, 13), *embeddings(70, 50, 14)]
    inputs = on_device(exact)
    wanted = reference.similarity_kl(*exact, tau=tau, kl_reduction=reduction)
    found = similarity_kl(*inputs, tau=tau, kl_reduction=reduction, backend="triton")
    # Rounding moves a cosine by some 5e-5, a logit by 1 / tau times that.
    tolerance = 5e-6 + 3e-7 / tau if storage == torch.float32 else 2e-4 + 1e-4 / tau
    for f, w in zip(found, wanted, strict=True):
        assert f.item() == pytest.approx(w.item(), rel=tolerance)
    found_gradients = torch.autograd.grad(2 * found[0] + 3 * found[1], inputs)
    for g, w in zip(found_gradients, torch.autograd.grad(2 * wanted[0] + 3 * wanted[1], exact), strict=True):
        assert relative(g, w) < 4 * tolerance


def test_the_gradients_error_at_the_size_of_a_batch():
    """What the README says; 3e-4 at tau >= 0.1 and 7e-4 at 0.02 is what the kernels are meant to have."""
    exact = embeddings(256, 128, 15, noise=2.0)  # positives that still have to be learned
    for tau, bound in ((0.5, 4e-5), (0.1, 4e-5), (0.02, 5e-4)):
        inputs = on_device(exact)
        wanted, found = reference.ntxent(*exact, tau=tau), ntxent_loss(*inputs, tau=tau, backend="triton")
        assert wanted > 0.5
        assert found.item() == pytest.approx(wanted.item(), rel=1e-5 if tau >= 0.1 else 1e-4)
        pairs = zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, exact), strict=True)
        assert all(relative(g, w) < bound for g, w in pairs)


# -- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 33, 100])
def test_identical_embeddings(N):
    inputs = on_device([torch.full((N, 7), 0.3)] * 4)
    found = mutual_loss(*inputs, backend="triton")
    assert found.ntxent_a.item() == pytest.approx(math.log(2 * N - 1), rel=1e-6)
    assert abs(found.kl_a.item()) < 1e-6
    for gradient in torch.autograd.grad(found.loss_a + found.loss_b, inputs):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_separated_embeddings(tau):
    """x = y = unit vectors along the axes: l = exp(1 / tau) + M - 2, and x_i is pulled against every other axis."""
    N = 40
    M = 2 * N
    x = torch.eye(N)
    inputs = on_device([x, x, x, x])
    found = mutual_loss(*inputs, tau_contrast=tau, tau_distill=2 * tau, backend="triton")
    others = (M - 2) * math.exp(-1 / tau)
    assert found.ntxent_a.item() == pytest.approx(math.log1p(others), rel=2e-4, abs=1e-6)
    weight = 2 * 2 * math.exp(-1 / tau) / (1 + others) / (M * tau)  # two views, rows and columns
    expected = weight * (1 - torch.eye(N))
    gradient = torch.autograd.grad(found.loss_a, inputs[0])[0].cpu()
    # All entries are one number here, so its rounding to float16 does not average out: 3e-4 of 1 / tau in a power.
    torch.testing.assert_close(gradient, expected, rtol=1e-3 / tau, atol=weight * 1e-3)


# -- inputs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype):
    inputs = on_device([*embeddings(33, 20, 17), *embeddings(33, 12, 18)], dtype)
    exact = [z.detach().cpu().double().requires_grad_() for z in inputs]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):  # a surrounding autocast must not reach the loss
        found = mutual_loss(*inputs, backend="triton")
    assert found.loss_a.dtype == torch.float32
    wanted = mutual_loss(*exact)
    torch.testing.assert_close(found.loss_a.cpu().double(), wanted.loss_a, rtol=3e-4, atol=0)
    # a loss scale as mixed precision uses it: unscaled, float16 gradients would vanish
    gradient = torch.autograd.grad(1024 * found.loss_a, inputs[0])[0]
    assert gradient.dtype == dtype
    assert relative(gradient, torch.autograd.grad(1024 * wanted.loss_a, exact[0])[0]) < 1e-2


def test_views_that_are_not_contiguous():
    x, y = on_device(embeddings(19, 6, 19))
    both = torch.stack((x.detach(), y.detach()), dim=2)  # [N, D, 2]
    strided = [both[:, :, 0].requires_grad_(), y.detach().T.contiguous().T.requires_grad_()]  # each in its own way
    found, wanted = (ntxent_loss(*z, backend="triton") for z in (strided, (x, y)))
    # On a GPU a layout of its own, and so another order of sums.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    for f, w in zip(torch.autograd.grad(found, strided), torch.autograd.grad(wanted, (x, y)), strict=True):
        torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-7)
    expanded = x.detach()[:1].expand(19, 6)
    assert ntxent_loss(expanded, y, backend="triton").isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tau", [0.1, 0.004])
def test_a_non_finite_embedding_gives_a_non_finite_loss(bad, tau):
    inputs = [z.detach() for z in on_device([*embeddings(70, 4, 20), *embeddings(70, 4, 21)])]
    inputs[1][63, 2] = bad
    for wanted in (True, False):
        grads = [z.requires_grad_(wanted) for z in inputs]
        found = mutual_loss(*grads, tau_distill=tau, backend="triton")
        assert not found.loss_a.isfinite()
        assert not found.kl_b.isfinite()
        assert found.ntxent_b.isfinite()
        assert not ntxent_loss(*grads[:2], tau=tau, backend="triton").isfinite()


@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e12, 1e30])
def test_the_scale_of_embeddings_does_not_matter(scale):
    exact = embeddings(9, 6, 22)
    scaled = [(z.detach() * scale).to(DEVICE, torch.float32).requires_grad_() for z in exact]
    found, wanted = ntxent_loss(*scaled, backend="triton"), ntxent_loss(*exact)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=1e-4, atol=0)
    gradient = torch.autograd.grad(found, scaled[0])[0].cpu().double() * scale
    assert relative(gradient, torch.autograd.grad(wanted, exact[0])[0]) < 1e-3


def test_a_row_of_zeros_stays_finite():
    inputs = on_device([*embeddings(6, 4, 23), *embeddings(6, 4, 24)])
    with torch.no_grad():
        inputs[0][2] = 0
    found = mutual_loss(*inputs, backend="triton")
    wanted = mutual_loss(*inputs, backend="torch")
    torch.testing.assert_close(found.loss_a, wanted.loss_a, rtol=1e-3, atol=0)
    assert torch.autograd.grad(found.loss_a, inputs[0])[0].isfinite().all()


def test_peers_of_different_dtypes():
    x_a, y_a, x_b, y_b = on_device([*embeddings(12, 6, 66), *embeddings(12, 7, 67)])
    half = [z.detach().bfloat16().requires_grad_() for z in (x_b, y_b)]
    found = mutual_loss(x_a, y_a, *half, backend="triton")
    gradients = torch.autograd.grad(found.loss_a + found.loss_b, (x_a, half[1]))
    assert [g.dtype for g in gradients] == [torch.float32, torch.bfloat16]


def test_a_tiny_embedding_has_no_nan_in_its_gradient():
    inputs = on_device(embeddings(6, 4, 68))
    with torch.no_grad():
        inputs[0][2] = torch.tensor([1e-42, 0.0, 0.0, 0.0])
    assert not torch.autograd.grad(ntxent_loss(*inputs, backend="triton"), inputs[0])[0].isnan().any()


# -- autograd and compile ------------------------------------------------------------------------------------------


def test_each_loss_sends_gradient_to_its_own_peer_only():
    inputs = on_device([*embeddings(7, 5, 25), *embeddings(7, 3, 26)])
    found = mutual_loss(*inputs, backend="triton")
    gradients = torch.autograd.grad(found.loss_a, inputs, retain_graph=True, allow_unused=True)
    assert gradients[2:] == (None, None)
    again = torch.autograd.grad(3 * found.loss_a, inputs[0], retain_graph=True)[0]
    torch.testing.assert_close(again, 3 * gradients[0])
    assert all(not term.requires_grad for term in found[2:])


def test_embeddings_without_gradient():
    x_a, y_a, x_b, y_b = on_device([*embeddings(7, 5, 27), *embeddings(7, 3, 28)])
    found = mutual_loss(x_a, y_a.detach(), x_b.detach(), y_b.detach(), backend="triton")
    assert found.loss_a.requires_grad
    assert not found.loss_b.requires_grad
    whole = mutual_loss(x_a, y_a, x_b, y_b, backend="triton")
    first, second = (torch.autograd.grad(loss.loss_a, x_a)[0] for loss in (found, whole))
    assert torch.equal(first, second)


def test_each_loss_goes_backward_by_itself():
    """As two engines send theirs: one after the other, neither keeping its graph."""
    inputs = on_device([*embeddings(9, 4, 52), *embeddings(9, 3, 53)])
    whole = mutual_loss(*inputs, backend="triton")
    wanted = torch.autograd.grad(whole.loss_a + whole.loss_b, inputs)
    both = mutual_loss(*inputs, backend="triton")
    both.loss_a.backward()
    assert inputs[2].grad is None
    both.loss_b.backward()
    assert all(torch.equal(z.grad, gradient) for z, gradient in zip(inputs, wanted, strict=True))


def test_second_derivatives_are_refused():
    inputs = on_device([*embeddings(5, 4, 50), *embeddings(5, 3, 51)])
    for loss in (ntxent_loss(*inputs[:2], backend="triton"), mutual_loss(*inputs, backend="triton").loss_a):
        first = torch.autograd.grad(loss.square(), inputs[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.square().sum().backward()


def test_operators_keep_torchs_rules():
    x, y = (z.detach() for z in on_device(embeddings(9, 5, 29)))
    z = mutual_triton.embed_op(x, y, 0.5, 0.1, "")
    torch.library.opcheck(mutual_triton.embed_op, (x, y, 0.5, None, ""))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(mutual_triton.ntxent_op, (x, y, *z, 0.5, "", True), test_utils=tests)
    arguments = (x, y, *z, x, y, *z, 0.5, 0.1, 1.0, 1.0, False, "", True)
    torch.library.opcheck(mutual_triton.mutual_op, arguments, test_utils=tests)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(compiler):
    inputs = on_device([*embeddings(6, 4, 30), *embeddings(6, 5, 31)])

    def losses(*z):
        both = mutual_loss(*z, backend="triton")
        return (
            both.loss_a
            + 2 * both.loss_b
            + ntxent_loss(*z[:2], backend="triton")
            + similarity_kl(*z, backend="triton")[0]
        )

    compiled = torch.compile(losses, fullgraph=True, backend=compiler)
    found, wanted = compiled(*inputs), losses(*inputs)
    torch.testing.assert_close(found, wanted)
    for f, w in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(f, w)


@pytest.mark.slow
def test_compiles_for_changing_temperatures_and_sizes():
    compiled = torch.compile(
        lambda x, y, tau: ntxent_loss(x, y, tau=tau, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    for N, tau in ((6, 0.5), (6, 0.4), (9, 0.3), (11, 0.2)):
        x, y = on_device(embeddings(N, 4, 30))
        torch.testing.assert_close(compiled(x, y, tau), ntxent_loss(x, y, tau=tau, backend="triton"))


class Largest(TorchDispatchMode):
    """The largest tensor that any operator makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_matrix_of_similarities_in_memory(monkeypatch):
    N, M = 1024, 2048
    inputs = on_device([*embeddings(N, 8, 32), *embeddings(N, 8, 33)])
    compute, seen = mutual_triton.compute, Largest()

    def watched(*arguments):  # inside of the operator, where a mode around it does not reach
        with seen:
            return compute(*arguments)

    monkeypatch.setattr(mutual_triton, "compute", watched)
    monkeypatch.setattr(tiles, "launch", lambda *_, **__: None)
    monkeypatch.setattr(passes_triton, "launch", lambda *_, **__: None)
    found = mutual_loss(*inputs, backend="triton")
    assert 2 * N * 8 <= seen.numel < M * M / 15, "row sums: 112 floats a row for both peers"
    with torch.no_grad():
        mutual_loss(*inputs, backend="triton")
    assert seen.numel < M * M / 10
    assert found.loss_a.requires_grad
    with Largest() as seen:
        mutual_loss(*inputs, backend="torch")
    assert seen.numel >= M * M, "the measure itself"


def test_strips_are_bounded():
    problem = pose(70_000, (2048, 2048), None, 0.5, 0.1, (1.0, 1.0), False, DEVICE)
    rows = passes_triton._strip_rows(problem)
    assert rows == 512
    assert (
        passes_triton._strip_rows(pose(4096, (512, 512), None, 0.5, 0.1, (1.0, 1.0), False, DEVICE))
        * (2 * 2 * 2 * problem.peers * 4096)
        <= passes_triton.STRIP_BYTES
    )


# -- choice of backend ---------------------------------------------------------------------------------------------


def test_auto_is_torch_on_a_cpu(monkeypatch):
    monkeypatch.setattr(mutual_triton, "ntxent", lambda *_: pytest.fail("triton was chosen"))
    x, y = (z.detach() for z in embeddings(5, 3, 38))
    assert ntxent_loss(x.float(), y.float()).isfinite()
    assert ntxent_loss(x.to(DEVICE), y.to(DEVICE)).isfinite()  # float64: everywhere


def test_what_triton_cannot_take_is_named(monkeypatch):
    x, y = (z.detach() for z in embeddings(5, 3, 39))
    with pytest.raises(ValueError, match="backend: 'triton' does not fit: float64 embeddings"):
        ntxent_loss(x.to(DEVICE), y.to(DEVICE), backend="triton")
    wide = torch.randn(4, 2049, device=DEVICE)
    with pytest.raises(ValueError, match="embeddings of width 2049, at most 2048"):
        ntxent_loss(wide, wide, backend="triton")
    monkeypatch.setattr(mutual_triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="embeddings on cpu, an NVIDIA GPU is needed; use 'torch' or 'auto'"):
        similarity_kl(*[x.float()] * 4, backend="triton")


def test_a_gather_must_be_of_the_same_call():
    x, y, z = (v.detach().float().to(DEVICE) for v in (*embeddings(5, 3, 40), embeddings(5, 3, 41)[0]))
    handle = gather_views(x, y, backend="triton")
    found = mutual_loss(x, y, x, y, gathered=(handle, None), backend="triton")
    assert torch.equal(found.loss_a, mutual_loss(x, y, x, y, backend="triton").loss_a)
    with pytest.raises(ValueError, match=r"gathered\[0\]: was started with other embeddings"):
        mutual_loss(z, y, x, y, gathered=(handle, None), backend="triton")
    with pytest.raises(ValueError, match=r"gathered\[0\]: was started with other embeddings"):
        mutual_loss(x, z, x, y, gathered=(handle, None), backend="triton")
    for bad in (handle, None, [handle], (handle, handle, None), (handle, 3)):
        with pytest.raises(ValueError, match="gathered: two of what gather_views returns"):
            mutual_loss(x, y, x, y, gathered=bad, backend="triton")
    with pytest.raises(ValueError, match=r"gathered\[1\]: was started with other temperatures"):
        mutual_loss(x, y, x, y, tau_distill=0.2, gathered=(None, handle), backend="triton")
    x.mul_(2)
    with pytest.raises(ValueError, match=r"gathered\[0\]: the embeddings were changed in place"):
        mutual_loss(x, y, x, y, gathered=(handle, None), backend="triton")


# -- on a GPU alone ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("N", [3000, 5001])
def test_runs_are_equal_to_the_bit(N):
    inputs = on_device([*embeddings(N, 128, 42), *embeddings(N, 64, 43)])
    first = None
    for _ in range(5):
        found = mutual_loss(*inputs, backend="triton")
        with torch.no_grad():
            alone = mutual_loss(*inputs, backend="triton")
        outcome = [*found, *alone, *torch.autograd.grad(found.loss_a + found.loss_b, inputs)]
        first = first or outcome
        assert all(torch.equal(a, b) for a, b in zip(outcome, first, strict=True))


@pytest.mark.gpu
def test_a_cuda_graph_repeats_the_loss():
    inputs = on_device([*embeddings(300, 128, 44), *embeddings(300, 128, 45)])

    def step():
        found = mutual_loss(*inputs, backend="triton")
        return [*found[:2], *torch.autograd.grad(found.loss_a + found.loss_b, inputs)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for z in inputs:
            z.copy_(torch.randn_like(z))
    graph.replay()
    for found, wanted in zip(captured, step(), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu():
    inputs = on_device([*embeddings(300, 128, 46), *embeddings(300, 128, 47)])
    for _ in range(2):  # the first compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = mutual_loss(*inputs, backend="triton")
            (found.loss_a + found.loss_b).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "D_a", "D_b"), list(itertools.product((1000, 4097), (128, 384), (64, 128))))
def test_sizes_that_the_interpreter_is_too_slow_for(N, D_a, D_b):
    check_against_formula([*embeddings(N, D_a, 48), *embeddings(N, D_b, 49)])

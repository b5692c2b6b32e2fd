"""Distillation terms of several networks: each form against the definition written out row by row in float64."""

import functools
import logging

import pytest
import torch
from torch.autograd import forward_ad

import kernels
from distillation import ALL_SETTINGS, TERMS, by_rows, gradients, networks
from embeddings import DEVICE
from kernels import Distilled, distill, distill_tiled, native, similarity_distillation, strips
from kernels.reference_distill import Settings

OTHER_FORMS = {"divergence": "js"}, {"rows": "all"}, {"partition": True}


@pytest.fixture(autouse=True)
def short_strips(monkeypatch):
    """Strips of 13 rows are uneven, and there are three."""
    monkeypatch.setattr(strips, "CPU_ROWS", 5)


def assert_same(found, wanted, tolerance: float) -> None:
    """Losses, shares and gradients of two `(losses, shares, gradients)`."""
    for loss, expected in zip(found[0], wanted[0], strict=True):
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=1e-15)
    assert [float(share) for share in found[1]] == pytest.approx([float(share) for share in wanted[1]], abs=1e-6)
    for term, expected_term in zip(found[2], wanted[2], strict=True):
        for gradient, expected in zip(term, expected_term, strict=True):
            assert (gradient is None) == (expected is None)
            if expected is not None:
                assert (gradient - expected).norm() <= tolerance * expected.norm() + 1e-15


def outcome(views, terms, **options):
    losses, shares = similarity_distillation(views, terms, **options)
    return losses, shares, gradients(losses, views)


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize(("divergence", "rows", "symmetric", "partition"), ALL_SETTINGS)
@pytest.mark.parametrize("tau", [0.02, 0.5])
def test_every_setting_is_the_definition(tau, divergence, rows, symmetric, partition, reduction):
    settings = Settings(tau, divergence, rows, symmetric, partition, reduction)
    views = networks(13)
    losses, shares = by_rows(views, TERMS, **settings._asdict())
    wanted = losses, shares, gradients(losses, views)
    if partition:
        assert any(0 < share < 1 for share in shares), "a mask that leaves out some rows is what this is about"
    for backend in ("auto", "torch"):
        assert_same(outcome(views, TERMS, backend=backend, **settings._asdict()), wanted, 1e-10)


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"kl_reduction": "mean"}])
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_fused_terms_are_those_of_the_tiled_form(backend, settings, monkeypatch):
    """Either direction alone, both in one call, and beside a term that is not fused."""
    if backend == "native" and native.core is None:
        pytest.skip(native.missing)
    N, tolerance = (13, 1e-10) if backend == "native" else (5, 5e-3)  # cosines of triton are of float16 vectors
    views = networks(N) if backend == "native" else networks(N, torch.float32, DEVICE)
    calls = []
    original = kernels.similarity_kl
    monkeypatch.setattr(distill, "similarity_kl", lambda *z, **options: calls.append(z) or original(*z, **options))
    for terms, fused in (([(0, (1,)), (1, (0,))], 1), ([(1, (0,))], 1), ([(0, (1,)), (2, (0, 1)), (0, (2,))], 2)):
        calls.clear()
        found = outcome(views, terms, backend=backend, **settings)
        assert len(calls) == fused * (1 + settings.get("symmetric", False))
        losses, shares = distill_tiled.distill(views, terms, Settings(**settings), None)
        assert_same(found, (losses, shares, gradients(losses, views)), tolerance)
        assert_same(found, outcome(views, terms, backend="torch", **settings), tolerance)


@pytest.mark.parametrize("options", [{}, *OTHER_FORMS], ids=str)
def test_each_loss_goes_backward_by_itself(options):
    views = networks(6)
    wanted = outcome(views, TERMS, **options)[2]
    for order in ((0, 1, 2, 3, 4), (4, 3, 2, 1, 0)):
        losses = similarity_distillation(views, TERMS, **options).losses
        for i in order:
            for z in (flat := [z for pair in views for z in pair]):
                z.grad = None
            losses[i].backward()  # keeps no graph for the others
            for z, gradient in zip(flat, wanted[i], strict=True):
                assert (z.grad is None) == (gradient is None)
                assert gradient is None or torch.equal(z.grad, gradient)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, *OTHER_FORMS], ids=str)
def test_gradient_goes_to_the_student_only(options, backend):
    views = networks(7)
    losses, shares = similarity_distillation(views, TERMS, backend=backend, **options)
    for (student, _), term in zip(TERMS, gradients(losses, views), strict=True):
        assert [gradient is not None for gradient in term] == [place // 2 == student for place in range(8)]
    assert not any(share.requires_grad for share in shares)


@pytest.mark.parametrize("options", [{}, *OTHER_FORMS], ids=str)
def test_no_gradient_is_made_where_none_is_wanted(options, monkeypatch):
    views = networks(7)
    wanted = similarity_distillation(views, TERMS, **options)
    monkeypatch.setattr(distill_tiled, "Gradient", lambda *_: pytest.fail("a gradient was made"))
    with torch.no_grad():
        found = similarity_distillation(views, TERMS, **options)
    for loss, expected in zip(found.losses, wanted.losses, strict=True):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        assert not loss.requires_grad


def test_one_network_in_two_guises():
    """SimSiam: predictions of a learn from projections of b, and the other way round."""
    (p_a, z_a, p_b, z_b) = networks(8)
    found = similarity_distillation([p_a, z_a, p_b, z_b], [(0, (3,)), (2, (1,))])
    assert isinstance(found, Distilled)
    losses, _ = by_rows([p_a, z_a, p_b, z_b], [(0, (3,)), (2, (1,))], tau=0.1, kl_reduction="batchmean")
    assert [loss.item() for loss in found.losses] == pytest.approx([loss.item() for loss in losses], rel=1e-10)


def test_gradients_against_finite_differences():
    (x, y), teacher, other, _ = networks(5)
    held = [(z.detach(), w.detach()) for z, w in (teacher, other)]
    for settings in ({"divergence": "js", "rows": "all"}, {"divergence": "jeffreys", "symmetric": True}):

        def loss(x, y, settings=settings):
            return similarity_distillation([(x, y), *held], [(0, (1, 2))], tau=0.3, **settings).losses[0]

        assert torch.autograd.gradcheck(loss, (x, y))
        torch_loss = functools.partial(
            lambda x, y, **o: similarity_distillation([(x, y), *held], [(0, (1, 2))], backend="torch", **o).losses[0],
            **settings,
        )
        assert torch.autograd.gradgradcheck(torch_loss, (x, y))


def test_upstream_gradients_scale_and_are_no_function_of_the_embeddings():
    views = networks(6)
    (loss,), _ = similarity_distillation(views, [(0, (1, 2))])
    once = torch.autograd.grad(loss, views[0][0], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(-3.5 * loss, views[0][0], retain_graph=True)[0], -3.5 * once)
    gradient = torch.autograd.grad(loss.square(), views[0][0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_half_inputs_are_computed_in_float32(dtype, backend):
    views = networks(33, dtype)
    exact = [(x.detach().double(), y.detach().double()) for x, y in views]
    for options in ({}, {"divergence": "jeffreys", "rows": "all"}):
        wanted = similarity_distillation(exact, TERMS, **options).losses
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a surrounding autocast must not reach the loss
            found = similarity_distillation(views, TERMS, backend=backend, **options).losses
        for loss, expected in zip(found, wanted, strict=True):
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=0)
        assert torch.autograd.grad(found[2], views[2][1])[0].dtype == dtype


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_one_network_in_float64_takes_all_there(backend):
    """Also a fused term of the others, whose loss would else have another dtype than those beside it."""
    views = networks(9, torch.float32)
    views[3] = networks(9)[3]
    exact = [(x.detach().double(), y.detach().double()) for x, y in views]
    wanted = similarity_distillation(exact, TERMS, backend="torch").losses
    found = similarity_distillation(views, TERMS, backend=backend).losses
    for loss, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    assert torch.autograd.grad(found[0], views[0][0])[0].dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("divergence", "rows", "symmetric", "partition"), ALL_SETTINGS)
def test_a_non_finite_embedding_gives_a_non_finite_loss(divergence, rows, symmetric, partition, bad):
    options = {"divergence": divergence, "rows": rows, "symmetric": symmetric, "partition": partition}
    for view, backend in ((0, "auto"), (1, "auto"), (1, "torch")):
        views = [[x.detach(), y.detach()] for x, y in networks(7, torch.float32)]
        views[1][view][3, 2] = bad
        for (student, teachers), loss in zip(
            TERMS, similarity_distillation(views, TERMS, backend=backend, **options).losses, strict=True
        ):
            assert loss.isfinite() == (1 not in (student, *teachers))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_embeddings_does_not_matter(scale):
    views = networks(9)
    scaled = [tuple((z.detach() * scale).float().requires_grad_() for z in pair) for pair in views]
    wanted, found = (similarity_distillation(v, [(0, (1, 2))], divergence="js").losses[0] for v in (views, scaled))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    expected = torch.autograd.grad(wanted, views[0][0])[0]
    gradient = torch.autograd.grad(found, scaled[0][0])[0].double() * scale
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("rows", ["cross_view", "all"])
def test_a_row_of_zeros_is_like_all_others_alike(rows):
    views = [[x.detach(), y.detach()] for x, y in networks(7)]
    views[0][0][2] = views[1][1][4] = 0
    leaves = [tuple(z.requires_grad_() for z in pair) for pair in views]
    options = {"divergence": "jeffreys", "rows": rows}
    found = outcome(leaves, TERMS, **options)
    assert all(g is None or g.isfinite().all() for term in found[2] for g in term)
    assert_same(found, outcome(leaves, TERMS, backend="torch", **options), 1e-10)


def test_rows_of_denormal_numbers():
    signs = [(x.detach().sign(), y.detach().sign()) for x, y in networks(9)]
    views = [tuple((z.float() * 1e-43).requires_grad_() for z in pair) for pair in signs]
    found, wanted = (similarity_distillation(v, TERMS, partition=True).losses for v in (views, signs))
    for loss, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    # the gradient, some 1e42, is more than float32 holds, but zero in rows that are left out
    assert not any(g is not None and g.isnan().any() for term in gradients(found, views) for g in term)


@pytest.mark.parametrize("rows", ["cross_view", "all"])
def test_identical_networks_have_no_distance(rows):
    (view, *_) = networks(8)
    for divergence in ("kl", "reverse_kl", "jeffreys", "js"):
        found = similarity_distillation(
            [view, (view[0].detach(), view[1].detach())], [(0, (1,))], tau=0.02, divergence=divergence, rows=rows
        ).losses[0]
        assert abs(found) < 1e-14
        assert torch.autograd.grad(found, view[0])[0].abs().max() < 1e-13


def test_rows_of_equal_confidence_are_left_out():
    (view, *_) = networks(8)
    found = similarity_distillation([view, (view[0].detach(), view[1].detach())], [(0, (1,))], partition=True)
    assert (found.losses[0].item(), found.shares[0].item()) == (0.0, 0.0)


# -- which form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "terms", "message"),
    [
        ({"divergence": "js"}, [(0, (1,))], "divergence='js' has no fused kernel; the tiled PyTorch form computes it"),
        ({"rows": "all"}, [(0, (1,))], "rows='all' has no fused kernel"),
        ({"partition": True}, [(0, (1,))], "partition=True has no fused kernel"),
        ({}, [(0, (1,)), (0, (1, 2))], "a term of several teachers has no fused kernel"),
    ],
)
def test_what_is_not_fused_is_said_once(options, terms, message, monkeypatch, caplog):
    if native.core is None:
        pytest.skip(native.missing)
    monkeypatch.setattr(distill, "_said", set())
    views = networks(5)
    with caplog.at_level(logging.WARNING, logger="kernels.distill"):
        similarity_distillation(views, terms, backend="torch", **options)
        similarity_distillation(views, [(0, (1,))])
        assert caplog.messages == []
        for _ in range(3):
            similarity_distillation(views, terms, **options)
    assert len(caplog.messages) == 1
    assert message in caplog.messages[0]


def test_without_a_core_the_tiled_form_computes_all(monkeypatch, caplog):
    monkeypatch.setattr(native, "core", None)
    monkeypatch.setattr(native, "missing", "kernels._native is not built (no compiler)")
    monkeypatch.setattr(distill, "_said", set())
    views = networks(7)
    found = outcome(views, TERMS)
    assert "(kernels._native is not built (no compiler)) has no fused kernel" in caplog.text
    assert_same(found, outcome(views, TERMS, backend="torch"), 1e-10)
    with pytest.raises(ValueError, match="backend: 'native' does not fit: kernels._native is not built"):
        similarity_distillation(views, TERMS, divergence="js", backend="native")


def test_a_backend_that_does_not_fit_is_refused_whatever_the_form():
    views = networks(5)
    for options in ({}, *OTHER_FORMS):
        with pytest.raises(ValueError, match="backend: 'triton' does not fit: float64 embeddings"):
            similarity_distillation(views, [(0, (1,))], backend="triton", **options)


@pytest.mark.parametrize("options", [{}, *OTHER_FORMS], ids=str)
def test_transforms_and_forward_mode_take_the_definition(options):
    views = networks(6)
    x, y = (z.detach() for z in views[0])
    tangent = torch.ones_like(x)

    def loss(z, backend="auto"):
        return similarity_distillation([(z, y), *views[1:]], [(0, (1,))], backend=backend, **options).losses[0]

    gradient = torch.autograd.grad(loss(leaf := x.clone().requires_grad_()), leaf)[0]
    wanted = (gradient * tangent).sum()
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1].detach(), wanted, rtol=1e-9, atol=1e-15)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(dual.detach(), wanted, rtol=1e-9, atol=1e-15)
    with pytest.raises(ValueError, match="backend: 'native' does not fit"):
        torch.func.grad(functools.partial(loss, backend="native"))(x)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"divergence": "js", "rows": "all", "partition": True}], ids=str)
def test_compiles_without_graph_breaks(options):
    flat = [z for pair in networks(6) for z in pair]

    def loss(*flat):
        return similarity_distillation(list(zip(flat[::2], flat[1::2], strict=True)), TERMS, **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = compiled(*flat), loss(*flat)
    for value, expected in zip((*found.losses, *found.shares), (*wanted.losses, *wanted.shares), strict=True):
        torch.testing.assert_close(value, expected)
    for value, expected in zip(
        torch.autograd.grad(sum(found.losses), flat), torch.autograd.grad(sum(wanted.losses), flat), strict=True
    ):
        torch.testing.assert_close(value, expected)


# -- bad input -----------------------------------------------------------------------------------------------------

GOOD = (torch.ones(4, 3), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ([], "views: a sequence of one or more pairs .* found list of 0"),
        (GOOD[0], "views: a sequence .* found Tensor"),
        ([GOOD, GOOD[0]], r"views\[1\]: the two views \(x, y\) of a network are expected, found Tensor"),
        ([GOOD, (*GOOD, GOOD[0])], r"views\[1\]: the two views .* found tuple of 3"),
        ([GOOD, (GOOD[0], GOOD[0][:3])], r"views\[1\]\[1\]: shape .* differs from views\[1\]\[0\]'s"),
        ([GOOD, (GOOD[0][:3], GOOD[0][:3])], r"views\[1\]: 3 images, but views\[0\] holds 4"),
        ([GOOD, (GOOD[0].to("meta"), GOOD[0].to("meta"))], r"views\[1\]: device meta differs from views\[0\]'s cpu"),
        ([(GOOD[0].int(), GOOD[0].int()), GOOD], r"views\[0\]\[0\]: dtype torch.int32 is not supported"),
        ([(GOOD[0][:1], GOOD[0][:1])] * 2, r"views\[0\]\[0\]: N = 1 has no negatives"),
    ],
)
def test_bad_views_are_named(views, message):
    with pytest.raises(ValueError, match=message):
        similarity_distillation(views, [(0, (1,))])


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "terms: a sequence of one or more .* found list of 0"),
        ("01", "terms: a sequence .* found str"),
        ([(0, 1)], r"terms\[0\]: \(student, \(teacher, ...\)\) is expected, found \(0, 1\)"),
        ([(0, (1,)), (0, (2,))], r"terms\[1\]: places in views are 0 to 1, found 2"),
        ([(-1, (1,))], r"terms\[0\]: places in views are 0 to 1, found -1"),
        ([(0, (True,))], r"terms\[0\]: places in views are 0 to 1, found True"),
        ([(0, ())], r"terms\[0\]: student 0 has no teacher"),
        ([(0, (0,))], r"terms\[0\]: teachers must be different networks, none of them the student 0, found \(0,\)"),
        ([(0, (1, 1))], r"terms\[0\]: teachers must be different networks"),
    ],
)
def test_bad_terms_are_named(terms, message):
    with pytest.raises(ValueError, match=message):
        similarity_distillation([GOOD, GOOD], terms)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau: must be positive and finite, found 0.0"),
        ({"divergence": "tv"}, "divergence: 'tv' is unknown; allowed: kl, reverse_kl, jeffreys, js"),
        ({"rows": "both"}, "rows: 'both' is unknown; allowed: cross_view, all"),
        ({"rows": "all", "symmetric": True}, "symmetric: with rows='all' the matrix is symmetric already"),
        ({"kl_reduction": "sum"}, "kl_reduction: 'sum' is unknown"),
        ({"backend": "cuda"}, "backend: 'cuda' is unknown"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        similarity_distillation([GOOD, GOOD], [(0, (1,))], **options)

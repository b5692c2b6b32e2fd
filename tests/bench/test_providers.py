"""Baselines, other libraries and our own providers against the reference in float64."""

import pytest
import torch

from bench import baselines, providers
from bench.baselines import TAU_CONTRAST, Unavailable
from bench.providers import PROVIDERS, TWO_NTXENT, Provider
from kernels import reference

CPU = torch.device("cpu")


def by_name(name: str) -> Provider:
    return next(p for p in PROVIDERS if p.name == name)


@pytest.mark.parametrize("which", ["mutual", "ntxent"])
@pytest.mark.parametrize("name", ["torch", "eager", "official"])
def test_providers_compute_the_losses(name, which):
    function = by_name(name).build(which, CPU, 16)
    found = providers.errors(function, which, 16, CPU, rows=18)
    assert found.loss < 1e-6
    assert found.gradient < 3e-6


@pytest.mark.parametrize("which", ["mutual", "ntxent"])
def test_baselines_are_right_in_float64(which):
    x_a, y_a, x_b, y_b = (view.detach().double().requires_grad_() for view in providers.make_views(18, 16, CPU))
    exact = (x_a, y_a, x_b, y_b)
    expected = providers.reference_losses(which, exact)
    for build in (baselines.build_eager, baselines.build_official):
        actual = build(which, CPU, 16)(*exact)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        for a, e in zip(torch.autograd.grad(actual, exact), torch.autograd.grad(expected, exact), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-15)
        expected = providers.reference_losses(which, exact)


def test_compiled_computes_the_loss():
    function = by_name("compiled").build("mutual", CPU, 16)
    found = providers.errors(function, "mutual", 16, CPU, rows=18)
    assert found.loss < 1e-6
    assert found.gradient < 3e-6


def test_lightly_computes_ntxent():
    pytest.importorskip("lightly")
    found = providers.errors(by_name("lightly").build("ntxent", CPU, 16), "ntxent", 16, CPU, rows=18)
    assert found.loss < 1e-6
    assert found.gradient < 3e-6


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 512])
@pytest.mark.parametrize("name", ["memeff", "memeff-bf16", "inf-cl"])
def test_gpu_libraries_compute_what_is_said(name, D):
    pytest.importorskip("inf_cl" if name == "inf-cl" else "memeff")
    provider = by_name(name)
    found = providers.errors(provider.build("ntxent", torch.device("cuda"), D), "selfish", D, torch.device("cuda"))
    assert max(found) < providers.TOLERANCE[provider.products]


def test_selfish_keeps_the_self_similarity():
    x, y = (torch.randn(9, 16, dtype=torch.float64, generator=torch.manual_seed(s)) for s in (0, 1))
    z = reference.normalize(torch.cat((x, y)))
    logits = z @ z.T / TAU_CONTRAST
    others = logits.masked_fill(torch.eye(18, dtype=torch.bool), float("-inf")).logsumexp(1)
    itself = torch.full_like(others, 1 / TAU_CONTRAST)
    expected = (torch.logaddexp(others, itself) - logits.diagonal(9).repeat(2)).mean()
    torch.testing.assert_close(baselines.selfish(x, y), expected, rtol=1e-12, atol=0)
    assert baselines.selfish(x, y) > reference.ntxent(x, y, tau=TAU_CONTRAST)


@pytest.mark.parametrize("name", ["lightly", "memeff", "memeff-bf16", "inf-cl"])
def test_one_softmax_is_no_mutual_loss(name):
    with pytest.raises(Unavailable, match="NT-Xent alone"):
        by_name(name).build("mutual", CPU, 128)


def test_inf_cl_refuses_widths_that_it_would_read_past():
    for D in (96, 8, 384):
        with pytest.raises(Unavailable, match=f"D = {D}"):
            baselines.build_inf_cl("ntxent", torch.device("cuda"), D)


def test_the_interpreter_is_never_timed():
    for name in ("triton", TWO_NTXENT):
        with pytest.raises(Unavailable, match="GPUs only"):
            by_name(name).build("mutual", CPU, 128)

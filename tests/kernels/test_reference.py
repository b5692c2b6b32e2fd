"""The oracle itself, against loops written out from the definitions and against closed forms."""

import math

import pytest
import torch

from kernels import reference


def cosine(u: torch.Tensor, v: torch.Tensor) -> float:
    return float(u @ v / (u.norm() * v.norm()))


def ntxent_by_loops(x: torch.Tensor, y: torch.Tensor, tau: float) -> float:
    z, N = torch.cat((x, y)), len(x)
    total = 0.0
    for i in range(2 * N):
        positive = math.exp(cosine(z[i], z[(i + N) % (2 * N)]) / tau)
        total -= math.log(positive / sum(math.exp(cosine(z[i], z[j]) / tau) for j in range(2 * N) if j != i))
    return total / (2 * N)


def kl_by_loops(x_t, y_t, x_s, y_s, tau: float) -> float:
    """Mean over rows of KL(teacher || student)."""

    def row(x, y, i):
        e = [math.exp(cosine(x[i], y[j]) / tau) for j in range(len(y))]
        return [value / sum(e) for value in e]

    total = 0.0
    for i in range(len(x_t)):
        total += sum(p * math.log(p / q) for p, q in zip(row(x_t, y_t, i), row(x_s, y_s, i), strict=True))
    return total / len(x_t)


@pytest.mark.parametrize(("N", "D", "tau"), [(2, 1, 0.5), (3, 5, 0.1), (13, 7, 0.5), (17, 3, 0.2)])
def test_ntxent_is_the_definition(N, D, tau):
    torch.manual_seed(0)
    x, y = torch.randn(2, N, D, dtype=torch.float64)
    assert reference.ntxent(x, y, tau=tau).item() == pytest.approx(ntxent_by_loops(x, y, tau), rel=1e-12)


@pytest.mark.parametrize(("N", "D_a", "D_b", "tau"), [(2, 1, 4, 0.5), (11, 6, 3, 0.1), (16, 2, 9, 0.2)])
def test_kl_is_the_definition(N, D_a, D_b, tau):
    torch.manual_seed(1)
    x_a, y_a = torch.randn(2, N, D_a, dtype=torch.float64)
    x_b, y_b = torch.randn(2, N, D_b, dtype=torch.float64)
    kl_a, kl_b = reference.similarity_kl(x_a, y_a, x_b, y_b, tau=tau)
    assert kl_a.item() == pytest.approx(kl_by_loops(x_b, y_b, x_a, y_a, tau), rel=1e-11)
    assert kl_b.item() == pytest.approx(kl_by_loops(x_a, y_a, x_b, y_b, tau), rel=1e-11)
    mean = reference.similarity_kl(x_a, y_a, x_b, y_b, tau=tau, kl_reduction="mean")
    assert mean[0].item() == pytest.approx(kl_a.item() / N, rel=1e-12)


def test_identical_embeddings_give_the_log_of_the_negatives():
    z = torch.ones(9, 4, dtype=torch.float64)
    assert reference.ntxent(z, z, tau=0.3).item() == pytest.approx(math.log(2 * 9 - 1), rel=1e-14)


def test_perfectly_separated_embeddings():
    N, tau = 6, 0.25
    z = torch.eye(N, dtype=torch.float64)
    # one positive at cosine 1, 2N - 2 negatives at cosine 0
    expected = math.log(math.exp(1 / tau) + 2 * N - 2) - 1 / tau
    assert reference.ntxent(z, z, tau=tau).item() == pytest.approx(expected, rel=1e-14)


def test_peers_that_agree_have_no_divergence():
    torch.manual_seed(2)
    x, y = torch.randn(2, 8, 5, dtype=torch.float64)
    kl_a, kl_b = reference.similarity_kl(x, y, x, y, tau=0.1)
    assert kl_a.item() == 0.0
    assert kl_b.item() == 0.0


def test_peaked_rows_at_the_smallest_temperature_stay_finite():
    z = torch.eye(5)
    kl_a, kl_b = reference.similarity_kl(z, z, z, z.flip(0), tau=0.02)
    assert kl_a.isfinite()
    assert kl_b.isfinite()
    assert reference.ntxent(z, -z, tau=0.02).item() == pytest.approx(50 + math.log(8 + math.exp(-50)), rel=1e-6)

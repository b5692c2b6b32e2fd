"""Strips of rows, and unit rows with their way back, against autograd of the plain formula in float64."""

import pytest
import torch

from embeddings import embeddings
from kernels import strips


def test_strips_are_even_and_within_the_bounds(monkeypatch):
    monkeypatch.setattr(strips, "CPU_ROWS", 256)
    like = torch.empty(0)
    assert list(strips.strips(600, 600, 10, like)) == [(0, 200), (200, 400), (400, 600)]
    assert list(strips.strips(3, 3, 10, like)) == [(0, 3)]
    assert list(strips.strips(64, 10**8, 10, like)) == [(0, 32), (32, 64)]  # whatever their bytes
    pieces = list(strips.strips(10_000, 40_000, 7, torch.empty(0, device="meta")))  # as on a GPU: by bytes alone
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == 10_000
    assert strips.STRIP_BYTES / 2 < max(end - begin for begin, end in pieces) * 40_000 * 4 * 7 <= strips.STRIP_BYTES


@pytest.mark.parametrize("centred", [False, True])
def test_unit_rows_and_their_gradient(centred):
    views = embeddings(7, 5, 90)
    weights = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(91), dtype=torch.float64)
    z = torch.stack(views)
    rows = z - z.sum(dim=2, keepdim=True) / 5 if centred else z
    rows = rows / (rows * rows).sum(dim=2, keepdim=True).sqrt()
    unit = strips.unit_rows(*(view.detach() for view in views), centred=centred)
    torch.testing.assert_close(unit.rows, rows.detach(), rtol=1e-13, atol=1e-14)
    # for rows without mean the gradient must have none: the callers' have not
    upstream = weights - weights.mean(dim=2, keepdim=True) if centred else weights
    wanted = torch.autograd.grad((upstream * rows).sum(), views)
    found = strips.through_unit_rows(upstream.clone(), unit)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-12, atol=1e-14)

"""What losses compute in: at least float32, also within an autocast."""

import pytest
import torch

from kernels.precision import at_least_float32, full_precision, unit_rows


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_halves_become_float32(dtype, computed):
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0]], dtype=dtype)
    assert at_least_float32(x).dtype == computed
    assert torch.equal(at_least_float32(x).double(), x.double())
    unit = unit_rows(x)
    assert unit.dtype == computed
    wanted = torch.tensor([[3 / 5, 4 / 5], [0, 0], [-5 / 13, 12 / 13]], dtype=torch.float64)
    torch.testing.assert_close(unit.double(), wanted, rtol=1e-6, atol=0)


def test_an_autocast_does_not_reach_inside():
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with full_precision(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16

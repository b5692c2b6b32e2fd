"""What takes the place of an image that cannot be read."""

import math

import pytest

from engine.data import skipped


@pytest.mark.parametrize("n", [1, 2, 3, 10, 97, 1000, 1281167])
def test_substitutes_are_sought_everywhere(n):
    stride = skipped._stride(n)
    assert math.gcd(stride, n) == 1
    if n < 2000:
        assert sorted((5 + k * stride) % n for k in range(n)) == list(range(n))

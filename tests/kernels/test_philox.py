"""Uniform numbers of many counters: NumPy's, to the bit."""

import numpy as np
import pytest

from kernels import native
from kernels.philox import philox_uniforms


def numpys(key, counters, stream, count):
    return np.stack([
        np.random.Generator(np.random.Philox(key=list(key), counter=[0, int(i), stream, 0])).random(count)
        for i in counters
    ])  # fmt: skip


@pytest.mark.parametrize("core", ["native", "numpy"])
@pytest.mark.parametrize("key", [(0, 0), (1, 7), (2**32 - 1, 10**6), (2**64 - 1, 2**63)])
@pytest.mark.parametrize("count", [1, 4, 33, 132])
def test_numbers_are_numpys(core, key, count, monkeypatch):
    if core == "numpy":
        monkeypatch.setattr(native, "core", None)
    elif native.core is None:
        pytest.skip(native.missing)
    counters = np.array([0, 1, 49_999, 2**40, 2**63 - 1])
    for stream in (0, 1):
        found = philox_uniforms(key, counters, stream=stream, count=count)
        np.testing.assert_array_equal(found, numpys(key, counters, stream, count))


@pytest.mark.parametrize("core", ["native", "numpy"])
def test_no_counters(core, monkeypatch):
    if core == "numpy":
        monkeypatch.setattr(native, "core", None)
    elif native.core is None:
        pytest.skip(native.missing)
    assert philox_uniforms((1, 2), np.zeros(0, np.int64), stream=0, count=5).shape == (0, 5)


@pytest.mark.skipif(native.core is None, reason=native.missing)
def test_counters_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"counters: \[n\] is expected, found 2 axes"):
        philox_uniforms((1, 2), np.zeros((2, 2), np.int64), stream=0, count=5)

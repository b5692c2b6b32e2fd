"""The checksum against published values and TensorBoard's own implementation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from engine.data.crc32c import crc32c, masked_crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"a", 0xC1D04330),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # RFC 3720, appendix B.4, from here on
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (bytes.fromhex("01c0000000000000000000000000000014000000000004000000001400000018280000000000000002000000"
                       "00000000"), 0xD9963A56),
    ],
)  # fmt: skip
def test_published_values(data, expected):
    assert crc32c(data) == crc32c(memoryview(data)) == expected


@given(st.binary(max_size=300))
def test_short_data(data):
    assert crc32c(data) == pywrap_tensorflow.crc32c(data)
    assert masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)


@pytest.mark.parametrize("length", [127, 128, 129, 131, 132, 255, 256, 257, 384, 1000, 16384, 16385, 100_003])
def test_long_data(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == pywrap_tensorflow.crc32c(data)
    assert crc32c(bytes(length)) == pywrap_tensorflow.crc32c(bytes(length))  # zeros in front count

"""CRC-32C (Castagnoli), the checksum of TFRecord files, over many pieces of the data at once with numpy."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # reflected
_PIECE = 32  # bytes; 170 us for a record of 28 kB, 330 us of 110 kB, where decoding takes 600 us and more

Words = NDArray[np.uint32]


def crc32c(data: bytes | memoryview) -> int:
    """The checksum of some bytes."""
    if len(data) <= _PIECE:
        return _short(data)
    pieces = -(-len(data) // _PIECE)
    padded = np.zeros(pieces * _PIECE, np.uint8)  # zeros before the data leave a register of zero at zero
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 0xFF  # what a register that starts with ones amounts to
    return int(_joined(_registers(padded.reshape(pieces, _PIECE)))) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """The checksum as TFRecord files store it: rotated, plus a constant."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _short(data: bytes | memoryview) -> int:
    table = _byte_list()
    register = 0xFFFFFFFF
    for byte in data:
        register = table[(register ^ byte) & 0xFF] ^ register >> 8
    return register ^ 0xFFFFFFFF


def _registers(pieces: NDArray[np.uint8]) -> Words:
    """The register after each row [K, bytes], from zero."""
    table = _pair_table()
    register = np.zeros(len(pieces), np.uint32)
    for pair in np.ascontiguousarray(pieces.view("<u2").T):
        register = table[(register ^ pair) & 0xFFFF] ^ register >> 16
    return register


def _joined(registers: Words) -> np.uint32:
    """The register after all pieces in a row: halves the number of pieces until one is left."""
    level = 0
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        registers = _advance(_advance_tables(level), registers[0::2]) ^ registers[1::2]
        level += 1
    return registers[0]


def _advance(tables: Words, registers: Words) -> Words:
    """Registers after as many bytes of zero as the tables [4, 256] stand for."""
    return (
        tables[0][registers & 0xFF]
        ^ tables[1][registers >> 8 & 0xFF]
        ^ tables[2][registers >> 16 & 0xFF]
        ^ tables[3][registers >> 24]
    )


@cache
def _advance_tables(level: int) -> Words:
    """Where each byte of a register, the others zero, leads over 2^level pieces of zeros."""
    bytes_ = np.arange(256, dtype=np.uint32)
    registers = np.stack([bytes_ << shift for shift in (0, 8, 16, 24)])
    if level:
        half = _advance_tables(level - 1)
        return _advance(half, _advance(half, registers))
    table = _byte_table()
    for _ in range(_PIECE):
        registers = table[registers & 0xFF] ^ registers >> 8
    return registers


@cache
def _byte_table() -> Words:
    """The register after one byte, by the byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    return table


@cache
def _byte_list() -> list[int]:
    return _byte_table().tolist()  # a list is indexed several times faster than an array, one at a time


@cache
def _pair_table() -> Words:
    """The register after two bytes, by the two as a little-endian number."""
    table = _byte_table()
    pairs = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(2):
        pairs = table[pairs & 0xFF] ^ pairs >> 8
    return pairs

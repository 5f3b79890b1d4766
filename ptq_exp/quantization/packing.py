# pyright: strict, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Unsigned integers of b bits packed to their real width: a stream of bits, least significant first.

Integer i occupies the bits i*b .. i*b + b - 1 of the stream, bit k of the stream is bit k % 8 of byte k // 8 (of
4 bits there are two per byte, the first in the lower half). The last byte is filled up with zeros.
"""

from __future__ import annotations

import numpy as np

from ptq_exp.errors import DataError, QuantizationError
from ptq_exp.quantization.affine import MAX_BITS

_CHUNK = 1 << 20  # integers at a time, so that their bits never sit in memory all at once; a multiple of 8


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` integers of `bits` bits take."""
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack `values`, integers of any shape and type, into uint8 [packed_size(values.size, bits)].

    Raises:
        QuantizationError: `bits` is not in 1..16, or a value does not fit.
    """
    _check_bits(bits)
    flat = np.asarray(values).reshape(-1)
    if flat.size and (flat.min() < 0 or flat.max() >> bits):
        raise QuantizationError(f"cannot pack {flat.min()}..{flat.max()} into unsigned integers of {bits} bits")
    if bits in (8, 16):
        return np.frombuffer(flat.astype(f"<u{bits // 8}").tobytes(), np.uint8)
    packed = np.empty(packed_size(flat.size, bits), np.uint8)
    step = _CHUNK * bits // 8
    for i, start in enumerate(range(0, flat.size, _CHUNK)):
        chunk = flat[start : start + _CHUNK].astype("<u2")
        single = np.unpackbits(chunk.view(np.uint8).reshape(-1, 2), axis=1, count=bits, bitorder="little")
        packed[i * step : (i + 1) * step] = np.packbits(single, bitorder="little")
    return packed


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the `count` integers that `pack` packed: uint8 [count], or uint16 beyond 8 bits.

    Raises:
        QuantizationError: `bits` is not in 1..16.
        DataError: `packed` holds another number of bytes, or its filling is not zero.
    """
    _check_bits(bits)
    packed = np.ascontiguousarray(packed)
    expected = packed_size(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (expected,):
        raise DataError(
            f"{count} integers of {bits} bits are uint8 [{expected}], found {packed.dtype} {list(packed.shape)}"
        )
    if (filling := expected * 8 - count * bits) and packed[-1] >> 8 - filling:
        raise DataError(f"packed integers of {bits} bits: the last byte is filled with something else than zeros")
    kind = np.uint8 if bits <= 8 else np.dtype("<u2")
    if bits in (8, 16):
        return packed.view(kind)
    values = np.empty(count, kind)
    step = _CHUNK * bits // 8
    for i, start in enumerate(range(0, count, _CHUNK)):
        n = min(_CHUNK, count - start)
        single = np.unpackbits(packed[i * step : (i + 1) * step], count=n * bits, bitorder="little").reshape(n, bits)
        whole = np.packbits(single, axis=1, bitorder="little")  # [n, bytes of one integer]
        values[start : start + n] = np.ascontiguousarray(whole).view(kind).reshape(-1)
    return values


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise QuantizationError(f"cannot pack integers of {bits} bits: choose 1..{MAX_BITS}")

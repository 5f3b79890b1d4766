"""Integers packed to their real width come back, take the bytes that they should, and damage is noticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq_exp.errors import DataError, QuantizationError
from ptq_exp.quantization import packing
from ptq_exp.quantization.packing import pack, packed_size, unpack


@st.composite
def integers(draw):
    bits = draw(st.integers(1, 16))
    return bits, np.array(draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=np.int32)


@given(integers())
def test_round_trip_at_every_width_and_length(case):
    bits, values = case
    packed = pack(values, bits)
    assert packed.dtype == np.uint8 and len(packed) == packed_size(len(values), bits) == -(-len(values) * bits // 8)
    found = unpack(packed, bits, len(values))
    assert found.dtype.itemsize == (1 if bits <= 8 else 2) and np.array_equal(found, values)


@given(integers())
def test_the_stream_is_the_one_of_the_definition(case):
    bits, values = case
    stream = sum(int(value) << i * bits for i, value in enumerate(values))
    assert pack(values, bits).tobytes() == stream.to_bytes(packed_size(len(values), bits), "little")


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 32, 33, 1001])
def test_chunks_join_without_seams(bits, count, monkeypatch):
    monkeypatch.setattr(packing, "_CHUNK", 16)
    values = np.random.default_rng(bits).integers(0, 2**bits, count)
    assert np.array_equal(unpack(pack(values, bits), bits, count), values)


def test_four_bits_are_two_per_byte():
    assert pack(np.array([[1, 2], [15, 0], [7, 8]]), 4).tolist() == [0x21, 0x0F, 0x87]


@pytest.mark.parametrize("values", [[-1], [8], [0, 7, 9]])
def test_what_does_not_fit_is_refused(values):
    with pytest.raises(QuantizationError, match="of 3 bits"):
        pack(np.array(values), 3)


@pytest.mark.parametrize("bits", [0, 17])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(QuantizationError, match="choose 1..16"):
        pack(np.array([0]), bits)
    with pytest.raises(QuantizationError, match="choose 1..16"):
        unpack(np.array([0], np.uint8), bits, 1)


def test_damaged_streams_are_refused():
    packed = pack(np.arange(5), 3)
    for damaged in (packed[:-1], np.append(packed, np.uint8(0)), packed.astype(np.int16), packed.reshape(1, -1)):
        with pytest.raises(DataError, match=r"5 integers of 3 bits are uint8 \[2\]"):
            unpack(damaged, 3, 5)
    with pytest.raises(DataError, match="filled"):
        unpack(packed | np.array([0, 128], np.uint8), 3, 5)

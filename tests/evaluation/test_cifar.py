"""CIFAR-10 batches as their authors wrote them, and pickles that are something else."""

import io
import os
import pickle
import pickletools

import numpy as np
import pytest

from ptq_exp.errors import DataError
from ptq_exp.evaluation import open_images


def failure(folder, **kwargs):
    with pytest.raises(DataError) as caught:
        open_images(folder, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_batches_are_read_in_order_with_the_channel_last(colour_images, write_cifar, protocol):
    folder = write_cifar(colour_images, protocol)
    assert np.array_equal(open_images(folder)[:], colour_images)
    assert np.array_equal(open_images(folder, split="test")[:], colour_images[:1])


def test_the_pickle_of_python_2_is_read(colour_images, write_cifar):
    """Python 2 wrote protocol 2 with str (SHORT_BINSTRING, BINSTRING) for text and for bytes."""

    def text(value):
        return pickle.SHORT_BINSTRING + bytes([len(value)]) + value

    def number(value):
        return pickle.BININT + value.to_bytes(4, "little", signed=True)

    row = colour_images[0].transpose(2, 0, 1).tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    content = pickle.BINSTRING + len(row).to_bytes(4, "little") + row
    state = b"(" + number(1) + number(1) + number(3072) + b"\x86" + dtype + b"\x89" + content + b"tb"
    written = b"\x80\x02}(" + text(b"data") + array + state + text(b"labels") + b"]u."
    pickletools.dis(written, io.StringIO())  # a well-formed pickle
    folder = write_cifar(colour_images)
    (folder / "test_batch").write_bytes(written)
    assert np.array_equal(open_images(folder, split="test")[:], colour_images[:1])


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_pickle_is_refused_before_anything_is_called(colour_images, write_cifar, tmp_path, protocol):
    folder, harm = write_cifar(colour_images), tmp_path / "harm"
    rows = np.zeros((1, 3072), np.uint8)
    mkdir = f"__import__('os').mkdir({str(harm)!r})"
    for attack in (Call(os.mkdir, str(harm)), Call(eval, mkdir), Call(np.fromfile, "x")):
        batch = {b"data": rows, b"labels": attack}
        (folder / "data_batch_3").write_bytes(pickle.dumps(batch, protocol))
        message = failure(folder)
        assert "data_batch_3" in message and "asks for" in message and "which no image needs" in message
    assert not harm.exists()


def test_other_arrays_and_values_are_refused(colour_images, write_cifar):
    folder = write_cifar(colour_images)
    for data, reason in [
        (np.zeros((1, 3072)), "another type than uint8"),
        (np.array([[None] * 3072]), "another type than uint8"),
        (np.zeros((1, 784), np.uint8), "found shape (1, 784)"),
        ([1, 2], "found no array"),
    ]:
        (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": data}, 2))
        message = failure(folder)
        assert "data_batch_1" in message and reason in message
    (folder / "data_batch_1").write_bytes(pickle.dumps([1], 2))
    assert "found no array" in failure(folder)


def test_damaged_and_missing_files_and_splits_are_named(colour_images, write_cifar):
    folder = write_cifar(colour_images)
    content = (folder / "data_batch_2").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>"):
        (folder / "data_batch_2").write_bytes(damaged)
        assert "data_batch_2 is no readable batch of CIFAR-10" in failure(folder)
    (folder / "data_batch_2").unlink()
    assert "data_batch_2: no such file; unpack" in failure(folder)
    assert "split=val: CIFAR-10 has the splits train and test" in failure(folder, split="val")

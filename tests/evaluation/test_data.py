"""Real images of every kind: lazily read, checked against the model, damaged or foreign files named."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from ptq_exp.errors import DataError
from ptq_exp.evaluation import content_digest, image_source, open_images
from ptq_exp.storage.npz import npz_array


def failure(*args, **kwargs):
    with pytest.raises(DataError) as caught:
        source = open_images(*args, **kwargs)
        source[:]
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def write_npz(tmp_path):
    def write(save=np.savez, name="reference.npz", **arrays):
        save(tmp_path / name, **arrays)
        return tmp_path / name

    return write


# ---- every kind gives the same images


def test_every_kind_reads_the_same_images_by_slice_and_index(colour_images, write_folder, write_npz, write_cifar):
    cifar = write_cifar(colour_images)
    kinds = {
        "folder": write_folder(colour_images),
        "samples.npz": write_npz(arr_0=colour_images, arr_1=np.zeros(50, np.int64)),
        "compressed": write_npz(np.savez_compressed, "compressed.npz", arr_0=colour_images),
        "fortran": write_npz(name="fortran.npz", arr_0=np.asfortranarray(colour_images)),
        "cifar": cifar,
        "parent of cifar": cifar.parent,
    }
    for kind, path in kinds.items():
        source = open_images(path, size=32, channels=3)
        assert len(source) == 50 and source.shape == (50, 32, 32, 3) and source.dtype == np.uint8, kind
        assert np.array_equal(source[3:7], colour_images[3:7]), kind
        assert np.array_equal(source[np.array([49, 0, 7])], colour_images[[49, 0, 7]]), kind
        assert np.array_equal(source[:], colour_images), kind
        assert type(source[:2]) is np.ndarray, kind  # no view of a mapped file


def test_an_uncompressed_archive_is_mapped_not_loaded(colour_images, write_npz):
    stored, packed = write_npz(arr_0=colour_images), write_npz(np.savez_compressed, "packed.npz", arr_0=colour_images)
    assert isinstance(npz_array(stored, "arr_0"), np.memmap)
    assert not isinstance(npz_array(packed, "arr_0"), np.memmap)
    with zipfile.ZipFile(stored, "a") as archive:  # a later member and an extra field in the header do no harm
        info = zipfile.ZipInfo("arr_1.npy")
        info.extra = b"\x99\x99\x04\x00abcd"
        archive.writestr(info, zipfile.ZipFile(stored).read("arr_0.npy"))
    assert isinstance(npz_array(stored, "arr_1"), np.memmap)
    assert np.array_equal(npz_array(stored, "arr_1"), colour_images)


def test_a_folder_reads_only_what_is_asked_for(colour_images, write_folder, monkeypatch):
    folder = write_folder(colour_images)
    (folder / "labels.txt").write_text("no image")
    (folder / "._000.png").write_text("what macOS leaves")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "000.png").write_text("what file managers leave")
    source, opened = open_images(folder), []
    monkeypatch.setattr(
        image_source.Image, "open", lambda file, original=Image.open: opened.append(file.name) or original(file)
    )
    source[48:]
    assert opened == ["048.png", "049.png"]


def test_take_spreads_over_the_source(colour_images, write_npz):
    source = open_images(write_npz(arr_0=colour_images))
    taken = source.take(5)
    assert np.array_equal(taken[1:3], colour_images[[10, 20]]) and taken.shape == (5, 32, 32, 3)
    assert source.take(None) is source.take(50) is source
    assert len({source.digest, taken.digest, source.take(6).digest}) == 3
    with pytest.raises(DataError, match="at least 1"):
        source.take(0)


def test_the_digest_follows_content_and_names(colour_images, write_folder, write_npz, write_cifar):
    first, second = write_folder(colour_images[:3], "a"), write_folder(colour_images[:3], "b")
    assert open_images(first).digest == open_images(second).digest == content_digest(first)
    (second / "000.png").rename(second / "x.png")
    assert open_images(second).digest != open_images(first).digest
    path = write_npz(arr_0=colour_images)
    before = open_images(path).digest
    assert before == content_digest(path)
    write_npz(arr_0=colour_images[::-1])
    assert open_images(path).digest != before
    cifar = write_cifar(colour_images)
    assert open_images(cifar).digest != open_images(cifar, split="test").digest


# ---- modes of image files


def save(folder, name, mode, array):
    folder.mkdir(exist_ok=True)
    Image.fromarray(array).convert(mode).save(folder / name)
    return folder


def test_grey_files_are_repeated_where_colour_is_wanted(tmp_path, colour_images):
    grey = colour_images[0, :, :, 0]
    folder = save(tmp_path / "images", "a.png", "L", grey)
    save(folder, "b.png", "1", np.uint8(grey > 127) * 255)
    assert open_images(folder).shape == (2, 32, 32, 1)
    assert np.array_equal(open_images(folder)[:1], grey[None, :, :, None])
    assert set(np.unique(open_images(folder)[1:])) == {0, 255}
    assert np.array_equal(open_images(folder, channels=3)[:1], grey[None, :, :, None].repeat(3, axis=3))
    save(folder, "c.png", "RGB", colour_images[1])
    assert open_images(folder).shape == (3, 32, 32, 3)
    assert "c.png has 3 channels, expected 1" in failure(folder, channels=1)


def test_palettes_and_opaque_alpha_become_rgb(tmp_path, colour_images):
    few = colour_images[0] // 128 * 255
    folder = save(tmp_path / "images", "palette.png", "P", few)
    opaque = np.concatenate([few, np.full((32, 32, 1), 255, np.uint8)], axis=2)
    save(folder, "alpha.png", "RGBA", opaque)
    save(folder, "grey.png", "LA", few[..., 0])
    alpha, grey, palette = open_images(folder)[:]
    assert np.array_equal(alpha, few) and np.array_equal(palette, few)
    assert np.array_equal(grey, few[..., :1].repeat(3, axis=2))


def test_transparency_other_modes_and_damage_are_named(tmp_path, colour_images):
    clear = np.concatenate([colour_images[0], np.full((32, 32, 1), 255, np.uint8)], axis=2)
    clear[5, 5, 3] = 254
    assert "t.png has transparent pixels" in failure(save(tmp_path / "alpha", "t.png", "RGBA", clear))
    assert "c.jpg has the mode CMYK" in failure(save(tmp_path / "cmyk", "c.jpg", "CMYK", colour_images[0]))
    folder = save(tmp_path / "damaged", "a.png", "RGB", colour_images[0])
    save(folder, "b.png", "RGB", colour_images[1])
    content = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(content[: len(content) // 2])
    assert "b.png cannot be read as an image" in failure(folder)
    (folder / "b.png").write_text("<html>")
    assert "b.png cannot be read as an image" in failure(folder)


# ---- what does not fit


def test_wrong_sizes_and_channels_name_the_file_and_the_model(colour_images, write_folder, write_npz, write_cifar):
    folder = write_folder(colour_images[:3])
    assert "000.png is 32x32, the model expects 64x64; resize the images to 64x64 first" in failure(folder, size=64)
    assert "the model expects 48x16" in failure(folder, size=(16, 48))
    path = write_npz(arr_0=colour_images)
    assert "reference.npz is 32x32, the model expects 64x64" in failure(path, size=64)
    assert "has 3 channel(s), the model expects 1" in failure(path, channels=1)
    assert "cifar-10-batches-py is 32x32, the model expects 16x16" in failure(write_cifar(colour_images), size=16)
    Image.fromarray(colour_images[0, :16]).save(folder / "001.png")
    assert "001.png is 32x16, but 000.png is 32x32; resize the images of the folder" in failure(folder)


def test_nothing_to_read_is_said(tmp_path):
    assert "no such file or folder" in failure(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("text")
    assert "found no images" in failure(tmp_path)
    assert "unpack an archive first" in failure(tmp_path / "notes.txt")


def test_other_archives_name_their_arrays(write_npz, colour_images):
    assert "found the arrays mu, sigma; expected arr_0" in failure(write_npz(mu=np.ones(2), sigma=np.eye(2)))
    assert "found the arrays (none)" in failure(write_npz())
    assert "float64 of shape (2, 2)" in failure(write_npz(arr_0=np.eye(2)))
    assert "uint8 of shape (50, 3, 32, 32)" in failure(write_npz(arr_0=colour_images.transpose(0, 3, 1, 2)))
    assert "uint8 of shape (0, 32, 32, 3)" in failure(write_npz(arr_0=colour_images[:0]))
    assert "is no readable .npz file" in failure(write_npz(arr_0=np.array([{"a": 1}], object)))


def test_damaged_archives_are_data_errors(write_npz, colour_images):
    path = write_npz(arr_0=colour_images)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"<html>", content[:40] + content[90:]):
        path.write_bytes(damaged)
        assert "reference.npz is no readable .npz file" in failure(path)
    np.save(path.with_suffix(".npy"), colour_images)
    path.with_suffix(".npy").rename(path)
    assert "holds one array without a name" in failure(path)

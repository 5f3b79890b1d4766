"""60 malformed files of every format that is read, seeded: one line that names the file, never a traceback or a guess.

Saved quantized models and foreign checkpoints have tests of their own.
"""

import io
import json
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from numpy.lib import format as npy
from safetensors.torch import load_file, save_file

import ptq_exp
from ptq_exp.calibration import CalibrationSet
from ptq_exp.correction import BitSchedule, NoiseStatistics
from ptq_exp.diffusion.checkpoints import Part, fill, identity
from ptq_exp.embedded.weights_file import WEIGHTS
from ptq_exp.errors import CheckpointError, DataError, PTQError
from ptq_exp.evaluation import FeatureStatistics, GaussianStatistics, load_statistics
from ptq_exp.evaluation.data import open_images
from ptq_exp.reports.tables.runs import collect
from ptq_exp.results.record import read_samples, write_samples
from ptq_exp.storage.npz import npz_arrays
from ptq_exp.storage.plain_json import read_json, write_json

RNG = np.random.default_rng(0)
HTML = b"<!DOCTYPE html><html><body>404 not found</body></html>"


def calibration_set(path):
    CalibrationSet(
        RNG.normal(size=(5, 1, 4, 4)).astype(np.float32), np.arange(5), np.arange(5, dtype=np.float32), np.ones(5, int)
    ).save(path)


def noise_statistics(path):
    steps = {name: torch.rand(3) for name in ("k", "residual_std", "r", "kurtosis", "k_stderr", "k_unshrunk", "counts")}
    NoiseStatistics(**steps, bias=torch.rand(3, 2), bias_stderr=torch.rand(3, 2), made_for={"grid": [1.0]}).save(path)


def features(path):
    FeatureStatistics(RNG.normal(size=(6, 4)), RNG.normal(size=(6, 14)), RNG.random((6, 3)), "a", "b").save(path)


def gaussians(path):
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(28), sigma_s=np.eye(28))


def samples(path):
    write_samples(path, RNG.integers(0, 255, (4, 8, 8, 3)).astype(np.uint8), np.arange(4))


def bit_schedule(path):
    BitSchedule(8, (8, 4, 4), (3.0, 2.0, 1.0)).save(path)


def results(path):
    write_json(path, {"status": "finished", "config": {"bits": {"name": "w8a8"}}, "metrics": {"fid": 1.0}})


def weights(path):
    save_file(load_file(WEIGHTS / "digits_unet.safetensors"), path)


def read_results(path):
    """As the tables read them, which leave a damaged file out and say so in the log."""
    read_json(path)
    if collect(path.parent)["status"].tolist() == ["unreadable"]:
        raise DataError(f"left out: {path}")


FORMATS = {
    "calibration_set.npz": (calibration_set, CalibrationSet.load),
    "noise_statistics.npz": (noise_statistics, NoiseStatistics.load),
    "features.npz": (features, load_statistics),
    "gaussians.npz": (gaussians, GaussianStatistics.load),
    "samples.npz": (samples, read_samples),
    "images.npz": (samples, lambda path: open_images(path)[:].sum()),
    "bit_schedule.json": (bit_schedule, BitSchedule.load),
    "results.json": (results, read_results),
    "weights.safetensors": (weights, lambda path: ptq_exp.load_model("digits", str(path)).digest),
}


def truncated(path, rng):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * rng.uniform(0.05, 0.99))])


def flipped(path, rng):
    """One bit of the data of the largest member; headers of archives hold bytes that nobody reads."""
    content = bytearray(path.read_bytes())
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            member = max(archive.infolist(), key=lambda info: info.file_size)
        start = member.header_offset + 30 + len(member.filename) + 20 + 128
        place = start + rng.randrange(member.file_size - 128)
    elif path.suffix == ".json":
        place = content.index(b'"')
    else:
        place = rng.randrange(8)  # the length of the header
    content[place] ^= 1 << rng.randrange(7)
    path.write_bytes(bytes(content))


def emptied(path, rng):
    path.write_bytes(b"")


def web_page(path, rng):
    path.write_bytes(HTML)


def folder(path, rng):
    path.unlink()
    path.mkdir()


def pickled(path, rng):
    path.write_bytes(pickle.dumps({"arr_0": [1, 2], "state_dict": {}}))


def noise(path, rng):
    path.write_bytes(rng.randbytes(1000))


def edited(path, edit):
    """Rewrite an archive or a file of tensors with one entry changed by `edit(name, array)`; None leaves it out."""
    if path.suffix == ".npz":
        with np.load(path) as archive:
            arrays = {name: archive[name] for name in archive.files}
    else:
        arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    changed = {name: edit(name, array) for name, array in arrays.items()}
    changed = {name: array for name, array in changed.items() if array is not None}
    if path.suffix == ".npz":
        np.savez(path, **changed)
    else:
        save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in changed.items()}, path)


KEY = {"samples.npz": "arr_0", "images.npz": "arr_0", "calibration_set.npz": "x", "noise_statistics.npz": "bias",
       "features.npz": "pooled", "gaussians.npz": "sigma", "weights.safetensors": "conv_in.weight"}


def other_keys(path, rng):
    key = KEY[path.name]
    edited(path, lambda name, array: None if name == key else array)


def other_shape(path, rng):
    key, rows = KEY[path.name], path.name == "features.npz"  # whose number of columns is the extractor's
    cut = {True: lambda array: array[:-1], False: lambda array: array[0] if array.ndim == 4 else array[..., :-1]}[rows]
    edited(path, lambda name, array: cut(array) if name == key else array)


def other_type(path, rng):
    """Text in place of numbers; whole numbers where a file of tensors knows no text."""
    key, text = KEY[path.name], path.suffix == ".npz"
    edited(path, lambda name, array: array if name != key else array.astype(str) if text else array.astype(np.int32))


def not_finite(path, rng):
    key = KEY[path.name]
    edited(path, lambda name, array: array * np.nan if name == key else array)


def objects(path, rng):
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays[KEY[path.name]] = np.array([{"a": 1}, None], dtype=object)
    np.savez(path, **arrays)


def declared(path, rng, shape=(10**7, 10**7)):
    """A header that promises 400 TB over a few bytes, stored and compressed."""
    key = KEY[path.name]
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as target:
        for name, array in arrays.items():
            if name != key:
                with target.open(f"{name}.npy", "w") as member:
                    npy.write_array(member, array)
        target.writestr(f"{key}.npy", stream.getvalue() + b"\0" * 100)


def text(content):
    def write(path, rng):
        path.write_text(content)

    write.__name__ = f"text_{content[:12]}"
    return write


ANY = (truncated, flipped, emptied, web_page, folder, pickled, noise)
NPZ = (other_keys, other_shape, other_type, objects, declared)
JSON = tuple(text(content) for content in ("null", "[1]", "7", "[" * 50_000, '{"a": NaN', '{"activation": 5}'))
SCHEDULES = tuple(text(json.dumps({"weight": w, "activation": a, "timesteps": t})) for w, a, t in (
    (99, [8], [1.0]), (8, [8, 8], [1.0]), (8, [8], ["x"]), (8, [8], [float("nan")]), (8, [], []), ("8", [8], [1.0]),
    (8, "[8]*999999999", [1.0]),
))


def cases():
    """Every format with every damage that it can suffer."""
    for name in FORMATS:
        damages = list(ANY)
        if name.endswith(".npz"):
            damages += NPZ + (() if "samples" in name or "images" in name else (not_finite,))
        elif name.endswith(".safetensors"):
            damages += [other_keys, other_shape, other_type, not_finite]
        else:
            damages += (*JSON, *SCHEDULES) if name == "bit_schedule.json" else JSON[:-1]
        yield from ((name, damage) for damage in damages)


CASES = list(cases())


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("name", "damage"), CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_malformed_file_ends_in_one_line_that_names_it(name, damage, tmp_path):
    write, read = FORMATS[name]
    path = tmp_path / name
    write(path)
    read(path)  # it is right before it is damaged
    damage(path, random.Random(f"{name}{damage.__name__}"))
    with pytest.raises(PTQError) as error:
        read(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and name in message


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(3, 2, dtype=torch.int8), "1 mistyped (a.weight of int8 instead of real numbers)"),
        (torch.full((3, 2), float("nan")), "a.weight holds NaN or infinity"),
        (torch.full((3, 2), 1e300, dtype=torch.float64), "a.weight holds NaN or infinity"),
        (torch.zeros(2, 3), "1 misshaped (a.weight [2, 3] instead of [3, 2])"),
    ],
)
def test_published_checkpoints_give_numbers_that_a_network_can_have(tensor, said, tmp_path):
    part = Part(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)}), identity)
    with pytest.raises(CheckpointError) as error:
        fill([part], {"a.weight": tensor, "a.bias": torch.zeros(3)}, tmp_path / "model.pt", wanted="a line")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_nothing_in_a_file_is_run(tmp_path):
    marker = tmp_path / "ran"

    class Runs:
        def __reduce__(self):
            return open, (str(marker), "w")

    for name, (_, read) in FORMATS.items():
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Runs()))
        with pytest.raises(PTQError):
            read(path)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path, "w") as archive, archive.open(f"{KEY[name]}.npy", "w") as member:
                npy.write_array(member, np.array([Runs()], dtype=object), allow_pickle=True)
            with pytest.raises(PTQError):
                read(path)
    assert not marker.exists()


def test_a_promise_of_terabytes_is_refused_before_memory_is_taken(tmp_path):
    samples(tmp_path / "samples.npz")
    for shape in ((10**7, 10**7), (10**30,), (-1, 5), (2**62, 4)):
        declared(tmp_path / "samples.npz", random.Random(1), shape)
        with pytest.raises(DataError, match="samples.npz"):
            npz_arrays(tmp_path / "samples.npz")
        samples(tmp_path / "samples.npz")

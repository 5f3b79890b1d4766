"""Images of the quantized model are drawn once: reused by the next run like it, by no other, and never edited."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ptq_exp.correction import BitSchedule
from ptq_exp.experiment import images as images_module
from ptq_exp.experiment import keys as keys_module
from ptq_exp.experiment.images import quantized_images
from ptq_exp.experiment.keys import Keys
from ptq_exp.settings.schema import EvaluationConfig, ExperimentConfig
from ptq_exp.storage.atomic import write_npz
from ptq_exp.storage.cache import ArtifactCache
from ptq_exp.storage.plain_json import read_json

CPU = torch.device("cpu")
QUICK = ("metric=minmax", "logger=none", "save_quantized=false", "evaluation.n_samples=6")
OF_THE_RUN = ("seconds", "forecast", "cache", "command", "calibration_seconds")
"""Entries of results.json that may differ between two runs with the same results."""


def said(folder) -> str:
    return next(folder.glob("*.log")).read_text()


def results(folder) -> dict:
    found = read_json(folder / "results.json")
    return {key: value for key, value in found.items() if key not in OF_THE_RUN}


@pytest.mark.usefixtures("small_networks")
def test_the_next_run_reuses_them_and_has_the_same_results_and_files(command, tmp_path):
    first, second = (command("+experiment=ptqd_w4a8", *QUICK) for _ in range(2))
    assert "W4A8 images: computed, 6" in said(first) and "W4A8 images: reused from the cache, 6" in said(second)
    assert results(first) == results(second)
    names = {path.name for path in first.iterdir()}
    assert {path.name for path in second.iterdir()} == names
    for name in ("samples.npz", "pairs.npz", "grid.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert (first / "samples.npz").samefile(second / "samples.npz")  # one file on disk

    drawn = (first / "samples.npz").read_bytes()
    shutil.rmtree(first)
    first.mkdir()  # folders are numbered
    third = command("+experiment=ptqd_w4a8", *QUICK)
    assert "reused from the cache, 6" in said(third) and (third / "samples.npz").read_bytes() == drawn
    (third / "samples.npz").write_bytes(b"edited in place")  # nothing here does; the cache sees it
    fourth = command("+experiment=ptqd_w4a8", *QUICK)
    assert "its checksum differs" in said(fourth) and "W4A8 images: computed, 6" in said(fourth)
    assert (fourth / "samples.npz").read_bytes() == drawn and results(fourth) == results(second)
    fifth = command("+experiment=ptqd_w4a8", *QUICK, "cache=refresh")
    assert "W4A8 images: computed, 6" in said(fifth) and (fifth / "samples.npz").read_bytes() == drawn
    assert not (fifth / "samples.npz").samefile(fourth / "samples.npz")


@pytest.mark.usefixtures("small_networks")
def test_an_engine_is_compared_with_images_that_were_reused(command):
    overrides = ("metric=minmax", "logger=none", "save_quantized=false", "runtime.compare=torch",
                 "+runtime.weights=7bit", "runtime.measure=1", "runtime.measure_seconds=60")
    first, second = (command(*overrides) for _ in range(2))
    assert "images: reused from the cache" in said(second)
    one, other = (read_json(folder / "results.json")["runtime"] for folder in (first, second))
    same = ("eps_error", "psnr", "states", "images", "int8_share")
    assert {key: one[key] for key in same} == {key: other[key] for key in same} and set(one) == set(other)


def config_of(**changes) -> ExperimentConfig:
    config = ExperimentConfig()
    config.bits.weight, config.bits.activation = 4, 8
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        owner = getattr(config, part) if part else config
        if part == "quantization":
            config.quantization = replace(owner, **{key: value})
        else:
            setattr(owner, key, value)
    return config


def key_of(config: ExperimentConfig, schedule=None, corrected=False, *, device=CPU, eta=0.0, times=2, **changes):
    grid = SimpleNamespace(timesteps=torch.arange(times), alphas_cumprod=torch.ones(times), eta=eta, solver="ddim")
    known = {"digest": "d", "blocks": (), "drawing": {}} | changes
    scale = known.pop("scale", 1.0)
    return Keys(config, SimpleNamespace(**known), grid, scale, known.pop("saved", None)).quantized_images(
        schedule, corrected, device
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1}, {"evaluation__n_samples": 9}, {"evaluation__batch_size": 9}, {"model__dtype": "bfloat16"},
        {"model__channels_last": True}, {"model__compile": True}, {"bits__weight": 8}, {"bits__activation": 6},
        {"bits__softmax": 8}, {"bits__boundary": 8}, {"bits__first_last": 8}, {"bits__groups": {"*mid*": "w8a8"}},
        {"metric__name": "kl"}, {"calibration__n_samples": 9}, {"calibration__rounds": 2},
        {"quantization__temporal": "per_step"}, {"quantization__transforms": ("rotate",)},
        {"quantization__keep_fp": ("*x*",)}, {"reconstruction__granularity": "layer"}, {"runtime__name": "torch"},
        {"trainer__cuda_graph": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_draw_other_images(changes):
    assert key_of(config_of(**changes)) != key_of(config_of())


def test_what_else_decides_or_draws_them_is_in_their_key(monkeypatch, tmp_path):
    plain = key_of(config_of())
    schedule = BitSchedule(4, (8, 6), (1, 0), "list")
    write_npz(tmp_path / "statistics.npz", k=np.zeros(1))
    others = [
        key_of(config_of(), schedule), key_of(config_of(), None, True), key_of(config_of(), eta=1.0),
        key_of(config_of(), times=3), key_of(config_of(), digest="e"), key_of(config_of(), drawing={"call": 1}),
        key_of(config_of(), scale=2.0), key_of(config_of(), saved=SimpleNamespace(digest="s")),
        key_of(config_of(), saved=SimpleNamespace(digest="t")), key_of(config_of(), device=torch.device("meta")),
        key_of(config_of(correction__convention="code"), None, True),
        key_of(config_of(correction__statistics=str(tmp_path / "statistics.npz")), None, True),
        key_of(config_of(runtime__name="torch")), key_of(config_of(runtime__name="torch", runtime__weights="7bit")),
    ]
    write_npz(tmp_path / "statistics.npz", k=np.ones(1))
    others.append(key_of(config_of(correction__statistics=str(tmp_path / "statistics.npz")), None, True))
    for variable in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR"):
        with monkeypatch.context() as here:
            here.setenv(variable, "AVX2")
            others.append(key_of(config_of()))
    for patch in (("torch.__version__", "99"), ("torch.get_num_threads", lambda: 99),
                  ("torch.backends.cpu.get_cpu_capability", lambda: "another")):
        with monkeypatch.context() as here:
            here.setattr(*patch)
            others.append(key_of(config_of()))
    for name, value in (("processor", lambda: "another"), ("VERSIONS", keys_module.VERSIONS | {"quantized_images": 2})):
        with monkeypatch.context() as here:
            here.setattr(keys_module, name, value)
            others.append(key_of(config_of()))
    with monkeypatch.context() as here:
        here.setattr(keys_module, "runtime_of", lambda *_: SimpleNamespace(version="99"))
        others.append(key_of(config_of(runtime__name="torch")))
    found = [json.dumps(key, sort_keys=True) for key in [plain, *others]]
    assert len(set(found)) == len(found)
    assert key_of(config_of()) == plain


def test_the_number_of_gigabytes_that_rows_may_take_is_in_no_key():
    active = {"reconstruction__granularity": "layer"}
    assert key_of(config_of(**active)) == key_of(config_of(**active, reconstruction__cache_gb=9.0))


class Drawing:
    """Stands for what draws images: two pieces, after the first of which it may be killed."""

    def __init__(self):
        self.drawn, self.killed = [], False

    def __call__(self, run, config, denoiser, title, folder, path, **_):
        for piece in ("a", "b"):
            if not (folder / piece).exists():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / piece).touch()
                self.drawn.append(piece)
                if self.killed:
                    raise KeyboardInterrupt
        write_npz(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
        return np.zeros(0)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_killed_run_is_continued_by_another_machine_and_nothing_is_left(tmp_path, monkeypatch, mode):
    drawing = Drawing()
    monkeypatch.setattr(images_module, "_drawn", drawing)
    watched = SimpleNamespace(forgotten=0)
    watched.forget = lambda: setattr(watched, "forgotten", watched.forgotten + 1)

    def draw(machine, n):
        run = SimpleNamespace(cache=ArtifactCache(tmp_path / "cache", mode))
        quantized = SimpleNamespace(denoiser=None, noise_in_eps={})
        key = {"seed": 0, "drawn_by": {"processor": machine}}
        return quantized_images(run, EvaluationConfig(n_samples=2), key, quantized, "W4A8 images",
                                tmp_path / f"run{n}" / "samples.npz", watched)

    drawing.killed = True
    with pytest.raises(KeyboardInterrupt):
        draw("one", 0)
    drawing.killed = False
    assert draw("other", 1).shape == (2, 4, 4, 3)
    assert drawing.drawn == ["a", "b"] and watched.forgotten == 1  # the first images were not seen
    assert list((tmp_path / "cache" / "parts").iterdir()) == []
    assert draw("other", 2).shape == (2, 4, 4, 3)
    one, other = (tmp_path / f"run{n}" / "samples.npz" for n in (1, 2))
    if mode == "on":
        assert drawing.drawn == ["a", "b"] and one.samefile(other)
    else:
        assert drawing.drawn == ["a", "b", "a", "b"] and not one.samefile(other)
        assert not (tmp_path / "cache" / "quantized_images").exists()
    draw("third", 3)  # its own images
    assert drawing.drawn[-2:] == ["a", "b"] and len(drawing.drawn) > 2

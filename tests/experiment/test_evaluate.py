"""A saved quantized model, evaluated by the command or loaded in Python, is the one that was saved."""

import json
import shutil

import numpy as np
import pytest

import ptq_exp
from ptq_exp.errors import ConfigError, DataError
from ptq_exp.experiment import experiment
from ptq_exp.results.record import read_samples
from ptq_exp.storage.plain_json import read_json

QUICK = ("metric=minmax", "logger=none")
pytestmark = pytest.mark.usefixtures("small_networks")
SCHEDULED = ("bits=step_list", "bits.schedule='[8]*2+[4]'", "bits.candidates=[4,8]")


def images(folder):
    return read_samples(folder / "samples.npz")[0]


def refused(command, capsys, *overrides) -> str:
    """The one line that a refused run says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command("logger=none", *overrides)
    (line,) = [x for x in (str(stop.value) + "\n" + capsys.readouterr().err).splitlines() if "error:" in x]
    assert stop.value.code not in (None, 0)
    return line


def test_the_folder_can_be_uploaded_as_it_is(run_of, tmp_path):
    folder = run_of("+experiment=ptqd_w3a8", *SCHEDULED, "bits.weight=3")
    names = {path.name for path in (folder / "quantized").iterdir()}
    assert names == {"quantized.safetensors", "quantization.json", "README.md", "bit_schedule.json",
                     "noise_statistics.npz"}
    assert (folder / "quantization.json").read_bytes() == (folder / "quantized" / "quantization.json").read_bytes()
    shutil.copytree(folder / "quantized", tmp_path / "elsewhere")
    model = ptq_exp.load_quantized(str(tmp_path / "elsewhere"))
    assert model.report.shares == pytest.approx((1 / 3, 2 / 3))
    assert np.array_equal(ptq_exp.sample(model, 5, batch_size=5), images(folder)[:5])
    described = json.loads((folder / "quantized" / "quantization.json").read_text())
    assert described["activation_widths"] == [4, 8] and described["evaluations"] > 0
    size = described["file"]
    assert size["bytes"] == (folder / "quantized" / size["name"]).stat().st_size
    assert size["bytes"] - size["header_bytes"] == pytest.approx(size["theoretical_bytes"], rel=0.01)
    assert "of the theoretical" in next(folder.glob("*.log")).read_text()


def test_the_card_says_what_how_good_how_made_and_how_to_load(run_of):
    folder = run_of("+experiment=ptqd_w3a8", *SCHEDULED, "bits.weight=3")
    card = (folder / "quantized" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: ptq-exp\ntags:\n- diffusion\n")
    metrics = read_json(folder / "results.json")["metrics"]
    expected = [
        "| 3 / 4/8, chosen for each sampling step |", f"| FID | {metrics['fid']:.4g} |", "100.00% / 100.00%",
        "python -m ptq_exp", "+experiment=ptqd_w3a8", "ptq_exp.load_quantized(", "`bit_schedule.json`",
    ]
    assert [text for text in expected if text not in card] == []
    assert "{" not in card and "None" not in card


def test_sampler_seed_and_evaluation_may_differ(run_of, command):
    folder = run_of("bits=w8a8")
    again = command("logger=none", "+experiment=evaluate", f"quantized={folder}", "sampler.steps=4", "seed=5",
                    "sampler.eta=1", "evaluation.n_samples=5")
    results = read_json(again / "results.json")
    assert len(results["eps_error_per_step"]) == 4 and len(images(again)) == 5
    assert results["config"]["seed"] == 5 and results["config"]["calibration"]["name"] == "ndtc"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["bits=w6a6"], "bits.name=w6a6 contradicts quantized="),
        (["bits.weight=4"], "bits.weight=4 contradicts quantized="),
        (["quantization=layers"], "quantization.name=layers contradicts"),
        (["calibration.n_samples=7"], "calibration.n_samples=7 contradicts"),
        (["metric=kl"], "metric.name=kl contradicts"),
        (["correction=ptqd"], "correction.name=ptqd contradicts"),
        (["model.dtype=bfloat16"], "model.dtype=bfloat16 contradicts"),
        (["model=digits_ldm"], "model.name=digits_ldm contradicts"),
    ],
)
def test_what_contradicts_the_saved_model_is_refused(given, said, run_of, command, capsys):
    folder = run_of("bits=w8a8")
    assert said in refused(command, capsys, "+experiment=evaluate", f"quantized={folder}", *given)


def test_what_repeats_the_saved_settings_is_let_pass(run_of, command):
    folder = run_of("bits=w8a8")
    command("logger=none", "+experiment=evaluate", f"quantized={folder}", "bits=w8a8", "calibration=ndtc",
            "model=digits", "evaluation.n_samples=5")


def test_schedules_and_statistics_demand_their_grid(run_of, command, capsys):
    folder = run_of("+experiment=ptqd_w4a8")
    evaluate = ("+experiment=evaluate", f"quantized={folder}")
    assert "made for another timesteps" in refused(command, capsys, *evaluate, "sampler.steps=4")
    assert "made for another eta" in refused(command, capsys, *evaluate, "sampler.eta=0")
    folder = run_of("+experiment=ptqd_w3a8", *SCHEDULED, "bits.weight=3")
    said = refused(command, capsys, "+experiment=evaluate", f"quantized={folder}", "sampler.steps=4")
    assert "bits.schedule was made for 3 steps" in said


def test_paths_without_a_saved_model_are_one_line(run_of, command, capsys, tmp_path):
    assert "needs quantized=PATH" in refused(command, capsys, "+experiment=evaluate")
    assert "use +experiment=evaluate" in refused(command, capsys, "quantized=somewhere")
    assert "holds no saved model" in refused(command, capsys, "+experiment=evaluate", f"quantized={tmp_path}/no")
    folder = command(*QUICK, "bits=w8a8", "save_quantized=false")
    assert json.loads((folder / "quantization.json").read_text())["layers"] and not (folder / "quantized").exists()
    assert "holds no saved model" in refused(command, capsys, "+experiment=evaluate", f"quantized={folder}")


def test_a_model_that_is_replaced_before_it_is_loaded_is_noticed(run_of, command, capsys, tmp_path, monkeypatch):
    """Else its images would be kept in the cache as those of the model that was opened."""
    folder, other, open_saved = tmp_path / "saved", run_of("bits=w8a8", "seed=3"), experiment.open_saved
    shutil.copytree(run_of("bits=w8a8") / "quantized", folder)

    def opened(config):
        found = open_saved(config)
        shutil.copytree(other / "quantized", folder, dirs_exist_ok=True)
        return found

    monkeypatch.setattr(experiment, "open_saved", opened)
    said = refused(command, capsys, "+experiment=evaluate", f"quantized={folder}")
    assert f"quantized={folder}: {folder} changed while it was read: load it again when nothing writes to it" in said


def test_other_sampler_settings_take_the_bare_network(run_of):
    quantized = ptq_exp.load_quantized(run_of("bits=w8a8"))
    with pytest.raises(ConfigError, match="steps: .*denoiser=quantized.network"):
        ptq_exp.sample(quantized, 2, steps=2)
    assert ptq_exp.sample(quantized.model, 2, steps=2, denoiser=quantized.network).shape == (2, 16, 16, 1)


@pytest.mark.parametrize("name", ["bit_schedule.json", "noise_statistics.npz"])
@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes() + b" ")])
def test_damaged_files_beside_are_reported(name, damage, run_of, tmp_path):
    shutil.copytree(run_of("+experiment=ptqd_w3a8", *SCHEDULED, "bits.weight=3") / "quantized", tmp_path / "copy")
    damage(tmp_path / "copy" / name)
    with pytest.raises(DataError, match=name):
        ptq_exp.load_quantized(tmp_path / "copy")


@pytest.mark.parametrize(
    ("added", "named"),
    [({"imports": ["antigravity"]}, "imports"),
     ({"evaluation": {"extractor": {"_target_": "os.system"}}}, "evaluation"),
     ({"model": {"name": "digits", "build": {"_target_": "os.system"}}}, "model.build")],
)
def test_nothing_in_a_saved_model_names_code_to_run(added, named, run_of, monkeypatch):
    """Whoever writes such a file can also write the right checksums."""
    from ptq_exp.deploy import artifact

    folder = run_of("bits=w8a8") / "quantized"
    whole = artifact.read_description(folder)
    edited = whole | {"settings": whole["settings"] | added}
    monkeypatch.setattr(artifact, "read_description", lambda folder: edited)
    with pytest.raises(DataError, match=f"damaged: {named} is no setting of a saved model"):
        artifact.Artifact.open(folder)

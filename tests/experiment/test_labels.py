"""`calibration.labels` in an experiment: its artefacts are apart from those of paired labels, which keep their keys."""

import pytest
from hydra import compose, initialize_config_dir

from ptq_exp.experiment.run import Setup
from ptq_exp.experiment.stages import make_calibration_set
from ptq_exp.settings.compose import config_folder, validated


@pytest.fixture
def setup_of(cache):
    def make(*overrides):
        small = ["sampler.steps=4", "calibration.n_samples=8", "trainer.accelerator=cpu", "trainer.progress_bar=false"]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = compose("config", overrides=[*small, f"cache_dir={cache}", "calibration=uniform", *overrides])
        return Setup.of(validated(composed))

    return make


def test_paired_artefacts_keep_the_keys_that_they_had_before_there_were_labels(setup_of):
    spec = setup_of().calibration_spec(1)["calibration"]
    assert spec == {
        "name": "uniform", "source": "denoise", "distribution": {"_target_": "ptq_exp.calibration.Uniform"},
        "n_samples": 8, "batch_size": 64, "rounds": 1,
    }  # fmt: skip


def test_reversed_labels_have_their_own_artefacts_and_show_the_number_of_the_pass(setup_of):
    paired, mismatched = setup_of(), setup_of("calibration.labels=reversed")
    assert mismatched.calibration_spec(1)["calibration"]["labels"] == "reversed"
    assert paired.ranges_spec() != mismatched.ranges_spec()
    before, after = make_calibration_set(paired), make_calibration_set(mismatched)
    assert sorted(before.t.tolist()) == sorted(2 * paired.grid.timesteps.tolist())
    assert sorted(after.t.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    # one draw of time indices: pass j of the loop, and the step that has j steps behind it
    assert after.t.tolist() == (3 - before.step).tolist()


def test_the_run_says_that_its_labels_are_reversed(setup_of):
    assert setup_of("calibration.labels=reversed", "bits=w4a8").config.name == "uniform_reversed_w4a8"

"""`calibration.labels` in an experiment: its artefacts are apart from those of paired labels."""

import pytest
from hydra import compose, initialize_config_dir

from ptq_exp.experiment.keys import Keys
from ptq_exp.experiment.run import Run
from ptq_exp.experiment.stages import make_calibration_set
from ptq_exp.settings.compose import config_folder, validated


@pytest.fixture
def setup_of(cache):
    def make(*overrides):
        small = ["sampler.steps=4", "calibration.n_samples=8", "trainer.accelerator=cpu", "trainer.progress_bar=false"]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = compose("config", overrides=[*small, f"cache_dir={cache}", "calibration=uniform", *overrides])
        config = validated(composed)
        run = Run.of(config)
        return config, run, Keys(config, run.model, run.grid, run.guidance_scale)

    return make


def test_reversed_labels_have_their_own_artefacts_and_show_the_number_of_the_pass(setup_of):
    paired, mismatched = setup_of(), setup_of("calibration.labels=reversed")
    labels = [keys.calibration(1)["calibration"].pop("labels") for _, _, keys in (paired, mismatched)]
    assert labels == ["paired", "reversed"]
    assert paired[2].ranges() != mismatched[2].ranges()
    before, after = (
        make_calibration_set(run, config.calibration, keys.calibration(1)) for config, run, keys in (paired, mismatched)
    )
    assert sorted(before.t.tolist()) == sorted(2 * paired[1].grid.timesteps.tolist())
    assert sorted(after.t.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    # one draw of time indices: pass j of the loop, and the step that has j steps behind it
    assert after.t.tolist() == (3 - before.step).tolist()


def test_the_run_says_that_its_labels_are_reversed(setup_of):
    assert setup_of("calibration.labels=reversed", "bits=w4a8")[0].name == "uniform_reversed_w4a8"

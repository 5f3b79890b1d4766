"""Commands of README and docs, run as they stand; those of reproduce.md and results/ in files of their own.

Launchers have tests of their own, and so have the commands of clusters.md.
Of a sweep those jobs run that have a method (an experiment, a metric, ...) which no command before has had, and at
least one. Published models are replaced by the embedded one of their kind, for want of their weights, and each
network by one of fewer layers of the same kinds. Experiment files as they stand, on the default model, run in
test_experiment_files; number formats in tests of their own. A job that sets nothing which no other job or file sets
on the same model is not run: it is planned up to the quantized network's report, which finds all that does not fit
together.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from guide_runs import TINY, assert_recorded, chosen_by, run_or_plan, runs
from small_pipelines import PROMPTS, SMALL

ALL = runs()
ELSEWHERE = ("reproduce", "number_formats", "transforms", "clusters")
RUNS = chosen_by(lambda page: page not in ELSEWHERE and not page.startswith("results/"))
pytestmark, COMMON_CACHE = pytest.mark.usefixtures("small_networks"), True


@pytest.fixture(scope="module")
def files(guide_folder):
    """What the guide's commands for one's own model and statistics read."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )
    DDPMPipeline(unet, DDIMScheduler(100)).save_pretrained(guide_folder / "my_folder")
    SMALL["sd15"].build().save_pretrained(guide_folder / "FOLDER")
    (guide_folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return guide_folder


def test_there_are_as_many_as_the_guide_has():
    assert len(ALL) > 90 and len(RUNS) > 25
    assert {"+experiment=ptqd_mp", "+experiment=ndtc_w8a8"} <= {word for _, job in ALL for word in job}


@pytest.mark.parametrize("job", RUNS)
def test_it_ends_well_with_the_default_logger(job, command, files, monkeypatch):
    monkeypatch.chdir(files)
    if "my_weights.pt" in " ".join(job) or "one_slope.npz" in " ".join(job):
        pytest.skip("run with its files in test_guide_python")
    run_or_plan(job, command)


def test_a_saved_model_is_evaluated_with_the_default_logger(command, files, monkeypatch):
    monkeypatch.chdir(files)
    first = command("+experiment=ndtc_w4a8", *TINY)
    folder = command("+experiment=evaluate", f"quantized={first}", "seed=1", *TINY)
    assert_recorded(folder)

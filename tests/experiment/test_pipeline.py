"""Experiments on a pipeline: what its network is called with is recorded, and everything else follows from that."""

import numpy as np
import pytest
import torch
from small_pipelines import PROMPTS, SMALL

from ptq_exp.lightning import RecordingModule
from ptq_exp.pipelines import PipelineModel
from ptq_exp.storage.plain_json import read_json

SMALLEST = (
    "model=pipeline", "sampler.steps=3", "model.call={height: 16, width: 16}", "evaluation.n_samples=2",
    "evaluation.batch_size=2", "evaluation.eps_error_samples=2", "calibration.n_samples=6", "metric=minmax",
    "logger=none",
)

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    SMALL["sd15"].build().save_pretrained(path / "sd15")
    (path / "prompts.txt").write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def run(command, folder):
    def run(*overrides):
        where = (f"model.checkpoint={folder / 'sd15'}", f"model.prompts={folder / 'prompts.txt'}")
        return read_json(command(*SMALLEST, *where, *overrides) / "results.json")

    return run


def test_ranges_of_each_step_and_a_mean_correction(run):
    values = run("+experiment=ptqd_w4a8", "bits=w8a8", "sampler.eta=0", "quantization.temporal=per_step",
                 "save_quantized=false")
    assert values["status"] == "finished" and values["quantization"]["coverage_conv_linear"] == 1
    assert len(values["eps_error_per_step"]) == 3 and values["metrics"]["psnr"] > 25
    before, after = values["metrics"]["eps_error_uncorrected"], values["metrics"]["eps_error"]
    assert 0 < before < 0.2 and after != before and abs(after / before - 1) < 0.1


@pytest.mark.parametrize("method", [("+experiment=brecq_w4a8", "reconstruction.iterations=3"), ("+experiment=gptq",)])
def test_reconstruction_block_by_block(run, method):
    values = run(*method, "save_quantized=false")
    assert values["status"] == "finished" and values["metrics"]["psnr"] > 15


def test_dynamic_ranges_record_nothing(run):
    values = run("+experiment=dynamic", "save_quantized=false")
    assert values["status"] == "finished" and values["metrics"]["psnr"] > 25
    assert values["evaluations"] == 0 and values["quantization"]["dynamic_scales"] > 0


@pytest.mark.parametrize(("override", "said"), [
    ("calibration=raw", "calibration.source=raw: of a pipeline the calls"),
    ("calibration.labels=reversed", "calibration.labels=reversed: of a pipeline"),
    ("sampler=euler", "sampler.solver=euler: of a pipeline"),
    ("bits=step_snr", "bits.schedule=snr: a pipeline's scheduler says no noise levels"),
    ("+model.call.depth=3", "takes no depth"),
])
def test_what_a_pipeline_cannot_give_is_refused(run, override, said, capsys):
    with pytest.raises(SystemExit) as error:
        run(override)
    assert said in capsys.readouterr().err + str(error.value)


def test_recorded_rows_are_those_of_their_image_and_step():
    small = SMALL["sd15"]
    model = PipelineModel(small.build(), PROMPTS, steps=3, call=small.call)
    grid = model.time_grid()
    records = []
    model.run(model.denoiser, grid, [0, 1], 5, stream=1, on_step=records.append)
    module = RecordingModule(model, grid, seed=5)
    steps = torch.tensor([[0, 2], [1, 0]])
    found = module.predict_step((torch.tensor([0, 1]), steps))
    copies = model.copies
    for image, wanted in enumerate(steps.tolist()):
        for place, step in enumerate(wanted):
            for copy in range(copies):
                row = found["x"][image, place * copies + copy]
                assert np.array_equal(row, records[step].call.x[copy * 2 + image].numpy())
                assert found["t"][image, place * copies + copy] == grid.timesteps[step]


def test_rows_of_one_image_stand_behind_each_other():
    small = SMALL["sd15"]
    model = PipelineModel(small.build(), PROMPTS, steps=2, call=small.call)
    rows = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 3, 3)
    folded = model.by_image(rows, 2)
    assert folded.shape == (2, 2, 6, 3) and folded[1, 0, :, 0].tolist() == [1, 1, 1, 3, 3, 3]


def test_a_saved_pipeline_has_a_card_and_is_evaluated_as_it_was_saved(command, folder):
    where = (*SMALLEST, f"model.checkpoint={folder / 'sd15'}", f"model.prompts={folder / 'prompts.txt'}")
    made = command(*where, "+experiment=uniform_w8a8", "evaluation.pairs=[ssim]")
    card = (made / "quantized" / "README.md").read_text()
    values = read_json(made / "results.json")["metrics"]
    assert [text for text in (
        "library_name: diffusers", f"| PSNR to full precision, same seeds (dB) | {values['psnr']:.4g}",
        "ptq_exp.load_quantized(", "DiffusionPipeline.from_pretrained(",
    ) if text not in card] == []
    again = command(*where, "+experiment=evaluate", "evaluation.pairs=[ssim]", f"quantized={made}")
    drawn = [np.load(path / "samples.npz")["arr_0"] for path in (made, again)]
    assert np.array_equal(*drawn)
    found = read_json(again / "results.json")["metrics"]
    assert {name: found[name] for name in ("psnr", "ssim")} == {name: values[name] for name in ("psnr", "ssim")}

"""Networks that are quantized block by block: the numbers are those of the path in memory, bit for bit."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from small_networks import use_few_candidate_ranges
from small_pipelines import SMALL

import ptq_exp
from ptq_exp.errors import ConfigError
from ptq_exp.experiment import blockwise
from ptq_exp.experiment.quantize import overrides_of, quantize_with
from ptq_exp.pipelines import RecordedModel
from ptq_exp.quantization.offload import folder_of
from ptq_exp.reconstruction import Reconstruction
from ptq_exp.storage.plain_json import read_json

TINY = 1e-7  # GB: less than any network has
QUICK = ("model=pipeline", "model.name=dit", "logger=none", "metric=minmax", "calibration.batch_size=2")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=4, patch_size=2,
        num_embeds_ada_norm=10,
    ).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def calls(network):
    draw = torch.Generator().manual_seed(1)
    return [{
        "hidden_states": torch.randn(rows, 4, 4, 4, generator=draw).to(network.dtype),
        "timestep": torch.randint(0, 1000, (rows,), generator=draw), "class_labels": torch.arange(rows),
    } for rows in (3, 2)]


def made(network, calls, *overrides, limit=None, folder=None):
    settings = overrides_of({"trainer.max_memory_gb": limit})
    return quantize_with(
        RecordedModel(network, calls, "dit"), [*QUICK, *overrides, *settings], progress=False, folder=folder
    )


def assert_same(one, other):
    a, b = one.network.state_dict(), other.network.state_dict()
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    assert one.report == other.report


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch):
    use_few_candidate_ranges(monkeypatch)


METHODS = {
    "ranges": ("bits=w8a8", "metric=mse"),
    "ranges of bins": ("bits=w8a8", "quantization.temporal=binned", "quantization.temporal_bins=2"),
    "transforms and gptq": (
        "bits=w4a8", "reconstruction=gptq",
        "quantization.transforms=[{name: smooth, online: true}, {name: low_rank, rank: 2, iterations: 2}]",
    ),
    "brecq": ("bits=w4a8", "reconstruction=brecq", "reconstruction.iterations=3"),
    "gptq of layers": ("bits=w4a16", "reconstruction=gptq", "reconstruction.granularity=layer"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_the_path_in_memory(network, calls, method, tmp_path):
    inside = made(network, calls, *METHODS[method])
    blockwise = made(network, calls, *METHODS[method], limit=TINY)
    assert folder_of(inside.network) is None and folder_of(blockwise.network) is not None
    assert_same(inside, blockwise)
    described = [quantized.save(tmp_path / name) for name, quantized in (("a", inside), ("b", blockwise))]
    assert described[0]["tensors"] == described[1]["tensors"]
    again = ptq_exp.load_quantized(tmp_path / "b", network=network)
    in_files = ptq_exp.load_quantized(tmp_path / "b", network=network, max_memory_gb=TINY, folder=tmp_path)
    assert folder_of(again.network) is None and folder_of(in_files.network) == tmp_path
    for quantized in (again, in_files):
        assert_same(inside, quantized)


class Killed(BaseException):
    """Stands for a signal."""


def test_a_killed_reconstruction_goes_on_with_the_next_block(network, calls, tmp_path, monkeypatch):
    method, begun = METHODS["transforms and gptq"], []
    begin = Reconstruction.begin

    def counted(self):
        begun.append(self.block.name)
        if kill_at is not None and len(begun) == kill_at:
            raise Killed
        begin(self)

    monkeypatch.setattr(Reconstruction, "begin", counted)
    kill_at = None
    whole, all_blocks = made(network, calls, *method, limit=TINY), [*begun]
    begun.clear()
    kill_at = 3  # after a layer and a block of the network
    with pytest.raises(Killed):
        made(network, calls, *method, limit=TINY, folder=tmp_path)
    kill_at = None
    begun.clear()
    monkeypatch.setattr(blockwise, "calibrate_weights_", None)  # ranges are there already
    continued = made(network, calls, *method, limit=TINY, folder=tmp_path)
    assert begun == all_blocks[2:]
    assert_same(whole, continued)


def test_killed_ranges_go_on_with_the_next_block(network, calls, tmp_path, monkeypatch):
    search, searched = blockwise.calibrate_weights_, []

    def counted(part, metric):
        searched.append(type(part).__name__)
        if len(searched) == kill_at:
            raise Killed
        search(part, metric)

    monkeypatch.setattr(blockwise, "calibrate_weights_", counted)
    kill_at = 3  # layers outside of blocks, a block
    with pytest.raises(Killed):
        made(network, calls, "bits=w8a8", limit=TINY, folder=tmp_path)
    searched.clear()
    kill_at = None
    continued = made(network, calls, "bits=w8a8", limit=TINY, folder=tmp_path)
    assert searched == ["PipelineNetwork", "BasicTransformerBlock"]
    assert_same(made(network, calls, "bits=w8a8"), continued)


def test_other_calls_are_not_taken_for_those_of_a_killed_run(network, calls, tmp_path):
    made(network, calls, "bits=w8a8", limit=TINY, folder=tmp_path)
    others = [call | {"timestep": call["timestep"] // 2} for call in calls]
    again = made(network, others, "bits=w8a8", limit=TINY, folder=tmp_path)
    assert_same(made(network, others, "bits=w8a8"), again)


def test_networks_that_fit_stay_in_memory(network, calls):
    assert folder_of(made(network, calls, "bits=w8a8", limit=1).network) is None


def test_what_needs_all_blocks_at_once_is_refused(network, calls):
    with pytest.raises(ConfigError, match="quantization.time_layers=all_steps: .* trainer.max_memory_gb"):
        made(network, calls, "bits=w8a8", "quantization.time_layers=all_steps", limit=TINY)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ConfigError, match="trainer.max_memory_gb: no module of plain"):
        quantize_with(RecordedModel(plain, [(torch.ones(2, 4),)], "plain"),
                      [*QUICK, "bits=w8a8", f"trainer.max_memory_gb={TINY}"], progress=False)
    with pytest.raises(ConfigError, match="max_memory_gb=1: weights in files are for device=cpu"):
        ptq_exp.load_quantized("nowhere", device="cuda", max_memory_gb=1)


def test_the_command_gives_the_same_results_on_a_pipeline_in_a_folder(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dit")
    SMALL["dit"].build().save_pretrained(folder)
    found = []
    for limit in ("null", TINY):
        run = command(
            "+experiment=gptq", "model=pipeline", f"model.checkpoint={folder}", "sampler.steps=2", "metric=minmax",
            "evaluation.n_samples=2", "evaluation.batch_size=2", "evaluation.eps_error_samples=2",
            "calibration.n_samples=4", "calibration.batch_size=2", "logger=none", f"trainer.max_memory_gb={limit}",
            f"cache_dir={folder}/cache_{limit}",
        )
        values = read_json(run / "results.json")
        layout = json.loads((run / "quantized" / "transformer" / "quantization.json").read_text())["tensors"]
        found.append((values["metrics"], values["quantization"], layout))
        quantized = ptq_exp.load_quantized(run, max_memory_gb=TINY)
        assert folder_of(quantized.network) is not None
    assert found[0] == found[1]

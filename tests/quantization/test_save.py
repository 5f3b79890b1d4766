"""A quantized network comes back from its files bit for bit, at the theoretical size; damaged files are refused."""

import copy
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import ptq_exp
from ptq_exp.errors import DataError, PTQError, QuantizationError
from ptq_exp.quantization import (
    PerChannel,
    PerTensor,
    Policy,
    QRange,
    QuantSpec,
    Rule,
    Segments,
    TensorSpec,
    Widths,
    calibrate_,
    calibrate_weights_,
    load_quantized_,
    quantize_,
    quantizers,
    save_quantized,
    select_row,
)
from ptq_exp.quantization import save as save_module
from ptq_exp.quantization.save import _description_hash, read_description, rule_from_dict, rule_to_dict
from ptq_exp.storage.atomic import file_digest


def quantized(network, rules, inputs, example):
    """Quantize and calibrate `network` in place; returns its report, shares of candidates included."""
    report = quantize_(network, rules, example)
    calibrate_(network, "minmax", [inputs])
    return report.mixed([1 / report.candidates] * report.candidates) if report.candidates > 1 else report


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    same = all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    return first.keys() == second.keys() and same


def scrambled(network):
    """A copy with other weights: everything must come from the files."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


@pytest.mark.parametrize(
    ("name", "weight", "activation"),
    [("digits", 8, 8), ("digits", 3, 8), ("digits_ldm", 4, 8), ("digits_ldm", 4, (4, 8))],
)
def test_networks_come_back_bit_for_bit_at_the_theoretical_size(name, weight, activation, tmp_path):
    model = ptq_exp.load_model(name)
    x = torch.randn(4, *model.sample_shape, generator=torch.Generator().manual_seed(1))
    inputs = (x, torch.tensor([1.0, 300.0, 600.0, 999.0]))
    inputs += () if model.n_classes is None else (torch.tensor([0, 3, 5, 10]),)
    network, rules = model.copy_denoiser(), Policy().rules(Widths(weight, activation))
    report = quantized(network, rules, inputs, model.example_inputs())
    description = save_quantized(tmp_path, network, rules, report, {"own": [1, "a"]})
    found = scrambled(model.denoiser)
    account = load_quantized_(found, tmp_path, model.example_inputs())
    assert same_state(network, found) and account.rows == report.rows
    for row in range(report.candidates):
        for one in (network, found) if report.candidates > 1 else ():
            select_row(one, row)
        with torch.no_grad():
            assert torch.equal(network(*inputs), found(*inputs))
    size = description["file"]
    assert size["theoretical_bytes"] == report.totals["weight_bytes"]
    assert size["bytes"] - size["header_bytes"] == pytest.approx(size["theoretical_bytes"], rel=0.01)
    with safe_open(tmp_path / size["name"], "pt") as file:
        names = list(file.keys())
    assert size["header_bytes"] < 150 * len(names)
    assert set(names) <= set(network.state_dict()) and set(model.denoiser.state_dict()) <= set(names)
    assert json.loads((tmp_path / "quantization.json").read_text())["own"] == [1, "a"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [
    {}, {"weight_symmetric": True, "activation_symmetric": True}, {"weight_granularity": "tensor"},
    {"weight_symmetric": True, "weight_granularity": "tensor"}, {"weight_granularity": "group", "group_size": 3},
])
def test_all_number_types_symmetries_and_granularities(dtype, settings, unet, batch, example, tmp_path):
    unet, inputs = unet.to(dtype), [(x.to(dtype), t) for x, t in (batch, example)]
    fresh, rules = scrambled(unet), Policy(**settings).rules(Widths(5, 8, boundary=12))
    report = quantized(unet, rules, *inputs)
    save_quantized(tmp_path, unet, rules, report, {})
    load_quantized_(fresh, tmp_path, inputs[1])
    assert same_state(unet, fresh)
    with torch.no_grad():
        assert torch.equal(unet(*inputs[0]).sample, fresh(*inputs[0]).sample)


def test_segments_kept_layers_and_odd_ranges(unet, batch, example, tmp_path):
    layer = TensorSpec(3, granularity=Segments((6, 10), PerChannel()))
    rules = [
        Rule("conv_out", None, "kept"),
        Rule("down_blocks.1.resnets.0.conv2", QuantSpec(layer, TensorSpec(4, granularity=Segments((12, 4))))),
        Rule("*", QuantSpec(TensorSpec(8, granularity=PerChannel()), TensorSpec(8, True, metric="lp", headroom=1.5))),
    ]
    fresh = scrambled(unet)
    report = quantized(unet, rules, batch, example)
    odd = next(quantizer for name, quantizer in quantizers(unet) if name.endswith("conv_in.input_quantizer"))
    odd.set_range(QRange(*torch.tensor([0.3, -1.5, -7.0, 9.0])))  # a zero point and limits of no rule
    wide = next(q for name, q in quantizers(unet) if name.endswith("conv1.input_quantizer"))
    wide.set_range(QRange(*torch.tensor([0.3, 40000.0, -7.0, 90000.0])))
    save_quantized(tmp_path, unet, rules, report, {})
    load_quantized_(fresh, tmp_path, example)
    assert same_state(unet, fresh)
    assert [rule_from_dict(json.loads(json.dumps(rule_to_dict(rule)))) for rule in rules] == rules


def test_what_is_not_on_the_grid_or_not_calibrated_is_refused(unet, batch, example, tmp_path):
    rules = Policy().rules(Widths(4, 8))
    report = quantize_(unet, rules, example)
    with pytest.raises(QuantizationError, match="conv_in.*not frozen"):
        save_quantized(tmp_path, unet, rules, report, {})
    calibrate_weights_(unet, "minmax")
    with pytest.raises(QuantizationError, match="conv_in.input_quantizer: not calibrated"):
        save_quantized(tmp_path, unet, rules, report, {})
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(QuantizationError, match="conv_in.weight_quantizer: 1 of 72 weights are not on the grid"):
        save_quantized(tmp_path, unet, rules, report, {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(unet, batch, example, tmp_path):
    """(folder of a saved network, a network to load it into, its example)."""
    fresh, rules = scrambled(unet), Policy().rules(Widths(4, 8))
    report = quantized(unet, rules, batch, example)
    save_quantized(tmp_path, unet, rules, report, {})
    return tmp_path, fresh, example


def refused(saved) -> str:
    """What loading says: one line, the files named."""
    folder, network, example = saved
    with pytest.raises(PTQError) as refusal:
        load_quantized_(network, folder, example)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 700 and str(folder) in message
    return message


@pytest.fixture
def another(saved, unet, batch, example, tmp_path_factory):
    """The folder of another network that would fit."""
    folder, other, rules = tmp_path_factory.mktemp("another"), scrambled(saved[1]), Policy().rules(Widths(4, 8))
    save_quantized(folder, other, rules, quantized(other, rules, batch, example), {})
    return folder


def replace(folder, another, names=("quantized.safetensors", "quantization.json")):
    """Put files of another folder in the place of those of the same names, as whoever writes safely does."""
    for name in names:
        shutil.copy(another / name, folder / "new")
        (folder / "new").replace(folder / name)


def test_a_folder_that_was_replaced_since_it_was_opened_is_noticed(saved, another):
    folder, network, example = saved
    opened = read_description(folder)["file"]["sha256"]
    load_quantized_(copy.deepcopy(network), folder, example, opened)
    replace(folder, another, ["quantized.safetensors"])  # half of it
    assert "is not the file that quantization.json describes" in refused(saved)
    for network in (copy.deepcopy(saved[1]), saved[1]):
        with pytest.raises(DataError, match=rf"{folder} changed while it was read: load it again"):
            load_quantized_(network, folder, example, opened)
        replace(folder, another)
    load_quantized_(copy.deepcopy(network), folder, example)


@pytest.mark.parametrize("when", ["before they are mapped", "while they are read"])
def test_a_folder_that_is_replaced_while_its_tensors_are_read_is_noticed(saved, another, monkeypatch, when):
    load = save_module.load_file

    def replaced(path):
        if when == "while they are read":
            found = load(path)
        replace(saved[0], another)
        return load(path) if when == "before they are mapped" else found

    monkeypatch.setattr(save_module, "load_file", replaced)
    assert "changed while it was read" in refused(saved)


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.3, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("name", ["quantized.safetensors", "quantization.json"])
def test_truncated_files(share, name, saved):
    content = (saved[0] / name).read_bytes()
    (saved[0] / name).write_bytes(content[: int(share * len(content))])
    assert name in refused(saved)


def test_one_flipped_bit(saved):
    path = saved[0] / "quantized.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is not the file that quantization.json describes, but truncated, changed or another one" in refused(saved)


def test_missing_and_foreign_files(saved):
    folder = saved[0]
    save_file({"conv_in.weight": torch.zeros(3)}, folder / "quantized.safetensors")
    assert "not the file that quantization.json describes" in refused(saved)
    (folder / "quantized.safetensors").unlink()
    assert "cannot read" in refused(saved) and "quantized.safetensors" in refused(saved)
    for text in ("[1, 2]", "{}", '{"layers": []}', "null", "[" * 100_000):
        (folder / "quantization.json").write_text(text)
        refused(saved)
    (folder / "quantization.json").unlink()
    assert "quantization.json is no readable description" in refused(saved)


@pytest.mark.parametrize("edit", [
    lambda d: d["rules"][0].update(pattern="*conv_out"), lambda d: d["totals"].update(params=1),
    lambda d: d.update(more=1), lambda d: d.pop("tensors"), lambda d: d["tensors"]["ranges"].clear(),
])
def test_edited_descriptions(edit, saved):
    path = saved[0] / "quantization.json"
    description = json.loads(path.read_text())
    edit(description)
    path.write_text(json.dumps(description))
    assert "quantization.json was edited, or belongs to another quantized.safetensors" in refused(saved)


def test_other_versions_say_what_to_do(saved):
    path = saved[0] / "quantization.json"
    for version in (4, "1", None, [1], True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
        assert "of the format, this code reads 1, 2, 3: install the ptq-exp that wrote it" in refused(saved)


def forged(folder, edit):
    """Edit description and tensors, then make their hashes agree again."""
    path = folder / "quantization.json"
    description = json.loads(path.read_text())
    with safe_open(folder / "quantized.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = file.metadata()
    edit(description, tensors)
    metadata["description_sha256"] = _description_hash(description)
    save_file(tensors, folder / "quantized.safetensors", metadata)
    description["file"]["sha256"] = file_digest(folder / "quantized.safetensors")
    path.write_text(json.dumps(description))


def layout(kind, name, **entry):
    return lambda d, t: d["tensors"][kind][name].update(entry)


def rule(index, role, **entry):
    return lambda d, t: d["rules"][index]["spec"][role].update(entry)


def number(tensor, value):
    """Set the first number of a tensor."""
    return lambda d, t: t[tensor].view(-1)[:1].fill_(value)


IN, FOUR = "conv_in.input_quantizer.scale", "mid_block.resnets.0.conv1.weight_quantizer.zero_point"


@pytest.mark.parametrize(("edit", "said"), [
    (lambda d, t: t.pop("conv_in.weight"), "the tensor conv_in.weight is missing"),
    (lambda d, t: t.pop(IN), "the tensor conv_in.input_quantizer.scale is missing"),
    (lambda d, t: t.pop("conv_in.bias"), "the tensor conv_in.bias is missing"),
    (lambda d, t: t.pop(FOUR), "conv1.weight_quantizer.zero_point is missing"),
    (lambda d, t: t.update(more=torch.zeros(2)), "the tensor more is more than the model has"),
    (lambda d, t: t.update({IN: t[IN].view(-1)}), r"is float32 \[1\], expected float32 \[1, 1\]"),
    (lambda d, t: t.update({IN: t[IN].half()}), "is float16 .*, expected float32"),
    (lambda d, t: t.update({"conv_in.bias": torch.zeros(9)}), r"conv_in.bias is float32 \[9\], expected float32 \[8\]"),
    (lambda d, t: t.update({"conv_in.weight": t["mid_block.resnets.0.conv1.weight"].clone()}), "72 integers of 8 bits"),
    (lambda d, t: t.update({"conv_in.weight": t["conv_in.weight"][:-1]}), "72 integers of 8 bits are uint8 .72."),
    (layout("weights", "conv_in.weight", bits=3), "conv_in.weight has bits 3, the model 8"),
    (layout("weights", "conv_in.weight", shape=[1, 8, 3, 3]), "conv_in.weight has shape .1, 8, 3, 3., the model"),
    (lambda d, t: t.update({"conv_in.bias": t["conv_in.bias"].half()}), "conv_in.bias is float16 .* expected float32"),
    (layout("ranges", "conv_in.input_quantizer", levels="odd"), "has the levels 'odd', expected one of unsigned"),
    (layout("ranges", "conv_in.input_quantizer", zero_point="float8"), "zero_point is .*, expected float8"),
    (number(IN, float("nan")), r"conv_in.*_quantizer: scale holds NaN or infinity in 1 of"),
    (number(IN, float("inf")), r"conv_in.*_quantizer: scale holds NaN or infinity in 1 of"),
    (number(IN, 0), r"conv_in.*_quantizer: scale holds 0, it must be positive"),
    (number(IN, -0.5), r"conv_in.*_quantizer: scale holds -0.5, it must be positive"),
    (number("conv_in.bias", float("nan")), r"safetensors: [\w.]+ holds NaN or infinity in 1 of"),
    (number("conv_in.bias", float("inf")), r"safetensors: [\w.]+ holds NaN or infinity in 1 of"),
    (number(FOUR, 200), r"conv1.weight_quantizer: zero_point holds 200, outside its levels 0 to 15"),
    (lambda d, t: d["tensors"]["weights"].pop("conv_in.weight"), "the model has and the file lacks conv_in.weight"),
    (lambda d, t: d["tensors"]["ranges"].update(more={}), "the file has and the model lacks more"),
    (lambda d, t: d["tensors"].pop("ranges"), "is damaged: KeyError"),
    (lambda d, t: d.update(tensors=[1]), "is damaged: TypeError"),
    (lambda d, t: d.update(rules=7), "is damaged: TypeError"),
    (lambda d, t: d["rules"][0].pop("spec"), "is damaged: KeyError"),
    (lambda d, t: d["rules"][0].update(pattern="*nothing*"), "does not fit the model: rule '.nothing.' matches no"),
    (rule(0, "weight", bits=4), "conv_in.weight has bits 8, the model 4"),
    (rule(0, "weight", bits=99), "does not fit the model: TensorSpec.bits=99"),
    (rule(0, "weight", width=4), "is damaged: TypeError"),
    (rule(0, "weight", granularity={"per": "row"}), "is damaged: KeyError"),
    (rule(0, "weight", granularity={"per": "group", "size": 0}), "does not fit the model: PerGroup.size=0"),
    (rule(0, "weight", granularity="row"), "is damaged: KeyError"),
    (rule(0, "input", granularity={"per": "segments", "channels": [3, 3], "within": {"per": "tensor"}}),
     "does not fit the model: conv_in.input_quantizer: segments"),
    (rule(-1, "input", bits=[4, 8]), "has bits 8, the model .4, 8."),
])
def test_forged_files_whose_hashes_agree(edit, said, saved):
    forged(saved[0], edit)
    assert re.search(said, refused(saved)), refused(saved)


def test_another_network_is_refused(saved):
    forged(saved[0], lambda d, t: None)
    model = ptq_exp.load_model("digits")
    message = refused((saved[0], model.copy_denoiser(), model.example_inputs()))
    assert "another network or other rules" in message


@pytest.fixture
def first_version(tmp_path):
    """(folder of a network saved by an earlier version, its network, its example)."""
    zipfile.ZipFile(Path(__file__).parents[1] / "golden" / "saved_model_1.zip").extractall(tmp_path)
    model = ptq_exp.load_model("diffusers", str(tmp_path / "model"))
    return tmp_path / "quantized", model.copy_denoiser(), model.example_inputs()


@pytest.mark.parametrize(("edit", "said"), [
    (lambda d, t: t.pop("unet.conv_in.weight"), "the tensor unet.conv_in.weight is missing"),
    (lambda d, t: t.pop("ranges.scale"), "the tensor ranges.scale is missing"),
    (lambda d, t: t.update(more=torch.zeros(2)), "the tensor more .* holds more than the model has"),
    (lambda d, t: t.update({"ranges.scale": t["ranges.scale"][:-1]}), "ranges.scale ends early"),
    (lambda d, t: t.update({"ranges.scale": t["ranges.scale"].half()}), "is float16 .*, expected float32"),
    (lambda d, t: t.update({"parameters.float32": torch.zeros(50000)}), "ends early|holds more"),
    (layout("parameters", "unet.conv_in.bias", type="float16"), "conv_in.bias has type float16, the model"),
    (number("ranges.scale", float("nan")), r"_quantizer: scale holds NaN or infinity in 1 of"),
    (number("parameters.float32", float("inf")), r"safetensors: [\w.]+ holds NaN or infinity in 1 of"),
    (lambda d, t: d["tensors"].pop("parameters"), "is damaged: KeyError"),
])
def test_forged_files_of_an_earlier_version(edit, said, first_version):
    forged(first_version[0], edit)
    assert re.search(said, refused(first_version)), refused(first_version)


def test_a_model_of_an_earlier_version_is_saved_anew_and_stays_what_it_was(first_version, tmp_path):
    folder, network, example = first_version
    report = load_quantized_(network, folder, example)
    rules = [rule_from_dict(rule) for rule in json.loads((folder / "quantization.json").read_text())["rules"]]
    assert save_quantized(tmp_path / "new", network, rules, report, {})["version"] == 2
    again = ptq_exp.load_model("diffusers", str(tmp_path / "model")).denoiser
    load_quantized_(again, tmp_path / "new", example)
    assert same_state(network, again)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), Segments((2, 4), PerChannel())])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_integers_of_a_large_weight_are_found_a_few_rows_at_a_time(kind, granularity, rows, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(6, rows).to(kind))
    quantize_(layer, [Rule("*", QuantSpec(TensorSpec(4, granularity=granularity)))], (torch.zeros(1, 6, dtype=kind),))
    calibrate_weights_(layer, "minmax")
    quantizer, weight = layer[0].weight_quantizer, layer[0].weight
    whole = quantizer.integers(weight)
    assert 0 <= whole.min() < whole.max() <= 15
    monkeypatch.setattr("ptq_exp.quantization.quantizer.weight._CHUNK", 7)
    assert torch.equal(quantizer.integers(weight), whole)
    with torch.no_grad():
        weight[-1, :2] += 0.01
    with pytest.raises(QuantizationError, match=f"2 of {6 * rows} weights are not on the grid"):
        quantizer.integers(weight)


def test_the_same_network_is_the_same_file(unet, batch, example, tmp_path):
    """The library's writer puts metadata into the file in another order each time."""
    rules = Policy().rules(Widths(4, 8))
    report = quantized(unet, rules, batch, example)
    digests = set()
    for number in range(8):
        about = {"settings": {"bits": "w4a8"}, "network": None}
        found = save_quantized(tmp_path / str(number), unet, rules, report, about)
        digests.add(found["file"]["sha256"])
    assert len(digests) == 1
    with safe_open(tmp_path / "0" / "quantized.safetensors", "pt") as tensors:
        assert set(tensors.metadata()) == {"format", "version", "description_sha256"} and len(tensors.keys()) > 20

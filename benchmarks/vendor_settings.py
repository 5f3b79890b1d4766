"""The settings that vendors.py compares: how each quantizes the digits network, and what then runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ptq_exp.diffusion import DiffusionModel
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.export_onnx import SESSION, onnx_model, write_onnx
from ptq_exp.runtime.openvino import OpenVINO
from ptq_exp.runtime.plan import integer_plan

BATCH = 64
States = tuple[Tensor, Tensor]
Quantize = Callable[[DiffusionModel, States, Path], nn.Module]
"""(model, calibration states and their times, folder for files) -> the quantized network, ready to run."""
Operation = tuple[str, str, list[str], list[str]]
"""Name, type, and names of inputs and outputs."""


class Session(nn.Module):
    """A network that another runtime evaluates, called as the original: eps = network(x, t).

    Args:
        run: maps float32 arrays x [BATCH, C, H, W] and t [BATCH] to eps; smaller batches are padded.
    """

    def __init__(self, run: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rows = torch.arange(BATCH).clamp(max=len(x) - 1)
        return torch.from_numpy(self.run(x[rows].numpy(), t[rows].float().numpy()))[: len(x)]


def ours(engine: str = "openvino", metric: str = "mse", **policy: Any) -> Quantize:
    """W8A8 of this framework: everything quantized, first and last layer at 16 bits."""

    def quantize(model: DiffusionModel, states: States, folder: Path) -> nn.Module:
        network = copy.deepcopy(model.denoiser)
        rules = Policy(first=model.first_layers, last=model.last_layers, **policy).rules(Widths(8, 8))
        quantize_(network, rules, model.example_inputs())
        calibrate_(network, metric, [states])
        if engine == "openvino":
            return OpenVINO().compile(network, model.example_inputs())
        call = (torch.zeros(BATCH, *model.sample_shape), torch.zeros(BATCH, dtype=torch.long))
        write_onnx(onnx_model(deployable(network, integer_plan(network)), call, ["x", "t"]), folder / "ours.onnx")
        return onnx_session(folder / "ours.onnx", SESSION, np.int64)

    return quantize


def in_full_precision(operations: list[Operation], ends: bool, time: bool) -> list[str]:
    """Names of the first and last convolution unless `ends`, and of what makes sines of the time unless `time`."""
    convolutions = [name for name, kind, _, _ in operations if kind in ("Conv", "Convolution")]
    names = [] if ends else [convolutions[0], convolutions[-1]]
    of_time, others = {"t"}, {"x"}
    for name, kind, inputs, outputs in operations:
        if kind in ("Shape", "ShapeOf"):
            continue  # a shape is of neither
        if others & {*inputs} or kind in ("MatMul", "Gemm"):
            others |= {*outputs}
        elif of_time & {*inputs}:
            of_time |= {*outputs}
            names += [] if time else [name]
    return names


def onnx_session(path: Path, entries: Mapping[str, str], time_type: type) -> Session:
    """The network of an ONNX file in ONNX Runtime, with `entries` among the options of its session."""
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for entry in entries.items():
        options.add_session_config_entry(*entry)
    session = library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Session(lambda x, t: session.run(None, {"x": x, "t": t.astype(time_type)})[0])


def nncf(ends: bool = True, time: bool = True, **settings: object) -> Quantize:
    """`nncf.quantize`; see `in_full_precision` for `ends` and `time`."""

    def quantize(model: DiffusionModel, states: States, folder: Path) -> nn.Module:
        import nncf as library
        import openvino

        without_snippets(openvino)
        full = openvino.convert_model(Floats(model.denoiser), example_input=tuple(part[:1] for part in states))
        full.reshape({0: [1, *model.sample_shape], 1: [1]})
        samples = [(x[None].numpy(), t[None].float().numpy()) for x, t in zip(*states, strict=True)]
        names = {key: value for key, value in settings.items() if value is not None}
        if "preset" in names:
            names["preset"] = getattr(library.QuantizationPreset, str(names["preset"]))
        if "model_type" in names:
            names["model_type"] = getattr(library.ModelType, str(names["model_type"]))
        kept = in_full_precision(
            [(op.get_friendly_name(), op.get_type_name(), *(
                [port.get_node().get_friendly_name() for port in ports]
                for ports in (op.input_values(), op.outputs())
            )) for op in full.get_ordered_ops()], ends, time,
        )  # fmt: skip
        names["ignored_scope"] = library.IgnoredScope(names=kept, validate=False)
        made = library.quantize(full, library.Dataset(samples), subset_size=len(samples), **names)
        made.reshape({0: [BATCH, *model.sample_shape], 1: [BATCH]})
        compiled = openvino.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return Session(lambda x, t: np.array(compiled((x, t))[0]))

    return quantize


def onnxruntime(ends: bool = True, time: bool = True, products_only: bool = False) -> Quantize:
    """`quantize_static`, per channel; `products_only` = Conv, MatMul and Gemm alone, `ends` and `time` as of `nncf`."""

    def quantize(model: DiffusionModel, states: States, folder: Path) -> nn.Module:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        full, prepared, made = (folder / f"{name}.onnx" for name in ("full", "prepared", "quantized"))
        call = (torch.zeros(BATCH, *model.sample_shape), torch.zeros(BATCH))
        torch.onnx.export(Floats(model.denoiser), call, full, input_names=["x", "t"], dynamo=True, opset_version=20,
                          external_data=False, verbose=False)  # fmt: skip
        quant_pre_process(full, prepared)
        graph = onnx.load(prepared).graph
        nodes = [(node.name, node.op_type, list(node.input), list(node.output)) for node in graph.node]
        quantize_static(
            prepared, made, Batches(states), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"] if products_only else None,
            nodes_to_exclude=in_full_precision(nodes, ends, time),
        )  # fmt: skip
        return onnx_session(made, {}, np.float32)

    return quantize


SPLIT: dict[str, Any] = {"shortcut": "split_all"}
SETTINGS: dict[str, Quantize] = {
    "ours": ours(**SPLIT),
    "ours, symmetric q k v": ours(**SPLIT, qkv_symmetric=True),
    "ours in ONNX Runtime": ours("onnxruntime", **SPLIT),
    "nncf default": nncf(),
    "nncf default, ends in FP": nncf(ends=False),
    "nncf default, time and ends in FP": nncf(ends=False, time=False),
    "nncf mixed": nncf(preset="MIXED"),
    "nncf transformer": nncf(model_type="TRANSFORMER"),
    "nncf transformer, ends in FP": nncf(ends=False, model_type="TRANSFORMER"),
    "onnxruntime default": onnxruntime(),
    "onnxruntime default, time and ends in FP": onnxruntime(ends=False, time=False),
    "onnxruntime products": onnxruntime(products_only=True),
    "onnxruntime products, ends in FP": onnxruntime(ends=False, products_only=True),
}
"""`ours` is ranges alone, separate ones for the parts of concatenated features, without a correction; products are
those of Conv, MatMul and Gemm. Without its time in FP a vendor's tool also quantizes the step index itself."""


class Floats(nn.Module):
    """The network with times as floats and the estimate alone as its output: what converters trace."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t)


class Batches:
    """Calibration states as ONNX Runtime reads them: one dictionary of arrays after the other, None at the end."""

    def __init__(self, states: States) -> None:
        rows = torch.arange(BATCH * -(-len(states[0]) // BATCH)) % len(states[0])  # whole batches
        self.pairs = zip(*(part[rows].float().split(BATCH) for part in states), strict=True)

    def get_next(self) -> dict[str, np.ndarray] | None:
        pair = next(self.pairs, None)
        return None if pair is None else {"x": pair[0].numpy(), "t": pair[1].numpy()}


def without_snippets(openvino: object) -> None:
    """Compile without fused subgraphs: OpenVINO 2026.4 crashes on full-precision U-Nets of scale-shift blocks else."""
    core = openvino.Core
    if not hasattr(core, "compiled_as_before"):
        core.compiled_as_before = core.compile_model

        def compile_model(self, model, device_name=None, config=None, **more):
            settings = {**(config or {}), "SNIPPETS_MODE": "DISABLE"}
            return core.compiled_as_before(self, model, device_name or "CPU", settings, **more)

        core.compile_model = compile_model

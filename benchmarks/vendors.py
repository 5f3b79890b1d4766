"""Vendors' post-training quantization beside ours: the same network, calibration states, seeds and measures.

    python benchmarks/vendors.py [--seeds 0 1 2] [--images 512] [--states 512] [--only NAME ...] [--against NAME ...]
                                 [--out vendors.json]

Needs the extra `vendors` (NNCF, ONNX, ONNX Runtime) beside `openvino`. Every setting quantizes the embedded digits
network from the same 512 states of denoising runs at steps of PTQ4DM's skew normal, and is executed in its own runtime:
NNCF's by OpenVINO, ONNX Runtime's by ONNX Runtime, ours by both. Then, for each seed:

* eps error: relative to full precision, on the full-precision trajectories of 32 samples of the seed, mean over steps;
* PSNR: of each image to the full-precision image of the same noise, mean over images;
* FID increase over the full-precision images, in units of the FID between two halves of the real digits;
* seconds: wall time of quantization, calibration states not counted.

The last lines compare settings in pairs (--against, or the first one): mean difference of PSNR over all images of all
seeds, with its 95 % interval (normal approximation).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import ptq_exp
from ptq_exp.calibration import SkewNormal, StateRequest, positions, source
from ptq_exp.diffusion import DiffusionModel
from ptq_exp.diffusion.paired import relative_eps_error
from ptq_exp.embedded import DigitsExtractor, digits_reference
from ptq_exp.evaluation import extract_features, frechet_distance_from_features, half_split_fid
from ptq_exp.evaluation.images import psnr
from ptq_exp.quantization import Policy, Widths, calibrate_, quantize_
from ptq_exp.runtime.deployable import deployable
from ptq_exp.runtime.export_onnx import SESSION, onnx_model, write_onnx
from ptq_exp.runtime.openvino import OpenVINO
from ptq_exp.runtime.plan import integer_plan

BATCH = 64
EPS_SAMPLES = 32
States = tuple[Tensor, Tensor]
Quantize = Callable[[DiffusionModel, States, Path], nn.Module]
"""(model, calibration states and their times, folder for files) -> the quantized network, ready to run."""


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


def onnx_session(path: Path, entries: Mapping[str, str], time_type: type) -> Session:
    """The network of an ONNX file in ONNX Runtime, with `entries` among the options of its session."""
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    for entry in entries.items():
        options.add_session_config_entry(*entry)
    session = library.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Session(lambda x, t: session.run(None, {"x": x, "t": t.astype(time_type)})[0])


def nncf(ends: bool = True, **settings: object) -> Quantize:
    """`nncf.quantize`; `ends` = False keeps the first and the last convolution in full precision."""

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
        if not ends:
            found = [op.get_friendly_name() for op in full.get_ordered_ops() if op.get_type_name() == "Convolution"]
            names["ignored_scope"] = library.IgnoredScope(names=[found[0], found[-1]])
        made = library.quantize(full, library.Dataset(samples), subset_size=len(samples), **names)
        made.reshape({0: [BATCH, *model.sample_shape], 1: [BATCH]})
        compiled = openvino.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return Session(lambda x, t: np.array(compiled((x, t))[0]))

    return quantize


def onnxruntime(ends: bool = True, products_only: bool = False) -> Quantize:
    """`onnxruntime.quantization.quantize_static`, per channel; `products_only` = Conv, MatMul and Gemm alone."""

    def quantize(model: DiffusionModel, states: States, folder: Path) -> nn.Module:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        full, prepared, made = (folder / f"{name}.onnx" for name in ("full", "prepared", "quantized"))
        call = (torch.zeros(BATCH, *model.sample_shape), torch.zeros(BATCH))
        torch.onnx.export(Floats(model.denoiser), call, full, input_names=["x", "t"], dynamo=True, opset_version=20,
                          external_data=False, verbose=False)  # fmt: skip
        quant_pre_process(full, prepared)
        convolutions = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv"]
        quantize_static(
            prepared, made, Batches(states), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"] if products_only else None,
            nodes_to_exclude=[] if ends else [convolutions[0], convolutions[-1]],
        )  # fmt: skip
        return onnx_session(made, {}, np.float32)

    return quantize


SPLIT: dict[str, Any] = {"shortcut": "split_all"}
SETTINGS: dict[str, Quantize] = {
    "ours": ours(**SPLIT),
    "ours, symmetric q k v": ours(**SPLIT, qkv_symmetric=True),
    "ours, joint shortcuts": ours(),
    "ours in ONNX Runtime": ours("onnxruntime", **SPLIT),
    "nncf default": nncf(),
    "nncf default, ends in FP": nncf(ends=False),
    "nncf mixed": nncf(preset="MIXED"),
    "nncf mixed, ends in FP": nncf(ends=False, preset="MIXED"),
    "nncf transformer": nncf(model_type="TRANSFORMER"),
    "nncf transformer, ends in FP": nncf(ends=False, model_type="TRANSFORMER"),
    "onnxruntime default": onnxruntime(),
    "onnxruntime products": onnxruntime(products_only=True),
    "onnxruntime products, ends in FP": onnxruntime(ends=False, products_only=True),
}
"""`ours` is the experiment best_w8a8 on these states; products are those of Conv, MatMul and Gemm."""


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


def calibration_states(model: DiffusionModel, n: int, seed: int) -> States:
    """The states and network times that `calibration=ndtc` would take."""
    grid = model.time_grid()
    steps = positions(SkewNormal(mean=0.4, std=0.4, shape=2.0), n, len(grid), seed=seed)
    states, _ = source("denoise")(model, StateRequest(grid, range(n), steps, seed=seed))
    return states, grid.network_time(steps)


def measure(model: DiffusionModel, network: nn.Module, full: dict, seed: int) -> dict:
    """Errors of `network` for one seed; `full` holds images and FID of full precision."""
    errors = relative_eps_error(model, model.denoiser, network, model.time_grid(), range(EPS_SAMPLES), seed)
    images = ptq_exp.sample(model, len(full["images"]), seed, denoiser=network, batch_size=BATCH)
    found = frechet_distance_from_features(extract_features(full["extractor"], images).pooled, full["real"])
    return {
        "eps error %": 100 * float(errors.mean()), "worst step %": 100 * float(errors.max()),
        "psnr": psnr(full["images"], images), "FID increase": (found - full["fid"]) / full["unit"],
    }  # fmt: skip


def full_precision(model: DiffusionModel, n: int, seed: int) -> dict:
    """What the quantized networks are measured against."""
    extractor = DigitsExtractor()
    real = extract_features(extractor, digits_reference()).pooled
    images = ptq_exp.sample(model, n, seed, batch_size=BATCH)
    fid = frechet_distance_from_features(extract_features(extractor, images).pooled, real)
    return {"extractor": extractor, "real": real, "images": images, "fid": fid, "unit": half_split_fid(real)}


def bench(
    settings: dict[str, Quantize], seeds: list[int], n_images: int, n_states: int, out: Path | None = None
) -> list[dict]:
    """One record per setting and seed; `out` is written after each."""
    model = ptq_exp.load_model("digits")
    records = []
    for seed in seeds:
        states, full = calibration_states(model, n_states, seed), full_precision(model, n_images, seed)
        for name, quantize in settings.items():
            with TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                started = time.perf_counter()
                network = quantize(model, states, Path(folder))
                spent = {"setting": name, "seed": seed, "seconds": time.perf_counter() - started}
                records.append(spent | measure(model, network, full, seed))
            shown = {key: round(value, 2) for key, value in records[-1].items() if isinstance(value, float)}
            print(f"{name}, seed {seed}: {shown}, PSNR {np.minimum(records[-1]['psnr'], 100).mean():.2f}", flush=True)
            if out:
                out.write_text(json.dumps(records, default=lambda array: np.minimum(array, 100).tolist()))
    return records


def table(records: list[dict]) -> pd.DataFrame:
    """Mean ± std over seeds by setting."""
    columns = ("eps error %", "worst step %", "PSNR dB", "FID increase", "seconds")
    flat = pd.DataFrame([r | {"PSNR dB": float(np.minimum(r["psnr"], 100).mean())} for r in records])
    grouped = flat.groupby("setting", sort=False)[list(columns)]
    return grouped.agg(lambda values: f"{values.mean():.2f} ± {0 if len(values) == 1 else values.std():.2f}")


def paired(records: list[dict], name: str, base: str) -> str:
    """Mean difference of PSNR over all images, `name` minus `base`, with its 95 % interval."""
    both = [np.concatenate([np.minimum(r["psnr"], 100) for r in records if r["setting"] == s]) for s in (name, base)]
    difference = both[0] - both[1]
    half = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    mean = difference.mean()
    interval = f"[{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"{name} - {base}: {mean:+.2f} dB, 95 % interval {interval}, {len(difference)} images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--states", type=int, default=512)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--against", nargs="+", choices=SETTINGS, metavar="NAME", help="(the first of --only)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the records as JSON")
    args = parser.parse_args()
    if missing := [name for name in ("nncf", "onnxruntime", "openvino") if find_spec(name) is None]:
        print(f"{', '.join(missing)} not installed: pip install -e '.[vendors]'")
        return
    torch.set_num_threads(args.threads)
    records = bench({name: SETTINGS[name] for name in args.only}, args.seeds, args.images, args.states, args.out)
    print(table(records).to_markdown())
    for base in args.against or args.only[:1]:
        for name in args.only:
            if name != base:
                print(paired(records, name, base))


if __name__ == "__main__":
    main()

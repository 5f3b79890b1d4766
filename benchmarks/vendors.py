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
import json
import math
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from torch import nn
from vendor_settings import BATCH, SETTINGS, Quantize, States

import ptq_exp
from ptq_exp.calibration import SkewNormal, StateRequest, positions, source
from ptq_exp.diffusion import DiffusionModel
from ptq_exp.diffusion.paired import relative_eps_error
from ptq_exp.embedded import DigitsExtractor, digits_reference
from ptq_exp.evaluation import extract_features, frechet_distance_from_features, half_split_fid
from ptq_exp.evaluation.images import psnr

EPS_SAMPLES = 32


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

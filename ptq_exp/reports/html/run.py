"""The report of one run: report.html, from the files that the run left in its folder."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image as Picture

from ptq_exp.errors import DataError
from ptq_exp.evaluation.scores import SCORES
from ptq_exp.reports import figures
from ptq_exp.reports.html.allocation import allocation_section
from ptq_exp.reports.html.analysis import activation_section, sensitivity_section
from ptq_exp.reports.html.cost import cost_section
from ptq_exp.reports.html.execution import execution_section
from ptq_exp.reports.html.page import data_uri, file_uri, write_page
from ptq_exp.reports.html.section import Image, Section, drawn
from ptq_exp.reports.html.table import Table, listing, number, text
from ptq_exp.results.environment import run_command
from ptq_exp.results.worst_pairs import WorstPair, worst_pairs
from ptq_exp.storage.plain_json import read_json


def write_run_report(folder: Path) -> Path:
    """Write report.html of the finished run in `folder` and return its path; what was not measured is left out.

    Raises:
        DataError: there is no results.json, it is damaged, or its run did not finish.
        PTQError: the report cannot be written.
    """
    results = read_json(folder / "results.json")
    if not isinstance(results, Mapping) or results.get("status") != "finished":
        raise DataError(f"{folder / 'results.json'} is not of a finished run, which alone has a report: run it again")
    found = [
        _summary(results), _images(results, folder), _worst(results, folder), _eps_error(results),
        _noise(folder), activation_section(folder), sensitivity_section(folder), _schedule(results),
        allocation_section(results), execution_section(results, folder), cost_section(folder),
        _reproduce(results, folder),
    ]
    config = results["config"]
    sampler = config["sampler"]
    return write_page(
        folder, title=str(results["name"]), tiles=_tiles(results),
        subtitle=f"{config['model']['name']}, {config['bits']['name'].upper()}, {sampler['solver']} with "
        f"{sampler['steps']} steps, seed {results['seed']}",
        sections=[section for section in found if section is not None],
    )


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers that people look for first."""
    metrics, cost = results["metrics"], results.get("quantization", {})
    shown = [(SCORES[key].heading, number(metrics[key]).text) for key in ("fid", "fid_increase_units", "psnr")
             if key in metrics]
    if "eps_error" in metrics:
        shown.append(("eps error", f"{metrics['eps_error']:.2%}"))
    if cost:
        shown.append(("coverage", f"{cost['coverage_conv_linear']:.2%}"))
        shown.append(("BOPs", f"FP32 / {cost['bops_ratio']:.1f}"))
    return shown


def _summary(results: Mapping[str, Any]) -> Section:
    rows = {"real data": results.get("real", {}), "FP32": results["fp32"]}
    if "quantization" in results:
        rows[results["config"]["bits"]["name"].upper()] = results["metrics"]
    keys = [key for key in SCORES if any(key in scores for scores in rows.values())]
    spec, unit = results["metric_spec"], results.get("real", {}).get("half_split_fid")
    note = (f"{spec['n_samples']} images, seed {spec['seed']}, extractor {spec['extractor']} ({spec['preprocessing']}),"
            f" reference {spec['reference']}.")
    if unit is not None:
        note += (" FID increase over FP32 of the same seeds in units of the FID between two random halves of the real "
                 f"data ({unit:.4g}).")
    intervals = results.get("intervals", {})
    if intervals:
        note += (f" In square brackets: 95 % interval of a paired bootstrap over images "
                 f"({', '.join(f'{n} resamples for {kind}' for kind, n in results['resamples'].items())}).")
    own = {id(results["metrics"]): intervals}  # of the quantized images alone
    table = Table(
        [("", False), *((SCORES[key].heading, True) for key in keys)],
        [[text(name), *(number(scores.get(key), interval=own.get(id(scores), {}).get(key)) for key in keys)]
         for name, scores in rows.items() if scores],
        "Scores", sortable=False, note=note,
    )
    return Section("summary", "Summary", tables=[table])


def _images(results: Mapping[str, Any], folder: Path) -> Section | None:
    uri = file_uri(folder / "grid.png")
    if uri is None:
        return None
    bits = results["config"]["bits"]["name"].upper()
    alt = f"Images of the full-precision model over those of {bits}" if "quantization" in results else "Images"
    return Section("images", "Images", images=[Image(uri, alt, caption=f"{alt}, same seeds.")])


def _worst(results: Mapping[str, Any], folder: Path) -> Section | None:
    """Return the pairs of the lowest PSNR, the worst first; None where the run has not left any."""
    pairs = worst_pairs(folder)
    if not pairs:
        return None
    bits = results["config"]["bits"]["name"].upper()
    text = (f"Left full precision, right {bits}, from the same noise: the {len(pairs)} pairs of the lowest PSNR of "
            f"{results['metric_spec']['n_samples']}, the worst first.")
    return Section("worst-pairs", "Worst pairs", text=[text], gallery=[_pair(pair, bits) for pair in pairs])


def _pair(pair: WorstPair, bits: str) -> Image:
    from ptq_exp.evaluation.images import side_by_side  # loads torch: other reports do without

    stream = io.BytesIO()
    Picture.fromarray(side_by_side(pair.fp_image, pair.image)).save(stream, format="PNG")
    drawn_from = f"{pair.drawn_from}, " if pair.drawn_from else ""
    alt = f"Image {pair.index} in full precision and in {bits}"
    psnr = f"{pair.psnr:.1f} dB" if math.isfinite(pair.psnr) else "infinite"
    caption = f"{drawn_from}image {pair.index}: PSNR {psnr}"
    return Image(data_uri(stream.getvalue(), ".png"), alt, caption=caption)


def _eps_error(results: Mapping[str, Any]) -> Section | None:
    after, before = results.get("eps_error_per_step"), results.get("eps_error_uncorrected_per_step")
    if not after:
        return None
    caption = "‖ε_q − ε‖ / ‖ε‖ of each sampling step, on full-precision trajectories."
    share, noise = results.get("fixed_pattern_share_per_step"), results.get("fixed_pattern_share_independent", 0.0)
    if share:  # not of a run from before it was measured
        samples = results["eps_error_samples"]
        caption += (
            " Share of a fixed pattern: norm of the mean error over samples / root mean squared norm of the error; "
            f"1 = the same for all samples; independent errors of {samples} samples: {noise:.2f}."
        )
    picture = drawn(
        lambda width: figures.eps_error(before, after, share=share, share_of_noise=noise, width=width),
        "Curves of the eps error per step", caption,
    )
    return Section("eps-error", "Error of the noise estimate per step", pictures=[picture])


def _noise(folder: Path) -> Section | None:
    uri = file_uri(folder / "noise.png")
    if uri is None:
        return None
    image = Image(uri, "Slope, correlation, kurtosis and density of the quantization noise", "fixed")
    return Section("noise", "Quantization noise", images=[image])


def _schedule(results: Mapping[str, Any]) -> Section | None:
    schedule = results.get("bit_schedule")
    if not schedule:
        return None
    bits = schedule["activation"]
    shares = ", ".join(f"{share:.0%} of the steps at {width} bits" for width, share in schedule["shares"].items())
    caption = f"{shares}; mean {sum(bits) / len(bits):.2f} bits."
    picture = drawn(lambda width: figures.bit_schedule(bits, width=width), "Activation bits of each step", caption)
    return Section("bit-schedule", "Bit schedule", pictures=[picture])


def _reproduce(results: Mapping[str, Any], folder: Path) -> Section:
    """Command, environment, seconds and settings; the command of older runs from what Hydra left."""
    environment = [[text(key), text(value)] for key, value in results.get("environment", {}).items()]
    tables = [listing(environment, "Environment")] if "environment" in results else []
    seconds = results.get("seconds", {})
    folded = []
    if seconds:
        rows = [[text(stage), number(spent)] for stage, spent in seconds.items()]
        total = f"Seconds of each stage, {sum(seconds.values()):.0f} in all"
        folded.append((total, Table([("stage", False), ("seconds", True)], rows, "Seconds of each stage")))
    return Section(
        "reproduce", "How to reproduce it", code=[results.get("command") or run_command(folder)], tables=tables,
        folded_tables=folded,
        folded_code=[("All settings", json.dumps(results["config"], indent=2, ensure_ascii=False))],
    )

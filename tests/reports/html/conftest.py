"""Folders of runs written by hand, and a reader of HTML that is not the one that wrote it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

VOID = {"meta", "link", "img", "source", "rect", "br"}


class Page(HTMLParser):
    """What a page holds: elements, sections, tables as lists of rows of texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.sections: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.keys: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are not closed"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.sections.append(attributes["id"])
        elif tag == "table":
            self.tables.append([])
            self.keys.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.keys[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.keys[-1][-1].append(attributes.get("data-key"))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, first: str) -> list[dict[str, str]]:
        """Rows of the table whose first heading is `first`, as heading -> text."""
        (rows,) = [rows for rows in self.tables if rows[0] and rows[0][0] == first]
        return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]

    def addresses(self, *tags: str) -> list[str]:
        """Every address that elements of these tags (all but anchors by default) refer to."""
        names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
        return [
            value for tag, attributes in self.elements if (tag in tags if tags else tag != "a")
            for name, value in attributes.items() if name in names
        ]


@pytest.fixture
def read_page():
    return lambda path: Page(Path(path).read_text(encoding="utf-8"))


def results(name="ndtc_w8a8", seed=0, fid=1.5, bops=4.0e9, bits="w8a8", model="digits", **extra) -> dict:
    """What a finished quantized run leaves in results.json, in small."""
    return {
        "status": "finished", "stage": "done", "name": name, "seed": seed, "command": f"python -m ptq_exp seed={seed}",
        "environment": {"python": "3.11.0", "torch": "2.9", "threads": 1},
        "config": {
            "name": name, "seed": seed, "model": {"name": model},
            "bits": {"name": bits, "weight": 32 if bits == "fp32" else int(bits[1])},
            "sampler": {"solver": "ddim", "steps": 3}, "calibration": {"n_samples": 8},
        },
        "seconds": {"quantize": 1.5, "scores": 2.0},
        "metric_spec": {"n_samples": 8, "seed": seed, "extractor": "e", "preprocessing": "p", "reference": "r"},
        "fp32": {"fid": 1.0, "is": 9.0}, "real": {"is": 10.0, "half_split_fid": 0.5},
        "metrics": {"fid": fid, "is": 8.5, "fid_increase_units": 2 * fid - 2, "psnr": 30.0, "eps_error": 0.02},
        "eps_error_per_step": [0.01, 0.02, 0.03],
        "quantization": {
            "coverage_conv_linear": 0.99, "bops_ratio": 16.0, "bops": {"conv_linear": bops},
            "bops_fp32": {"conv_linear": 64e9},
        },
    } | extra


def account() -> dict:
    """quantization.json of a network with two operations, in small."""
    layers = [
        {"name": "conv_in", "type": "Conv2d", "scope": "conv_linear", "params": 10, "macs": 100, "weight_bits": 8,
         "activation_bits": [4, 8], "weight_bytes": 10.0, "reason": ""},
        {"name": "a.qk", "type": "Attention.qk", "scope": "attention", "params": 0, "macs": 50, "weight_bits": None,
         "activation_bits": 8, "weight_bytes": 0.0, "reason": "no quantizer on k"},
    ]
    totals = {"params": 10, "weight_bytes": 10.0, "fp32_bytes": 40, "size_reduction": 4.0}
    pairs = {"macs": (100, 150), "coverage": (1.0, 0.667), "bops": (4800, 17600), "bops_fp32": (102400, 153600),
             "bops_reduction": (21.3, 8.7)}
    for key, pair in pairs.items():
        totals[key] = dict(zip(("conv_linear", "everything"), pair, strict=True))
    return {"totals": totals, "layers": layers, "shares": [0.5, 0.5]}


@pytest.fixture
def make_run():
    """Write a run folder: results.json, quantization.json, grid.png and, with `analysis`, analysis.npz."""

    def make(folder: Path, analysis: bool = False, quantized: bool = True, **changes) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        values = results(**changes)
        if quantized:
            (folder / "quantization.json").write_text(json.dumps(account()))
        else:
            del values["quantization"], values["eps_error_per_step"]
            values["metrics"] = values["fp32"]
        (folder / "results.json").write_text(json.dumps(values))
        Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / "grid.png")
        if analysis:
            np.savez(folder / "analysis.npz", **analysis_arrays())
        return folder

    return make


def analysis_arrays() -> dict[str, np.ndarray]:
    """Three sites in two steps; the second one's range grows tenfold. Two layers, the second one is the worse."""
    base = np.array([-2.0, -1, -0.5, 0, 0.5, 1, 3], np.float32)
    return {
        "sites": np.array(["a.input_quantizer", "b.output_quantizer", "c.softmax_quantizer"]),
        "steps": np.array([0, 2]), "fractions": np.array([0, 0.01, 0.25, 0.5, 0.75, 0.99, 1]),
        "activations": np.stack([[base, base], [base, 10 * base], [base * 0 + 7, base * 0 + 7]]),
        "layers": np.array(["a", "b"]), "sensitivity_steps": np.array([0, 2]),
        "sensitivity": np.array([[0.01, 0.02], [0.03, 0.01]]),
    }

"""report.html of a run: what stands in it, what does not, and that it needs nothing but itself."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from ptq_exp.cli.report import main
from ptq_exp.errors import DataError
from ptq_exp.reports.html import write_run_report

ALWAYS = ["summary", "images", "eps-error", "cost", "reproduce"]


def test_a_plain_run_has_what_it_measured_and_nothing_else(make_run, tmp_path, read_page):
    path = write_run_report(make_run(tmp_path / "run"))
    page = read_page(path)
    assert path == tmp_path / "run" / "report.html" and page.sections == ALWAYS
    assert len(page.elements) > 50


def test_everything_that_was_measured_has_its_section(make_run, tmp_path, read_page):
    schedule = {"rule": "snr", "activation": [8, 8, 4], "shares": {"4": 1 / 3, "8": 2 / 3}}
    before = [0.02, 0.03, 0.05]
    folder = make_run(tmp_path, analysis=True, bit_schedule=schedule, eps_error_uncorrected_per_step=before)
    (folder / "noise.png").write_bytes((folder / "grid.png").read_bytes())
    page = read_page(write_run_report(folder))
    assert page.sections == ["summary", "images", "eps-error", "noise", "activations", "sensitivity", "bit-schedule",
                             "cost", "reproduce"]
    assert any("33% of the steps at 4 bits, 67% of the steps at 8 bits; mean 6.67 bits" in text for text in page.texts)


def test_bits_that_were_chosen_have_their_tables(make_run, tmp_path, read_page):
    solution = {"uniform": "", "predicted_eps_error": 0.01, "final_error": 0.02, "chosen": True, "size_mb": 1.25,
                "counts": {"w8a8": 1, "w4a8": 1}}
    same = solution | {"uniform": "w4a8", "chosen": False, "final_error": 0.03}
    allocation = {
        "candidates": ["w8a8", "w4a8"], "groups": 2, "budget": {"size_mb": 1.3}, "solutions": [solution, same],
        "layers": {"a.q": "w8a8", "a.k": "w8a8", "b": "w4a8"},
        "chosen": [{"layers": ["a.q", "a.k"], "bits": "w8a8", "eps_error": 0.001},
                   {"layers": ["b"], "bits": "w4a8", "eps_error": 0.004}],
    }
    page = read_page(write_run_report(make_run(tmp_path, allocation=allocation)))
    assert page.sections == ["summary", "images", "eps-error", "allocation", "cost", "reproduce"]
    found = page.table("groups with")
    assert [row["groups with"] for row in found] == ["w8a8: 1, w4a8: 1", "w4a8 everywhere"]
    assert [(row["MB"], row["measured final error"], row[""]) for row in found] == [
        ("1.25", "2.000%", "chosen"), ("1.25", "3.000%", "")
    ]
    layers = [row for row in page.table("layer")]
    assert [(row["layer"], row["bits"], row["group"]) for row in layers] == [
        ("a.q", "w8a8", "0"), ("a.k", "w8a8", "0"), ("b", "w4a8", "1")
    ]


def test_a_full_precision_run_has_no_sections_of_quantization(make_run, tmp_path, read_page):
    page = read_page(write_run_report(make_run(tmp_path, quantized=False)))
    assert page.sections == ["summary", "images", "reproduce"]
    assert [row[""] for row in page.table("")[:2]] == ["real data", "FP32"]


def test_numbers_are_those_of_the_files(make_run, tmp_path, read_page):
    page = read_page(write_run_report(make_run(tmp_path, analysis=True)))
    scores = next(table for table in page.tables if "FID increase" in table[0])
    assert scores[-1] == ["W8A8", "1.5", "8.5", "1", "30", "0.02"] and scores[1][1] == "—"
    operations = page.table("name")
    # BOPs: half of the evaluations at 4 bits, half at 8; an operand in full precision counts 32
    assert float(operations[0]["BOPs, M"]) == pytest.approx(100 * 8 * (4 + 8) / 2 / 1e6)
    assert float(operations[1]["BOPs, M"]) == pytest.approx(50 * 32 * 8 / 1e6)
    assert operations[0]["activation bits"] == "4/8" and operations[1]["why in full precision"] == "no quantizer on k"
    layers = page.table("layer")
    assert [(row["layer"], row["eps error"], row["at worst"], row["in step"]) for row in layers] == [
        ("b", "2.000%", "3.000%", "0"), ("a", "1.500%", "2.000%", "2")
    ]
    bars = [float(a["width"].rstrip("%")) for tag, a in page.elements if tag == "rect"]
    assert bars == [100, 75]
    sites = page.table("activation")
    assert [row["activation"] for row in sites] == ["b, output", "a, input", "c, softmax"]
    assert (sites[0]["minimum"], sites[0]["maximum"], sites[0]["ratio"]) == ("−20", "30", "10.00")
    assert (sites[0]["narrowest"], sites[0]["widest"], sites[2]["ratio"]) == ("2", "20", "—")


def test_the_share_of_a_fixed_pattern_is_drawn_beside_the_eps_error(make_run, tmp_path, read_page):
    def curves(page):
        return [a["alt"] for tag, a in page.elements if tag == "img" and a["alt"].startswith("Curve")]

    old = read_page(write_run_report(make_run(tmp_path / "old")))
    assert curves(old) == ["Curves of the eps error per step"]
    assert not any("fixed pattern" in text for text in old.texts)
    shares = {"fixed_pattern_share_per_step": [0.8, 0.4, 0.3], "fixed_pattern_share_independent": 0.25}
    new = make_run(tmp_path / "new", eps_error_samples=16, **shares, metrics={
        "fid": 1.5, "eps_error": 0.02, "eps_error_without_last": 0.015, "fixed_pattern_share": 0.5,
    })
    page = read_page(write_run_report(new))
    assert curves(page) == ["Curves of the eps error per step"]
    assert any("independent errors of 16 samples: 0.25" in text for text in page.texts)
    scores = next(table for table in page.tables if "FID increase" in table[0] or "FID" in table[0])
    assert scores[0][-3:] == ["eps error", "eps error, not last", "fixed pattern"]
    assert scores[-1][-3:] == ["0.02", "0.015", "0.5"]


def test_the_page_is_self_contained(make_run, tmp_path, read_page):
    path = write_run_report(make_run(tmp_path, analysis=True))
    page, text = read_page(path), path.read_text()
    addresses = page.addresses()
    assert len(addresses) >= 6 and all(address.startswith("data:") for address in addresses)
    assert "url(" not in text and "@import" not in text and "fetch(" not in text
    for address in page.addresses("img", "source"):
        kind, content = re.fullmatch(r"data:image/(png|svg\+xml);base64,(.+)", address).groups()
        head = base64.b64decode(content, validate=True)[:300]
        assert head.startswith(b"\x89PNG") if kind == "png" else b"<svg" in head or b"<?xml" in head
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_hostile_names_are_text(make_run, tmp_path, read_page):
    hostile = "</title><script>alert(1)</script>\"'><img src=x onerror=alert(2)> $\\frac{"
    folder = make_run(tmp_path, name=hostile, model=hostile, command=hostile, environment={hostile: hostile},
                      analysis=True)
    page = read_page(write_run_report(folder))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert all(address.startswith("data:") for address in page.addresses())
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.texts.count(hostile) >= 4


def test_the_same_run_gives_the_same_page(make_run, tmp_path):
    folder = make_run(tmp_path, analysis=True)
    first = write_run_report(folder).read_bytes()
    assert write_run_report(folder).read_bytes() == first


def test_older_runs_show_the_command_that_hydra_recorded(make_run, tmp_path, read_page):
    folder = make_run(tmp_path, command=None, environment={})
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("- +experiment=ndtc_w8a8\n- model.checkpoint=my file.ckpt\n")
    page = read_page(write_run_report(folder))
    assert "python -m ptq_exp +experiment=ndtc_w8a8 'model.checkpoint=my file.ckpt'" in page.texts


def test_a_run_that_did_not_finish_has_no_report(make_run, tmp_path):
    folder = make_run(tmp_path, status="failed")
    with pytest.raises(DataError, match="finished"):
        write_run_report(folder)
    assert not (folder / "report.html").exists()


def test_the_command_rebuilds_reports_of_a_run_and_of_a_sweep(make_run, tmp_path, capsys):
    first = make_run(tmp_path / "sweep" / "0_a")
    make_run(tmp_path / "sweep" / "1_b", seed=1, status="failed")
    main([str(first)])
    assert capsys.readouterr().out.split() == [str(first / "report.html")]
    (first / "report.html").unlink()
    main([str(tmp_path / "sweep")])
    written = [tmp_path / "sweep" / "0_a" / "report.html", tmp_path / "sweep" / "report.html"]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    for missing in (tmp_path / "nothing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match="error: "):
            main([str(missing)])


def test_an_engine_has_a_section_with_times_and_layers_by_kernel(make_run, read_page, tmp_path):
    names = ("torch_fp32", "simulation", "openvino_f32", "openvino_int8")
    entry = {
        "engine": "openvino", "version": "2026.4", "threads": 1, "batch_size": 64, "repeats": 5, "int8_share": 0.998,
        "attention_int8_share": 1.0, "file_bytes": 1_700_000, "saturation": 1.0, "eps_error": 0.007, "states": 5,
        "psnr": 53.1, "images": 64, "ms_per_evaluation": dict(zip(names, (90.0, 120.0, 86.0, 40.0), strict=True)),
        "ms_per_image": dict(zip(names, (28.0, 37.5, 26.9, 12.5), strict=True)),
        "faster_than": {"torch_fp32": 2.25, "simulation": 3.0, "openvino_f32": 2.15},
        "peak_bytes": {"openvino_f32": 5e8, "openvino_int8": 2e8},
    }
    layers = [
        {"layer": "conv_in", "kind": "Conv2d", "executed": "float", "kernel": "jit_f32", "macs": 10,
         "reason": "16-bit input"},
        *({"layer": name, "kind": "Conv2d", "executed": "int8", "kernel": "jit_i8", "macs": 495, "reason": ""}
          for name in ("a", "b")),
    ]
    folder = make_run(tmp_path / "run", runtime=entry)
    (folder / "runtime.json").write_text(json.dumps({"layers": layers}))
    page = read_page(write_run_report(folder))
    (found,) = [rows for rows in page.tables if rows[0][1:2] == ["ms per evaluation"]]
    times = {row[0]: dict(zip(found[0], row, strict=True)) for row in found[1:]}
    assert times["openvino int8"]["ms per evaluation"] == "40" and times["torch fp32"]["time / int8"] == "2.25"
    assert times["openvino int8"]["peak MB"] == "200" and times["simulation"]["peak MB"] == "—"
    kernels = [(row["kernel"], row["operations"], row["MACs %"], row["reason"]) for row in page.table("executed")]
    assert kernels == [("jit_i8", "2", "99.00", ""), ("jit_f32", "1", "1.00", "16-bit input")]
    assert [row["layer"] for row in page.table("layer")] == ["conv_in", "a", "b"]
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "99.80% of the MACs" in text and "53.1 dB from the simulation" in text


def test_the_worst_pairs_come_first_with_prompt_and_scores_with_interval(make_run, read_page, tmp_path):
    interval = {"psnr": [28.5, 31.25]}
    folder = make_run(tmp_path / "run", intervals=interval, resamples={"pairs": 10000})
    rng = np.random.default_rng(0)
    fp = rng.integers(0, 256, (4, 16, 16, 1), dtype=np.uint8)
    images = rng.integers(0, 256, fp.shape, dtype=np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.array([7, 7, 3, 3]))
    scores = np.array([30.0, 12.5, 40.0, 20.0])
    np.savez(folder / "pairs.npz", psnr=scores, worst=[1, 3], worst_fp32=fp[[1, 3]])
    page = read_page(write_run_report(folder))
    assert page.sections.index("worst-pairs") == page.sections.index("images") + 1
    captions = [text for text in page.texts if text.startswith("class ")]
    assert captions == ["class 7, image 1: PSNR 12.5 dB", "class 3, image 3: PSNR 20.0 dB"]
    pictures = [attributes["src"] for tag, attributes in page.elements if "in full precision and in" in
                attributes.get("alt", "")]
    for uri, i in zip(pictures, (1, 3), strict=True):
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
        tile = picture[4:100:6, 4:100:6, 0], picture[4:100:6, 104:200:6, 0]
        assert np.array_equal(tile[0], fp[i, ..., 0]) and np.array_equal(tile[1], images[i, ..., 0])
    scored = page.tables[0]
    row = dict(zip(scored[0], scored[-1], strict=True))
    assert row[""] == "W8A8" and row["PSNR dB"] == "30 [28.5, 31.25]"
    assert "10000 resamples for pairs" in " ".join(page.texts)

    np.savez(folder / "pairs.npz", psnr=scores, worst=[1], worst_fp32=fp[[1]], prompts=["", "a <b> fox", "", ""])
    assert "a <b> fox, image 1: PSNR 12.5 dB" in read_page(write_run_report(folder)).texts

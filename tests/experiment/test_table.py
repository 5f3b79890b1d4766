"""The table command, on hand-made results."""

import pytest
from markdown_text import squeezed

from ptq_exp.cli.table import layout_table, main
from ptq_exp.reports.tables.render import render
from ptq_exp.storage.plain_json import write_json


def results(name, bits, seed, increase, **metrics):
    spec = {"extractor": "e", "preprocessing": "p", "reference": "r", "n_samples": 4, "seed": seed}
    values = {
        "name": name, "status": "finished", "seed": seed, "metric_spec": spec,
        "config": {"seed": seed, "metric": {"name": "lp"}, "bits": {"name": bits}},
        "metrics": {"fid": 1.0 + seed, "sfid": 2.0, "is": 9.0, **metrics},
    }
    if increase is not None:
        values["metrics"] |= {"fid_increase_units": increase, "psnr": 40.0, "eps_error": 0.0125}
        values["quantization"] = {"coverage_conv_linear": 1.0, "bops_ratio": 16.0}
    return values


@pytest.fixture
def runs(tmp_path):
    rows = [("ndtc_w4a4", "w4a4", 3.0), ("ndtc_w8a8", "w8a8", 0.1), ("fp32", "fp32", None)]
    for name, bits, increase in rows:
        for seed in (0, 2):
            write_json(tmp_path / f"{name}_{seed}" / "results.json", results(name, bits, seed, increase))
    return tmp_path


def experiments(runs):
    """The lines of the table that stands where nothing else is asked for, without its title."""
    return squeezed(render(layout_table(str(runs), "experiments"), label="experiments")).splitlines()[2:]


def test_rows_stand_in_order_of_their_damage_with_mean_and_deviation(runs):
    lines = experiments(runs)
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| FP32", "| ndtc_w8a8", "| ndtc_w4a4"]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["ndtc_w8a8", "lp", "2.00 ± 1.41", "2.00 ± 0.00", "9.00 ± 0.00", "**0.10 ± 0.00**", "40.00 ± 0.00",
                     "1.25 ± 0.00", "100.00", "16.00"]
    assert lines[2].count("—") == 5  # what full precision has no value for is shown as missing
    assert lines[6] == "- extractor e, n_samples 4, preprocessing p, reference r; seed 0, 2"


def test_a_folder_without_results_is_one_clear_line(tmp_path):
    with pytest.raises(SystemExit, match="error: no results.json below"):
        main([str(tmp_path)])


def test_a_failed_run_neither_breaks_the_table_nor_stands_before_the_finished_ones(runs):
    failed = results("ndtc_w3a8", "w3a8", 0, None) | {"status": "failed", "error": "no"}
    del failed["metrics"], failed["metric_spec"]
    write_json(runs / "0_failed" / "results.json", failed)
    broken = runs / "1_broken" / "results.json"
    broken.parent.mkdir()
    broken.write_text("{")
    lines = experiments(runs)
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == ["FP32", "ndtc_w8a8", "ndtc_w4a4", "ndtc_w3a8"]
    assert lines[5].count("—") == 8 and lines[-2:] == ["- failed: 0_failed (no)", "- unreadable: 1_broken"]


def test_a_folder_without_a_readable_result_is_one_clear_line(tmp_path):
    (tmp_path / "results.json").write_text("{")
    for layout in ("experiments", "ablation"):
        with pytest.raises(SystemExit, match="error: none of the runs says"):
            main([str(tmp_path), "--layout", layout])


def test_markdown_is_the_default_and_latex_a_choice(runs, capsys):
    main([str(runs)])
    assert squeezed(capsys.readouterr().out).splitlines() == ["**Experiments**", "", *experiments(runs)]
    main([str(runs), "--format", "latex"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith(r"\caption{Experiments. extractor e, n\_samples 4, preprocessing p, reference r; seed")
    assert r"ndtc\_w8a8 & lp & $2.00 \pm 1.41$ & $2.00 \pm 0.00$ & $9.00 \pm 0.00$ & $\mathbf{0.10" in lines[9]
    assert lines[3:5] == [r"\label{tab:experiments}", r"\begin{tabular}{llrrrrrrrr}"]


@pytest.fixture
def corrected(tmp_path):
    for bits, correction, increase in (("w4a8", "ptqd", 1.0), ("w4a8", "none", 2.0), ("fp32", "none", None)):
        for seed in (0, 2):
            values = results("x", bits, seed, increase)
            values["config"] |= {
                "model": {"name": "digits"}, "sampler": {"name": "ddim", "eta": 1.0}, "calibration": {"name": "ndtc"},
                "correction": {"name": correction},
            }
            write_json(tmp_path / f"{bits}_{correction}_{seed}" / "results.json", values)
    return tmp_path


def test_the_ablation_in_markdown(corrected, capsys):
    main([str(corrected), "--layout", "ablation"])
    scores = "2.00 ± 1.41 | 2.00 ± 0.00 | 9.00 ± 0.00"
    quantized = f"{scores} | 40.00 ± 0.00 | 1.25 ± 0.00 | 16.00 |"
    assert squeezed(capsys.readouterr().out).splitlines() == [
        "**Parts of the noise correction**", "",
        "| model | sampler | sampler.eta | bits | correction | FID ↓ | sFID ↓ | IS ↑ | PSNR dB ↑ | eps error % ↓ "
        "| BOPs ratio ↑ |",
        "|:--|:--|:--|:--|:--|--:|--:|--:|--:|--:|--:|",
        f"| digits | ddim | 1 | FP32 | | {scores} | — | — | — |",
        f"| digits | ddim | 1 | w4a8 | baseline | {quantized}",
        f"| digits | ddim | 1 | w4a8 | + variance | {quantized}",
        "",
        "- extractor e, n_samples 4, preprocessing p, reference r; seed 0, 2",
        "- mean ± std of n=2 runs",
    ]


def test_the_ablation_in_latex_has_a_rule_between_blocks(corrected, capsys):
    main([str(corrected), "--layout", "ablation", "--format", "latex"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:5] == [r"\label{tab:ablation}", r"\begin{tabular}{lllllrrrrrr}"]
    heads = [line.split(" & ")[3] if " & " in line else line for line in lines[7:]]
    assert heads[:6] == [r"\midrule", "FP32", r"\midrule", "w4a8", "w4a8", r"\bottomrule"]
    assert lines[8].endswith(r"$9.00 \pm 0.00$ & -- & -- & -- \\")


def test_every_layout_can_be_changed_and_narrowed(corrected, capsys):
    main([str(corrected), "--layout", "ablation", "--where", "correction=ptqd", "--values", "fid", "--delta"])
    lines = squeezed(capsys.readouterr().out).splitlines()
    assert lines[5] == "| digits | ddim | 1 | w4a8 | + variance | 2.00 ± 1.41 (+0.00) |"
    main([str(corrected), "--layout", "experiments", "--rows", "correction", "--values", "fid", "--no-fp32"])
    assert squeezed(capsys.readouterr().out).splitlines()[4:6] == ["| ptqd | 2.00 ± 1.41 |", "| none | 2.00 ± 1.41 |"]


def test_help_names_layouts_and_formats(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(word in text for word in ("experiments", "ablation", "markdown", "latex", "booktabs"))
    with pytest.raises(SystemExit):
        main(["--layout", "ablatoin"])


def test_rows_columns_and_values_by_key(runs, capsys):
    main([str(runs), "--rows", "name", "--cols", "bits", "--values", "fid,is", "--where", "metric=lp", "--delta"])
    lines = squeezed(capsys.readouterr().out).splitlines()
    assert lines[0] == "| name | w8a8: FID ↓ | w8a8: IS ↑ | w4a4: FID ↓ | w4a4: IS ↑ |"
    assert lines[2].startswith("| FP32 | 2.00 ± 1.41 | 9.00 ± 0.00 | 2.00 ± 1.41 |")
    assert lines[3] == "| ndtc_w4a4 | — | — | 2.00 ± 1.41 (+0.00) | 9.00 ± 0.00 (+0.00) |"
    main([str(runs), "--rows", "metric", "--where", "bits=w8a8", "--no-fp32", "--format", "csv"])
    out, err = capsys.readouterr()
    assert out.splitlines()[1].startswith("lp,2.0,1.41") and "seed 0, 2" in err


def test_a_ready_made_layout_can_be_narrowed_and_written_to_a_file(runs, tmp_path, capsys):
    main([str(runs), "--layout", "ptq4dm_metric", "--where", "bits=w2a2", "--output", str(tmp_path / "t.md")])
    assert capsys.readouterr().out == ""
    text = (tmp_path / "t.md").read_text()
    assert text.startswith("**PTQ4DM, metric of the range search, W8A8**")
    assert "| ddim_imagenet64 | l1 |" in squeezed(text)
    main(["--list"])
    assert "+experiment=ndtc_w8a8 metric=l1,cosine,kl,mse,lp seed=0,1,2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "metrc"], "metrc: no such configuration key; did you mean 'metric'"),
        (["--layout", "ablatoin"], "no such layout; did you mean 'ablation'"),
        (["--rows", "bits", "--where", "bits"], "--where bits: expected KEY=VALUE"),
        (["--wandb", "project", "--rows", "bits"], "--wandb project: expected entity/project"),
    ],
)
def test_mistakes_end_in_one_line(runs, arguments, message):
    with pytest.raises(SystemExit, match=message):
        main([str(runs), *arguments])


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(SystemExit, match="there is no such folder"):
        main(["no/such/folder"])

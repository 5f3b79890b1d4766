"""Tables by configuration keys: averages by hand, what is never averaged, and what must not vanish without a word."""

import math
import os

import pytest
from markdown_text import squeezed

from ptq_exp.errors import ConfigError, DataError
from ptq_exp.reports.tables.render import plain_frame, render
from ptq_exp.reports.tables.request import BY_RUN, Published, PublishedRow, Request, RowLabel
from ptq_exp.reports.tables.result_table import result_table
from ptq_exp.reports.tables.runs import gather

SPEC = {"extractor": "digits", "preprocessing": "none", "reference": "train", "n_samples": 512}


def table_of(root, rows=("calibration",), values=("fid",), settings=(), **request):
    return result_table(gather([root]), Request(rows=list(rows), values=list(values), **request), settings)


def cells(table, column="fid"):
    """{texts of the row: number}."""
    keys = [head for head in table.frame if table.titles.get(head) == head and "/" not in head and head != column]
    names = ["|".join(row) for row in table.frame[keys].astype(str).itertuples(index=False)]
    return dict(zip(names, table.frame[column], strict=True))


def lines(table, form="markdown"):
    return [line for line in squeezed(render(table, form)).splitlines() if line.startswith("|")]


@pytest.fixture
def two_by_two(tmp_path, write_run):
    """FID 1 and 3 (NDTC W8A8), 5 and 7 (NDTC W4A8), 2 and 2.5 (uniform W8A8), full precision 0.5 and 1.5."""
    fids = {
        ("w8a8", "ndtc"): (1, 3), ("w4a8", "ndtc"): (5, 7), ("w8a8", "uniform"): (2, 2.5), ("fp32", "none"): (0.5, 1.5),
    }
    for (bits, calibration), pair in fids.items():
        for seed, fid in enumerate(pair):
            folder = tmp_path / f"{bits}_{calibration}_{seed}"
            write_run(folder, bits, calibration, seed, metrics={"fid": fid, "is": 9.0})
    return tmp_path


def test_rows_columns_and_means(two_by_two):
    table = table_of(two_by_two, cols=["bits"])
    assert cells(table, "w8a8/fid") == {"FP32": 1.0, "ndtc": 2.0, "uniform": 2.25}
    assert table.frame["w4a8/fid"].tolist()[:2] == [1.0, 6.0] and math.isnan(table.frame["w4a8/fid"][2])
    assert table.frame["w8a8/fid.std"].tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(2), math.sqrt(0.125)])
    assert lines(table) == [
        "| calibration | w8a8: FID ↓ | w4a8: FID ↓ |",
        "|:--|--:|--:|",
        "| FP32 | 1.00 ± 0.71 | 1.00 ± 0.71 |",
        "| ndtc | **2.00 ± 1.41** | 6.00 ± 1.41 |",  # alone in its column: nothing to be better than
        "| uniform | 2.25 ± 0.35 | — |",
    ]


def test_the_difference_to_full_precision_is_that_of_the_same_seeds(two_by_two, write_run):
    write_run(two_by_two / "third", "w8a8", "ndtc", 2, metrics={"fid": 100.0})
    table = table_of(two_by_two, delta=True, where={"bits": ["w8a8"]})
    assert cells(table) == {"FP32": 1.0, "ndtc": pytest.approx(104 / 3), "uniform": 2.25}
    # (1 - 0.5 + 3 - 1.5) / 2: the third run has no full-precision one
    assert table.frame["fid.delta"].tolist()[1:] == pytest.approx([1.0, 1.25])
    assert "| ndtc | 34.67 ± 56.59 (n=3) (+1.00) |" in lines(table)
    assert any("in brackets" in note for note in table.notes)


def test_higher_is_better_where_it_is_and_equal_numbers_have_no_best(tmp_path, write_run):
    for calibration, score in (("ndtc", 9.0), ("uniform", 9.5)):
        metrics = {"is": score, "evaluations": score, "sfid": 1.0}
        write_run(tmp_path / calibration, calibration=calibration, metrics=metrics)
    frame = table_of(tmp_path, values=["is", "evaluations", "sfid"]).frame
    assert frame["is.best"].tolist() == [False, True]
    assert not frame["evaluations.best"].any() and not frame["sfid.best"].any()


def test_the_best_is_sought_among_runs_with_the_same_full_precision_model(tmp_path, write_run):
    for model, fids in (("digits", (3, 4)), ("latent", (1, 2))):
        for calibration, fid in zip(("ndtc", "uniform"), fids, strict=True):
            settings = {"model": {"name": model}}
            write_run(tmp_path / f"{model}{calibration}", "w8a8", calibration, metrics={"fid": fid}, config=settings)
    rows = ["model", "calibration"]
    assert table_of(tmp_path, rows).frame["fid.best"].tolist() == [True, False, True, False]
    assert table_of(tmp_path, rows, best_of_all=True).frame["fid.best"].tolist() == [False, False, True, False]


def test_different_metric_specs_are_never_averaged(tmp_path, write_run):
    write_run(tmp_path / "a", seed=0, metrics={"fid": 1.0})
    write_run(tmp_path / "b", seed=1, metrics={"fid": 3.0})
    write_run(tmp_path / "c", seed=2, metrics={"fid": 50.0}, spec=SPEC | {"n_samples": 64})
    table = table_of(tmp_path)
    assert cells(table) == {"ndtc|(a)": 2.0, "ndtc|(b)": 50.0}
    assert not table.frame["fid.best"].any()  # nor compared
    assert any(note.startswith("(b) ") and "n_samples 64" in note and "seed 2" in note for note in table.notes)
    assert any("neither averaged nor compared" in note for note in table.notes)


def test_no_difference_to_a_reference_that_was_scored_otherwise(tmp_path, write_run):
    write_run(tmp_path / "a", "fp32", "none", spec=SPEC | {"n_samples": 64})
    write_run(tmp_path / "b")
    assert table_of(tmp_path, delta=True).frame["fid.delta"].isna().all()


def test_a_repeated_run_counts_once_and_is_named(tmp_path, write_run):
    write_run(tmp_path / "old", metrics={"fid": 100.0})
    write_run(tmp_path / "new", metrics={"fid": 1.0})
    os.utime(tmp_path / "old" / "results.json", (1, 1))
    table = table_of(tmp_path)
    assert cells(table) == {"ndtc": 1.0}
    assert any("newest" in note and note.endswith("not old") for note in table.notes)


def test_an_older_run_with_other_settings_is_no_repetition(tmp_path, write_run):
    write_run(tmp_path / "old", config={"sampler": {"eta": 1.0}})
    write_run(tmp_path / "new")
    with pytest.raises(ConfigError, match=r"differ in sampler.eta \(0, 1\): add sampler.eta to rows, cols or agg"):
        table_of(tmp_path)
    assert cells(table_of(tmp_path, where={"sampler.eta": [1]})) == {"ndtc": 1.0}
    assert len(table_of(tmp_path, cols=["sampler.eta"]).groups) == 2
    table = table_of(tmp_path, agg=["seed", "sampler.eta"])
    assert table.frame["fid.runs"].tolist() == [2] and any("sampler.eta 0/0, 0/1" in note for note in table.notes)


def test_unfinished_runs_are_named_and_their_rows_are_shown_as_missing(two_by_two, write_run):
    write_run(two_by_two / "failed", "w4a8", "raw", status="failed", error="no\nimages", metrics={"fid": 9.0})
    write_run(two_by_two / "killed", "w8a8", "ndtc", 5, status="running", stage="fp32", metrics={"fid": 9.0})
    (two_by_two / "broken").mkdir()
    (two_by_two / "broken" / "results.json").write_text("{")
    table = table_of(two_by_two, cols=["bits"])
    assert "| raw | — | — |" in lines(table)
    assert cells(table, "w8a8/fid")["ndtc"] == 2.0
    write_run(two_by_two / "large", "w8a8", "ndtc", 6, status="infeasible", error="too many bit operations")
    table = table_of(two_by_two, cols=["bits"])
    expected = ("failed: failed (no images)", "unfinished: killed (fp32)", "unreadable: broken",
                "infeasible: large (too many bit operations)")
    for note in expected:
        assert note in table.notes
    assert "failed: failed (no images)" not in table_of(two_by_two, where={"bits": ["w8a8"]}).notes


def test_a_missing_setting_is_a_row_and_not_dropped(tmp_path, write_run):
    write_run(tmp_path / "a", config={"calibration": {"rounds": None}}, metrics={"fid": 1.0})
    write_run(tmp_path / "b", config={"calibration": {"rounds": 2}}, metrics={"fid": 2.0})
    write_run(tmp_path / "c", config={"calibration": {"rounds": 10}}, metrics={"fid": 3.0})
    table = table_of(tmp_path, rows=["calibration.rounds"])
    assert list(cells(table).items()) == [("2", 2.0), ("10", 3.0), ("—", 1.0)]
    assert list(cells(table_of(tmp_path, rows=["calibration.rounds"], where={"calibration.rounds": [None]}))) == ["—"]


def test_full_precision_does_not_split_by_what_has_no_effect_on_it(tmp_path, write_run):
    for seed, metric in enumerate(("mse", "lp")):
        settings = {"metric": {"name": metric}}
        write_run(tmp_path / f"fp{seed}", "fp32", "none", seed, metrics={"fid": 1.0 + seed}, config=settings)
        write_run(tmp_path / f"q{seed}", seed=seed, metrics={"fid": 5.0}, config=settings)
    table = table_of(tmp_path, rows=["metric"])
    assert cells(table) == {"FP32": 1.5, "lp": 5.0, "mse": 5.0}
    assert list(cells(table_of(tmp_path, rows=["metric"], fp32=False))) == ["lp", "mse"]
    assert "FP32" in cells(table_of(tmp_path, rows=["metric"], where={"metric": ["lp"], "bits": ["w8a8"]}))
    assert list(cells(table_of(tmp_path, rows=["model"], where={"metric": ["lp"]}))) == ["digits (FP32)", "digits"]


def test_full_precision_has_the_bit_operations_and_size_that_quantized_runs_report(tmp_path, write_run):
    account = {
        "bops": {"conv_linear": 2e9}, "bops_fp32": {"conv_linear": 32e9}, "weight_bytes": 1e6, "fp32_bytes": 4e6,
        "bops_ratio": 16.0,
    }
    write_run(tmp_path / "fp", "fp32", "none")
    for seed in range(2):
        write_run(tmp_path / f"q{seed}", seed=seed, quantization=account)
    frame = table_of(tmp_path, values=["bops_g", "size_mb", "bops_ratio"]).frame
    assert frame[["bops_g", "size_mb", "bops_ratio"]].to_numpy().tolist() == [[32, 4, 1], [2, 1, 16]]
    assert frame["bops_g.std"].isna().all()


def test_unknown_names_are_told_with_those_that_are_near(two_by_two):
    with pytest.raises(ConfigError, match="calibratoin: no such configuration key; did you mean 'calibration'"):
        table_of(two_by_two, rows=["calibratoin"])
    with pytest.raises(ConfigError, match="no such configuration key; did you mean .*sampler.eta"):
        table_of(two_by_two, cols=["sampler.etta"])
    with pytest.raises(ConfigError, match=r"logger: no such configuration key; did you mean 'logger\.project'"):
        table_of(two_by_two, rows=["logger"])
    with pytest.raises(ConfigError, match="fidd: no such value; did you mean .*fid"):
        table_of(two_by_two, values=["fidd"])
    with pytest.raises(ConfigError, match="sampler.spacing"):
        table_of(two_by_two, rows=["sampler.spacing"])
    known = {"settings": ["config.sampler.spacing"], "where": {"bits": ["w4a8"]}, "fp32": False}
    assert list(cells(table_of(two_by_two, rows=["sampler.spacing"], **known))) == ["—"]
    with pytest.raises(DataError, match=r"none of the runs passes the filter \(bits=w2a2\)"):
        table_of(two_by_two, where={"bits": ["w2a2"]}, fp32=False)


def test_bits_stand_from_wide_to_narrow_and_numbers_by_size(tmp_path, write_run):
    for bits in ("w4a8", "w8a8", "step_snr", "w4a4"):
        write_run(tmp_path / bits, bits)
    assert list(cells(table_of(tmp_path, rows=["bits"]))) == ["w8a8", "w4a8", "w4a4", "step_snr"]
    order = ["w4a4", "w8a8"]
    assert list(cells(table_of(tmp_path, rows=["bits"], where={"bits": order}))) == order


def test_published_figures_stand_beside_ours_and_are_labelled(two_by_two):
    rows = (
        PublishedRow({"model": "big"}, True, {"fid": 21.0}),
        PublishedRow({"model": "big", "calibration": "ndtc"}, False, {"fid": 23.5}),
        PublishedRow({"model": "digits", "calibration": "uniform"}, False, {"fid": 2.0}),
    )
    published = [Published("Paper", "its table 1", rows)]
    table = table_of(two_by_two, rows=["model", "calibration"], where={"bits": ["w8a8"]}, published=published)
    assert lines(table)[0] == "| model | calibration | FID ↓ | published, Paper: FID |"
    assert "| big | FP32 | — | 21.00 |" in lines(table) and "| big | ndtc | — | 23.50 |" in lines(table)
    assert "| digits | uniform | 2.25 ± 0.35 | 2.00 |" in lines(table)
    assert "Paper: its table 1; published, not measured here" in table.notes
    assert r"& published, Paper \\" in render(table, "latex")
    nothing = table_of(two_by_two, rows=["model", "calibration"], where={"model": ["big"]}, published=published)
    assert len(lines(nothing)) == 5 and any("none of the runs passes" in note for note in nothing.notes)


def test_latex_has_rules_bold_numbers_and_the_notes_in_its_caption(two_by_two):
    text = render(table_of(two_by_two, cols=["bits"], title="A_1"), "latex", "x")
    assert r" & w8a8 & w4a8 \\" in text and r"\cmidrule(lr){2-2}" in text
    assert r"ndtc & $\mathbf{2.00 \pm 1.41}$ & $6.00 \pm 1.41$ \\" in text
    assert r"\caption{A\_1. extractor digits" in text and r"FID $\downarrow$" in text and r"\label{tab:x}" in text


def test_csv_holds_plain_numbers(two_by_two):
    table = table_of(two_by_two, cols=["bits"], delta=True)
    first, *rest = render(table, "csv").splitlines()
    assert first == ("calibration,w8a8/fid,w8a8/fid.std,w8a8/fid.n,w8a8/fid.delta,"
                     "w4a8/fid,w4a8/fid.std,w4a8/fid.n,w4a8/fid.delta")
    assert rest[2].split(",")[:2] == ["uniform", "2.25"] and rest[2].endswith(",,,,")
    assert "w4a8/fid" in plain_frame(table_of(two_by_two, cols=["bits"], where={"calibration": ["ndtc", "raw"]}))
    with pytest.raises(ConfigError, match="format='html'"):
        render(table, "html")


@pytest.fixture
def beside_their_twins(tmp_path, write_run):
    """NDTC and uniform at seeds 0 and 1, each with the FID of full precision: 1 and 2."""
    for calibration, extra in (("ndtc", 1.0), ("uniform", 3.0)):
        for seed in (0, 1):
            write_run(tmp_path / f"{calibration}{seed}", calibration=calibration, seed=seed,
                      metrics={"fid": 1.0 + seed + extra}, fp32={"fid": 1.0 + seed})
    return tmp_path


def test_the_twins_of_quantized_runs_are_the_full_precision_row(beside_their_twins):
    table = table_of(beside_their_twins, delta=True)
    assert cells(table) == {"FP32": 1.5, "ndtc": 2.5, "uniform": 4.5}
    assert table.frame["fid.runs"].tolist() == [2, 2, 2]
    assert table.frame["fid.delta"].tolist()[1:] == [1.0, 3.0] and not table.frame["fid.best"][0]
    assert list(cells(table_of(beside_their_twins, fp32=False))) == ["ndtc", "uniform"]
    assert cells(table_of(beside_their_twins, where={"calibration": ["ndtc"]})) == {"FP32": 1.5, "ndtc": 2.5}


def test_runs_of_the_full_precision_model_itself_come_first(beside_their_twins, write_run):
    write_run(beside_their_twins / "fp", "fp32", "none", metrics={"fid": 0.5})
    table = table_of(beside_their_twins, delta=True)
    assert cells(table)["FP32"] == 0.5 and table.frame["fid.delta"][1] == 1.5  # seed 0 alone


def test_twins_that_differ_are_no_row_and_stop_nothing(tmp_path, write_run):
    for eta in (0.0, 1.0):
        write_run(tmp_path / f"eta{eta}", calibration=f"c{eta:.0f}", metrics={"fid": 2.0}, fp32={"fid": eta},
                  config={"sampler": {"eta": eta}})
    table = table_of(tmp_path)
    assert cells(table) == {"c0": 2.0, "c1": 2.0}
    assert any(note.startswith("no FP32 row: ") and "differ in sampler.eta" in note for note in table.notes)
    assert cells(table_of(tmp_path, rows=["sampler.eta", "calibration"])) == {
        "0|FP32": 0.0, "0|c0": 2.0, "1|FP32": 1.0, "1|c1": 2.0,
    }


def test_numbers_that_older_runs_lack_are_gaps_in_their_rows(tmp_path, write_run):
    write_run(tmp_path / "old", "w8a8", "uniform", metrics={"eps_error": 0.02})
    new = {"eps_error": 0.02, "eps_error_without_last": 0.015, "fixed_pattern_share": 0.5}
    asked = ["eps_error_percent", "eps_error_without_last_percent", "fixed_pattern_share"]
    table = table_of(tmp_path, values=asked)
    assert lines(table)[0] == "| calibration | eps error % ↓ | eps error %, not last ↓ | fixed pattern ↓ |"
    assert lines(table)[2:] == ["| uniform | 2.00 | — | — |"]
    write_run(tmp_path / "new", "w8a8", "ndtc", metrics=new)
    assert lines(table_of(tmp_path, values=asked))[2:] == [
        "| ndtc | 2.00 | 1.50 | 0.50 |", "| uniform | 2.00 | — | — |"
    ]


def test_runs_that_differ_have_rows_of_their_own_where_asked_for(two_by_two):
    table = table_of(two_by_two, apart=True)
    assert table.frame[["calibration", "bits"]].to_numpy().tolist() == [
        ["FP32", ""], ["ndtc", "w8a8"], ["ndtc", "w4a8"], ["uniform", "w8a8"]
    ]
    assert table.frame["fid"].tolist() == [1.0, 2.0, 6.0, 2.25]
    assert table.rows == [(True, "0, 1")] + 3 * [(False, "0, 1")] and table.keys == ["calibration", "bits"]


def test_numbers_that_look_alike_have_all_their_digits_in_such_rows(tmp_path, write_run):
    for i, mean in enumerate((0.1234567, 0.1234568)):
        write_run(tmp_path / str(i), config={"calibration": {"mean": mean}})
    assert table_of(tmp_path, apart=True).frame["calibration.mean"].tolist() == ["0.1234567", "0.1234568"]


def test_rows_in_the_order_of_a_value_or_of_their_runs(tmp_path, write_run):
    for i, (calibration, score) in enumerate((("b", 5.0), ("a", 9.0), ("c", 7.0), ("d", math.nan))):
        write_run(tmp_path / str(i), calibration=calibration, metrics={"is": score, "fid": -score})
    write_run(tmp_path / "5", "fp32", "none")
    write_run(tmp_path / "4", calibration="0", status="failed")
    by_score = ["FP32", "a", "c", "b", "d", "0"]
    assert list(cells(table_of(tmp_path, sort="is"))) == list(cells(table_of(tmp_path, sort="fid"))) == by_score
    assert list(cells(table_of(tmp_path, sort=BY_RUN))) == ["FP32", "b", "a", "c", "d", "0"]


def test_a_label_stands_for_a_choice_and_orders_it(two_by_two):
    labels = [RowLabel("calibration", {"calibration": "uniform"}, "flat"),
              RowLabel("calibration", {"calibration": "ndtc", "bits": "w8*"}, "normal, 8 bits")]
    frame = table_of(two_by_two, rows=["calibration", "bits"], labels=labels).frame
    assert frame["calibration"].tolist() == ["FP32", "flat", "normal, 8 bits", "ndtc"]


def test_a_run_that_lacks_a_value_is_named(two_by_two, write_run):
    write_run(two_by_two / "lacking", "w8a8", "ndtc", 2, metrics={"fid": math.nan})
    assert "no FID in lacking: the mean is that of the other runs" in table_of(two_by_two, cols=["bits"]).notes


def test_an_interval_is_shown_of_a_single_run_and_a_deviation_of_several(write_run, tmp_path):
    scores, interval = {"psnr": 49.1, "eps_error": 0.0123}, {"psnr": [48.6, 49.54]}
    write_run(tmp_path / "a", bits="w8a8", metrics=scores, intervals=interval)
    for seed in (0, 1):
        write_run(tmp_path / f"b{seed}", bits="w4a4", seed=seed, metrics={"psnr": 30.0 + seed}, intervals=interval)
    table = result_table(gather([tmp_path]), Request(rows=["bits"], values=["psnr", "eps_error_percent"]))
    text = render(table)
    assert "**49.10** [48.60, 49.54]" in text and "30.50 ± 0.71" in text and text.count("[48.60") == 1
    assert "1.23 " in text and "paired bootstrap" in text
    assert r"$\mathbf{49.10} [48.60, 49.54]" in render(table, "latex")
    plain = plain_frame(table).set_index("bits")
    assert (plain.loc["w8a8", "psnr.low"], plain.loc["w8a8", "psnr.high"]) == (48.6, 49.54)
    assert plain.loc["w4a4"].isna()["psnr.low"] and "eps_error_percent.low" not in plain
    write_run(tmp_path / "a", bits="w8a8", metrics=scores)
    older = render(result_table(gather([tmp_path]), Request(rows=["bits"], values=["psnr"], where={"bits": ["w8a8"]})))
    assert "[" not in older and "bootstrap" not in older

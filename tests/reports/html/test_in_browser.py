"""Reports opened in headless Chromium: no errors, pictures load, sorting works, readable when narrow, wide and dark."""

import json
import re
import shutil
import subprocess

import pytest

from ptq_exp.reports.html import write_run_report, write_sweep_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed (Debian: apt install chromium)")

# Runs after the page's own script and tells what it finds to the page around it, where --dump-dom shows it.
PROBE = """
window.addEventListener("load", () => setTimeout(() => {
  const column = (table, i) => [...table.tBodies[0].rows].map((row) => row.cells[i].textContent);
  const sorts = [...document.querySelectorAll("table.sortable")].map((table) => {
    const seen = {};
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.focus();
      const focused = document.activeElement === button;
      const states = [head.ariaSort];
      const orders = [column(table, i)];
      for (const click of [1, 2]) { button.click(); states.push(head.ariaSort); orders.push(column(table, i)); }
      const others = [...table.tHead.rows[0].cells].filter((o) => o.ariaSort && o !== head && o.ariaSort !== "none");
      seen[i + " " + button.textContent] = { focused, states, orders, others: others.length };
    });
    return seen;
  });
  const luminance = (color) => {
    const [r, g, b] = color.match(/[0-9.]+/g).map((v) => v / 255).map((v) =>
      v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    while (element && getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
    return getComputedStyle(element ?? document.body).backgroundColor;
  };
  const contrast = [...document.querySelectorAll("h1, h2, p, td, th, dt, dd, a, figcaption, summary, pre")].map((e) => {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  });
  const images = [...document.images];
  const found = {
    width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches, page: luminance(ground(document.body)),
    contrast: Math.min(...contrast), texts: contrast.length, images: images.length,
    broken: images.filter((i) => !i.complete || !i.naturalWidth).length,
    beyond: images.filter((i) => i.getBoundingClientRect().right > innerWidth && !i.closest(".paper")).length,
    figures: images.filter((i) => i.closest("picture")).map((i) => [i.naturalWidth, i.clientWidth / i.naturalWidth]),
    small: Math.min(...[...document.querySelectorAll("p, td, th, dt")].map(
      (e) => parseFloat(getComputedStyle(e).fontSize))),
    requests: performance.getEntriesByType("resource").filter((r) => !r.name.startsWith("data:")).map((r) => r.name),
    sorts,
  };
  parent.postMessage(JSON.stringify(found), "*");
}, 50));
"""
# Windows of Chromium have a smallest width, frames have none.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<body><pre id="found"></pre>
<script>addEventListener("message", (event) => { document.getElementById("found").textContent = event.data; });</script>
<iframe src="probed.html" width="WIDTH" height="900" style="border: 0"></iframe>"""


def opened(path, tmp_path, width, dark=False):
    """What the probe finds in a frame of that width, and the errors on the console."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it would stop the probe
    copy = tmp_path / "probed.html"
    copy.write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    found, errors = chromium(frame, tmp_path, "--dump-dom", "--window-size=1700,1000",
                             f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    (values,) = re.findall(r'<pre id="found">(.*?)</pre>', found, re.DOTALL)
    values = values.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(values), errors


def chromium(path, tmp_path, *arguments):
    """Standard output, and the lines of the page's console."""
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", *arguments, path.as_uri(),
    ]
    run = subprocess.run(command, capture_output=True, timeout=120)
    assert run.returncode == 0, run.stderr.decode(errors="replace")[-2000:]
    console = [line for line in run.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return run.stdout.decode(), console


@pytest.fixture
def run_report(make_run, tmp_path):
    schedule = {"rule": "snr", "activation": [8, 8, 4], "shares": {"4": 1 / 3, "8": 2 / 3}}
    folder = make_run(tmp_path / "run", analysis=True, bit_schedule=schedule, name="a_long_name_" * 12)
    return write_run_report(folder)


@pytest.fixture
def sweep_report(make_run, tmp_path):
    for i, (bits, fid) in enumerate([("w8a8", 1.1), ("w4a8", 12.0), ("w6a6", 2.0)]):
        make_run(tmp_path / "sweep" / str(i), name=f"ndtc_{bits}", bits=bits, fid=fid, bops=(4 - i) * 1e9)
    make_run(tmp_path / "sweep" / "3", name="fp32", quantized=False)
    return write_sweep_report(tmp_path / "sweep")


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1600, False), (1600, True)])
def test_a_run_is_readable_in_every_window(width, dark, run_report, tmp_path):
    found, errors = opened(run_report, tmp_path, width, dark)
    assert errors == [] and found["requests"] == []
    assert found["width"] == width and found["overflow"] <= 0 and found["beyond"] == 0
    assert found["images"] >= 4 and found["broken"] == 0
    assert len(found["figures"]) == 3
    for own_width, scale in found["figures"]:  # text in figures is 13 pixels high before they are scaled
        assert (own_width < 500) == (width == 400) and 0.9 <= scale <= 1.1
    assert found["dark"] is dark and (found["page"] < 0.1) == dark
    assert found["contrast"] >= 4.5 and found["texts"] > 50 and found["small"] >= 13


def test_the_page_runs_under_its_own_policy_without_a_complaint(run_report, tmp_path):
    dom, errors = chromium(run_report, tmp_path, "--dump-dom")
    assert errors == [] and "</section>" in dom
    forbidden = tmp_path / "forbidden.html"
    forbidden.write_text(run_report.read_text().replace("</body>", "<script>document.title = 'run'</script></body>"))
    dom, errors = chromium(forbidden, tmp_path, "--dump-dom")
    assert len(errors) == 1 and "Content Security Policy" in errors[0] and "<title>run</title>" not in dom


def shown_number(text):
    return float(text.split(" ")[0].rstrip("%").replace("−", "-").replace(",", ""))


def test_tables_of_a_sweep_sort_both_ways_with_missing_values_last(sweep_report, tmp_path):
    found, errors = opened(sweep_report, tmp_path, 1600)
    assert errors == [] and found["overflow"] <= 0 and len(found["sorts"]) == 2
    numeric = 0
    for table in found["sorts"]:
        for name, seen in table.items():
            assert seen["focused"] and seen["states"][1:] == ["ascending", "descending"] and seen["others"] == 0
            before, up, down = ([text for text in order if text != "—"] for order in seen["orders"])
            assert sorted(before) == sorted(up) == sorted(down)
            if name.split(" ", 1)[1] in ("FID", "FID increase", "BOPs, G", "seed"):
                numeric += 1
                assert [*map(shown_number, up)] == sorted(map(shown_number, up))
                assert [*map(shown_number, down)] == sorted(map(shown_number, up), reverse=True)
            for order in seen["orders"][1:]:
                assert "—" not in order[: len(up)]
    assert numeric == 7
    fid_increase = next(seen for name, seen in found["sorts"][0].items() if name.endswith("FID increase"))
    assert fid_increase["orders"][1] == ["0.20", "2.00", "22.00", "—"]

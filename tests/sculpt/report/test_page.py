"""`sculpt report`: everything that was measured is on one page, which needs nothing else."""

from __future__ import annotations

import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_language import tiny_model
from typer.testing import CliRunner

from sculpt.certificate.leak import Certificate, LeakRow
from sculpt.cli.app import app
from sculpt.report import charts
from sculpt.report.page import report
from sculpt.report.results import ReportError, Results
from sculpt.runs.state import MethodResult
from sculpt.task.table import TaskRow

NAN = math.nan
SVG = "{http://www.w3.org/2000/svg}"
NAMES = [f"model.layers.{i}.mlp.{kind}_proj" for i in range(2) for kind in ("up", "down")]


def method(name: str, *, leak: float = 1e-7, certified: bool = True) -> MethodResult:
    rows = [LeakRow(n, leak, leak / 2, leak / 4, 1e-9, 0.01, 0.0) for n in NAMES]
    return MethodResult(
        name,
        generated=[[0.91, NAN], [0.35, 0.82]],
        among_labels=[[0.95, NAN], [0.85, 0.83]],
        losses=[[3.0, 2.0, 1.0], [2.5, 1.5, NAN]],
        seconds={"subspaces": 3.0, "train": 40.0, "certify": 2.0, "evaluate": 5.0},
        step_seconds=1.234,
        peak_memory_bytes=3 * 2**30,
        optimizer_state_bytes=812 * 2**20,
        trainable_elements=106_168_320,
        certificates=[Certificate(rows, t, "recomputed") for t in ("one", "two")]
        if certified
        else [],
        subspaces=[[vars(TaskRow(n, (64, 32), 24, 8, 64, 0.9, "svd")) for n in NAMES]] * 2
        if certified
        else [[], []],
    )


def write(folder: Path, *methods: MethodResult, tasks: tuple[str, ...] = ("one", "two")) -> Path:
    config = {"model": "some-model", "seed": 7, "sculpt": {"unfreeze_rank_ratio": 0.25}}
    results = Results(config, {"torch": "1"}, [{"name": t} for t in tasks], {})
    results.methods.update({m.method: m for m in methods})
    folder.mkdir(parents=True)
    results.write(folder)
    return folder


class Page(HTMLParser):
    """Words, tags and references of a page, which must be well formed."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_one_page_has_everything_and_needs_nothing(tmp_path):
    run = write(tmp_path / "first-run", method("plain", certified=False), method("sculpt"))
    tiny_model().save_pretrained(run / "model")
    text = report([run])
    page = Page(text)
    assert page.links == []
    assert "script" not in page.tags
    assert "http" not in text.replace("http://www.w3.org", "")
    for words in (
        "first-run", "some-model", "Accuracy, generated answer", "0.91", "0.35", "0.585",
        "Forgetting of each task", "+0.560", "Training loss", "Leak of every matrix",
        "the constraint holds", "8 matrices over 2 tasks", "Ranks and spectra",
        "preserved 24 of k = 32", "Where the time went", "106,168,320", "1.0e-07", "torch",
    ):  # fmt: skip
        assert words in page.text, words
    assert "nan" not in text.lower()
    # Four accuracy matrices, forgetting, losses, two of leaks, two kinds, energy, times.
    assert page.tags.count("svg") == 12
    names = re.findall(r' id="([^"]*)"', text)
    assert len(names) == len(set(names))


def test_runs_stand_side_by_side(tmp_path):
    first = write(tmp_path / "a", method("sculpt"))
    second = write(tmp_path / "b", method("sculpt", leak=1e-3), tasks=("one", "<two>"))
    text = report([first, second])
    page = Page(text)
    assert "a: sculpt" in page.text
    assert "b: sculpt" in page.text
    # Each run has a colour of its own, in the charts as in the legend.
    for number in range(2):
        for what in ("--key", "fill", "stroke"):
            assert f"{what}: var(--c{number})" in text
    assert page.text.count("the constraint holds") == 1
    assert page.text.count("the constraint is broken") == 1
    assert text.count("fill: var(--bad)") == len(NAMES), "the broken matrices, and no others"
    assert "&lt;two&gt;" in text
    assert "<two>" not in text


def test_runs_of_the_same_tasks_share_their_charts(tmp_path):
    runs = [write(tmp_path / name, method("sculpt")) for name in ("sculpt", "b")]
    page = Page(report(runs))
    assert "sculpt: sculpt" not in page.text, "a run that is called like its method"
    assert "b: sculpt" in page.text
    assert page.text.count("tasks in a row") == 1
    assert page.text.count("optimizer steps") == 1, "one chart of both, on one scale"
    other = write(tmp_path / "c", method("sculpt"), tasks=("one", "three"))
    page = Page(report([*runs, other]))
    assert page.text.count("tasks in a row") == 2
    assert page.text.count("optimizer steps") == 3


def test_general_ability_is_shown_before_and_after(tmp_path):
    result = method("sculpt")
    result.general_scores = {"before": {"piqa acc": 0.78}, "after": {"piqa acc": 0.75}}
    run = write(tmp_path / "a", method("plain", certified=False), result)
    assert "piqa acc - 0.780 → 0.750" in Page(report([run])).text
    results = run / "results.json"
    results.write_text(results.read_text().replace("general_scores", "lm_eval"))
    assert "piqa acc - 0.780 → 0.750" in Page(report([run])).text, "of an earlier version"


def test_layers_are_those_of_the_method_whose_model_is_saved(tmp_path):
    weights, last = method("weights"), method("sculpt")
    row = TaskRow(NAMES[0], (64, 32), 24, 8, 64, 0.9, "curvature, ratio")
    last.subspaces[-1] = [vars(row)]
    page = Page(report([write(tmp_path / "run", weights, last)])).text
    assert "in the directions that the last task trained" in page


@pytest.mark.parametrize(
    ("affordable", "wanted", "said"),
    [
        (1e12, None, "preserved 24 of k = 32"),
        (0, None, "left out, they take more than a minute here: --spectra"),
        (0, True, "preserved 24 of k = 32"),
        (1e12, False, "left out by --no-spectra"),
    ],
)
def test_spectra_that_take_long_are_left_out(affordable, wanted, said, tmp_path, monkeypatch):
    monkeypatch.setattr("sculpt.report.page.AFFORDABLE", affordable)
    run = write(tmp_path / "run", method("sculpt"))
    tiny_model().save_pretrained(run / "model")
    assert said in Page(report([run], with_spectra=wanted)).text


def drawn(figure, label: str) -> ElementTree.Element:
    return ElementTree.fromstring(charts.as_svg(figure, label))


def widths(svg: ElementTree.Element, fill: str) -> list[float]:
    """Of the rectangles in a colour."""
    found = []
    for path in svg.iter(f"{SVG}path"):
        if f"fill: var(--{fill})" in path.get("style", ""):
            x = [float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", path.get("d", ""))]
            found.append(max(x) - min(x))
    return found


def test_charts_are_well_formed_and_keep_their_numbers():
    svg = drawn(charts.bars(["a & b"], {"x": [-0.25], "y": [0.5]}, first=2), "<bars>")
    assert svg.get("aria-label") == "<bars>"
    assert [t.text for t in svg.iter(f"{SVG}text")] == ["a & b", "-0.250", "+0.500"]
    assert widths(svg, "c3")[0] == pytest.approx(2 * widths(svg, "c2")[0], rel=1e-2)
    svg = drawn(charts.stacks({"m": {"p": 1.0, "q": 3.0}}, "s"), "times")
    assert widths(svg, "f1")[0] == pytest.approx(3 * widths(svg, "f0")[0], rel=1e-2)
    svg = drawn(charts.losses({"m": [[4.0, 2.0], [1.0, NAN]]}, ["a", "b"]), "loss")
    styles = [path.get("style", "") for path in svg.iter(f"{SVG}path")]
    assert sum("stroke: var(--c0)" in style for style in styles) == 4
    drawn(charts.spectra([([1.0, 0.1, 0.0], 0.5)], 0.75), "spectrum")


def test_cells_stand_where_their_matrices_are():
    values = {"layers.0.q": 0.0, "layers.2.q": 1.5, "layers.1.k": 0.5, "other": NAN}
    svg = drawn(charts.layers({"leak": values}), "leak")
    styles = [path.get("style", "") for path in svg.iter(f"{SVG}path")]
    assert [s for s in styles if "--heat" in s or "--bad" in s] == [
        "fill: var(--heat); opacity: 0.06",
        "fill: var(--bad)",
        "fill: var(--heat); opacity: 0.53",
    ]
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert texts == ["0", "1", "2", "layers.q", "layers.k", "other", "leak"]


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = write(tmp_path / "run", method("sculpt"))
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 2
    assert "pip install 'sculpt-kernels[report]'" in result.output


def test_the_command(tmp_path):
    run = write(tmp_path / "run", method("sculpt"))
    result = CliRunner().invoke(app, ["report", str(run)])
    assert result.exit_code == 0
    assert result.output.strip() == str(run / "report.html")
    Page((run / "report.html").read_text(encoding="utf-8"))
    out = tmp_path / "elsewhere" / "page.html"
    assert CliRunner().invoke(app, ["report", str(run), "--out", str(out)]).exit_code == 0
    assert out.is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no results.json, which is written at the end of a run.*'interrupted'"),
        ("{", "damaged or not of a run"),
        ('{"tasks": [], "methods": {}}', "has no methods"),
        ("[]", "damaged or not of a run"),
    ],
)
def test_what_is_no_run_is_refused(content, message, tmp_path):
    (tmp_path / "status.json").write_text(json.dumps({"state": "interrupted"}))
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(ReportError, match=message):
        report([tmp_path])
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ReportError, match="no directory"):
        report([tmp_path / "nowhere"])

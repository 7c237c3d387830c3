"""Tables, JSON and picture of a run that was made up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sculpt.certificate.leak import Certificate, LeakRow
from sculpt.metrics import METRICS, summary
from sculpt.report.charts import matrices, save_png
from sculpt.report.results import ACCURACIES, AMONG, GENERATED, Results, tables
from sculpt.runs.state import MethodResult
from tests.sculpt.report.test_page import method

NAN = math.nan


def certificate(task: str, leak: float, floor: float) -> Certificate:
    rows = [
        LeakRow("quiet", 1e-9, 1e-9, 1e-9, 1e-9, 0.1, 0.0),
        LeakRow("loud", leak, leak / 2, leak / 4, floor, 0.01, 0.0),
    ]
    return Certificate(rows, task, "recomputed")


def made_up(name: str, last: list[float]) -> MethodResult:
    return replace(
        method(name, certified=False),
        generated=[[0.9, NAN, NAN], [0.5, 0.8, NAN], last],
        among_labels=[[0.95, NAN, NAN], [0.85, 0.8, NAN], [0.7, 0.7, 0.7]],
    )


@pytest.fixture
def results() -> Results:
    sculpt = made_up("sculpt", [0.85, 0.75, 0.75])
    sculpt.certificates = [
        certificate("one", 3.1e-7, 1.2e-7),
        certificate("two", 8.0e-7, 7.9e-7),
        certificate("three", 1.5e-7, 1e-9),
    ]
    return Results(
        config={"model": "some-model", "seed": 7},
        versions={"torch": "1"},
        tasks=[{"name": name} for name in ("BBC topic", "tweet sentiment", "movie verdict")],
        methods={"plain": made_up("plain", [0.0, 0.1, 0.8]), "sculpt": sculpt},
    )


def shown(results: Results, width: int) -> str:
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(tables(results))
    return captured.get()


def test_tables_hold_every_figure_with_direction_and_definition(results: Results) -> None:
    text = shown(results, 120)
    flat = " ".join(text.split())
    for accuracy, meaning in ACCURACIES.items():
        assert f"Accuracy, {accuracy} (↑ higher is better): {meaning}" in flat
        for name, figures in results.summaries(accuracy).items():
            assert name in text
            assert f"{figures.average_accuracy:.3f}" in text
            assert f"{figures.forgetting:.3f}" in text
    for figure in (
        *("8.0e-07", "7.9e-07", "1,234 ms", "3,072 MiB", "812 MiB", "106,168,320"),
        *("40.0 s", "3.0 s", "7.0 s", "50.0 s", "-0.800"),
    ):
        assert figure in text, figure
    for metric in METRICS:
        assert (metric.title in text) == (metric.name != "forward_transfer")
    assert "best score ever minus" in text
    assert "nan" not in text
    assert "lm-eval" not in text
    assert (
        "Average accuracy ↑ plain 0.30, sculpt 0.78. Forgetting ↓ plain 0.80, sculpt 0.05." in flat
    )


@pytest.mark.parametrize("width", [60, 80, 200])
def test_tables_fit_the_terminal(results: Results, width: int) -> None:
    assert max(len(line) for line in shown(results, width).splitlines()) <= width


@pytest.mark.parametrize("width", [80, 120])
def test_tables_of_four_methods_can_be_read(results: Results, width: int) -> None:
    results.methods |= {f"method {n}": made_up("plain", [0.5, 0.6, 0.7]) for n in (3, 4)}
    lines = shown(results, width).splitlines()
    assert max(map(len, lines)) <= width
    rows = [" ".join(line.split()) for line in lines]
    for accuracy in ("0.50 0.60 0.70", "0.70 0.70 0.70"):
        assert f"movie verdict {accuracy}" in rows
    assert rows.count("method 4 BBC topic 0.90 · ·") == 1
    assert "time in steps ↓ 40.0 s 40.0 s 40.0 s 40.0 s" in rows
    assert "time in steps: all tasks" in rows


def test_json_is_whole_and_legal(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path)
    text = (tmp_path / "results.json").read_text()
    assert "NaN" not in text
    written = json.loads(text)
    sculpt = written["methods"]["sculpt"]
    assert sculpt["generated"][0] == [0.9, None, None]
    assert sculpt["certificates"][1]["worst"]["leak"] == 8.0e-7
    assert len(sculpt["certificates"][0]["rows"]) == 2
    for name, accuracy in (("generated", GENERATED), ("among_labels", AMONG)):
        figures = summary(getattr(results.methods["sculpt"], name))
        got = sculpt["metrics"][accuracy]
        assert got["forgetting"] == figures.forgetting
        assert got["forward_transfer"] is None
    assert set(written["definitions"]) == {*ACCURACIES, *(metric.name for metric in METRICS)}
    save_png(matrices(results), tmp_path / "matrix.png")
    png = (tmp_path / "matrix.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "matrix.png"}


@pytest.mark.parametrize(
    ("count", "lines", "columns"), [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 2, 2)]
)
def test_the_picture_has_two_methods_in_a_line(
    count: int, lines: int, columns: int, results: Results
) -> None:
    results.methods = {f"method {n}": made_up("plain", [0.5, 0.5, 0.5]) for n in range(count)}
    axes = matrices(results).axes
    assert [axis.get_title(loc="left") for axis in axes] == list(results.methods)
    corners = [axis.get_position(original=True).p0.round(6).tolist() for axis in axes]
    assert len({x for x, _ in corners}) == columns
    assert len({y for _, y in corners}) == lines


def test_worst_leak_is_the_one_nearest_to_its_limit(results: Results) -> None:
    worst = results.methods["sculpt"].worst_leak
    assert worst is not None
    assert (worst.name, worst.leak) == ("loud", 8.0e-7 / 1)
    assert results.methods["plain"].worst_leak is None
    still = MethodResult("sculpt", certificates=[certificate("one", 0.0, math.inf)])
    assert still.worst_leak is not None

"""Predictions of `sculpt inspect` against real steps of a pretrained model, and their table."""

from __future__ import annotations

import warnings

import pytest
import torch

from bench import inspection
from bench.inspection import COLUMNS, WAYS, Layout, Trained
from sculpt.demo.models import minilm

LAYOUTS = (Layout(2, 64), Layout(1, 64, True))
SLOW = pytest.mark.slow
CHECKED = (
    pytest.param("plain", marks=SLOW),
    "sculpt 1/4",
    pytest.param("sculpt, update, core", marks=SLOW),
)


@pytest.mark.parametrize("way", CHECKED)
def test_predictions_hold_for_a_pretrained_encoder(way):
    folder = minilm()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = Trained(folder, WAYS[way])
        found = inspection.compare(folder, WAYS[way], trained, LAYOUTS)
    for layout, both in found.items():
        for column in COLUMNS:
            expected, real = both["predicted"][column], both["measured"][column]
            assert expected == pytest.approx(real, rel=0.05), f"{column}, {layout}"
    # Recomputed layers leave their inputs only, and that shows in the peak.
    kept, again = (both["measured"] for both in found.values())
    assert again["activations"] < kept["activations"] / 4
    assert again["peak"] < kept["peak"]


def test_the_table_says_how_far_predictions_are_off():
    sizes = dict.fromkeys(COLUMNS, 100)
    layouts = {
        str(layout): {"predicted": sizes, "measured": sizes | {"step_peak": 120}}
        for layout in inspection.LAYOUTS
    }
    last = str(inspection.LAYOUTS[-1])
    layouts[last] = {"predicted": sizes | {"peak": 97}, "measured": sizes | {"step_peak": 1}}
    rows = [{"model": "m", "way": "plain", "process": 130, "layouts": layouts}]
    facts = {"cpu": "c", "torch": torch.__version__, "peft": "p", "date": "d", "command": "x"}
    table = inspection.table("inspection.json", facts | {"rows": rows})
    assert "largest difference 3.0%" in table
    line = "| m | plain | " + "1.000 | " * 5 + "1.000 1.000 0.970 | 1.000 | 1.20 | 1.30 |"
    assert table.splitlines()[-1] == line

"""What a step sends between processes, against the formulas."""

from __future__ import annotations

from launch import launch

from bench.traffic import CASES, count, expected, of_model


def counted():
    return [count(*case) for case in CASES]


def test_formulas_hold_to_the_byte(tmp_path):
    for found in launch(2, counted, tmp_path):
        assert found == [expected(*case) for case in CASES]


def test_less_than_plain_training():
    assert expected("sculpt replicas") * 16 == expected("plain replicas")
    for half in (False, True):
        assert expected("sculpt shards", half) < expected("plain shards", half)
    large = of_model(16384, 53248, 1024, 126, 0.25)
    assert large["sculpt"] < large["plain"]
    assert large["memory"] < large["plain memory"]

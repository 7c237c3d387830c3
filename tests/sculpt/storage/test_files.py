"""Atomic writes: whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sculpt.storage.files import build_once, replacing_directory, replacing_file, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), replacing_file(path) as temporary:
        fail(temporary)
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]
    assert path.read_text() == "old"


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [math.nan, (1.5, math.inf)], 3: Path("p")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, [1.5, None]], "3": "p"}


def test_a_build_happens_once_and_leaves_nothing_where_it_fails(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []
    built = []
    for _ in range(2):
        folder = build_once(tmp_path / "a", lambda f: built.append((f / "x").touch()))
    assert len(built) == 1
    assert [p.name for p in folder.iterdir()] == ["x"]


def test_whoever_finishes_first_wins(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with replacing_directory(target) as slow:
        (slow / "by").write_text("slow")
        with replacing_directory(target) as fast:
            (fast / "by").write_text("fast")
    assert (target / "by").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]

"""A slip in any field, or in any value that is one of several, is named with line and nearest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from sculpt.config import SculptConfig
from sculpt.runs.config import RunConfig
from sculpt.runs.yaml_file import ConfigError, read_config

Place = tuple[str, ...]


def smallest() -> dict[str, Any]:
    """A file that is right."""
    return {"model": "m", "out": "o", "data": {"tasks": [{"name": "a", "train": "a.jsonl"}]}}


def sections(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or annotation is SculptConfig
    ):
        yield annotation
    for argument in get_args(annotation):
        yield from sections(argument)


def fields(section: type, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Place and type of every field that a file may have."""
    if dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            yield (*place, field.name), None
        return
    assert issubclass(section, BaseModel)
    for name, info in section.model_fields.items():
        yield (*place, name), info.annotation
        for inner in sections(info.annotation):
            yield from fields(inner, (*place, name))


FIELDS = dict(fields(RunConfig))


def choices(annotation: Any) -> list[str]:
    if get_origin(annotation) is Literal:
        return [value for value in get_args(annotation) if isinstance(value, str)]
    return [c for argument in get_args(annotation) for c in choices(argument)]


def slips(name: str) -> set[str]:
    """What fingers make of a name."""
    found = {name + name[-1], name.replace("_", "-"), name.title().replace("_", "")}
    if len(name) > 3:
        found |= {name[:-1], name[0] + name[2] + name[1] + name[3:]}
    return found - {name}


def error_of(folder: Path, place: Place, value: Any) -> tuple[str, int]:
    """What is said of the value at `place`, and the line on which it stands."""
    values = smallest()
    section: Any = values
    for name in place[:-1]:
        section = section.setdefault(name, {})
        section = section[0] if isinstance(section, list) else section
    section[place[-1]] = value
    path = folder / "run.yaml"
    with path.open("w", encoding="utf-8") as file:
        yaml = YAML()
        yaml.default_flow_style = False
        yaml.dump(values, file)
    written = YAML().load(path.read_text(encoding="utf-8"))
    for name in place[:-1]:
        written = written[name]
        written = written[0] if isinstance(written, list) else written
    line = written.lc.key(place[-1])[0] + 1
    with pytest.raises(ConfigError) as raised:
        read_config(path)
    return str(raised.value), line


def test_all_sections_are_walked() -> None:
    for place in ("training", "lr"), ("data", "tasks", "measure"), ("sculpt", "engine"):
        assert place in FIELDS
    assert len(FIELDS) > 60


@pytest.mark.parametrize("place", FIELDS, ids=".".join)
def test_a_slip_in_a_field_names_it_its_line_and_the_nearest(tmp_path: Path, place: Place) -> None:
    known = {other[-1] for other in FIELDS if other[:-1] == place[:-1]}
    for slip in slips(place[-1]) - known:
        said, line = error_of(tmp_path, (*place[:-1], slip), 1)
        mine = [part for part in said.splitlines() if f"run.yaml:{line}: " in part and slip in part]
        assert mine, (slip, said)
        assert f"did you mean {place[-1]!r}?" in mine[0], (slip, said)


CHOICES = [place for place, annotation in FIELDS.items() if choices(annotation)]
CHOICES.remove(("data", "tasks", "fields"))


@pytest.mark.parametrize("place", CHOICES, ids=".".join)
def test_a_slip_in_a_choice_names_the_nearest(tmp_path: Path, place: Place) -> None:
    for choice in choices(FIELDS[place]):
        said, line = error_of(tmp_path, place, choice + choice[-1])
        assert f"run.yaml:{line}: " in said
        assert f"did you mean {choice!r}?" in said, said


CHOICES_OF_SCULPT = {
    "constraint": "strict", "engine": "compact", "coordinates": "full", "others": "freeze",
    "weight_update": "recompute", "originals": "disk", "basis_dtype": "weight",
}  # fmt: skip


@pytest.mark.parametrize(("field", "choice"), CHOICES_OF_SCULPT.items())
def test_a_slip_in_a_choice_of_sculpt_names_the_nearest(
    tmp_path: Path, field: str, choice: str
) -> None:
    said, line = error_of(tmp_path, ("sculpt", field), choice[:-1])
    assert f"run.yaml:{line}: " in said
    assert f"did you mean {choice!r}?" in said, said

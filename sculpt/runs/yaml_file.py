"""A run from a YAML file, with every mistake named by field and line, and the nearest valid name.

ruamel.yaml, not PyYAML: it knows where each value stands, refuses a key given twice, and reads
`1e-5` as a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from sculpt.nearest import did_you_mean
from sculpt.runs.config import RunConfig, describe

Place = tuple[str | int, ...]


class ConfigError(ValueError):
    """The configuration is wrong; the message names every field and line."""


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the file at `path` describes, with `overrides` of the form "key.key=value".

    Raises `ConfigError`.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from None
    values, lines = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected fields such as `model: DIRECTORY`, got {values!r}")
    places: dict[Place, str] = {place: f"{path}:{line}" for place, line in lines.items()}
    for argument in overrides:
        _override(values, argument, places)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_problem(item, values, places, str(path)) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def _parse(text: str, source: str) -> tuple[Any, dict[Place, int]]:
    """Plain values, and the line of each field, counted from 1."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        loaded = YAML(typ="rt").load(StringIO(text))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem or error).splitlines()[0]
        raise ConfigError(f"{source}:{line}: {problem}") from None
    except YAMLError as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None
    lines: dict[Place, int] = {}
    return _plain(loaded, (), lines), lines


def _plain(value: Any, place: Place, lines: dict[Place, int]) -> Any:
    if isinstance(value, CommentedMap):
        for key in value:
            lines[*place, str(key)] = value.lc.key(key)[0] + 1
        return {str(key): _plain(item, (*place, str(key)), lines) for key, item in value.items()}
    if isinstance(value, CommentedSeq):
        for index in range(len(value)):
            lines[*place, index] = value.lc.item(index)[0] + 1
        return [_plain(item, (*place, index), lines) for index, item in enumerate(value)]
    for kind in (bool, int, float, str):  # the parser's own subclasses remember their spelling
        if isinstance(value, kind):
            return kind(value)
    return value


def _override(values: dict[str, Any], argument: str, places: dict[Place, str]) -> None:
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise ConfigError(f"argument {argument!r}: expected key=value, such as training.lr=1e-5")
    value, _ = _parse(text, f"argument {argument!r}") if text.strip() else (None, {})
    *above, last = key.split(".")
    inner: Any = values
    for depth, name in enumerate(above):
        inner = inner.setdefault(name, {})
        places.setdefault(tuple(above[: depth + 1]), f"argument {argument!r}")
        if not isinstance(inner, dict):
            raise ConfigError(
                f"argument {argument!r}: {'.'.join(above[: depth + 1])} holds {inner!r}, no fields"
            )
    inner[last] = value
    places[*above, last] = f"argument {argument!r}"


def _problem(item: ErrorDetails, values: Any, places: dict[Place, str], source: str) -> str:
    """One line: where, which field, what is wrong, and the nearest valid name."""
    place = _known(item["loc"], values)
    if item["type"] == "value_error" and isinstance(item.get("input"), dict):
        # A check of a whole section says in its message which field it is about.
        named = [key for key in item["input"] if key in item["msg"]]
        place = (*place, *sorted(named, key=item["msg"].find)[:1])
    field = ".".join(str(part) for part in place)
    where = next(
        (places[place[:end]] for end in range(len(place), 0, -1) if place[:end] in places), source
    )
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        names = _fields(place[:-1])
        return f"{where}: unknown field {field!r}{_nearest(str(place[-1]), names)}"
    if kind == "missing":
        return f"{where}: the field {field!r} is missing"
    if kind == "literal_error":
        options = [str(option).strip("'") for option in _options(item)]
        return (
            f"{where}: {field}={given!r}, expected one of {', '.join(options)}"
            f"{_nearest(str(given), options)}"
        )
    return f"{where}: {describe(item, field)}"


def _known(loc: Place, values: Any) -> Place:
    """`loc` without the parts that name a type among several and no field."""
    place: list[str | int] = []
    for index, part in enumerate(loc):
        if isinstance(values, dict):
            if part not in values and index < len(loc) - 1:
                continue
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif not isinstance(values, list):
            break
        place.append(part)
    return tuple(place)


def _options(item: ErrorDetails) -> list[str]:
    expected = str(item.get("ctx", {}).get("expected", ""))
    return [part for part in expected.replace(" or ", ", ").split(", ") if part]


def _fields(place: Place) -> list[str]:
    """Names of the fields that there are at `place`."""
    section: Any = RunConfig
    for part in place:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), None)
            if section is None:
                return []
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _nearest(name: str, known: Sequence[str]) -> str:
    others = f"; known: {', '.join(known)}" if known else ""
    return did_you_mean(name, known) or others

"""A run from a YAML file, with every mistake named by field and line, and the nearest valid name.

ruamel.yaml, not PyYAML: it reads `1e-5` as a number. It gives nodes, which know their lines; what
they mean is decided here. Anchors, aliases and merge keys (`<<`) work; tags and keys that a run has
no use for are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sculpt.messages import did_you_mean
from sculpt.runs.config import RunConfig, describe
from sculpt.runs.methods import method_class

Place = tuple[str | int, ...]
T = TypeVar("T")

TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"
VALUES = {TAG + name for name in ("str", "int", "float", "bool", "null")}
TEXT = {TAG + name for name in ("timestamp", "value", "merge")}
"""What YAML takes for a date, a default key or a merge, and is text in a run."""


class ConfigError(ValueError):
    """The configuration is wrong; the message names every field and line."""


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the file at `path` describes, with `overrides` of the form "key.key=value".

    Relative paths in the file start at its folder, those of `overrides` at the current one.

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
    if path.is_file():  # a pipe has no folder
        _start_paths_at(path.absolute().parent, values, lines)
    places: dict[Place, str] = {place: f"{path}:{line}" for place, line in lines.items()}
    for argument in overrides:
        _override(values, argument, places)
    values.setdefault("options", {})  # there may be some that a method cannot do without
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = [_problem(item, values, places, str(path)) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def _parse(text: str, source: str) -> tuple[Any, dict[Place, int]]:
    """Plain values, and the line of each field, counted from 1."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.reader import ReaderError

    yaml = YAML(typ="safe", pure=True)
    try:
        root = yaml.compose(StringIO(text))
        reader = _Reader(source, yaml.constructor.construct_object)
        return (None if root is None else reader.value(root, ())), reader.lines
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = ": ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{source}:{line}: {problem}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{source}:{line}: the character U+{error.character:04X} is not allowed"
        ) from None
    except YAMLError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deep") from None


class _Reader:
    """Nodes as plain values. `lines` has that of each field, at its anchor where it is merged."""

    def __init__(self, source: str, scalar: Callable[[Node], Any]) -> None:
        self.lines: dict[Place, int] = {}
        self._source = source
        self._scalar = scalar

    def value(self, node: Node, place: Place, above: tuple[Node, ...] = ()) -> Any:
        """The value of `node`, which is inside of the nodes `above`."""
        self._refuse_circle(node, above)
        inner = (*above, node)
        if isinstance(node, MappingNode) and node.tag == TAG + "map":
            found = {}
            for name, (key, item) in self._entries(node, above).items():
                self.lines[*place, name] = _line(key)
                found[name] = self.value(item, (*place, name), inner)
            return found
        if isinstance(node, SequenceNode) and node.tag == TAG + "seq":
            self.lines |= {(*place, index): _line(item) for index, item in enumerate(node.value)}
            return [self.value(item, (*place, i), inner) for i, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and node.tag in TEXT:
            return node.value
        if isinstance(node, ScalarNode) and node.tag in VALUES:
            try:
                return self._scalar(node)
            except (ValueError, KeyError):
                pass  # `!!int ten`
        tag = str(node.tag).replace(TAG, "!!")
        raise self._error(node, f"{tag} is not expected here: write plain values, without a tag")

    def _entries(self, node: MappingNode, above: tuple[Node, ...]) -> dict[str, tuple[Node, Node]]:
        """Key and value by name: those of `node` itself, then what it merges and does not have."""
        self._refuse_circle(node, above)
        own: dict[str, tuple[Node, Node]] = {}
        merged: dict[str, tuple[Node, Node]] = {}
        for key, item in node.value:
            if key.tag == MERGE:
                for part in item.value if isinstance(item, SequenceNode) else (item,):
                    if not isinstance(part, MappingNode):
                        raise self._error(key, "<< expects an alias of fields, or a list of them")
                    merged = self._entries(part, (*above, node)) | merged
                continue
            if not isinstance(key, ScalarNode):
                raise self._error(key, "expected the name of a field before the colon")
            if key.value in own:
                first = _line(own[key.value][0])
                raise self._error(key, f"found duplicate key {key.value!r}, first in line {first}")
            own[key.value] = (key, item)
        return own | {name: entry for name, entry in merged.items() if name not in own}

    def _refuse_circle(self, node: Node, above: tuple[Node, ...]) -> None:
        if any(node is other for other in above):
            raise self._error(node, f"the anchor {node.anchor!r} contains itself")

    def _error(self, node: Node, problem: str) -> ConfigError:
        return ConfigError(f"{self._source}:{_line(node)}: {problem}")


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _start_paths_at(folder: Path, values: Any, lines: dict[Place, int]) -> None:
    """Make relative paths among `values` start at `folder`."""
    for *above, last in lines:
        inner = values
        for part in above:
            inner = inner[part]
        text = inner[last]
        if isinstance(text, str) and not text.startswith("~") and _is_path((*above, last), values):
            inner[last] = str(folder / text)


def _override(values: dict[str, Any], argument: str, places: dict[Place, str]) -> None:
    key, equals, text = argument.partition("=")
    if not equals or not key:
        raise ConfigError(f"argument {argument!r}: expected key=value, such as training.lr=1e-5")
    value, _ = _parse(text, f"argument {argument!r}") if text.strip() else (None, {})
    *above, last = key.split(".")
    inner: Any = values
    for depth, name in enumerate(above):
        if inner.get(name) is None:
            inner[name] = {}
        inner = inner[name]
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
        section = _section(place[:-1], values)
        names = [] if section is None else list(section.model_fields)
        return f"{where}: unknown field {field!r}{_nearest(str(place[-1]), names)}"
    if kind == "missing":
        return f"{where}: the field {field!r} is missing"
    if given is None:
        return f"{where}: {field} is empty, expected a value"
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


def _section(place: Place, values: Any) -> type[BaseModel] | None:
    """What has its fields at `place` of `values`; None where that is no section of its own."""
    section: type[BaseModel] | None = RunConfig
    if place[:1] == ("options",):
        section, place = _options_of(values.get("method", "sculpt")), place[1:]
    for part in place:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        section = next(_types(section.model_fields[part].annotation, BaseModel), None)
    return section


def _options_of(method: Any) -> type[BaseModel] | None:
    """The fields of `options:` for this method; None where there is no such method."""
    try:
        return method_class(str(method)).Options
    except ValueError:
        return None


def _is_path(place: Place, values: Any) -> bool:
    section, name = _section(place[:-1], values), place[-1]
    if section is None or name not in section.model_fields:
        return False
    return any(_types(section.model_fields[name].annotation, Path))


def _types(annotation: Any, kind: type[T]) -> Iterator[type[T]]:
    """The types of `kind` that `annotation` names."""
    if isinstance(annotation, type) and issubclass(annotation, kind):
        yield annotation
    for argument in get_args(annotation):
        yield from _types(argument, kind)


def _nearest(name: str, known: Sequence[str]) -> str:
    others = f"; known: {', '.join(known)}" if known else ""
    return did_you_mean(name, known) or others

"""Layouts of a row: which of its values are question, answer, chat or document.

| layout | values |
|---|---|
| answer | `prompt`, `answer` |
| chat | `messages`: a list of `{"role", "content"}`, the last one the assistant's |
| document | `document` |
| label | `text` or `sentence`, and `label` |

All rows of a file have the layout of its first one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sculpt.data.config import TaskConfig
from sculpt.data.examples import DataError, Example, Message
from sculpt.data.rows import BadRows, Row

LAYOUTS = {
    "chat": ("messages",),
    "answer": ("prompt", "answer"),
    "document": ("document",),
    "label": ("text", "label"),
}
ROLES = ("system", "user", "assistant", "tool")


class _BadValueError(ValueError):
    """A value of this row cannot be used."""


def examples_of(rows: Iterable[Row], task: TaskConfig, bad: BadRows) -> list[Example]:
    """Rows as examples. Raises `DataError` as `bad` says, or where no row is left."""
    found: list[Example] = []
    layout = where = ""
    for row in rows:
        where = where or row.where
        try:
            values = _renamed(row.values, task.fields)
            own = _layout(values)
            layout = layout or own
            if own != layout:
                raise _BadValueError(f"layout {own!r} in a file that began with {layout!r}")
            example = _example(layout, values, task, row.where)
            if task.labels and example.wanted not in task.labels:
                raise _BadValueError(f"answer {example.wanted!r} is not one of {list(task.labels)}")
            found.append(example)
        except _BadValueError as error:
            bad.add(row.where, str(error))
    if not found:
        raise DataError(f"{where or 'the file'}: no usable row")
    return found


def _renamed(values: dict[str, Any], fields: Mapping[Any, str]) -> dict[str, Any]:
    renamed = dict(values)
    for ours, theirs in fields.items():
        if theirs not in values:
            raise _BadValueError(f"no value {theirs!r} (for {ours}), only {sorted(values)}")
        renamed[ours] = values[theirs]
    if "sentence" in renamed:
        renamed.setdefault("text", renamed["sentence"])
    return renamed


def _layout(values: dict[str, Any]) -> str:
    for layout, names in LAYOUTS.items():
        if all(name in values for name in names):
            return layout
    for names in LAYOUTS.values():
        missing = [name for name in names if name not in values]
        if len(missing) < len(names):
            raise _BadValueError(f"no {missing[0]!r}, only {sorted(values)}")
    expected = "; ".join(", ".join(names) for names in LAYOUTS.values())
    raise _BadValueError(f"values {sorted(values)}, expected one of: {expected}")


def _example(layout: str, values: dict[str, Any], task: TaskConfig, where: str) -> Example:
    match layout:
        case "chat":
            return Example(messages=_messages(values["messages"]), where=where)
        case "document":
            return Example(answer=_string(values, "document"), where=where)
        case "label":
            text = _string(values, "text")
            if task.instruction:
                options = f"\nOption: {', '.join(task.labels)} " if task.labels else ""
                text = f"{task.instruction}{options}\n{text}"
            return Example(text, _string(values, "label"), task.suffix, where=where)
        case _:
            text, suffix = split_question(_string(values, "prompt"))
            return Example(text, _string(values, "answer"), suffix, where=where)


def split_question(prompt: str) -> tuple[str, str]:
    """The prompt up to the words that ask for the answer, and these words.

    They are the last line; where this is the longest line itself, its closing word with a colon.
    """
    place = prompt.rfind("\n", 0, len(prompt.rstrip()))
    if place > 0 and len(prompt) - place < max(map(len, prompt[:place].split("\n"))):
        return prompt[:place], prompt[place:]
    closing = re.search(r"\s\S*:\s*$", prompt)
    return (prompt[: closing.start()], closing.group()) if closing else (prompt, "")


def _string(values: dict[str, Any], name: str) -> str:
    value = values[name]
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise _BadValueError(f"{name!r} is {value!r}, expected text")
    if not value.strip():
        raise _BadValueError(f"{name!r} is empty")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _BadValueError(f"'messages' is {value!r}, expected a list of messages")
    messages = []
    for number, item in enumerate(value, 1):
        role = item.get("role") if isinstance(item, dict) else None
        content = item.get("content") if isinstance(item, dict) else None
        if role not in ROLES or not isinstance(content, str) or not content.strip():
            raise _BadValueError(
                f"message {number} is {item!r}, expected a role, one of {', '.join(ROLES)}, "
                "and a content that is not empty"
            )
        messages.append(Message(role, content))
    if messages[-1].role != "assistant":
        raise _BadValueError(
            f"the last message is the {messages[-1].role}'s, so there is no answer"
        )
    return tuple(messages)

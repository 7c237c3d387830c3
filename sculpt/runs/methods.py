"""The classes that `method:` can name."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from sculpt.messages import did_you_mean

if TYPE_CHECKING:
    from sculpt.runs.method import Strategy

METHODS = {
    "sculpt": "sculpt.runs.sculpting:Sculpt",
    "plain": "sculpt.runs.plain:Plain",
    "multitask": "sculpt.runs.plain:MultiTask",
}
"""Short names of the methods that come with this package."""


def method_class(name: str) -> type[Strategy]:
    """The class with this short name or import path, `package.module:Class`.

    Modules are found as by a script in the current folder. Raises `ValueError`, in one line, for
    what cannot be imported or is no method.
    """
    module, _, attribute = METHODS.get(name, name).partition(":")
    if not (module and attribute):
        raise ValueError(
            f"expected one of {', '.join(METHODS)}, or the import path of a class, such as "
            f"package.module:Class{did_you_mean(name, METHODS)}"
        )
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    try:
        found = import_module(module)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{module} cannot be imported: {type(error).__name__}: {reason}"
        ) from error
    from sculpt.runs.method import Strategy

    classes = {n: v for n, v in vars(found).items() if inspect.isclass(v)}
    if attribute not in classes:
        methods = [n for n, v in classes.items() if issubclass(v, Strategy)]
        raise ValueError(f"{module} has no class {attribute}{did_you_mean(attribute, methods)}")
    method = classes[attribute]
    if not issubclass(method, Strategy):
        raise ValueError(f"{attribute} is no subclass of sculpt.runs.method.Strategy")
    if inspect.isabstract(method):
        missing = ", ".join(sorted(method.__abstractmethods__))
        raise ValueError(f"{attribute} does not define {missing}")
    return method

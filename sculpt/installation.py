"""Whether what is installed as `sculpt` is this project: another one on PyPI has that name."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "sculpt-kernels"
REMEDY = f"run `pip uninstall sculpt {DISTRIBUTION}`, then install {DISTRIBUTION} again"


def require_own_package() -> None:
    """Raise `ImportError` where `__init__.py` of `sculpt` is another project's, or gone."""
    package = sys.modules["sculpt"]
    if getattr(package, "__distribution__", None) != DISTRIBUTION:
        where = getattr(package, "__file__", None) or ", ".join(package.__path__)
        raise ImportError(
            f"the package `sculpt` that was imported, {where}, is not that of {DISTRIBUTION}: the "
            f"distribution `sculpt` on PyPI is another project with the same import name; {REMEDY}"
        )


def other_distribution() -> str | None:
    """What is wrong where a distribution called `sculpt` is installed too."""
    try:
        found = version("sculpt")
    except PackageNotFoundError:
        return None
    return (
        f"A distribution `sculpt` {found} is installed too. It is another project's, or an older "
        f"version of this one, and its files and those of {DISTRIBUTION} replace each other: "
        f"{REMEDY}."
    )

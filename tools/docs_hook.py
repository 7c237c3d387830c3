"""What `make docs` adds to the page of the command line: the options of every command."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

TYPER = [sys.executable, "-m", "typer", "sculpt.cli.app", "utils", "docs", "--name", "sculpt"]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    if page.file.src_uri != "reference/command-line.md":
        return markdown
    options = subprocess.run(TYPER, check=True, capture_output=True, text=True).stdout
    return markdown + "\n" + options[options.index("\n## ") :]

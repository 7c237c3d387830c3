"""Make `.venv` with the versions of `constraints.txt` and this project, or leave it as it is.

    python3 tools/bootstrap.py

Needs Python 3.11 and its standard library. Without an NVIDIA GPU the CPU build of torch is asked
for first. A stamp, written last, says what `.venv` was made from: while it is right, nothing is
run and no network is needed; without one, `.venv` is made again from nothing.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)
EXTRAS = "demo,dev,triton" if sys.platform == "linux" else "demo,dev"


class SetupError(Exception):
    """The set-up cannot go on; the text says why."""


class Setup:
    """The set-up of the project in folder `root`."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.venv = root / ".venv"
        self.python = self.venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self.stamp = self.venv / "set-up.json"
        self.log = root / ".cache" / "set-up.log"
        self.constraints = root / "constraints.txt"
        self.gpu = has_nvidia_gpu()

    def run(self) -> None:
        """Make `.venv` ready; a second call at the same time waits for the first."""
        self.log.parent.mkdir(exist_ok=True)
        with self.log.with_suffix(".lock").open("w") as lock:
            if os.name != "nt":
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            kept, wanted = self.noted(), self.description()
            if kept == wanted:
                return
            self.stamp.unlink(missing_ok=True)
            if not kept or kept["venv"] != wanted["venv"]:
                say("set-up: making .venv")
                shutil.rmtree(self.venv, ignore_errors=True)
                self.call(sys.executable, "-m", "venv", str(self.venv))
            try:
                self.install()
            except SetupError:
                # pip itself ended in order: what it installed is whole, and worth keeping.
                self.note({**wanted, "packages": "incomplete"})
                raise
            self.note(wanted)
            say("set-up: done")

    def note(self, made: dict[str, str]) -> None:
        part = self.stamp.with_suffix(".part")
        part.write_text(json.dumps(made, indent=1), encoding="utf-8")
        part.replace(self.stamp)

    def noted(self) -> dict[str, str]:
        """What `.venv` was made from; empty where it is not finished or does not run."""
        try:
            return dict(json.loads(self.stamp.read_bytes())) if self.python.exists() else {}
        except (OSError, ValueError):
            return {}

    def description(self) -> dict[str, str]:
        """What decides how `.venv` is made, and what it holds."""
        made = [sys.version, self.gpu, str(self.root), Path(__file__).read_text(encoding="utf-8")]
        files = [self.constraints.read_bytes(), (self.root / "pyproject.toml").read_bytes()]
        return {
            "venv": hashlib.sha256(json.dumps(made).encode()).hexdigest(),
            "packages": hashlib.sha256(b"\0".join(files)).hexdigest(),
        }

    def install(self) -> None:
        """Install torch, then what is pinned, then the project."""
        constraints = self.constraints
        if not self.install_cpu_torch() and sys.platform == "linux":
            # The CUDA build of torch names the one triton that it works with.
            pins = constraints.read_text(encoding="utf-8")
            constraints = self.log.with_name("constraints-cuda.txt")
            constraints.write_text(re.sub(r"(?m)^triton==.*\n", "", pins), encoding="utf-8")
            self.pip("torch", "-c", str(constraints))
        self.pip("--no-deps", "-r", str(constraints))
        project = f"{self.root}[{EXTRAS}]"
        self.pip("-c", str(constraints), "--no-build-isolation", "-e", project)

    def install_cpu_torch(self) -> bool:
        """Whether a CPU build of the pinned torch is wanted, and there is one."""
        if self.gpu or sys.platform != "linux":
            return False
        pinned = re.search(r"(?m)^torch==\S+", self.constraints.read_text(encoding="utf-8"))
        assert pinned is not None, "constraints.txt has no line `torch==...`"
        try:
            self.pip("--no-deps", f"{pinned[0]}+cpu")
        except SetupError as error:
            if f"No matching distribution found for {pinned[0]}+cpu" not in str(error):
                raise
            say(f"set-up: there is no {pinned[0]}+cpu here; taking {pinned[0]}")
            return False
        return True

    def pip(self, *arguments: str) -> None:
        """Run `pip install`; what it says goes to a log."""
        say(f"set-up: pip install {' '.join(arguments).replace(str(self.root), '.')}")
        quiet = ("--no-input", "--progress-bar", "off", "--disable-pip-version-check")
        self.call(str(self.python), "-m", "pip", "install", *quiet, *arguments)

    def call(self, *command: str) -> None:
        unwanted = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
        environment = {k: v for k, v in os.environ.items() if k not in unwanted}
        with self.log.open("w", encoding="utf-8") as log:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        if done.returncode:
            said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise SetupError(
                f"`{' '.join(command)}` failed. Its last words, of {self.log}:\n"
                + "\n".join(f"  {line}" for line in said[-8:])
            )


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, seen without any CUDA library."""
    if glob.glob("/proc/driver/nvidia/gpus/*") or glob.glob("/dev/nvidia[0-9]*"):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    try:
        if sys.version_info < OLDEST:
            raise SetupError(
                f"{sys.executable} is Python {sys.version.split()[0]}, and 3.11 or newer is "
                "needed: name one, `make PYTHON=python3.11 ...`"
            )
        Setup().run()
    except (SetupError, OSError) as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

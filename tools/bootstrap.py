"""Make `.venv` with everything the project needs; do nothing when it is there already.

    python3 tools/bootstrap.py

Needs Python 3.11 and its standard library. Installs the versions of `constraints.txt` and this
project in editable form. Without an NVIDIA GPU the CPU build of torch is asked for first.

A stamp in `.venv`, written last, says what it was made from; while it holds, nothing is run and no
network is needed. A note outside of `.venv` says that a set-up is under way; one that was killed
half-way leaves the note behind, and the next set-up starts from an empty `.venv`.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ["demo", "dev"]

UNREACHABLE = (
    r"Retrying \(Retry|Connection (refused|reset|aborted)|ConnectionError|Max retries exceeded|"
    r"Name or service not known|Temporary failure in name resolution|ProxyError|timed out"
)
# What pip prints, what is wrong, what to do about it. The first that matches is reported.
HINTS = (
    (
        r"No space left on device",
        "the disk is full",
        "free some space (the CPU set-up needs about 3 GB, the CUDA one 10 GB)",
    ),
    (
        UNREACHABLE,
        "pip could not reach its package index",
        "check the network, or pip's own settings: `pip config list`, PIP_INDEX_URL, PIP_PROXY",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED|SSLError",
        "pip does not trust the certificate of its package index",
        "point PIP_CERT at the right certificates",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "constraints.txt and pyproject.toml ask for different versions",
        "make them agree",
    ),
    (
        r"DO NOT MATCH THE HASHES|Hash mismatch|BadZipFile|has an invalid wheel",
        "a download arrived damaged",
        "run `pip cache purge`",
    ),
    (
        r"Permission denied",
        "a file may not be written",
        "check who owns .venv and pip's cache folder",
    ),
    (
        r"No matching distribution found",
        "pip's package index has no such version for this Python and machine",
        "take another Python, `make PYTHON=python3.11 ...`, or an index that has it "
        "(PIP_INDEX_URL, PIP_FIND_LINKS; PIP_NO_INDEX must not be set)",
    ),
    (
        r"Failed building wheel|subprocess-exited-with-error",
        "there is no ready-made build for this Python and machine, and building it failed",
        "take another Python, `make PYTHON=python3.11 ...`",
    ),
)


class SetupError(Exception):
    """The set-up cannot go on; the text says why and what to do."""


class Setup:
    """The set-up of the project in folder `root`."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.venv = root / ".venv"
        scripts = "Scripts" if os.name == "nt" else "bin"
        self.python = self.venv / scripts / ("python.exe" if os.name == "nt" else "python")
        self.stamp = self.venv / "set-up.json"
        self.notes = root / ".cache" / "set-up"
        self.under_way = self.notes / "under-way"
        self.log = self.notes / "pip.log"
        self.constraints = root / "constraints.txt"
        self.has_gpu = has_nvidia_gpu()

    def ready(self) -> bool:
        """Whether `.venv` is there and was made from what is here now."""
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return stamp == self.description() and os.access(self.python, os.X_OK)

    def description(self) -> dict[str, object]:
        """All that decides what `.venv` holds."""
        digest = hashlib.sha256()
        for path in (self.constraints, self.root / "pyproject.toml", Path(__file__)):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return {
            "files": digest.hexdigest(),
            "python": sys.version,
            "gpu": self.has_gpu,
            "folder": str(self.root),  # a virtual environment does not survive being moved
        }

    def run(self) -> None:
        """Make `.venv` ready; a second call at the same time waits for the first."""
        if self.ready():
            return
        self.notes.mkdir(parents=True, exist_ok=True)
        with locked(self.notes / "lock"):
            if self.ready():
                return
            started = time.monotonic()
            self.make_venv()
            self.under_way.write_text("removed when the set-up has ended\n", encoding="utf-8")
            self.log.write_text("", encoding="utf-8")
            try:
                self.install()
            except SetupError:
                # pip itself ended in order: what it installed is whole, and worth keeping.
                self.under_way.unlink()
                raise
            write_atomically(self.stamp, json.dumps(self.description(), indent=1))
            self.under_way.unlink()
            say(f"set-up: done in {time.monotonic() - started:.0f} s")

    def make_venv(self) -> None:
        """Keep a sound `.venv` of this Python, replace any other."""
        reason = self.reason_to_replace()
        if reason is None:
            return
        version = ".".join(str(n) for n in sys.version_info[:3])
        say(f"set-up: making .venv with Python {version} ({reason})")
        self.under_way.write_text("removed when the set-up has ended\n", encoding="utf-8")
        shutil.rmtree(self.venv, ignore_errors=True)
        made = subprocess.run(
            [sys.executable, "-m", "venv", str(self.venv)], capture_output=True, text=True
        )
        if made.returncode:
            said = (made.stdout + made.stderr).strip()
            raise SetupError(
                f"`{sys.executable} -m venv` failed.\n  it said: {last_line(said)}\n"
                "  what to do: install Python's own venv and pip (Debian, Ubuntu: the package "
                "python3-venv), or take another Python, `make PYTHON=python3.11 ...`"
            )

    def reason_to_replace(self) -> str | None:
        try:
            made_with = (self.venv / "pyvenv.cfg").read_text(encoding="utf-8")
        except OSError:
            return "there is none yet"
        if self.under_way.exists():
            return "the last set-up was stopped half-way"
        version = re.search(r"^version\s*=\s*(\d+)\.(\d+)", made_with, re.MULTILINE)
        if version is None or (int(version[1]), int(version[2])) != sys.version_info[:2]:
            return "the one here is of another Python"
        with contextlib.suppress(OSError, ValueError, KeyError):
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
            if stamp["folder"] != str(self.root):
                return "the one here was moved"
            if stamp["gpu"] != self.has_gpu:  # it decides which build of torch is wanted
                return "a GPU came or went"
        works = [str(self.python), "-c", "import pip"]
        if not os.access(self.python, os.X_OK) or subprocess.run(works).returncode:
            return "the one here does not work"
        return None

    def install(self) -> None:
        """Install torch, which decides about triton, then what is pinned, then the project."""
        self.install_torch()
        constraints = self.constraints
        if sys.platform == "linux" and "+cpu" not in self.installed("torch"):
            # The CUDA build of torch names the one triton it works with.
            constraints = self.notes / "constraints-cuda.txt"
            lines = self.constraints.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if not line.startswith("triton==")]
            constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
            self.pip("-c", str(constraints), "torch==" + self.pinned("torch"))
        self.pip("--no-deps", "-r", str(constraints))
        # Another system or Python may need more than is pinned: here pip looks, and adds it.
        extras = [*EXTRAS, "triton"] if sys.platform == "linux" else EXTRAS
        project = f"{self.root}[{','.join(extras)}]"
        if self.installed("sculpt"):  # its files and those of `sculpt-kernels` replace each other
            self.pip("sculpt", command="uninstall")
        self.pip("-c", str(constraints), "--no-build-isolation", "-e", project)

    def install_torch(self) -> None:
        """The CPU build where there is no GPU and pip's indexes have one, else the plain one."""
        plain = "torch==" + self.pinned("torch")
        if self.installed("torch").split("+")[0] == self.pinned("torch"):
            return
        if not self.has_gpu and sys.platform == "linux":
            try:
                self.pip("--no-deps", plain + "+cpu")
                return
            except SetupError:
                said = self.log.read_text(encoding="utf-8")
                missing = f"No matching distribution found for {plain}+cpu" in said
                if not missing or re.search(UNREACHABLE, said):
                    raise
            say(
                f"set-up: pip's indexes have no {plain}+cpu; taking {plain}, with CUDA if it has it"
            )
        self.pip("--no-deps", plain)

    def pinned(self, package: str) -> str:
        text = self.constraints.read_text(encoding="utf-8")
        found = re.search(rf"^{package}==([^\s;]+)", text, re.MULTILINE)
        if found is None:
            raise SetupError(f"constraints.txt has no line `{package}==...`; put it back")
        return found[1]

    def installed(self, package: str) -> str:
        """The version in `.venv`, or an empty string."""
        folder = "Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"
        for found in self.venv.glob(f"{folder}/{package}-*.dist-info"):
            return found.name[len(package) + 1 : -len(".dist-info")]
        return ""

    def pip(self, *arguments: str, command: str = "install") -> None:
        """Run `pip` with `arguments`, showing what it is at, logging all it says."""
        unwanted = ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PYTHONPATH", "PYTHONHOME")
        environment = {k: v for k, v in os.environ.items() if k not in unwanted}
        environment.update(
            PYTHONUNBUFFERED="1", PIP_DISABLE_PIP_VERSION_CHECK="1", LC_ALL="C.UTF-8"
        )
        options = {
            "install": ["--no-input", "--progress-bar", "off", "--retries", "3"],
            "uninstall": ["--no-input", "--yes"],
        }
        pip = [str(self.python), "-m", "pip", command, *options[command], *arguments]
        said: list[str] = []
        with (
            self.log.open("a", encoding="utf-8") as log,
            subprocess.Popen(
                pip,
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                said.append(line)
                show_progress(line)
        clear_progress()
        if process.returncode:
            raise SetupError(explain("".join(said), self.log.relative_to(self.root)))


def explain(said: str, log: Path) -> str:
    """pip's output as: which package failed, why, and what to do."""
    errors = re.findall(r"^\s*(ERROR: .*|\w+Error: .*)$", said, re.MULTILINE)
    reason, remedy = "pip failed", f"read {log}"
    for pattern, why, what in HINTS:
        if re.search(pattern, said):
            reason, remedy = why, what
            break
    return (
        f"could not install {failed_package(said)}: {reason}.\n"
        f"  pip said: {errors[-1] if errors else last_line(said)}\n"
        f"  what to do: {remedy}; then run the same command again.\n"
        f"  all of it: {log}"
    )


def failed_package(said: str) -> str:
    """The package that pip failed at: the one it names, else the last one it was at."""
    for pattern in (
        r"No matching distribution found for ([^\s;]+)",
        r"satisfies the requirement ([^\s;]+)",
        r"Failed building wheel for ([^\s;]+)",
        r"Cannot install ([^\s;,]+)",
    ):
        if found := re.search(pattern, said):
            return found[1]
    at = re.findall(r"^\s*(?:Collecting|Obtaining) ([^\s;(]+)", said, re.MULTILINE)
    if not at:
        return "the packages"
    return "this project itself" if at[-1].startswith("file:") else at[-1]


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU, seen without any CUDA library."""
    if glob.glob("/proc/driver/nvidia/gpus/*") or glob.glob("/dev/nvidia[0-9]*"):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20)
        return listed.returncode == 0 and "GPU 0" in listed.stdout
    return False


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the system lets go of it if this process is killed."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there two set-ups at once are the user's to avoid
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("set-up: another one is under way here; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing"


def say(text: str) -> None:
    print(text, flush=True)


def show_progress(line: str) -> None:
    """What pip is at: one line that changes on a terminal, the long steps only elsewhere."""
    line = line.strip()
    if sys.stdout.isatty():
        if line.startswith(("Collecting", "Downloading", "Using cached", "Installing", "Building")):
            print(f"\r\033[K  {line[:76]}", end="", flush=True)
    elif line.startswith("Downloading") and re.search(r"\(\d{3,}(\.\d+)? MB\)", line):
        say(f"set-up: {line}")
    elif line.startswith("Installing collected packages"):
        names = line.partition(":")[2].split(",")
        what = names[0].strip() if len(names) == 1 else f"{len(names)} packages"
        say(f"set-up: installing {what}")


def clear_progress() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)


def check_python(version: tuple[int, ...], executable: str) -> None:
    if version < OLDEST:
        raise SetupError(
            f"{executable} is Python {'.'.join(map(str, version))}, and this project needs "
            f"{'.'.join(map(str, OLDEST))} or newer.\n"
            "  what to do: install one, or name one, `make PYTHON=python3.11 ...`"
        )


def main() -> int:
    try:
        check_python(tuple(sys.version_info[:3]), sys.executable)
        Setup().run()
    except SetupError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"set-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        clear_progress()
        print("set-up interrupted; the same command starts it anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

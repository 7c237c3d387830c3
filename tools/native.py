"""Build the native CPU kernels in `build/native` and test them, also under sanitizers.

    python tools/native.py

Needs CMake, a build tool and a C++ compiler; without them it says so in one line and all goes on
without the native part. What is built already is not built again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILDS = {"native": "OFF", "native-sanitize": "ON"}


def missing() -> str | None:
    """What the build lacks here, or `None`."""
    if find("cmake") is None:
        return "there is no cmake"
    if find("ninja") is None and find("make") is None:
        return "there is neither ninja nor make"
    if not any(find(compiler) for compiler in ("c++", "g++", "clang++")):
        return "there is no C++ compiler (c++, g++ or clang++)"
    return None


def find(tool: str) -> str | None:
    """Where `tool` is: beside this Python, else on the path."""
    return shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool)


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        raise SystemExit(f"native part: `{' '.join(command)}` failed")


def main() -> int:
    reason = missing()
    if reason is not None:
        print(f"native part: {reason}; going on without it")
        return 0
    cmake = find("cmake") or "cmake"
    ctest = str(Path(cmake).with_name("ctest"))
    generator = ["-G", "Ninja"] if find("ninja") else []
    for name, sanitize in BUILDS.items():
        folder = f"build/{name}"
        run(cmake, "-S", ".", "-B", folder, *generator, f"-DSCULPT_SANITIZE={sanitize}")
        run(cmake, "--build", folder, "--parallel")
        run(ctest, "--test-dir", folder, "--output-on-failure")
    print("native part: built in build/native; its tests pass, under sanitizers too")
    return 0


if __name__ == "__main__":
    sys.exit(main())

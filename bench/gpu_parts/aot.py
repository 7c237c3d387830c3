"""Kernels compiled ahead of time: what a process saves at its start, from Python and from C.

python -m bench.gpu_parts.aot ROWS COLUMNS RANK     # one process, as the part starts it
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.gpu_parts.run import Run

ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = ("project_left_", "update_stochastic_")
DTYPE = "bfloat16"


def part_aot(run: Run) -> None:
    """Build a pack; on a device, start one process with it and one that compiles."""
    run.attempt("aot", 2.0 if run.options.tiny else 30.0, _aot, run)


def _aot(run: Run) -> None:
    from sculpt_kernels.aot.build import Choice, build
    from sculpt_kernels.aot.pack import Pack

    cuda = run.device.type == "cuda"
    major, minor = torch.cuda.get_device_capability() if cuda else (9, 0)
    shape, rank = ((256, 128), 16) if run.options.tiny else ((4096, 4096), 128)
    size = (*shape, rank)
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pack"
        start = time.perf_counter()
        choice = Choice([10 * major + minor], [shape], [rank], [DTYPE], OPERATIONS)
        found: dict[str, Any] = {"kernels": build(choice, pack)}
        found["build_s"] = round(time.perf_counter() - start, 2)
        Pack.open(pack)
        library = _library(pack)
        found["library"] = library is not None
        if cuda:
            ways = {"compiled at the start": {}, "ahead of time": {"SCULPT_AOT": str(pack)}}
            for name, extra in ways.items():
                found[name] = _process(size, Path(folder) / name, extra)
            same = len({found[name]["digest"] for name in ways}) == 1
            run.check("aot equals compiled at the start", float(not same), 0.0)
            if library is not None:
                wrong = float(not _same_from_c(library, size))
                run.check("aot from C equals Python", wrong, 0.0)
        run.results["aot"] = found
        print(f"ahead of time: {json.dumps(found)}", flush=True)


def _library(pack: Path) -> Path | None:
    """The launcher with this pack inside, where there is a compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    native, library = ROOT / "native", pack.parent / "libsculpt_aot.so"
    sources = [native / "aot/driver.cpp", native / "aot/launcher.cpp", pack / "pack.cpp"]
    headers = [f"-I{native / folder}" for folder in ("include", "aot", "src")]
    command = [compiler, "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", *headers,
               f"-Wa,-I{pack}",
               *map(str, sources), "-ldl", "-o", str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return library


def _process(size: tuple[int, ...], cache: Path, extra: dict[str, str]) -> dict[str, Any]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)} | extra
    command = [sys.executable, "-m", "bench.gpu_parts.aot", *map(str, size)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _same_from_c(library: Path, size: tuple[int, ...]) -> bool:
    """Whether a projection from C has the bits of the one from Python."""
    from sculpt_kernels.kernels.project import project_

    m, n, rank = size
    G, U, _ = _operands(size)
    want = project_(G.clone(), U, None, "left")
    aot = ctypes.CDLL(str(library))
    aot.sculpt_aot_workspace.restype = ctypes.c_int64
    name = f"project_left_{m}x{n}_r{rank}_{DTYPE}".encode()
    bytes_ = int(aot.sculpt_aot_workspace(name))
    workspace = torch.empty(max(bytes_, 16), dtype=torch.uint8, device="cuda")
    tensors = (ctypes.c_uint64 * 2)(G.data_ptr(), U.data_ptr())
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    at = ctypes.c_uint64(workspace.data_ptr())
    failed = aot.sculpt_aot_run(name, tensors, 2, at, stream)
    torch.cuda.synchronize()
    return not failed and torch.equal(G, want)


def _operands(size: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m, n, rank = size
    generator = torch.Generator("cuda").manual_seed(0)

    def of(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator).bfloat16()

    return of(m, n), torch.linalg.qr(of(m, rank).float()).Q.bfloat16(), of(n, rank)


def main(arguments: list[str]) -> None:
    """Seconds until the first results, microseconds per launch afterwards, and what came out."""
    from sculpt_kernels.kernels.project import project_
    from sculpt_kernels.kernels.update import update_

    X, U, B = _operands(tuple(int(x) for x in arguments))
    torch.cuda.synchronize()
    start = time.perf_counter()
    update_(X, U, B, alpha=0.5, rounding="stochastic", seed=1)
    project_(X, U, None, "left")
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    digest = hashlib.sha256(X.view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
    small, launches = X[:64, :64].contiguous(), 300
    a, b = U[:64].contiguous(), B[:64].contiguous()
    start = time.perf_counter()
    for seed in range(launches):
        update_(small, a, b, alpha=0.5, rounding="stochastic", seed=seed)
    launch = (time.perf_counter() - start) / launches
    torch.cuda.synchronize()
    print(json.dumps({"first_s": first, "launch_us": 1e6 * launch, "digest": digest}))


if __name__ == "__main__":
    main(sys.argv[1:])

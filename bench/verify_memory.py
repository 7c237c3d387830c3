"""Peak memory of `sculpt verify` on a large random checkpoint.

    python -m bench.verify_memory [--layers 24] [--width 2048] [--inner 5504] [--dtype bfloat16]

Writes two sharded checkpoints of random matrices into a temporary directory, every matrix of the
second changed at random, so that each is really measured; verifies them in a process of its own,
and prints its high-water mark of resident memory, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

MEASURE = """
import sys, time
from pathlib import Path
from sculpt.config import SculptConfig
from sculpt.memory import peak_memory_bytes, reset_peak_memory
from sculpt.certificate.disk import verify_checkpoints
reset_peak_memory()
start = peak_memory_bytes()
began = time.perf_counter()
found = verify_checkpoints(
    Path(sys.argv[1]), Path(sys.argv[2]), SculptConfig(unfreeze_rank_ratio=0.25)
)
print(len(found.certificate.rows), start, peak_memory_bytes(), time.perf_counter() - began)
"""


def write_checkpoints(
    folder: Path, layers: int, width: int, inner: int, dtype: torch.dtype
) -> tuple[Path, Path, int]:
    """Two checkpoints of `layers` matrices each, tall and wide in turn, and the bytes of one."""
    paths = folder / "before", folder / "after"
    weight_map, total = {}, 0
    for path in paths:
        path.mkdir(parents=True)
    for layer in range(layers):
        shape = (inner, width) if layer % 2 else (width, inner)
        name, file = f"layers.{layer}.weight", f"model-{layer:05d}.safetensors"
        generator = torch.Generator().manual_seed(layer)
        W = torch.randn(shape, generator=generator) / width**0.5
        save_file({name: W.to(dtype)}, paths[0] / file)
        W += 0.05 * torch.randn(shape, generator=generator) / width**0.5
        save_file({name: W.to(dtype)}, paths[1] / file)
        weight_map[name] = file
        total += W.numel() * dtype.itemsize
    for path in paths:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return *paths, total


def measure(before: Path, after: Path) -> tuple[int, int, int, float]:
    """Matrices, resident bytes after the imports, peak of resident bytes, and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(before), str(after)],
        capture_output=True,
        text=True,
        check=True,
    )
    rows, start, peak, seconds = done.stdout.split()
    return int(rows), int(start), int(peak), float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5504)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        before, after, total = write_checkpoints(
            Path(folder),
            options.layers,
            options.width,
            options.inner,
            getattr(torch, options.dtype),
        )
        print(f"written in {time.perf_counter() - began:.0f} s, {total / 1e9:.2f} GB each")
        rows, start, peak, seconds = measure(before, after)
    print(
        f"{rows} matrices of {options.width} x {options.inner}, {options.dtype}: peak "
        f"{peak / 1e9:.2f} GB, {start / 1e9:.2f} GB of it after the imports, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()

"""Everything that needs a GPU, in one call of at most nine minutes.

    python -m bench.gpu                      # all parts, result in $OUT or bench/results
    python -m bench.gpu --only project adamw --minutes 4
    python -m bench.gpu --only training      # steps of a 7B model, plain and peers beside it
    python -m bench.gpu --resume FILE        # what an earlier call on such a device did not finish
    python -m bench.gpu --only continual --model DIR --data DIR   # task order 1 by every method
    python -m bench.gpu --tiny               # rehearsal on any machine, small shapes

Needs torch and, on a GPU, Triton and a C compiler, LoRA and OSF also PEFT, task sequences pydantic;
run it in the repository's root, nothing has to be installed. Every operation is compared with
float64 first; what is wrong is not timed. Inputs are random and rotate through more than the L2
cache; variants take turns. Each part has a process and a time limit of its own, and what is
finished is in the file at once, whatever comes after it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench import machine, tables
from bench.gpu_parts import schedule
from bench.gpu_parts.parts import ALWAYS, PARTS
from sculpt.storage.files import write_json
from sculpt_kernels import backends

# Lists that parts add to, and what each part says of itself.
EMPTY: dict[str, Any] = {
    "rows": [], "compiled": [], "checks": [], "subspaces": [], "training": [], "curvature": [],
    "continual": [], "skipped": [], "finished": [], "now": None, "parts": {},
}  # fmt: skip


def about(path: Path) -> None:
    """Write down the device and what runs on it."""
    cuda = torch.cuda.is_available()
    found: dict[str, Any] = machine.about() | {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "triton": None,
        "backends": backends(),
    }
    if cuda:
        device = torch.cuda.get_device_properties()
        found |= {
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_bytes": device.total_memory,
            "cuda": torch.version.cuda,
        }
    with suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    write_json(path, found)


def here() -> dict[str, Any]:
    """What `about` says in a process of its own: this one must not touch the device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "about.json"
        process = schedule.start_method().Process(target=about, args=(path,))
        process.start()
        process.join(120)
        if not path.is_file():
            process.kill()
            raise SystemExit("the device did not answer within two minutes; see the lines above")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def begin(options: argparse.Namespace) -> Path:
    """Start the file of results, or go on with that of an earlier call."""
    found = here()
    if found["device"] == "cpu" and not options.tiny:
        raise SystemExit("no CUDA device here; --tiny rehearses on the CPU")
    label = ("tiny-" if options.tiny else "") + found["device"].replace(" ", "-")
    path: Path = options.out / f"gpu-{label}.json"
    results = found | {"tiny": options.tiny, "seconds": 0.0} | EMPTY
    if options.resume is not None:
        earlier = json.loads(options.resume.read_text(encoding="utf-8"))
        for key in ("device", "torch", "triton", "tiny"):
            if earlier[key] != results[key]:
                raise SystemExit(f"--resume must name results of this {key}, {results[key]!r}; "
                                 f"got {earlier[key]!r}")  # fmt: skip
        results |= {key: earlier[key] for key in (*EMPTY, "rates", "compile") if key in earlier}
        results |= {"skipped": [], "now": None, "calls": earlier.get("calls", 1) + 1}
    write_json(path, results)
    return path


def todo(options: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Parts in order, without those that an earlier call finished."""
    asked = [name for name in PARTS if name in (*ALWAYS, *options.only)]
    done = {name for name, part in results["parts"].items() if part["state"] == "done"}
    # What is compiled is on the machine that did it.
    return [name for name in asked if name not in done or name == "compile"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes, seconds in all")
    parser.add_argument("--minutes", type=float, default=8.5, help="time budget")
    parser.add_argument("--resume", type=Path, help="results of an earlier call, to be completed")
    parser.add_argument("--out", type=Path,
                        default=Path(os.environ.get("OUT", "bench/results")))  # fmt: skip
    parser.add_argument("--model", type=Path, help="a model directory, for the part continual")
    parser.add_argument("--data", type=Path, help="its folder of data sets")
    options = parser.parse_args(arguments)
    options.begun = time.monotonic()
    options.deadline = options.begun + 60 * options.minutes
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    path = begin(options)
    results = json.loads(path.read_text(encoding="utf-8"))
    for name in todo(options, results):
        schedule.do(name, options, path)
    results = json.loads(path.read_text(encoding="utf-8"))
    print(tables.gpu({path.name: results}))
    for name, part in results["parts"].items():
        print(f"{name:12} {part['state']:24} {part['seconds']:6.1f} s, predicted "
              f"{part['predicted']:.0f} s")  # fmt: skip
    failed = [check["what"] for check in results["checks"] if not check["ok"]]
    print(f"checks failed: {', '.join(failed) or 'none'}; skipped: {len(results['skipped'])}; "
          f"{results['seconds']} s; wrote {path}")  # fmt: skip
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())

"""Everything that needs a GPU, in one call of at most nine minutes.

    python -m bench.gpu                      # all parts, result in $OUT or bench/results
    python -m bench.gpu --only project adamw --minutes 4
    python -m bench.gpu --only subspaces     # splits and the library's decompositions, a 7B model
    python -m bench.gpu --only training      # steps of a 7B model, plain and peers beside it
    python -m bench.gpu --only continual --model DIR --data DIR   # task order 1 by every method
    python -m bench.gpu --tiny               # rehearsal on any machine, small shapes

Needs torch and, on a GPU, Triton; run it in the repository's root, nothing has to be installed.
Every operation is compared with float64 first; what is wrong is not timed. Inputs are random and
rotate through more than the L2 cache; variants take turns; what is finished in time is kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench import cases as C
from bench.gpu_parts import aot, continual, subspaces, training
from bench.gpu_parts.launches import part_graph, part_many
from bench.gpu_parts.run import Run, off, random
from bench.timing import ceilings
from sculpt_kernels import (
    compress,
    expand_add_,
    project,
    project_adamw_,
    project_many_,
    reference,
)

FORMS = ("core", "strict", "left", "right")


def part_ceilings(run: Run) -> None:
    tiny = run.options.tiny
    run.rates = ceilings(run.device, size=256 if tiny else 8192, elements=2**20 if tiny else 2**28)
    run.results["rates"] = run.rates
    print({key: f"{rate:.3g}" for key, rate in run.rates.items()}, flush=True)


def part_checks(run: Run) -> None:
    """Every operation against float64 from the same rounded inputs, and against torch's chain."""
    for name, dtype, error, limit in _errors(run):
        ok = error <= limit
        run.results["checks"].append(
            {"what": name, "dtype": dtype, "error": error, "limit": limit, "ok": ok}
        )
        if not ok:
            run.wrong.add(name.split()[0])
            print(f"WRONG {name} {dtype}: error {error:.2e}, limit {limit:.2e}", flush=True)
    passed = sum(check["ok"] for check in run.results["checks"])
    print(f"checks: {passed} of {len(run.results['checks'])} passed", flush=True)


def _errors(run: Run) -> Iterator[tuple[str, str, float, float]]:
    shapes = [(48, 80, 12, 9), (37, 53, 7, 5)]
    if not run.options.tiny:
        shapes += [(1000, 1536, 100, 128), (1536, 1000, 300, 200), (2048, 2048, 1024, 1024)]
    for dtype_name, dtype in C.DTYPES.items():
        if dtype == torch.float16 and run.device.type == "cpu":
            continue
        unit = torch.finfo(dtype).eps / 2
        # float32 products may run in TF32 inside a kernel; 16-bit ones round two intermediates.
        limit = 4 * unit if dtype != torch.float32 else 2e-6
        for m, n, r, s in shapes:
            G, U, V = (random(run.device, *shape, dtype=dtype, basis=i > 0)
                       for i, shape in enumerate(((m, n), (m, r), (n, s))))  # fmt: skip
            wide = G.double(), U.double(), V.double()
            size = f"{m}x{n} r={r},{s}"
            for form in FORMS:
                A, B = (None if form == "right" else U), (None if form == "left" else V)
                want = reference.project(wide[0], None if A is None else wide[1],
                                         None if B is None else wide[2], form)  # fmt: skip
                yield f"{form} {size}", dtype_name, off(project(G, A, B, form=form), want), limit
                if run.device.type == "cuda":
                    got = project(G, A, B, form=form, backend="triton")
                    yield f"{form} triton {size}", dtype_name, off(got, want), limit
                many = [G.clone() for _ in range(3)]
                project_many_(many, [A] * 3, [B] * 3, form=form)
                yield f"{form} many {size}", dtype_name, max(off(X, want) for X in many), limit
            exact = project(G, U, V, precision="exact")
            P, Q = (B @ torch.linalg.solve(B.T @ B, B.T) for B in wide[1:])
            yield f"exact {size}", dtype_name, off(exact, wide[0] - P @ wide[0] @ Q), limit
            core = reference.compress(*wide)
            scale = float(wide[0].norm() / core.norm())
            yield f"compress {size}", dtype_name, off(compress(G, U, V), core) / scale, 2e-5
            coordinates = random(run.device, r, s, dtype=torch.float32)
            W = expand_add_(G.clone(), coordinates, U, V, alpha=0.5)
            want = reference.expand_add(wide[0], coordinates.double(), *wide[1:], 0.5)
            yield f"expand_add {size}", dtype_name, off(W, want), unit + 2e-5
            yield from _adamw_errors(run, dtype_name, G, U, V, size, unit)


def _adamw_errors(
    run: Run, dtype: str, G: Tensor, U: Tensor, V: Tensor, size: str, unit: float
) -> Iterator[tuple[str, str, float, float]]:
    for kind in ("update", "gradient"):
        state = [random(run.device, *G.shape) for _ in range(3)]
        state[2].square_()
        given = (state[0], G, *state[1:], U, V)
        options = {"form": "core", "project": kind, **C.ADAMW} | {"lr": 1e-2}
        want = reference.project_adamw(*(X.double() for X in given), **options)
        before = state[0].double()
        project_adamw_(*given, **options)
        # The step matters, not the weight it is added to.
        error = off(state[0].double() - before, want[0] - before)
        yield f"adamw {kind} {size}", dtype, error, 16 * unit + 1e-4


def part_project(run: Run) -> None:
    model = "LLaMA-2-7B"
    for form in ("core", "strict", "left"):
        for shape in run.shapes()[: 2 if form == "core" else 1]:
            for ratio in run.ratios():
                run.timed(C.Case("project", form, shape, ratio, "bfloat16", model))


def part_adamw(run: Run) -> None:
    for shape in run.shapes()[:2]:
        for ratio in run.ratios():
            run.timed(C.Case("adamw", "core", shape, ratio, "bfloat16", "LLaMA-2-7B"))


def part_coordinates(run: Run) -> None:
    for operation in ("compress", "expand_add"):
        for shape in run.shapes()[:2]:
            for ratio in run.ratios()[:4]:
                run.timed(C.Case(operation, "core", shape, ratio, "bfloat16", "LLaMA-2-7B"))


PARTS = {
    "ceilings": part_ceilings,
    "checks": part_checks,
    "graph": part_graph,
    "adamw": part_adamw,
    "project": part_project,
    "many": part_many,
    "coordinates": part_coordinates,
    "subspaces": subspaces.part_subspaces,
    "training": training.part_training,
    "continual": continual.part_continual,
    "aot": aot.part_aot,
}


def table(run: Run) -> str:
    """The last thing printed: best variant of ours against torch's best lines."""
    about = run.results
    lines = [
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['date']}",
        f"{'case':36} {'chain us':>9} {'ours us':>9} {'ratio':>6} {'roofline':>8}",
    ]
    for row in run.results["rows"]:
        ours = {k: v for k, v in row["variants"].items() if k.startswith(("ours", "triton"))}
        if not ours:
            continue
        best = min(ours.values(), key=lambda v: v["us"])
        base = row["variants"]["chain"]["us"]
        lines.append(f"{row['case']:36} {base:9.0f} {best['us']:9.0f} {best['ratio']:6.2f} "
                     f"{best['roofline']:8.0%}")  # fmt: skip
    lines += subspaces.table(run.results.get("subspaces", []))
    lines += training.table(run.results.get("training", []))
    lines += continual.table(run.results.get("continual", []))
    failed = [check["what"] for check in run.results["checks"] if not check["ok"]]
    lines.append(f"checks failed: {', '.join(failed) if failed else 'none'}; "
                 f"skipped: {len(run.results['skipped'])}; {run.results['seconds']} s")  # fmt: skip
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes, seconds in all")
    parser.add_argument("--minutes", type=float, default=8.5, help="time budget")
    parser.add_argument("--out", type=Path,
                        default=Path(os.environ.get("OUT", "bench/results")))  # fmt: skip
    parser.add_argument("--model", type=Path, help="a model directory, for the part continual")
    parser.add_argument("--data", type=Path, help="its folder of data sets")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        parser.error("no CUDA device here; --tiny rehearses on the CPU")
    return options


def main(arguments: list[str] | None = None) -> int:
    run = Run(parse(arguments))
    # Rates and correctness come first whatever was asked for.
    for name in ("ceilings", "checks", *run.options.only):
        if name in ("ceilings", "checks") and run.results.get(f"{name} done"):
            continue
        try:
            PARTS[name](run)
        except Exception as error:
            run.results["skipped"].append(f"{name}: {type(error).__name__}: {error}")
            print(f"part {name} failed: {type(error).__name__}: {error}", flush=True)
        run.results[f"{name} done"] = True
        run.save()
    print(table(run))
    print(f"wrote {run.path}")
    return 1 if any(not check["ok"] for check in run.results["checks"]) else 0


if __name__ == "__main__":
    raise SystemExit(main())

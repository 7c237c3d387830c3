"""Everything that needs a GPU, in one call of at most nine minutes.

    python -m bench.gpu                      # all parts, result in $OUT or bench/results
    python -m bench.gpu --only project adamw --minutes 4
    python -m bench.gpu --tiny               # rehearsal on any machine, small shapes

Needs torch and, on a GPU, Triton; run it in the repository's root, nothing has to be installed.
Every operation is compared with float64 first; what is wrong is not timed. Inputs are random and
rotate through more than the L2 cache; variants take turns; what is finished in time is kept.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import cases as C
from bench.timing import ceilings, interleaved
from sculpt_kernels import (
    backends,
    compress,
    expand_add_,
    orthonormalize,
    project,
    project_,
    project_adamw_,
    project_many_,
    reference,
)

FORMS = ("core", "strict", "left", "right")
ROTATE_BYTES = 3 * 50 * 2**20
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096)]
TINY_SHAPES = [(48, 80), (80, 48)]


class Run:
    """Options, deadline and results of one call; saved after every part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.start = time.monotonic()
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        label = ("tiny-" if options.tiny else "") + name.replace(" ", "-")
        self.path = options.out / f"gpu-{label}.json"
        self.rates: dict[str, float] = {}
        self.wrong: set[str] = set()
        self.results: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "backends": backends(),
            "tiny": options.tiny,
            "rows": [],
            "checks": [],
            "skipped": [],
        }
        try:
            import triton

            self.results["triton"] = triton.__version__
        except ImportError:
            self.results["triton"] = None

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return self.options.minutes * 60 - (time.monotonic() - self.start)

    def save(self) -> None:
        self.results["seconds"] = round(time.monotonic() - self.start, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.results, indent=1))

    def shapes(self) -> list[tuple[int, int]]:
        return TINY_SHAPES if self.options.tiny else SHAPES

    def ratios(self) -> list[str]:
        return ["1/8", "3/4"] if self.options.tiny else list(C.RATIOS)

    def timed(self, case: C.Case, **extra: Any) -> None:
        """Time the variants of a case; a case that fails or finds no time left is noted."""
        if self.left < 5:
            self.results["skipped"].append(case.name)
            return
        key = case.operation if case.operation != "project" else case.form
        if key in self.wrong:
            self.results["skipped"].append(f"{case.name}: wrong result")
            return
        try:
            row = self._measure(case)
        except Exception as error:
            self.results["skipped"].append(f"{case.name}: {type(error).__name__}: {error}")
            return
        self.results["rows"].append(row | extra)
        print(short(row), flush=True)

    def _measure(self, case: C.Case) -> dict[str, Any]:
        first = C.Inputs(case, self.device, seed=0)
        size = first.G.numel() * first.G.element_size()
        count = 1 if self.options.tiny else max(2, min(6, -(-ROTATE_BYTES // size)))
        sets = [C.variants(first)]
        if case.operation == "project" and self.device.type == "cuda":
            _add_triton(sets[0], first)
        for seed in range(1, count):
            data = first.again(seed)
            sets.append(C.variants(data))
            if "triton" in sets[0]:
                _add_triton(sets[-1], data)
        found = interleaved(sets, self.device, rounds=5 if self.options.tiny else 11,
                            seconds=0.05 if self.options.tiny else 1.2)  # fmt: skip
        return row_of(case.name, found, self.floor(case)) | {"model": case.model, "rank": case.rank}

    def floor(self, case: C.Case) -> float:
        name = case.dtype if case.dtype in self.rates else "float32"
        device = self.device.type if self.device.type == "cpu" else "H100"
        return C.floor(case, device, self.rates[name], self.rates["copy"])


def _add_triton(variants: C.Variants, data: C.Inputs) -> None:
    """The Triton kernels also where `auto` leaves the products to the library."""
    form = data.case.form
    U = None if form == "right" else data.U
    V = None if form == "left" else data.V
    variants["triton"] = lambda: project_(data.G, U, V, form=form, backend="triton")


def row_of(name: str, found: dict[str, Any], floor: float) -> dict[str, Any]:
    return {
        "case": name,
        "floor_us": 1e6 * floor,
        "variants": {
            key: {"us": 1e6 * t.median, "p20": 1e6 * t.p20, "p80": 1e6 * t.p80,
                  "ratio": t.ratio, "roofline": floor / t.median, "rounds": t.rounds}
            for key, t in found.items()
        },
    }  # fmt: skip


def short(row: dict[str, Any]) -> str:
    cells = [f"{k} {v['us']:.0f}us {v['ratio']:.2f}x" for k, v in row["variants"].items()]
    ours = [v["roofline"] for k, v in row["variants"].items() if k.startswith(("ours", "triton"))]
    best = f"  roofline {max(ours):.0%}" if ours else ""
    return f"{row['case']:36} " + " | ".join(cells) + best


# Parts ------------------------------------------------------------------------------------------


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
            G, U, V = (_random(run.device, *shape, dtype=dtype, basis=i > 0)
                       for i, shape in enumerate(((m, n), (m, r), (n, s))))  # fmt: skip
            wide = G.double(), U.double(), V.double()
            size = f"{m}x{n} r={r},{s}"
            for form in FORMS:
                A, B = (None if form == "right" else U), (None if form == "left" else V)
                want = reference.project(wide[0], None if A is None else wide[1],
                                         None if B is None else wide[2], form)  # fmt: skip
                yield f"{form} {size}", dtype_name, _off(project(G, A, B, form=form), want), limit
                if run.device.type == "cuda":
                    got = project(G, A, B, form=form, backend="triton")
                    yield f"{form} triton {size}", dtype_name, _off(got, want), limit
                many = [G.clone() for _ in range(3)]
                project_many_(many, [A] * 3, [B] * 3, form=form)
                yield f"{form} many {size}", dtype_name, max(_off(X, want) for X in many), limit
            exact = project(G, U, V, precision="exact")
            P, Q = (B @ torch.linalg.solve(B.T @ B, B.T) for B in wide[1:])
            yield f"exact {size}", dtype_name, _off(exact, wide[0] - P @ wide[0] @ Q), limit
            core = reference.compress(*wide)
            scale = float(wide[0].norm() / core.norm())
            yield f"compress {size}", dtype_name, _off(compress(G, U, V), core) / scale, 2e-5
            coordinates = _random(run.device, r, s, dtype=torch.float32)
            W = expand_add_(G.clone(), coordinates, U, V, alpha=0.5)
            want = reference.expand_add(wide[0], coordinates.double(), *wide[1:], 0.5)
            yield f"expand_add {size}", dtype_name, _off(W, want), unit + 2e-5
            yield from _adamw_errors(run, dtype_name, G, U, V, size, unit)


def _adamw_errors(
    run: Run, dtype: str, G: Tensor, U: Tensor, V: Tensor, size: str, unit: float
) -> Iterator[tuple[str, str, float, float]]:
    for kind in ("update", "gradient"):
        state = [_random(run.device, *G.shape) for _ in range(3)]
        state[2].square_()
        given = (state[0], G, *state[1:], U, V)
        options = {"form": "core", "project": kind, **C.ADAMW} | {"lr": 1e-2}
        want = reference.project_adamw(*(X.double() for X in given), **options)
        before = state[0].double()
        project_adamw_(*given, **options)
        # The step matters, not the weight it is added to.
        error = _off(state[0].double() - before, want[0] - before)
        yield f"adamw {kind} {size}", dtype, error, 16 * unit + 1e-4


def _random(
    device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, basis: bool = False
) -> Tensor:
    X = torch.randn(*shape, device=device)
    return (orthonormalize(X) if basis else X).to(dtype)


def _off(got: Tensor, want: Tensor) -> float:
    error = float((got.double() - want).norm() / want.norm())
    return error if error == error else float("inf")


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


def part_many(run: Run) -> None:
    """The matrices of four layers at a small rank: one launch per shape against one by one."""
    if run.left < 10 or "core" in run.wrong:
        run.results["skipped"].append("many")
        return
    layers = 1 if run.options.tiny else 4
    shapes = [shape for shape in run.shapes() for _ in range(4 * layers)]
    for ratio in run.ratios()[:2]:
        rank = max(1, round(C.RATIOS[ratio] * min(shapes[0])))
        Gs = [_random(run.device, *shape, dtype=torch.bfloat16) for shape in shapes]
        bases = {size: _random(run.device, size, rank, dtype=torch.bfloat16, basis=True)
                 for size in {x for shape in shapes for x in shape}}  # fmt: skip
        Us, Vs = [bases[m].clone() for m, _ in shapes], [bases[n].clone() for _, n in shapes]

        def chain(Gs=Gs, Us=Us, Vs=Vs) -> None:
            for G, U, V in zip(Gs, Us, Vs, strict=True):
                G.addmm_(U @ (U.T @ (G @ V)), V.T, alpha=-1)

        calls: dict[str, Callable[[], object]] = {
            "chain": chain,
            "ours": lambda Gs=Gs, Us=Us, Vs=Vs: project_many_(Gs, Us, Vs),
        }
        found = interleaved([calls], run.device, seconds=2.0)
        floor = sum(
            run.floor(C.Case("project", "core", shape, ratio, "bfloat16")) for shape in shapes
        )
        row = row_of(f"many {len(Gs)} matrices {ratio} bfloat16", found, floor)
        run.results["rows"].append(row)
        print(short(row), flush=True)


def part_graph(run: Run) -> None:
    """A captured projected AdamW step replays with new scalars, bit for bit as it ran eagerly."""
    if run.device.type != "cuda" or run.left < 15:
        run.results["skipped"].append("graph")
        return
    m, n, r = 512, 768, 64
    U, V = (_random(run.device, size, r, dtype=torch.bfloat16, basis=True) for size in (m, n))
    G = _random(run.device, m, n, dtype=torch.bfloat16)

    def fresh() -> list[Tensor]:
        generator = torch.Generator(run.device).manual_seed(1)
        return [torch.rand(m, n, device=run.device, generator=generator) for _ in range(3)]

    lr = torch.tensor(1e-3, device=run.device)
    step = torch.tensor(1, device=run.device)

    def once(state: list[Tensor]) -> None:
        project_adamw_(state[0], G, state[1], state[2], U, V, lr=lr, step=step)

    eager, replayed = fresh(), fresh()
    warm = fresh()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            once(warm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        once(replayed)
    for number in (1, 2, 3):
        lr.fill_(1e-3 / number)
        step.fill_(number)
        once(eager)
        graph.replay()
    same = all(torch.equal(a, b) for a, b in zip(eager, replayed, strict=True))
    run.results["checks"].append({"what": "graph replay equals eager", "ok": same})
    print(f"CUDA graph replay equals eager: {same}", flush=True)


PARTS = {
    "ceilings": part_ceilings,
    "checks": part_checks,
    "graph": part_graph,
    "adamw": part_adamw,
    "project": part_project,
    "many": part_many,
    "coordinates": part_coordinates,
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
    failed = [check["what"] for check in run.results["checks"] if not check["ok"]]
    lines.append(f"checks failed: {', '.join(failed) if failed else 'none'}; "
                 f"skipped: {len(run.results['skipped'])}; {run.results['seconds']} s")  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes, seconds in all")
    parser.add_argument("--minutes", type=float, default=8.5, help="time budget")
    parser.add_argument("--out", type=Path,
                        default=Path(os.environ.get("OUT", "bench/results")))  # fmt: skip
    run = Run(parser.parse_args(arguments))
    if run.device.type != "cuda" and not run.options.tiny:
        parser.error("no CUDA device here; --tiny rehearses on the CPU")
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

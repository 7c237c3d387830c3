"""Many matrices in one call, and a captured step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench import cases as C
from bench.gpu_parts.run import Run, random, row_of, short
from bench.timing import interleaved
from sculpt_kernels import project_adamw_, project_many_


def part_many(run: Run) -> None:
    """The matrices of four layers at a small rank: one launch per shape against one by one."""
    if run.left < 10 or "core" in run.wrong:
        run.results["skipped"].append("many")
        return
    layers = 1 if run.options.tiny else 4
    shapes = [shape for shape in run.shapes() for _ in range(4 * layers)]
    for ratio in run.ratios()[:2]:
        rank = max(1, round(C.RATIOS[ratio] * min(shapes[0])))
        Gs = [random(run.device, *shape, dtype=torch.bfloat16) for shape in shapes]
        bases = {size: random(run.device, size, rank, dtype=torch.bfloat16, basis=True)
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
    U, V = (random(run.device, size, r, dtype=torch.bfloat16, basis=True) for size in (m, n))
    G = random(run.device, m, n, dtype=torch.bfloat16)

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
    for dtype in (torch.float32, torch.bfloat16):
        same = step_replays(run.device, dtype)
        run.results["checks"].append({"what": f"graph of a training step {dtype}", "ok": same})
        print(f"CUDA graph of a training step in {dtype} equals eager: {same}", flush=True)


def step_replays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a captured step of the compact engine, replayed, gives the bits of eager ones.

    Forward, backward, fused AdamW and the update of the weights; the last batch is not finite, so
    that both must leave a step out.
    """
    # Here, so that the other parts run where sculpt needs what is not installed.
    from bench.gpu_parts.steps import Training

    eager, captured = Training(device, dtype), Training(device, dtype)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for task in (eager, captured):
            for _ in range(3):
                task.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for batch in range(4):
        for task in (eager, captured):
            task.load(batch, scale=float("nan") if batch == 3 else 1.0)
        eager.step()
        graph.replay()
    return eager.moved and all(map(torch.equal, eager.state(), captured.state()))

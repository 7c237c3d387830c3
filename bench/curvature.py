"""What protecting a task takes in training steps, and what sketches of its factors lose.

    python -m bench.curvature --model DIR --out bench/results

Rows are tokens of the pydoc topics that every Python brings. Seconds are those of the processor, so
that other processes weigh little. A sketch is compared with the exact factor of the same rows:
`captured` is the share of the trace in its eigenvectors over the most that as many directions can
hold, `unknown` the share of the trace that it does not tell apart, `given up` the curvature of the
earlier rows in the directions that it chooses for the later ones, over that in those of the exact
factors.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from bench.machine import about
from sculpt import SculptConfig, Sculptor
from sculpt.curvature.directions import Directions, eigenvalues
from sculpt.curvature.factors import Sketch
from sculpt.curvature.memory import Memory
from sculpt.task.targets import find_targets

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]
Memories = tuple[Memory, Memory]
Bases = dict[str, tuple[torch.Tensor, torch.Tensor]]
ROWS, SIZE = 64, 8
"""Rows of a task's statistics, and of a step."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    parser.add_argument("--ranks", type=int, nargs="+", default=[256, 512], help="of sketches")
    parser.add_argument("--out", type=Path, help="folder for curvature-....json")
    options = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tasks = rows_of(tokenizer, options.tokens)
    found = {
        "model": options.model.name,
        "tokens": options.tokens,
        "machine": about(),
        "seconds": seconds(model, *tasks),
        "sketches": sketched(model, tasks, options.ranks),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        path = options.out / f"curvature-{options.model.name}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def rows_of(tokenizer: Any, tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Batches of an earlier and of a later task: the first and the last topics."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text).input_ids)
    half = ROWS * tokens
    earlier, later = ids[:half], ids[-half:]
    return tuple(  # type: ignore[return-value]
        [{"input_ids": batch, "labels": batch} for batch in part.view(-1, SIZE, tokens)]
        for part in (earlier, later)
    )


def seconds(model: torch.nn.Module, earlier: list[Batch], later: list[Batch]) -> Row:
    """Of a step of plain fine-tuning and of sculpt, of a pass over the rows, and of the choice."""
    targets = find_targets(model, SculptConfig()).chosen
    weights = [target.parameter for target in targets]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    plain = steps(model, torch.optim.AdamW(weights, lr=1e-9, fused=True), later)
    sculptor = Sculptor(model, SculptConfig())
    collect = clocked(lambda: sculptor.protect(earlier))
    both = clocked(lambda: sculptor.begin_task(later))
    optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-6, fused=True)
    sculptor.attach(optimizer)
    ours = steps(model, optimizer, later)
    sculptor.undo_task()
    return {"plain step": plain, "sculpt step": ours, "pass": collect, "choice": both - collect}


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """The median of a few steps, after one that is not counted."""

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    times = [clocked(lambda batch=batch: step(batch)) for batch in batches[:6]]  # type: ignore[misc]
    return statistics.median(times[1:])


def clocked(call: Callable[[], object]) -> float:
    """Seconds of the processor."""
    start = time.process_time()
    call()
    return time.process_time() - start


def sketched(
    model: torch.nn.Module, tasks: tuple[list[Batch], list[Batch]], ranks: list[int]
) -> list[Row]:
    """Sketches of each rank beside exact factors."""
    targets = find_targets(model, SculptConfig()).chosen
    exact = memories(model, tasks, SculptConfig())
    truth = chosen(model, exact)
    found = []
    for rank in ranks:
        sides = [size for target in targets for size in target.shape]
        limit = sum(4 * size * min(rank, size) for size in sides)  # of all as sketches
        config = SculptConfig(factor_bytes=limit, sketch_rank=rank)
        found.append(beside(model, exact, truth, memories(model, tasks, config), rank))
    return found


def beside(
    model: torch.nn.Module, exact: Memories, truth: Bases, sketches: Memories, rank: int
) -> Row:
    """What sketches hold of the exact factors, and what their directions give up."""
    captured, unknown = [], []
    for key, factor in sketches[0].factors.items():
        if isinstance(factor, Sketch):
            best = float(eigenvalues(exact[0].factors[key]).flip(0)[:rank].sum())
            Q, values = factor.eigenpairs()
            whole = float(factor.trace())
            captured.append(float(exact[0].factors[key].quadratic(Q.mT)) / whole / best)
            unknown.append(1 - float(values.sum()) / whole)
    given = Directions(*exact)
    given_up = [
        given.touched(name, *ours) / max(given.touched(name, *truth[name]), 1e-12)
        for name, ours in chosen(model, sketches).items()
    ]
    return {
        "rank": rank,
        "sketches": len(captured),
        "bytes": {"exact": size(exact[0]), "sketch": size(sketches[0])},
        "captured": spread(captured),
        "unknown": spread(unknown),
        "given up": spread(given_up),
    }


def memories(
    model: torch.nn.Module, tasks: tuple[list[Batch], list[Batch]], config: SculptConfig
) -> Memories:
    """Of both tasks."""
    found = []
    for batches in tasks:
        sculptor = Sculptor(model, config)
        sculptor.protect(batches)
        found.append(sculptor.memory)
    return found[0], found[1]


def chosen(model: torch.nn.Module, memory: Memories) -> Bases:
    """The bases of each target by its name."""
    directions, targets = Directions(*memory), find_targets(model, SculptConfig()).chosen
    return {t.name: directions.trainable(t.name, t.trainable_rank) for t in targets}


def size(memory: Memory) -> int:
    return sum(t.nbytes for factor in memory.factors.values() for t in factor.tensors().values())


def spread(values: list[float]) -> Row:
    """Median, and the least and the most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()

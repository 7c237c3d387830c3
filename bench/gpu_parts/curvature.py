"""Protecting a task of 64 rows in the LLaMA-2-7B configuration: the pass, and all directions.

Four layers are measured, of 32. Exact factors of all 32 would take 64 GB a set; by default the
longest sides are sketches.

    python -m bench.gpu_parts.curvature    # counts of the whole model, on any machine
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bench.gpu_parts.run import Run
from bench.gpu_parts.training import build
from bench.llama import LLAMA_2_7B, TINY

ROWS, SIZE, LENGTH = 64, 8, 512
LAYERS = 4


def part_curvature(run: Run) -> None:
    """Exact factors, and sketches of all of them."""
    for kind in ("exact", "sketches"):
        run.attempt(f"curvature {kind}", 15.0, _measure, run, kind)


def _measure(run: Run, kind: str) -> None:
    # Here, so that the other parts run where sculpt needs what is not installed.
    from sculpt import SculptConfig, Sculptor

    shape = TINY if run.tiny else replace(LLAMA_2_7B, layers=LAYERS)
    model = build(run.device, shape)
    rank, length = (16, 32) if run.tiny else (512, LENGTH)
    limit = sum(4 * rank * (m + n) for m, n in shape.matrices) * shape.layers
    options = {"factor_bytes": limit if kind == "sketches" else 10**12, "sketch_rank": rank}
    sculptor = Sculptor(model, SculptConfig(**options))
    batches = [
        torch.randint(shape.vocabulary, (SIZE, length), device=run.device)
        for _ in range(ROWS // SIZE)
    ]
    losses = [lambda model, ids=ids: model(ids) * ids[:, 1:].numel() for ids in batches]
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first = _seconds(run, lambda: sculptor.protect(losses[:1]))
    passed = _seconds(run, lambda: sculptor.protect(losses))
    both = _seconds(run, lambda: sculptor.begin_task(losses))
    factors = sculptor.memory.factors.values()
    run.add("curvature", {
        "factors": kind,
        "layers": shape.layers,
        "tokens": ROWS * length,
        "first_batch_seconds": first,
        "pass_seconds": passed,
        "choice_seconds": both - passed,
        "bytes": sum(t.nbytes for factor in factors for t in factor.tensors().values()),
        "peak_bytes": torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None,
    })  # fmt: skip


def _seconds(run: Run, call: Callable[[], Any]) -> float:
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    """Counts of the whole model, with exact factors and with what fits into 16 GiB."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    ).parse_args(arguments)
    from transformers import LlamaConfig

    from sculpt import SculptConfig
    from sculpt.inspection.estimate import inspect_model

    shape = LLAMA_2_7B
    model = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, vocab_size=shape.vocabulary,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    options = {"tokens": SIZE * LENGTH, "sequence": LENGTH, "checkpointing": True}
    for limit in (10**12, 2**34):
        found = inspect_model(model, SculptConfig(factor_bytes=limit), dtype="bfloat16", **options)
        assert found.statistics is not None
        of = found.statistics
        print(
            f"{of.factors} factors, {of.sketches} sketches: {of.bytes / 1e9:.1f} GB, pass "
            f"{ROWS // SIZE * of.flops / 1e12:,.0f}, choice {of.choice / 1e12:,.0f} TFLOP"
        )


if __name__ == "__main__":
    main()

"""Training steps of sculpt, plain full fine-tuning, PEFT's OSF and LoRA, side by side.

    python -m bench.training --case width-1536           # two Llama layers, 2048 tokens
    python -m bench.training --case width-1024 --tokens 512
    python -m bench.training --memory --case width-1024  # peak memory, each method in a process

All in one process and on the same weights. Rounds are interleaved: every method makes a step, then
every method makes the next one. Ratios are medians over rounds of the ratio to the plain step of
the same round. With `OMP_NUM_THREADS=1` seconds are those of the processor, which other processes
do not add to.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.contenders import RATIOS, Contender, Decomposition, decompose, make
from bench.llama import SMOLLM2_135M, TINY, Llama, Shape, two_layers
from bench.machine import about
from bench.memory import give_back_freed_memory, tensor_bytes
from bench.memory import peak as allocated
from bench.timing import clock
from sculpt import SculptConfig
from sculpt.inspection import inspect_model
from sculpt.memory import peak_memory_bytes, reset_peak_memory
from sculpt.storage.files import write_json

CASES: dict[str, Shape] = {
    "width-512": two_layers(512),
    "width-1024": two_layers(1024),
    "width-1536": two_layers(1536),
    "width-2048": two_layers(2048),
    "SmolLM2-135M": SMOLLM2_135M,
    "tiny": TINY,
}
SEQUENCE = 512


def contestants(ratios: Sequence[str]) -> list[tuple[str, str]]:
    """Method and ratio, the latter where it matters."""
    found = [("plain", ""), ("lora", "")]
    return found + [(method, ratio) for ratio in ratios for method in ("sculpt", "osf")]


def builder(shape: Shape) -> Llama:
    torch.manual_seed(0)
    return Llama(shape)


def batch(shape: Shape, tokens: int) -> torch.Tensor:
    length = min(tokens, SEQUENCE)
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary, (tokens // length, length), generator=generator)


def compare(case: str, tokens: int, ratios: Sequence[str], rounds: int) -> dict[str, Any]:
    """All methods on one shape: seconds by phase, bytes, leak."""
    shape = CASES[case]
    ids = batch(shape, tokens)
    known = decompose(builder(shape))
    field: dict[str, Contender] = {
        f"{method} {ratio}".strip(): make(method, RATIOS.get(ratio, 1.0), builder(shape), known)
        for method, ratio in contestants(ratios)
    }
    totals: dict[str, list[float]] = {name: [] for name in field}
    losses: dict[str, list[float]] = {name: [] for name in field}
    for done in range(rounds + 1):
        # Back and forth, so that none always follows the same one.
        for name in field if done % 2 else reversed(field):
            start = clock()
            losses[name].append(float(field[name].step(ids)))
            totals[name].append(clock() - start)
        print(f"  round {done}: " + ", ".join(f"{n} {t[-1]:.2f}s" for n, t in totals.items()))
    rows = []
    for name, contender in field.items():
        # The first round warms up.
        seconds, plain = totals[name][1:], totals["plain"][1:]
        ratio = RATIOS.get(name.rpartition(" ")[2], min(map(RATIOS.__getitem__, ratios)))
        rows.append(
            {
                "method": name,
                "seconds": statistics.median(seconds),
                "all_seconds": seconds,
                "of_plain": statistics.median(a / b for a, b in zip(seconds, plain, strict=True)),
                "phases": contender.seconds(skip=1),
                "trainable": contender.trainable,
                "optimizer_bytes": contender.optimizer_bytes,
                "saved_bytes": contender.saved_bytes(ids),
                "leak": contender.worst_leak(known, ratio),
                "rounding_floor": contender.rounding_floor(known),
                "losses": losses[name],
            }
        )
    return {"rounds": rounds, "rows": rows}


def memory(case: str, tokens: int, ratios: Sequence[str]) -> dict[str, Any]:
    """Peak memory above that of the imported libraries, every method in a process of its own.

    Subspaces are found in this one: the library keeps the work buffers that it takes for them.
    """
    field = contestants(ratios) + [("sculpt/disk", ratio) for ratio in ratios]
    # What is freed is given back: otherwise the C library keeps a quarter of the peak, another one
    # in each run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "decomposed.pt"
        torch.save(decompose(builder(CASES[case])), found)
        for method, ratio in field:
            command = [sys.executable, "-m", "bench.training", "--peak", method, "--case", case]
            command += ["--tokens", str(tokens), "--ratios", ratio or ratios[0]]
            command += ["--decomposed", str(found)]
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=environment
            )
            row = {"method": f"{method} {ratio}".strip()}
            row |= json.loads(done.stdout.splitlines()[-1])
            row["predicted_bytes"] = predicted_peak(method, case, tokens, ratio or ratios[0])
            rows.append(row)
            print(f"  {row}", flush=True)
    for row in rows:
        row["of_plain"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return {"memory": rows}


def predicted_peak(method: str, case: str, tokens: int, ratio: str) -> int | None:
    """What `sculpt inspect` says of transformers' Llama of these sizes."""
    from transformers import LlamaConfig

    shape = CASES[case]
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    kind, _, originals = method.partition("/")
    found = inspect_model(
        config,
        SculptConfig(unfreeze_rank_ratio=RATIOS[ratio], originals=originals or "auto"),
        tokens=tokens,
        sequence=min(tokens, SEQUENCE),
        state_dtype="trained",
    )
    return found.methods[kind].peak


def peak(method: str, case: str, tokens: int, ratio: str, found: Path | None) -> dict[str, Any]:
    """Of three steps, and of the tensors of a fourth; `found` has the subspaces of the others."""
    import peft  # noqa: F401  (what it takes is no method's own)

    shape = CASES[case]
    ids = batch(shape, tokens)
    warm = Llama(TINY)
    warm(torch.zeros(1, 8, dtype=torch.long)).backward()
    give_back_freed_memory()
    reset_peak_memory()
    base = peak_memory_bytes()
    known: dict[str, Decomposition] = {}
    if found and method not in ("plain", "lora"):
        known = torch.load(found, weights_only=False)
    contender = make(method, RATIOS[ratio], builder(shape), known)
    known.clear()
    give_back_freed_memory()
    reset_peak_memory()
    for _ in range(3):
        contender.step(ids)
    whole = peak_memory_bytes() - base
    held = tensor_bytes()
    step = allocated(lambda: contender.step(ids)).total
    return {"peak_bytes": whole, "held_bytes": held, "step_bytes": step, "base_bytes": base}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=list(CASES), default="width-1536")
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--ratios", nargs="+", choices=list(RATIOS), default=["1/4", "1/8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--decomposed", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    case, tokens = options.case, options.tokens
    if options.peak:
        found = peak(options.peak, case, tokens, options.ratios[0], options.decomposed)
        print(json.dumps(found))
        return
    if options.memory:
        result = memory(case, tokens, options.ratios)
    else:
        result = compare(case, tokens, options.ratios, options.rounds)
    kind = "training-memory" if options.memory else "training"
    if not options.memory and torch.get_num_threads() == 1:
        kind += "-1-thread"
    path = options.out / f"{kind}-{case}-{tokens}.json"
    facts = {"case": case, "tokens": tokens, "shape": vars(CASES[case])}
    write_json(path, about("peft") | facts | result)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()

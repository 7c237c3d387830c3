"""Training steps of a model in the LLaMA-2-7B configuration: random weights, bf16, checkpointing.

Plain full fine-tuning keeps its Adam moments in bf16, because float32 ones do not fit beside it.
LoRA and OSF are PEFT's. Bases are random: a step takes the same time.
"""

from __future__ import annotations

import statistics

import torch

from bench.gpu_parts.run import Run
from bench.llama import LLAMA_2_7B, TINY, Llama, Shape, matrix_flops

METHODS = ("plain", "sculpt 1/4", "sculpt 1/8", "lora", "osf 1/8", "sculpt 1/2", "osf 1/4")
LENGTH = 4096
# Seconds that must be left for one method: building it, and six steps of so many tokens.
NEEDED = {16384: 26.0, 4096: 14.0, 64: 2.0}


def part_training(run: Run) -> None:
    """Each method with each number of tokens: the larger ones first, which say more."""
    shape = TINY if run.tiny else LLAMA_2_7B
    for method in METHODS:
        for tokens in (64,) if run.tiny else (16384, 4096):
            case = f"training {method} {tokens}"
            run.attempt(case, NEEDED[tokens], _measure, run, method, shape, tokens)


def _measure(run: Run, method: str, shape: Shape, tokens: int) -> None:
    # Here, so that the other parts run where sculpt or PEFT need what is not installed.
    from bench.contenders import RATIOS, Random, make

    cuda = run.device.type == "cuda"
    kind, _, ratio = method.partition(" ")
    model = build(run.device, shape)
    known = {name: Random(module.weight) for name, module in model.matrices().items()}
    options = {"basis_dtype": "weight"} if kind == "sculpt" else {}
    contender = make(kind, RATIOS.get(ratio, 1.0), model, known, lr=1e-5, **options)
    ids = torch.randint(shape.vocabulary, (max(1, tokens // LENGTH), min(tokens, LENGTH)),
                        device=run.device)  # fmt: skip
    state = torch.cuda.memory_allocated() if cuda else None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    skip, steps = (1, 2) if run.tiny else (2, 6)
    for _ in range(steps):
        contender.step(ids)
    each = zip(*(times[skip:] for times in contender.phases.values()), strict=True)
    seconds = statistics.median(map(sum, each))
    work = matrix_flops(shape, tokens, ids.shape[1])
    rate = run.rates.get("bfloat16", run.rates["float32"])
    run.add("training", {
        "method": method,
        "tokens": tokens,
        "seconds": seconds,
        "phases": contender.seconds(skip=skip),
        "tokens_per_second": tokens / seconds,
        # FLOPs that plain training needs, by the measured rate of large products.
        "utilisation": work / seconds / rate,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        # Weights and bases before the first step; gradients and optimizer states come with it.
        "held_bytes": state,
        "trainable": contender.trainable,
        "optimizer_bytes": contender.optimizer_bytes,
    })  # fmt: skip


def build(device: torch.device, shape: Shape) -> Llama:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return Llama(shape, checkpointing=True)
    finally:
        torch.set_default_dtype(before)

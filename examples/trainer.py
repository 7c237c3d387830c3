"""Two tasks in the Trainer of transformers, in one process or in several, on GPUs or on a CPU.

torchrun --nproc-per-node 2 examples/trainer.py
accelerate launch --cpu --num_processes 2 examples/trainer.py                        # replicas
accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 examples/trainer.py  # fully_shard
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sculpt import SculptCallback, SculptConfig


def rows(seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (64, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="after", help="write the model to this directory")
    options = parser.parse_args()
    torch.manual_seed(0)  # The same model everywhere.
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    model = LlamaForCausalLM(config)
    memory = None
    for seed, task in enumerate(("first", "second")):
        sculpt = SculptConfig(unfreeze_rank_ratio=0.25)
        callback = SculptCallback(sculpt, name=task, memory=memory)
        arguments = TrainingArguments(
            output_dir=f"{options.out}/{task}",
            max_steps=10,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model, arguments, train_dataset=rows(seed), callbacks=[callback])
        trainer.train()
        model, memory = trainer.model, callback.sculptor.memory
        if trainer.is_world_process_zero():
            print(callback.certificate)
    trainer.save_model(f"{options.out}/model")
    if dist.is_initialized():
        dist.destroy_process_group()
        if not torch.cuda.is_available():
            time.sleep(0.5)  # As in several_processes.py: gloo's threads end later.


if __name__ == "__main__":
    main()

"""Two tasks in several processes, on GPUs or on a CPU.

torchrun --nproc-per-node 2 examples/several_processes.py           # replicas
torchrun --nproc-per-node 2 examples/several_processes.py --shard   # fully_shard
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from sculpt import SculptConfig, Sculptor
from sculpt.storage.export import save_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shard", action="store_true", help="divide the model by fully_shard")
    parser.add_argument("--out", default=None, help="write the model to this directory")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda" if gpu else "cpu")

    torch.manual_seed(0)  # The same model everywhere.
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    if options.shard:  # Once, before the first task.
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    sculptor = Sculptor(model, SculptConfig(unfreeze_rank_ratio=0.25))
    for task in ("first", "second"):
        sculptor.begin_task(name=task)
        # Replicas get a new wrapper for each task, around the coordinates that train in it.
        wrapped = model if options.shard else DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(sculptor.parameters(), lr=1e-3)
        sculptor.attach(optimizer)
        own = torch.Generator().manual_seed(dist.get_rank())  # Other data in every process.
        for _ in range(10):
            ids = torch.randint(0, 64, (4, 12), generator=own).to(device)
            optimizer.zero_grad()
            wrapped(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(sculptor.parameters(), 1.0)
            optimizer.step()
        certificate = sculptor.verify()  # Every process takes part.
        if dist.get_rank() == 0:
            print(certificate)
        sculptor.end_task()
    if options.out is not None:
        save_pretrained(model, options.out)
    dist.destroy_process_group()
    if not gpu:
        # A mesh of devices keeps gloo's threads, which may still let go of tensors and must not
        # find an interpreter that has ended: it would abort (pytorch/pytorch#179291).
        time.sleep(0.5)


if __name__ == "__main__":
    main()

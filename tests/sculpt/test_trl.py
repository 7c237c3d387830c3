"""`SculptCallback` in TRL's `SFTTrainer`: the losses of a plain loop over the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import tiny_model, tiny_tokenizer

from sculpt import SculptCallback
from tests.sculpt.test_trainer import CONFIG, LR, losses, plain_loop


def make_trainer(folder: Path, callback: SculptCallback, **options: Any) -> Any:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = ["the film is good", "the song is very bad", "they say that it is long"] * 8
    arguments = SFTConfig(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=LR,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        optim="adamw_torch",
        gradient_checkpointing=False,
    )
    return SFTTrainer(
        tiny_model(),
        arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tiny_tokenizer(),
        callbacks=[callback],
        **options,
    )


def test_adapters_are_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"is of PEFT: .* A trainer takes no peft_config"):
        make_trainer(tmp_path, SculptCallback(CONFIG), peft_config=peft.LoraConfig())


def test_the_losses_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    callback = SculptCallback(CONFIG)
    trainer = make_trainer(tmp_path, callback)
    batches: list[dict[str, torch.Tensor]] = []
    collate = trainer.data_collator

    def remember(rows: list[Any]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        batches.append({key: value.clone() for key, value in batch.items()})
        return batch

    trainer.data_collator = remember
    trainer.train()
    assert callback.certificate is not None
    assert callback.certificate.ok
    found = losses(trainer)
    expected, _ = plain_loop(batches, [LR] * 6, decay=0.0)
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0]

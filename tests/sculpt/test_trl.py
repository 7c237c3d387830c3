"""`SculptCallback` in TRL's `SFTTrainer`: the losses of a plain loop over the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import tiny_model, tiny_tokenizer

from sculpt import SculptCallback
from sculpt.messages import SculptWarning
from tests.sculpt.test_trainer import CONFIG, LR, losses, plain_loop

TEXTS = ["the film is good", "the song is very bad", "they say that it is long"] * 8


def make_trainer(
    folder: Path, callback: SculptCallback, settings: dict[str, Any] | None = None, **options: Any
) -> Any:
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

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
        **({"gradient_checkpointing": False} | (settings or {})),
    )
    return SFTTrainer(
        **(
            {
                "model": tiny_model(),
                "args": arguments,
                "train_dataset": Dataset.from_dict({"text": TEXTS}),
                "processing_class": tiny_tokenizer(),
                "callbacks": [callback],
            }
            | options
        )
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


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"packing": True, "max_length": 12},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 12},
    ],
    ids=["padded", "recomputed", "packed", "wrapped"],
)
def test_a_training_run_is_protected_in_the_next(settings: dict[str, Any], tmp_path: Path) -> None:
    first = SculptCallback(CONFIG, name="first")
    trainer = make_trainer(tmp_path / "first", first, settings)
    trainer.train()
    assert first.sculptor is not None
    factors = first.sculptor.memory.of("model.layers.0.mlp.up_proj")
    assert factors is not None
    # All tokens, with the one at the end of each row, however rows lie in batches; the first ones
    # of packed rows are not learned, and may be left out.
    every = sum(len(tiny_tokenizer()(text)["input_ids"]) + 1 for text in TEXTS)
    fewest = every - len(TEXTS) if "packing" in settings else every
    assert fewest <= int(factors[1].count) <= every

    second = SculptCallback(CONFIG, name="second", memory=tmp_path / "first")
    trainer = make_trainer(tmp_path / "second", second, settings, model=trainer.model)
    assert second.table is not None
    assert all("ratio" in row.method for row in second.table.rows)
    trainer.train()
    assert second.certificate is not None
    assert second.certificate.ok


def test_preferences_are_trained_without_protection_of_their_own(tmp_path: Path) -> None:
    """Their batches hold two answers to a prompt, which no likelihood belongs to."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    answer = {"prompt": "the film is", "chosen": " good", "rejected": " bad"}
    arguments = DPOConfig(
        str(tmp_path), max_steps=3, learning_rate=LR, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    callback = SculptCallback(CONFIG)
    with pytest.warns(SculptWarning, match="nothing of this task will be protected"):
        trainer = DPOTrainer(
            tiny_model(),
            ref_model=tiny_model(),
            args=arguments,
            train_dataset=Dataset.from_list([answer] * 12),
            processing_class=tiny_tokenizer(),
            callbacks=[callback],
        )
    trainer.train()
    assert callback.certificate is not None
    assert callback.certificate.ok

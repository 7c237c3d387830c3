"""A divided model as a plain Hugging Face directory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from launch import launch
from small_models import KINDS
from test_shards import shard_blocks
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from transformers import AutoModelForCausalLM

from sculpt.storage import export
from sculpt.storage.export import save_pretrained

NAMES = ["linear", "tied head and embedding"]


def full_disk(*_):
    raise OSError("no space left")


def save(folder):
    export.FILE_BYTES = 4000  # Several files.
    for name in NAMES:
        model = KINDS[name].build(torch.bfloat16)
        save_pretrained(shard_blocks(model), folder / name)
        with pytest.raises((FileExistsError, RuntimeError), match="must not exist"):
            save_pretrained(model, folder / name)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(HuggingFaceStorageWriter, "write_data", full_disk)
        with pytest.raises(OSError, match="no space left"):
            save_pretrained(model, folder / "failed")


def test_from_pretrained_reads_what_several_processes_wrote(tmp_path):
    launch(2, save, tmp_path, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(NAMES)
    for name in NAMES:
        expected = KINDS[name].build(torch.bfloat16)
        folder = tmp_path / "out" / name
        assert len(list(folder.glob("*.safetensors"))) > 1
        assert not [path for path in folder.iterdir() if path.is_dir()]
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        for key, value in expected.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), key
            assert loaded.state_dict()[key].dtype == torch.bfloat16

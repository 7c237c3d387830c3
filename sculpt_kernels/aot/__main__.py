"""Compile the Triton kernels ahead of time, without a GPU.

    python -m sculpt_kernels.aot --arch 90 --matrix 4096x4096 4096x11008 --rank 128 1024 --out pack

The kernels serve every matrix whose shape and strides are divisible by 16 where those of the
pack are; `SCULPT_AOT=pack` makes the package take them from there. Functions for C and C++ are
for the given shapes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sculpt_kernels.aot.build import Choice, build
from sculpt_kernels.aot.calls import DTYPES
from sculpt_kernels.compile import ARCHS


def _matrix(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be rows x columns, like 4096x11008; got {text!r}")
    return int(found[1]), int(found[2])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sculpt_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), help="80 90 100 ...")
    parser.add_argument("--matrix", type=_matrix, nargs="+", default=[(4096, 4096)], help="MxN ...")
    parser.add_argument("--rank", type=int, nargs="+", default=[128])
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=["bfloat16"])
    parser.add_argument("--only", nargs="*", default=[], help="operations that start so")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pack")
    options = parser.parse_args(arguments)
    choice = Choice(options.arch, options.matrix, options.rank, options.dtype, options.only)
    try:
        count = build(choice, options.out)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{count} kernels in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

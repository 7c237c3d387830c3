"""Small cases of every kernel, to be run under a checker of memory accesses and races.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 \\
      python -m bench.gpu_parts.sanitize

Without PyTorch's cache every tensor is an allocation of its own, so that an access beyond its end
is seen. The sizes are ragged: the last tiles reach over every edge.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bench.checks import SMALL, of_shape
from bench.gpu_parts.graph import operations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wrong = []
    for name, dtype in DTYPES.items():
        for shape in SMALL:
            for what, _, measure, limit in of_shape(device, name, dtype, shape):
                if not measure() <= limit:
                    wrong.append(f"{what} {name}")
            print(f"{name} {shape}", flush=True)
    for operation in operations(device):
        operation.call(operation.fresh())
        print(operation.name, flush=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"wrong: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

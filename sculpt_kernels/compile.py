"""`python -m sculpt_kernels.compile`: the Triton kernels compiled and judged without a GPU."""

import sys

from sculpt_kernels.triton.compile import main

if __name__ == "__main__":
    sys.exit(main())

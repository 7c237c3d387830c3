"""Numerics of continual full fine-tuning: two-sided projections, coordinates and subspaces.

`G`, `W` are `(..., m, n)`; `U` `(..., m, r)` and `V` `(..., n, s)` have orthonormal columns.
"""

from sculpt_kernels import reference
from sculpt_kernels.backend import backends
from sculpt_kernels.basis import orthonormalize
from sculpt_kernels.coordinates import compress, expand_add_
from sculpt_kernels.leakage import Leak, leak
from sculpt_kernels.linear import compact_linear
from sculpt_kernels.project import project, project_
from sculpt_kernels.randomized import range_finder, rsvd
from sculpt_kernels.subspace import Subspace, split

__all__ = [
    "Leak",
    "Subspace",
    "backends",
    "compact_linear",
    "compress",
    "expand_add_",
    "leak",
    "orthonormalize",
    "project",
    "project_",
    "range_finder",
    "reference",
    "rsvd",
    "split",
]

"""Numerics of continual full fine-tuning: two-sided projections, coordinates and subspaces.

`G`, `W` are `(..., m, n)`; `U` `(..., m, r)` and `V` `(..., n, s)` have orthonormal columns.
Autocast is off inside all of them but the `compact_` layers, which follow it. Transforms of
`torch.func` and forward-mode differentiation pass through `reference` only.
"""

from sculpt_kernels import ops as _ops  # noqa: F401  (registers the operators)
from sculpt_kernels import reference
from sculpt_kernels.adamw import project_adamw_
from sculpt_kernels.backend import backends
from sculpt_kernels.basis import orthonormalize
from sculpt_kernels.cache import SubspaceCache
from sculpt_kernels.coordinates import compress, expand_add_
from sculpt_kernels.expand_many import expand_add_many_
from sculpt_kernels.leakage import Leak, leak
from sculpt_kernels.linear import compact_linear
from sculpt_kernels.plan import Plan, plan
from sculpt_kernels.project import project, project_, project_many_
from sculpt_kernels.randomized import range_finder, rsvd
from sculpt_kernels.sharded import is_divided
from sculpt_kernels.split_plan import SplitPlan, plan_split
from sculpt_kernels.subspace import Subspace, split
from sculpt_kernels.weight import compact_embedding, compact_weight

__all__ = [
    "Leak",
    "Plan",
    "SplitPlan",
    "Subspace",
    "SubspaceCache",
    "backends",
    "compact_embedding",
    "compact_linear",
    "compact_weight",
    "compress",
    "expand_add_",
    "expand_add_many_",
    "is_divided",
    "leak",
    "orthonormalize",
    "plan",
    "plan_split",
    "project",
    "project_",
    "project_adamw_",
    "project_many_",
    "range_finder",
    "reference",
    "rsvd",
    "split",
]

"""Numerics of continual full fine-tuning: two-sided projections, coordinates and subspaces.

`G`, `W` are `(..., m, n)`; `U` `(..., m, r)` and `V` `(..., n, s)` have orthonormal columns.
Autocast is off inside all of them but the `compact_` layers, which follow it. Transforms of
`torch.func` and forward-mode differentiation pass through `reference` only.
"""

from sculpt_kernels import ops as _ops  # noqa: F401  (registers the operators)
from sculpt_kernels import reference
from sculpt_kernels.adamw.adamw import project_adamw_
from sculpt_kernels.coordinates.compress import compress
from sculpt_kernels.coordinates.expand import expand_add_, expand_add_many_
from sculpt_kernels.coordinates.linear import compact_linear
from sculpt_kernels.coordinates.weight import compact_embedding, compact_weight
from sculpt_kernels.dispatch import backends
from sculpt_kernels.leak import Leak, leak
from sculpt_kernels.plan.projections import Plan, plan
from sculpt_kernels.projection.project import project, project_, project_many_
from sculpt_kernels.shards import is_divided
from sculpt_kernels.subspaces.basis import orthonormalize
from sculpt_kernels.subspaces.cache import SubspaceCache
from sculpt_kernels.subspaces.methods import Subspace
from sculpt_kernels.subspaces.randomized import range_finder, rsvd
from sculpt_kernels.subspaces.split import split

__all__ = [
    "Leak",
    "Plan",
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
    "project",
    "project_",
    "project_adamw_",
    "project_many_",
    "range_finder",
    "reference",
    "rsvd",
    "split",
]

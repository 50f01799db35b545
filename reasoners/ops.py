"""The operators: one documented function each, its fake (meta) form and its derivative.

Every kernel of the package is reached through this file and nowhere else. Inputs may have any
strides unless said otherwise; a tensor that is mutated must be contiguous. Shapes use the letters of
the field: H heads, P head dim, N state dim; a tensor with fewer heads or groups than H is shared by
consecutive heads (head h reads head h // (H / Hx) of x), and no repeat is ever materialised.

Raises, all of them: ValueError for shapes and values, TypeError for dtypes, NotImplementedError for
a device without a kernel. Data is float32 or bfloat16 (float16 on CUDA, float64 on CPU for gradient
checks); decays, scales, D and scan states are float32 (float64 beside float64 data).
"""

import torch
from torch import Tensor

from reasoners import _C  # importing it registers the operators

_ops = torch.ops.reasoners

build = {
    "compiled_with_cuda": _C.compiled_with_cuda,
    "cuda_archs": _C.cuda_archs,
    "cutlass_version": _C.cutlass_version,
    "cpu_vectors": _C.cpu_vectors,
    "torch_version": _C.torch_version,
}


def state_update(
    state: Tensor,
    slots: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    scale: Tensor | None = None,
    D: Tensor | None = None,
) -> Tensor:
    """Advance the SSD recurrence by one token per row, in place on the rows' slots.

    S = exp(log_decay) S + scale x B^T,   y = S C + D x

    state: (slots, H, P, N) float32 or bfloat16, mutated at the named slots only.
    slots: (batch) int32, distinct; a negative slot is a padding row: zeros out, no state touched.
    x: (batch, Hx, P); log_decay: (batch, H) <= 0; B: (batch, Gb, N); C: (batch, Gc, N).
    scale: (batch, H), None means 1. D: (H), None means 0.
    Returns y (batch, H, P) in x's dtype. Source: Dao & Gu 2024 (Mamba-2), section 7.
    """
    return _ops.state_update(state, slots, x, log_decay, B, C, scale, D)


@torch.library.register_fake("reasoners::state_update")
def _(state, slots, x, log_decay, B, C, scale, D):
    return x.new_empty(x.shape[0], log_decay.shape[1], x.shape[2])

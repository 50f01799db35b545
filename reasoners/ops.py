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


def ssd_scan(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    scale: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the SSD recurrence over whole sequences, in chunks; differentiable.

    S_t = exp(log_decay_t) S_{t-1} + scale_t x_t B_t^T,   y_t = S_t C_t + D x_t

    x: (batch, length, Hx, P); B: (batch, length, Gb, N); C: (batch, length, Gc, N).
    log_decay: (batch, length, H) <= 0; -inf forgets everything before.
    scale: (batch, length, H), None means 1. D: (H), None means 0.
    initial_state: (sequences, H, P, N), the state before the first token, None means 0.
    cu_seqlens: (sequences + 1) int32 offsets from 0 to length of sequences packed into batch 1; each
        starts from its own initial state and gets bit for bit what it would alone. None means that
        every batch row is a sequence.
    Returns y (batch, length, H, P) in x's dtype and the states after the last tokens, (sequences, H,
    P, N). Every gradient is summed in a fixed order: the same bits at any number of threads.
    Source: Dao & Gu 2024 (Mamba-2), section 6.
    """
    return _ops.ssd_scan(x, log_decay, B, C, scale, D, initial_state, cu_seqlens)


@torch.library.register_fake("reasoners::ssd_scan")
def _(x, log_decay, B, C, scale, D, initial_state, cu_seqlens):
    batch, length, heads = log_decay.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = x.new_empty(batch, length, heads, x.shape[3])
    return y, log_decay.new_empty(sequences, heads, x.shape[3], B.shape[3])


@torch.library.register_fake("reasoners::ssd_scan_backward")
def _(dy, dfinal_state, x, log_decay, B, C, scale, D, initial_state, cu_seqlens):
    def like(argument, model):
        return model.new_empty(0 if argument is None else argument.shape)

    wide = [like(argument, log_decay) for argument in (scale, D, initial_state)]
    data = [like(argument, argument) for argument in (x, log_decay, B, C)]
    return *data, *wide


def _ssd_scan_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.state_shape = output[1].shape


def _ssd_scan_derivative(ctx, dy, dfinal_state):
    inputs = ctx.saved_tensors
    x, log_decay, *_ = inputs
    if dy is None:
        dy = x.new_zeros(*log_decay.shape, x.shape[3])
    if dfinal_state is None:
        dfinal_state = log_decay.new_zeros(ctx.state_shape)
    gradients = _ops.ssd_scan_backward(dy, dfinal_state, *inputs)
    return *(g if n else None for g, n in zip(gradients, ctx.needs_input_grad)), None


torch.library.register_autograd(
    "reasoners::ssd_scan", _ssd_scan_derivative, setup_context=_ssd_scan_setup
)


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """ssd_scan under the names, order and defaults of mamba_ssm's mamba_chunk_scan_combined.

    delta = clamp(softplus(dt + dt_bias), *dt_limit),   log_decay = delta A,   scale = delta
    out = ssd_scan(...) * silu(z)

    x, z: (batch, length, H, P); dt: (batch, length, H); A, dt_bias: (H); B, C: (batch, length, groups,
    N); D: (H) or (H, P). chunk_size is accepted and changes nothing: the kernel has its own.
    cu_seqlens: as in ssd_scan; unlike there it separates the sequences by itself, and initial_states
        is (sequences, H, P, N) beside it. seq_idx must be None: pass cu_seqlens.
    Returns out, then with return_final_states the state at the end of each row (batch, H, P, N), then
    with return_varlen_states the state at the end of each sequence (sequences, H, P, N).
    """
    if seq_idx is not None:
        raise NotImplementedError(
            "mamba_chunk_scan: seq_idx expected None, got a tensor: cu_seqlens"
        )
    if return_varlen_states and cu_seqlens is None:
        raise ValueError(
            "mamba_chunk_scan: cu_seqlens expected with return_varlen_states, got None"
        )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    delta = dt.to(wide)
    if dt_bias is not None:
        delta = delta + dt_bias.to(wide)
    if dt_softplus:
        delta = torch.nn.functional.softplus(delta)
    if tuple(dt_limit) != (0.0, float("inf")):
        delta = delta.clamp(*dt_limit)
    skip = None if D is None or D.dim() == 2 else D.to(wide)
    if initial_states is not None:
        initial_states = initial_states.to(wide)
    y, states = ssd_scan(x, delta * A.to(wide), B, C, delta, skip, initial_states, cu_seqlens)
    if D is not None and D.dim() == 2:
        y = torch.addcmul(y, D.to(y.dtype), x)
    if z is not None:
        y = (y.to(wide) * torch.nn.functional.silu(z.to(wide))).to(y.dtype)
    results = [y]
    if return_final_states:
        results.append(states if cu_seqlens is None else states[-1:])
    if return_varlen_states:
        results.append(states)
    return y if len(results) == 1 else tuple(results)

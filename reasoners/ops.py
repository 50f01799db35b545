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

from reasoners import _C  # importing _C registers the operators

_ops = torch.ops.reasoners

build = {
    "compiled_with_cuda": _C.compiled_with_cuda,
    "cuda_archs": _C.cuda_archs,
    "cutlass_version": _C.cutlass_version,
    "cpu_vectors": _C.cpu_vectors,
    "torch_version": _C.torch_version,
}


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of decays, scales, D, scan states and sums beside data of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_kernel(name: str, device: str) -> bool:
    """Whether this build has a kernel of the operator for "cpu" or "cuda"."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(f"reasoners::{name}", device.upper())


def all_on(device: str) -> bool:
    """Whether every operator that generating needs has a kernel for "cpu" or "cuda"."""
    names = torch._C._dispatch_get_all_op_names()
    ours = {
        n.removeprefix("reasoners::").split(".")[0] for n in names if n.startswith("reasoners::")
    }
    return all(has_kernel(name, device) for name in ours if not name.endswith("_backward"))


def state_update(
    state: Tensor,
    slots: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    scale: Tensor | None = None,
    D: Tensor | None = None,
    rng_key: Tensor | None = None,
) -> Tensor:
    """Advance the SSD recurrence by one token per row, in place on the rows' slots.

    S = exp(log_decay) S + scale x B^T,   y = S C + D x

    state: (slots, H, P, N) float32 or bfloat16, mutated at the named slots only.
    slots: (batch) int32, distinct; a negative slot is a padding row: zeros out, no state touched.
    x: (batch, Hx, P); log_decay: (batch, H) <= 0; B: (batch, Gb, N); C: (batch, Gc, N).
    scale: (batch, H), None means 1. D: (H), None means 0.
    rng_key: (batch, 4) int64: seed, prompt, sample, position, as in `sample`. A 16-bit state is then
        rounded up or down at random, unbiased, by noise that depends on the row's key only, so that
        increments too small for its bits are not lost. None rounds to nearest; a state that is not
        rounded must have None.
    Returns y (batch, H, P) in x's dtype. Source: Dao & Gu 2024 (Mamba-2), section 7.
    """
    return _ops.state_update(state, slots, x, log_decay, B, C, scale, D, rng_key)


@torch.library.register_fake("reasoners::state_update")
def _(state, slots, x, log_decay, B, C, scale, D, rng_key):
    return x.new_empty(x.shape[0], log_decay.shape[1], x.shape[2])


def deferred_state_update(
    state: Tensor,
    recent: Tensor,
    recent_decay: Tensor,
    pending: Tensor,
    slots: Tensor,
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    scale: Tensor | None = None,
    D: Tensor | None = None,
    period: int = 1,
    rng_key: Tensor | None = None,
) -> Tensor:
    """`state_update` that writes the state every `period` tokens, and keeps the tokens between.

    S = state[s] with the pending[s] entries of recent[s] and then this token folded onto it,
    y = S C + D x;   state[s] = S if pending[s] + 1 >= period, else this token becomes the next entry

    A state is much larger than a token, so most of the traffic of decoding is gone.

    state: (slots, H, P, N) float32 or bfloat16, mutated at the slots of the rows that write.
    recent: (slots, capacity, Hx * P + Gb * N) in x's dtype, entries [x, B], capacity at most 15;
        mutated at one entry of each row that does not write.
    recent_decay: (slots, capacity, 2, H), entries [log_decay, scale (1 for None)], mutated likewise.
    pending: (slots) int32, how many entries of each slot count; only read, because the layers of a
        model share it: `count_pending` moves it once all have run. Taking back the last k of them is
        pending -= k.
    slots, x, log_decay, B, C, scale, D, rng_key: as in state_update; nothing is rounded, and no noise
        drawn, where no state is written.
    period: 1 to capacity + 1, free to change between tokens; 1 always writes.
    Returns y (batch, H, P) in x's dtype. A row's bits depend on its slot and token only.
    """
    return _ops.deferred_state_update(
        state, recent, recent_decay, pending, slots, x, log_decay, B, C, scale, D, period, rng_key
    )


@torch.library.register_fake("reasoners::deferred_state_update")
def _(
    state, recent, recent_decay, pending, slots, x, log_decay, B, C, scale, D, period, rng_key
):  # fmt: skip
    return x.new_empty(x.shape[0], log_decay.shape[1], x.shape[2])


def count_pending(pending: Tensor, slots: Tensor, period: int) -> None:
    """Count the token that every layer's `deferred_state_update` has just taken.

    pending[s] = 0 if pending[s] + 1 >= period else pending[s] + 1   for each slot s >= 0 of slots

    pending: (slots) int32, mutated at the named slots only. slots: (batch) int32, distinct; a negative
    slot is a padding row. period: as it was in deferred_state_update.
    """
    _ops.count_pending(pending, slots, period)


@torch.library.register_fake("reasoners::count_pending")
def _(pending, slots, period):
    return None


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
    wide = wide_dtype(x.dtype)
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


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution over time, optionally followed by SiLU.

    y_t = act(bias + sum_w weight[:, w] u_{t - (width - 1) + w}), u = x after the initial state

    x: (batch, length, channels). weight: (channels, width), width 2 to 4. bias: (channels), None
    means 0. initial_state: (batch or sequences, width - 1, channels), the inputs before the first,
    oldest first; None means 0. cu_seqlens: (sequences + 1) int32 offsets of sequences packed along
    length in a batch of one. All in x's dtype.
    Returns y (batch, length, channels) and the final state, the last width - 1 inputs of each
    sequence. Differentiable in the tensors. Source: Gu & Dao 2023 (Mamba), section 3.4.
    """
    return _ops.causal_conv1d(x, weight, bias, initial_state, cu_seqlens, silu)


@torch.library.register_fake("reasoners::causal_conv1d")
def _(x, weight, bias, initial_state, cu_seqlens, silu):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), x.new_empty(sequences, weight.shape[1] - 1, x.shape[2])


@torch.library.register_fake("reasoners::causal_conv1d_backward")
def _(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu):
    optional = [x.new_empty(0 if t is None else t.shape) for t in (bias, initial_state)]
    return x.new_empty(x.shape), x.new_empty(weight.shape), *optional


def _causal_conv1d_setup(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.state_shape = output[1].shape


def _causal_conv1d_derivative(ctx, dy, dfinal_state):
    inputs = ctx.saved_tensors
    x = inputs[0]
    dy = torch.zeros_like(x) if dy is None else dy
    dfinal_state = x.new_zeros(ctx.state_shape) if dfinal_state is None else dfinal_state
    gradients = _ops.causal_conv1d_backward(dy, dfinal_state, *inputs, ctx.silu)
    return *(g if n else None for g, n in zip(gradients, ctx.needs_input_grad)), None, None


torch.library.register_autograd(
    "reasoners::causal_conv1d", _causal_conv1d_derivative, setup_context=_causal_conv1d_setup
)


def conv_update(
    state: Tensor,
    slots: Tensor,
    lengths: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Advance `causal_conv1d` by one token per row, in place on the rows' slots.

    y = act(bias + sum_w weight[:, w] u_w),   u_w = entry (length + w) % width, and the last u is x

    state: (slots, width, channels), a ring: the input at position t is entry t % width, zeros before
        the first. Mutated at the named slots' entry (length - 1) % width only.
    slots: (batch) int32, distinct; a negative slot is a padding row: zeros out, no state touched.
    lengths: (batch) int32, tokens of each row's sequence with this one; ignored for a padding row.
    x: (batch, channels). weight: (channels, width), width 2 to 4. bias: (channels), None means 0. All
    in x's dtype.
    Returns y (batch, channels).
    """
    return _ops.conv_update(state, slots, lengths, x, weight, bias, silu)


@torch.library.register_fake("reasoners::conv_update")
def _(state, slots, lengths, x, weight, bias, silu):
    return x.new_empty(x.shape)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Mamba-1 recurrence: a decay for every channel and state entry.

    S_t = exp(delta_t A) S_{t-1} + delta_t x_t B_t,   y_t = S_t . C_t + D x_t

    x: (batch, length, channels). delta: (batch, length, channels) >= 0. A: (channels, N) < 0.
    B: (batch, length, Gb, N), C: (batch, length, Gc, N); channel c reads group c // (channels / G).
    D: (channels), None means 0. initial_state: (batch or sequences, channels, N), None means 0.
    cu_seqlens: (sequences + 1) int32 offsets of sequences packed along length in a batch of one.
    Returns y (batch, length, channels) in x's dtype and the final state (batch or sequences,
    channels, N). Differentiable in the tensors. Source: Gu & Dao 2023 (Mamba), section 3.2.
    """
    return _ops.selective_scan(x, delta, A, B, C, D, initial_state, cu_seqlens)


@torch.library.register_fake("reasoners::selective_scan")
def _(x, delta, A, B, C, D, initial_state, cu_seqlens):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty(x.shape), A.new_empty(sequences, *A.shape)


@torch.library.register_fake("reasoners::selective_scan_backward")
def _(dy, dfinal_state, x, delta, A, B, C, D, initial_state, cu_seqlens):
    optional = [A.new_empty(0 if t is None else t.shape) for t in (D, initial_state)]
    return *(t.new_empty(t.shape) for t in (x, delta, A, B, C)), *optional


def _selective_scan_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.state_shape = output[1].shape


def _selective_scan_derivative(ctx, dy, dfinal_state):
    inputs = ctx.saved_tensors
    x, _, A, *_ = inputs
    dy = torch.zeros_like(x) if dy is None else dy
    dfinal_state = A.new_zeros(ctx.state_shape) if dfinal_state is None else dfinal_state
    gradients = _ops.selective_scan_backward(dy, dfinal_state, *inputs)
    return *(g if n else None for g, n in zip(gradients, ctx.needs_input_grad)), None


torch.library.register_autograd(
    "reasoners::selective_scan", _selective_scan_derivative, setup_context=_selective_scan_setup
)


def selective_update(
    state: Tensor,
    slots: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
) -> Tensor:
    """Advance `selective_scan` by one token per row, in place on the rows' slots.

    state: (slots, channels, N) float32 or bfloat16, mutated at the named slots only. slots: (batch)
    int32, distinct; a negative slot is a padding row: zeros out, no state touched. x: (batch,
    channels); delta: (batch, channels) >= 0; A: (channels, N) < 0; B: (batch, Gb, N); C: (batch, Gc,
    N); D: (channels), None means 0.
    Returns y (batch, channels) in x's dtype.
    """
    return _ops.selective_update(state, slots, x, delta, A, B, C, D)


@torch.library.register_fake("reasoners::selective_update")
def _(state, slots, x, delta, A, B, C, D):
    return x.new_empty(x.shape)


def discrete_mamba2_scan(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    z_bias: Tensor,
    D: Tensor,
    state_dim: int,
    past: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Llamba's mixer between its projections over whole sequences; without gradients.

    [x, B, C] = causal_conv1d([x, B, C]),   log_decay = -softplus(a)
    out = ssd_scan(x, log_decay, B, C, D) * silu(z + z_bias)

    projected: (batch, length, I + 2 G N + I + H), rows [x, B, C, z, a]. I = H P, N = state_dim.
    conv_weight: (I + 2 G N, width), width 2 to 4; conv_bias: (I + 2 G N); z_bias: (I); in projected's
        dtype. D: (H) float32.
    past: (sequences, width - 1, I + 2 G N), the inputs of the convolution before the first, oldest
        first; None means 0. initial_state, cu_seqlens: as in ssd_scan.
    Returns out (batch, length, I) in projected's dtype, the convolution's last width - 1 inputs of
    each sequence, and the states after the last tokens, (sequences, H, P, N). A sequence gets bit for
    bit what it would alone. Source: Bick et al. 2025 (Llamba).
    """
    return _ops.discrete_mamba2_scan(
        projected, conv_weight, conv_bias, z_bias, D, state_dim, past, initial_state, cu_seqlens
    )


@torch.library.register_fake("reasoners::discrete_mamba2_scan")
def _(projected, conv_weight, conv_bias, z_bias, D, state_dim, past, initial_state, cu_seqlens):
    return _mixer_scan_results(projected, conv_weight, z_bias, D, state_dim, cu_seqlens)


def _mixer_scan_results(projected, conv_weight, per_channel, D, state_dim, cu_seqlens):
    batch, length, _ = projected.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    (inner,), (heads,), (channels, width) = per_channel.shape, D.shape, conv_weight.shape
    y = projected.new_empty(batch, length, inner)
    last_inputs = projected.new_empty(sequences, width - 1, channels)
    return y, last_inputs, D.new_empty(sequences, heads, inner // heads, state_dim)


def mamba2_scan(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    state_dim: int,
    past: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """MambaInLlama's Mamba-2 mixer between its projections over whole sequences; without gradients.

    [x, B, C] = silu(causal_conv1d([x, B, C])),   delta = softplus(dt + dt_bias)
    y = ssd_scan(x, -delta exp(A_log), B, C, scale=delta, D)
    g = y silu(z),   out = g / sqrt(mean(g^2) + eps) * norm_weight   with the mean over each head's P

    projected: (batch, length, I + K (P + N) + H N + H), rows [z, x, B, C, dt]. I = H P, N = state_dim;
        K kv heads.
    conv_weight: (channels, width), width 2 to 4; conv_bias: (channels); norm_weight: (I); in
        projected's dtype. dt_bias, A_log, D: (H) float32.
    past, initial_state, cu_seqlens: as in discrete_mamba2_scan.
    Returns what discrete_mamba2_scan does. Source: Wang et al. 2024 (MambaInLlama).
    """
    return _ops.mamba2_scan(
        projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, state_dim, past,
        initial_state, cu_seqlens,
    )  # fmt: skip


@torch.library.register_fake("reasoners::mamba2_scan")
def _(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, state_dim, past,
    initial_state, cu_seqlens,
):  # fmt: skip
    return _mixer_scan_results(projected, conv_weight, norm_weight, D, state_dim, cu_seqlens)


def discrete_mamba2_update(
    conv_state: Tensor,
    state: Tensor,
    recent: Tensor | None,
    recent_decay: Tensor | None,
    pending: Tensor | None,
    slots: Tensor,
    lengths: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    z_bias: Tensor,
    D: Tensor,
    period: int = 1,
    rng_key: Tensor | None = None,
) -> Tensor:
    """One token of Llamba's mixer between its projections.

    [x, B, C] = conv_update([x, B, C]),   log_decay = -softplus(a)
    out = deferred_state_update(x, log_decay, B, C, D) * silu(z + z_bias)

    conv_state: (slots, width, I + 2 G N), as conv_update's state; mutated. I = H P.
    state: (slots, H, P, N); recent: (slots, capacity, I + G N); recent_decay: (slots, capacity, 2, H);
        pending: (slots): as in deferred_state_update, mutated like there. recent, recent_decay and
        pending are all None for `state_update` in its place, with period 1.
    slots, lengths: (batch) int32, as in conv_update.
    projected: (batch, I + 2 G N + I + H), rows [x, B, C, z, a].
    conv_weight: (I + 2 G N, width); conv_bias: (I + 2 G N); z_bias: (I); in its dtype.
    D: (H) float32.
    period, rng_key: as in deferred_state_update.
    Returns (batch, I) in projected's dtype. Source: Bick et al. 2025 (Llamba).
    """
    return _ops.discrete_mamba2_update(
        conv_state, state, recent, recent_decay, pending, slots, lengths, projected, conv_weight,
        conv_bias, z_bias, D, period, rng_key,
    )  # fmt: skip


@torch.library.register_fake("reasoners::discrete_mamba2_update")
def _(conv_state, state, recent, recent_decay, pending, slots, lengths, projected, *rest):
    return projected.new_empty(projected.shape[0], state.shape[1] * state.shape[2])


def mamba2_update(
    conv_state: Tensor,
    state: Tensor,
    recent: Tensor | None,
    recent_decay: Tensor | None,
    pending: Tensor | None,
    slots: Tensor,
    lengths: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    eps: float,
    period: int = 1,
    rng_key: Tensor | None = None,
) -> Tensor:
    """One token of MambaInLlama's Mamba-2 mixer between its projections.

    [x, B, C] = silu(conv_update([x, B, C])),   delta = softplus(dt + dt_bias)
    y = deferred_state_update(x, -delta exp(A_log), B, C, scale=delta, D)
    g = y silu(z),   out = g / sqrt(mean(g^2) + eps) * norm_weight   with the mean over each head's P

    conv_state: (slots, width, K (P + N) + H N), as conv_update's state; mutated. K kv heads.
    state: (slots, H, P, N); recent: (slots, capacity, K (P + N)); recent_decay, pending: as in
        discrete_mamba2_update.
    slots, lengths: (batch) int32, as in conv_update.
    projected: (batch, I + K (P + N) + H N + H), rows [z, x, B, C, dt]. I = H P.
    conv_weight: (channels, width); conv_bias: (channels); norm_weight: (I); in
        its dtype. dt_bias, A_log, D: (H) float32.
    period, rng_key: as in deferred_state_update.
    Returns (batch, I) in projected's dtype. Source: Wang et al. 2024 (MambaInLlama).
    """
    return _ops.mamba2_update(
        conv_state, state, recent, recent_decay, pending, slots, lengths, projected, conv_weight,
        conv_bias, dt_bias, A_log, D, norm_weight, eps, period, rng_key,
    )  # fmt: skip


@torch.library.register_fake("reasoners::mamba2_update")
def _(conv_state, state, recent, recent_decay, pending, slots, lengths, projected, *rest):
    return projected.new_empty(projected.shape[0], state.shape[1] * state.shape[2])


def mamba1_update(
    conv_state: Tensor,
    state: Tensor,
    slots: Tensor,
    lengths: Tensor,
    projected: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    kv_dim: int,
) -> Tensor:
    """One token of MambaInLlama's Mamba-1 mixer between its projections.

    x = silu(conv_update(repeat(x))),   delta = softplus(dt + dt_bias)
    out = selective_update(x, delta, -exp(A_log), repeat(B), C, D) * silu(z)

    repeat: each chunk of N of the kv_dim channels, I / kv_dim times; never materialised for B.
    conv_state: (slots, width, I), as conv_update's state; mutated. state: (slots, I, N); mutated.
    slots, lengths: (batch) int32, as in conv_update.
    projected: (batch, 2 I + 2 kv_dim + any), rows [z, x, B, C, unread]; kv_dim divides I and is a
        multiple of N.
    dt: (batch, I), the projected step sizes. conv_weight: (I, width); conv_bias, dt_bias: (I);
        in projected's dtype. A_log: (I, N), D: (I), float32.
    Returns (batch, I) in projected's dtype. Source: Wang et al. 2024 (MambaInLlama).
    """
    return _ops.mamba1_update(
        conv_state, state, slots, lengths, projected, dt, conv_weight, conv_bias, dt_bias, A_log, D,
        kv_dim,
    )  # fmt: skip


@torch.library.register_fake("reasoners::mamba1_update")
def _(conv_state, state, slots, lengths, projected, *rest):
    return projected.new_empty(projected.shape[0], state.shape[1])


def gate(x: Tensor, z: Tensor, bias: Tensor | None = None) -> Tensor:
    """x silu(z + bias), the gate of every mixer and MLP here.

    x, z: the same shape (..., channels); bias: (channels), None means 0. All in one dtype.
    An element's bits do not depend on where in the tensor it stands. Differentiable.
    """
    return _ops.gate(x, z, bias)


@torch.library.register_fake("reasoners::gate")
def _(x, z, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("reasoners::gate_backward")
def _(dy, x, z, bias):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _gate_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gate_derivative(ctx, dy):
    x, z, bias = ctx.saved_tensors
    dx, dz = _ops.gate_backward(dy, x, z, bias)
    return dx, dz, dz.sum_to_size(bias.shape) if ctx.needs_input_grad[2] else None


torch.library.register_autograd("reasoners::gate", _gate_derivative, setup_context=_gate_setup)


def swiglu(gate_up: Tensor) -> Tensor:
    """The second half of the channels times silu of the first; as `gate`, its bits and all.

    gate_up: (..., 2 channels), as the one matrix of an MLP's two projections gives them.
    Returns (..., channels). Differentiable, and its gradient is one tensor too.
    Source: Shazeer 2020 (GLU Variants Improve Transformer).
    """
    return _ops.swiglu(gate_up)


@torch.library.register_fake("reasoners::swiglu")
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.register_fake("reasoners::swiglu_backward")
def _(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_derivative(ctx, dy):
    return _ops.swiglu_backward(dy, *ctx.saved_tensors)


torch.library.register_autograd(
    "reasoners::swiglu", _swiglu_derivative, setup_context=_swiglu_setup
)


def softplus(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """log(1 + exp(x + bias)) in float32 (float64 for float64): step sizes and decays.

    x: (..., channels); bias: (channels) float32, None means 0.
    An element's bits do not depend on where in the tensor it stands. Differentiable.
    """
    return _ops.softplus(x, bias)


@torch.library.register_fake("reasoners::softplus")
def _(x, bias):
    wide = wide_dtype(x.dtype)
    return x.new_empty(x.shape, dtype=wide)


def _softplus_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _softplus_derivative(ctx, dy):
    x, bias = ctx.saved_tensors
    v = x.to(dy.dtype) if bias is None else x.to(dy.dtype) + bias
    dv = dy * torch.sigmoid(v)
    return dv.to(x.dtype), None if bias is None else dv.sum_to_size(bias.shape)


torch.library.register_autograd(
    "reasoners::softplus", _softplus_derivative, setup_context=_softplus_setup
)


def distillation_losses(
    logits: Tensor,
    taught: Tensor | None,
    labels: Tensor,
    beta: float = 1.0,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and divergence of every token; their gradient takes the place of the logits.

    ce = cross entropy of softmax(logits) with labels; kl = the divergence of softmax(logits / temperature)
    and softmax(taught / temperature), which distill.losses.generalized_jsd defines.

    logits: (tokens, vocab), contiguous; with `gradient` they become that of (1 - kl_weight) ce +
    kl_weight kl, token by token. taught: the teacher's, likewise, left as they are; None where kl_weight is
    0. labels: (tokens) int64; one outside the vocabulary raises IndexError, on CUDA its ce is NaN.
    Returns ce, kl: (tokens) float32, or float64 for float64; kl is 0 without a teacher.
    """
    return _ops.distillation_losses(logits, taught, labels, beta, temperature, kl_weight, gradient)


@torch.library.register_fake("reasoners::distillation_losses")
def _(logits, taught, labels, *settings):
    wide = wide_dtype(logits.dtype)
    return tuple(logits.new_empty(logits.shape[0], dtype=wide) for _ in range(2))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b with the same bits in a row of x however many rows there are; without gradients.

    x: (..., in_features); weight: (out_features, in_features); bias: (out_features), None means 0. All in
    one dtype. BLAS libraries sum in another order for few rows; here few rows are padded (CPU) or take
    a kernel of their own that sums as cuBLAS does for many (CUDA, 16 bits). Float32
    products on CUDA, and on Intel CPUs without MKL_CBWR=AVX512,STRICT, do not keep the promise.
    Returns (..., out_features).
    """
    return _ops.linear(x, weight, bias)


@torch.library.register_fake("reasoners::linear")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# Rows up to which the products of a 16-bit model on CUDA take the norm in front of them, and the sum
# behind them, into their own launch.
FEW_ROWS = 4


def rms_norm_linear(
    h: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """The product with the RMSNorm of h, gated on request; without gradients.

    y = W norm(h) + b;   gated: y = value silu(gate) with the first half of W's rows for gates

    h: (..., dim) contiguous. norm_weight: (dim). weight: (out_features, dim). bias: (out_features), None
    means 0. All in one dtype.
    Returns (..., out_features), or out_features / 2 if gated: the bits of add_rms_norm, linear and gate,
    each rounded. One launch for up to FEW_ROWS rows on CUDA, 16 bits.
    """
    return _ops.rms_norm_linear(h, norm_weight, eps, weight, bias, gated)


@torch.library.register_fake("reasoners::rms_norm_linear")
def _(h, norm_weight, eps, weight, bias, gated):
    return h.new_empty(*h.shape[:-1], weight.shape[0] // (2 if gated else 1))


def add_linear(h: Tensor, x: Tensor, weight: Tensor) -> None:
    """h += x W^T, in place; without gradients.

    h: (..., out_features) contiguous, mutated. x: (..., in_features). weight: (out_features, in_features).
    All in one dtype. Product and sum are each rounded to it. One launch for up to FEW_ROWS rows on CUDA,
    16 bits.
    """
    _ops.add_linear(h, x, weight)


@torch.library.register_fake("reasoners::add_linear")
def _(h, x, weight):
    return None


def add_rms_norm(h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """h += delta in place, and the RMSNorm of the sum.

    h = h + delta,   y = h / sqrt(mean(h^2) + eps) * weight   with the mean over the last dimension

    h: (..., dim) contiguous, mutated unless delta is None. delta: as h, None means 0. weight: (dim). All
    in one dtype.
    Returns y like h. The sum, the normalised value and the product are each rounded to that dtype;
    the statistics are float32 (float64 for float64). A row's bits depend on the row only.
    Source: Zhang & Sennrich 2019 (RMSNorm).
    """
    return _ops.add_rms_norm(h, delta, weight, eps)


@torch.library.register_fake("reasoners::add_rms_norm")
def _(h, delta, weight, eps):
    return h.new_empty(h.shape)


def rotate(x: Tensor, positions: Tensor, inv_freq: Tensor) -> None:
    """Half-split rotary position embedding, in place.

    first' = first cos - second sin,   second' = second cos + first sin,   angle = position inv_freq

    x: (tokens, heads, head_dim), mutated; the heads of a token are packed, the stride between tokens
        is free, as in a slice of a projection's output. first and second are the halves of a head.
    positions: (tokens) int32. inv_freq: (head_dim / 2) float32.
    Angle, cosine and sine are float32 and the products are rounded once. A token's bits depend on
    itself and its position only. Source: Su et al. 2021 (RoFormer).
    """
    _ops.rotate(x, positions, inv_freq)


@torch.library.register_fake("reasoners::rotate")
def _(x, positions, inv_freq):
    return None


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """`rotate` of a copy of x (..., heads, head_dim), with as many tokens before; differentiable in x."""
    return _Rotated.apply(x, positions, inv_freq)


class _Rotated(torch.autograd.Function):
    """The derivative turns back."""

    @staticmethod
    def forward(ctx, x, positions, inv_freq):
        ctx.save_for_backward(positions, inv_freq)
        y = x.clone(memory_format=torch.contiguous_format)
        _ops.rotate(y.flatten(0, -3), positions, inv_freq)
        return y

    @staticmethod
    def backward(ctx, dy):
        positions, inv_freq = ctx.saved_tensors
        return _Rotated.apply(dy, positions, -inv_freq), None, None


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
) -> None:
    """Write the keys and values of new tokens to their places in the paged cache.

    Token i of a row with n new tokens goes to position kv_lengths[row] - n + i, that is slot
    position % page_size of page page_table[row, position // page_size].

    k_cache, v_cache: (pages, kv_heads, page_size, head_dim), mutated at those places only.
    k, v: (tokens, kv_heads, head_dim) in the cache's dtype, the rows' new tokens one after the other.
    page_table: (rows, max_pages) int32; entries past a row's length are never read.
    cu_seqlens_q: (rows + 1) int32, where each row's new tokens begin in k.
    kv_lengths: (rows) int32, the length of each row with its new tokens; 0 or less is a padding row,
        whose tokens are skipped.
    Rows may share pages (a forked prompt) as long as no row appends to a shared one. On CPU the
    values of the three tables are checked before anything is written.
    """
    _ops.append_kv(k_cache, v_cache, k, v, page_table, cu_seqlens_q, kv_lengths)


@torch.library.register_fake("reasoners::append_kv")
def _(k_cache, v_cache, k, v, page_table, cu_seqlens_q, kv_lengths):
    return None


def rotate_append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    inv_freq: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
) -> None:
    """`rotate` of the new tokens' queries and keys, and `append_kv`, in one pass: the same bits.

    k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths: as in append_kv; a token's position, which
        rotates it, is its place in its row.
    qkv: (tokens, heads + 2 * kv_heads, head_dim): queries, keys and values as one projection gives
        them; the stride between tokens is free. The queries are rotated in place; keys and values
        stay as they are, and the rotated keys are in the cache only. Tokens of padding rows are
        skipped.
    inv_freq: (head_dim / 2) float32.
    """
    _ops.rotate_append_kv(k_cache, v_cache, qkv, inv_freq, page_table, cu_seqlens_q, kv_lengths)


@torch.library.register_fake("reasoners::rotate_append_kv")
def _(k_cache, v_cache, qkv, inv_freq, page_table, cu_seqlens_q, kv_lengths):
    return None


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    kv_lengths: Tensor,
    scale: float | None = None,
    max_queries: int | None = None,
    shared: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each row's last tokens over the row's pages.

    y_i = sum_j softmax_j(scale q_i . k_j) v_j   over positions j <= position of i
    lse_i = log sum_j exp(scale q_i . k_j)

    q: (tokens, heads, head_dim); the queries of a row are its last positions. heads is a multiple of
        kv_heads, and query head h reads kv head h // (heads / kv_heads).
    k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths: as in append_kv, which comes first: a
        row's length includes its queries. The queries of a padding row give zeros.
    scale: of the scores; None means head_dim ** -0.5.
    max_queries: what no row's count of queries exceeds. 1 means decode, which other kernels serve than
        prefill, and needs as many tokens as rows: it is to be said, as a prompt's last piece may be
        one token long and must get the bits of any other piece, so anything above 1. None means 1
        if there are as many tokens as rows.
    shared: (rows, 2) int32, which rows begin with the same pages, so that they are read once for all
        of them: [first row of the group, tokens it shares]. The rows of a group are neighbours and
        carry the same pair, a row by itself [its own number, 0]; tokens are whole pages and fewer
        than any row's length, padding rows apart; the pages are those of the first row, padding or
        not. Needs max_queries = 1. Changes no bit of the result. None means that no rows share.
    return_lse: return (y, lse), with which results over disjoint positions can be merged.
    Returns y (tokens, heads, head_dim) in q's dtype, and lse (tokens, heads) float32 (float64 for
    float64), -inf for padding rows. Sums and softmax are kept in float32; CUDA prefill in 16 bits
    rounds the weights once to the data type. On one device the result of a row is the same bit for
    bit whatever the other rows, the numbering of its pages and the number of threads, and in CUDA
    prefill the result of a query whatever the pieces its prompt was cut into. On CUDA head_dim is at
    most 256. Source: Kwon et al. 2023 (PagedAttention); Dao 2023 (FlashAttention-2).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if max_queries is None:
        tokens = q.shape[0]
        max_queries = 1 if tokens == kv_lengths.shape[0] else max(2, tokens)
    op = _ops.paged_attention_lse if return_lse else _ops.paged_attention
    where = page_table, cu_seqlens_q, kv_lengths
    return op(q, k_cache, v_cache, *where, scale, max_queries, shared)


@torch.library.register_fake("reasoners::paged_attention")
def _(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale, max_queries, shared):
    return q.new_empty(q.shape)


@torch.library.register_fake("reasoners::paged_attention_lse")
def _(q, k_cache, v_cache, page_table, cu_seqlens_q, kv_lengths, scale, max_queries, shared):
    wide = wide_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=wide)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    rng_key: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose one token per row: temperature, then top-k, top-p and min-p, then a draw.

    token = argmax over kept i of  logits_i / temperature + Gumbel_i(rng_key)

    logits: (batch, vocabulary) float32 or bfloat16. A logit of -inf is never chosen.
    temperature: (batch) float32; 0 or less is greedy: the maximum, its lowest id among equals.
    top_k: (batch) int32; the k largest logits stay, and all that equal the smallest of them. 0 or
        less, or the vocabulary size and more: off.
    top_p: (batch) float32; of what top-k kept, renormalised at this temperature, the fewest most
        probable tokens whose mass reaches top_p stay, and all that equal the last. 1 and more: off.
    min_p: (batch) float32; tokens of at least min_p times the largest probability stay. 0: off.
        The most probable token survives every filter.
    rng_key: (batch, 4) int64: seed, prompt, sample, position. It names the row's noise, one number
        per token id, so that a choice depends on nothing but its own row: not on the batch, the
        order or the threads. Distinct keys are independent; position counts modulo 2^32.
    Returns (token (batch) int64, logprob (batch) float32): logprob is the log-softmax of the raw
    logits at the token, before temperature and filters. A row with NaN or +inf, or with nothing but
    -inf, gives token -1 and logprob NaN. Source: Gumbel-max trick; Salmon et al. 2011 (Philox).
    """
    return _ops.sample(logits, temperature, top_k, top_p, min_p, rng_key)


@torch.library.register_fake("reasoners::sample")
def _(logits, temperature, top_k, top_p, min_p, rng_key):
    batch = logits.shape[0]
    return logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.float32)


def advance(
    token: Tensor,
    logprob: Tensor,
    stop_ids: Tensor,
    last: Tensor,
    slots: Tensor,
    lengths: Tensor,
    remaining: Tensor,
    rng_key: Tensor,
    drawn: Tensor,
    logprobs: Tensor,
    step: Tensor,
) -> None:
    """The end of a decode step, without a look at it from the host: record, then go on or end.

    With t = step[0], each row with slots[row] >= 0: drawn[t, row] = last = token, logprobs[t, row] =
    logprob, remaining -= 1. It ends if token < 0, token is one of its stop_ids or remaining is 0: slots
    = -1, lengths = 0. Otherwise lengths and rng_key[row, 3] move on by 1. A row with a
    negative slot records drawn[t, row] = -2 and nothing else. At last step[0] += 1.

    token: (rows) int64; logprob: (rows) float32: what `sample` returned.
    stop_ids: (rows, any) int64, -1 where a row has fewer.
    last: (rows) int64; slots, lengths, remaining: (rows) int32; rng_key: (rows, 4) int64; the
        next step's arguments, mutated. They may be the first rows of larger buffers.
    drawn: (steps, rows or more) int64; logprobs: (steps, rows or more) float32: the record, mutated at
        row t. step: (1) int32, below steps, mutated.
    """
    _ops.advance(
        token, logprob, stop_ids, last, slots, lengths, remaining, rng_key, drawn, logprobs,
        step,
    )  # fmt: skip


@torch.library.register_fake("reasoners::advance")
def _(token, logprob, stop_ids, *mutated):
    return None

"""The derivative of the SSD recurrence made of forward ones, for CUDA, which has no kernel of its own.

The derivatives are recurrences of the same kind, two of them back in time. Everything is float32
inside, whatever the data.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class Sequences:
    """Which sequence every token of (batch, length) belongs to, packed or a batch row each."""

    def __init__(self, batch: int, length: int, cu_seqlens: Tensor | None, device: torch.device):
        self.batch, self.length, self.packed = batch, length, cu_seqlens is not None
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, length], device=device)
        self.bounds = cu_seqlens.long()
        self.sizes = self.bounds.diff()

    def to_tokens(self, values: Tensor) -> Tensor:
        """(sequences, ...) -> (batch, length, ...): every token gets its sequence's."""
        if not self.packed:
            return values[:, None].expand(-1, self.length, *values.shape[1:])
        return values.repeat_interleave(self.sizes, 0, output_size=self.length)[None]

    def lasts(self) -> Tensor:
        """(1, length) booleans: whether a token is the last of its sequence."""
        at = torch.arange(self.length, device=self.bounds.device)
        ends = self.bounds[1:].repeat_interleave(self.sizes, output_size=self.length)
        return (at + 1 == ends)[None]

    def firsts(self, tokens: Tensor, empty: float) -> Tensor:
        """(batch, length, ...) -> (sequences, ...): each one's first token, `empty` without one."""
        if not self.length:
            return tokens.new_full(
                (len(self.sizes) if self.packed else self.batch, *tokens.shape[2:]), empty
            )
        if not self.packed:
            return tokens[:, 0]
        found = tokens[0, self.bounds[:-1].clamp(max=self.length - 1)]
        some = (self.sizes > 0).view(-1, *(1,) * (found.dim() - 1))
        return torch.where(some, found, empty)

    def sums_from_here(self, tokens: Tensor) -> Tensor:
        """(batch, length, ...): the sum over a token and all after it in its sequence."""
        total = tokens.flip(1).cumsum(1).flip(1)
        if not self.packed:
            return total
        end = tokens.new_zeros(1, 1, *tokens.shape[2:])
        later = torch.cat((total, end), 1)[0, self.bounds[1:]]
        return total - self.to_tokens(later)


def ssd_scan_backward(
    scan: Callable, dy: Tensor, dfinal_state: Tensor, x: Tensor, log_decay: Tensor, B: Tensor,
    C: Tensor, scale: Tensor | None, D: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The arguments and results of the operator, by three calls of `scan`, the forward operator.

    With the states S_t and R_t = exp(l_{t+1}) R_{t+1} + dy_t C_t^T, R after the end the final state's:
    dC_t = S_t^T dy_t, dx_t = scale_t R_t B_t + D dy_t, dB_t = scale_t R_t^T x_t, and with q_t = C_t . dC_t,
    r_t = B_t . dB_t:  dl_t = <dS_T, S_T> + sum over i >= t of (q_i - r_i).
    """
    dtype, heads = x.dtype, log_decay.shape[2]
    dy, x, B, C = (t.float() for t in (dy, x, B, C))
    sequences = Sequences(*x.shape[:2], cu_seqlens, x.device)
    back = None if cu_seqlens is None else (cu_seqlens[-1] - cu_seqlens).flip(0)

    def per_head(t: Tensor) -> Tensor:
        return t.repeat_interleave(heads // t.shape[2], 2)

    def per_group(t: Tensor, like: Tensor) -> Tensor:
        return t.unflatten(2, (like.shape[2], -1)).sum(3).to(dtype)

    def backwards(x: Tensor, B: Tensor, C: Tensor, initial: Tensor):
        if cu_seqlens is not None:
            initial = initial.flip(0)
        inputs = (t.flip(1) for t in (x, next_decay, B, C))
        y, final = scan(*inputs, None, None, initial, back)
        return y.flip(1), final if cu_seqlens is None else final.flip(0)

    next_decay = log_decay.roll(-1, 1).masked_fill(sequences.lasts()[..., None], 0.0)
    started = None if initial_state is None else initial_state.mT.contiguous()
    dC, final_state = scan(B, log_decay, x, dy, scale, None, started, cu_seqlens)
    dx, first_state = backwards(dy, C, B, dfinal_state)
    dB, _ = backwards(C, dy, x, dfinal_state.mT.contiguous())

    dscale = None if scale is None else (per_head(x) * dx).sum(-1)
    dD = None if D is None else (per_head(x) * dy).sum((0, 1, 3))
    if scale is not None:
        dx, dB = dx * scale[..., None], dB * scale[..., None]
    q, r = (per_head(C) * dC).sum(-1), (per_head(B) * dB).sum(-1)
    if D is not None:
        dx = dx + D[:, None] * dy
    from_end = (dfinal_state * final_state.mT).sum((-1, -2))
    # In float64: what is left of two long sums may be small beside them.
    dlog_decay = sequences.sums_from_here(q.double() - r.double())
    dlog_decay = (dlog_decay + sequences.to_tokens(from_end)).to(log_decay.dtype)
    dinitial_state = None
    if initial_state is not None:
        first_decay = sequences.firsts(log_decay, 0.0)
        dinitial_state = first_decay.exp()[..., None, None] * first_state
    return (
        per_group(dx, x), dlog_decay, per_group(dB, B), per_group(dC, C), dscale, dD, dinitial_state,
    )  # fmt: skip

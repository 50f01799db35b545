"""Float64 references of the operators, the makers of their inputs, and the tolerance of a test.

A reference is the definition written as plainly as PyTorch allows, one token after the other. It
computes in the dtype of its inputs: in float64 it is the oracle, in the kernel's own dtype it is the
yardstick of how large a rounding error plain PyTorch makes on the same data.
"""

from itertools import pairwise

import torch
from torch import Tensor


def widen(value):
    """Floating tensors to float64, everything else as it is."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def assert_close(actual: Tensor, oracle: Tensor, plain: Tensor, name: str, floor: float = 1e-6):
    """err(actual) <= 2 err(plain) + floor, against the float64 oracle, at the worst element.

    plain: the same definition computed by PyTorch in the dtype of the operator under test.
    floor: relative to the oracle's largest magnitude.
    """
    actual, plain = actual.detach().double().cpu(), plain.detach().double().cpu()
    oracle = oracle.detach().double().cpu()
    assert actual.shape == oracle.shape, f"{name}: shape {actual.shape}, expected {oracle.shape}"
    if actual.numel() == 0:
        return
    finite = oracle.isfinite()
    same = (actual == oracle) | (actual.isnan() & oracle.isnan()) | (finite & actual.isfinite())
    assert same.all(), f"{name}: non-finite values differ at {(~same).nonzero()[0].tolist()}"
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (actual - oracle).abs(), zero)
    allowed = 2 * torch.where(finite, (plain - oracle).abs(), zero).max()
    allowed = allowed + floor * torch.where(finite, oracle.abs(), zero).max()
    worst = error.argmax()
    index = torch.unravel_index(worst, error.shape)
    assert error.max() <= allowed, (
        f"{name}: worst at {[int(i) for i in index]}: got {actual.flatten()[worst]:.8g}, expected "
        f"{oracle.flatten()[worst]:.8g}, error {error.max():.3g} > allowed {allowed:.3g}"
    )


def share(tensor: Tensor, heads: int, dim: int) -> Tensor:
    """Repeat consecutive groups along `dim` until there is one per head."""
    return tensor.repeat_interleave(heads // tensor.shape[dim], dim)


# ---- state_update


def state_update(state, slots, x, log_decay, B, C, scale=None, D=None):
    """Returns (y, new state); the argument is left as it was."""
    heads = log_decay.shape[1]
    x, B, C = share(x, heads, 1), share(B, heads, 1), share(C, heads, 1)
    state, y = state.clone(), torch.zeros_like(x)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        gain = x[row] if scale is None else x[row] * scale[row, :, None].to(x.dtype)
        step = gain[:, :, None] * B[row, :, None, :]
        decay = log_decay[row].exp()[:, None, None].to(state.dtype)
        state[slot] = decay * state[slot] + step.to(state.dtype)
        y[row] = torch.einsum("hpn,hn->hp", state[slot].to(x.dtype), C[row])
        if D is not None:
            y[row] += D[:, None].to(x.dtype) * x[row]
    return y, state


def state_update_inputs(
    batch=3, H=4, Hx=4, Gb=4, Gc=4, P=16, N=16, dtype=torch.float32, state_dtype=torch.float32,
    slots=None, scale=True, D=True, decay=1.0, seed=0,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    num_slots = batch + 2
    slots = torch.randperm(num_slots, generator=g)[:batch] if slots is None else torch.tensor(slots)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "state": normal(num_slots, H, P, N).to(state_dtype),
        "slots": slots.int(),
        "x": normal(batch, Hx, P).to(dtype),
        "log_decay": (-decay * torch.rand(batch, H, generator=g)).to(wide),
        "B": normal(batch, Gb, N).to(dtype),
        "C": normal(batch, Gc, N).to(dtype),
        "scale": torch.rand(batch, H, generator=g).to(wide) if scale else None,
        "D": normal(H).to(wide) if D else None,
    }


STATE_UPDATE_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 data and state": {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "bf16 state, fp32 data": {"state_dtype": torch.bfloat16},
    "no scale": {"scale": False},
    "no D": {"D": False},
    "batch 1": {"batch": 1},
    "empty batch": {"batch": 0},
    "many rows": {"batch": 70},
    "kv sharing (kv, kv, H)": {"Hx": 2, "Gb": 2},
    "one group (H, 1, 1)": {"Gb": 1, "Gc": 1},
    "all shared": {"Hx": 1, "Gb": 1, "Gc": 2},
    "P 64, N 64 (Llamba-1B)": {"P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2},
    "P 96 (Llamba-3B)": {"P": 96, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2},
    "P 128, N 128": {"P": 128, "N": 128, "H": 3, "Hx": 1, "Gb": 1, "Gc": 3},
    "odd extents": {"P": 7, "N": 5},
    "zero decay": {"decay": 0.0},
    "strong decay": {"decay": 40.0},
    "padding rows": {"batch": 4, "slots": [5, -1, 0, -7]},
    "only padding": {"batch": 2, "slots": [-1, -1]},
}


# ---- ssd_scan


def ssd_scan(x, log_decay, B, C, scale=None, D=None, initial_state=None, cu_seqlens=None):
    """Returns (y, final states), one token after the other."""
    heads = log_decay.shape[2]
    x, B, C = share(x, heads, 2), share(B, heads, 2), share(C, heads, 2)
    gain = x if scale is None else x * scale[..., None].to(x.dtype)
    tokens = (gain, log_decay.exp(), B, C)
    if cu_seqlens is None:
        sequences, dim = [[t[i : i + 1] for t in tokens] for i in range(x.shape[0])], 0
    else:
        offsets, dim = cu_seqlens.tolist(), 1
        sequences = [[t[:, i:j] for t in tokens] for i, j in pairwise(offsets)]
    y = [x.new_zeros(0, *x.shape[1:]) if dim == 0 else x.new_zeros(1, 0, *x.shape[2:])]
    final = [log_decay.new_zeros(0, heads, x.shape[3], B.shape[3])]
    for i, sequence in enumerate(sequences):
        state = log_decay.new_zeros(1, heads, x.shape[3], B.shape[3])
        state = state if initial_state is None else initial_state[i : i + 1]
        rows = [x.new_zeros(1, 0, heads, x.shape[3])]
        for u, decay, b, c in zip(*(t.unbind(1) for t in sequence)):
            state = decay[..., None, None] * state + u[..., None] * b[..., None, :]
            rows.append(torch.einsum("bhpn,bhn->bhp", state.to(x.dtype), c)[:, None])
        y.append(torch.cat(rows, 1))
        final.append(state)
    y = torch.cat(y, dim)
    if D is not None:
        y = y + D[:, None].to(x.dtype) * x
    return y, torch.cat(final)


def ssd_scan_inputs(
    batch=2, length=40, H=4, Hx=4, Gb=4, Gc=4, P=16, N=16, dtype=torch.float32, scale=True, D=True,
    initial_state=True, lengths=None, decay=1.0, seed=0,
):  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sequences = batch
    cu_seqlens = None
    if lengths is not None:
        batch, length, sequences = 1, sum(lengths), len(lengths)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return {
        "x": normal(batch, length, Hx, P).to(dtype),
        "log_decay": (-decay * torch.rand(batch, length, H, generator=g)).to(wide),
        "B": normal(batch, length, Gb, N).to(dtype),
        "C": normal(batch, length, Gc, N).to(dtype),
        "scale": torch.rand(batch, length, H, generator=g).to(wide) if scale else None,
        "D": normal(H).to(wide) if D else None,
        "initial_state": normal(sequences, H, P, N).to(wide) if initial_state else None,
        "cu_seqlens": cu_seqlens,
    }


SSD_SCAN_CASES = {
    "base": {},
    "bf16": {"dtype": torch.bfloat16},
    "no scale": {"scale": False},
    "no D": {"D": False},
    "no initial state": {"initial_state": False},
    "no option, bf16": {
        "scale": False, "D": False, "initial_state": False, "dtype": torch.bfloat16,
    },
    "batch 1": {"batch": 1},
    "empty batch": {"batch": 0},
    "length 0": {"length": 0},
    "length 1": {"length": 1},
    "a chunk less one": {"length": 31},
    "a chunk": {"length": 32},
    "a chunk and one": {"length": 33},
    "prime length": {"length": 131},
    "kv sharing (kv, kv, H)": {"Hx": 2, "Gb": 2},
    "one group (H, 1, 1), bf16": {"Gb": 1, "Gc": 1, "dtype": torch.bfloat16},
    "sharing out of step (2, 3, 1)": {"H": 6, "Hx": 2, "Gb": 3, "Gc": 1},
    "P 64, N 64 (Llamba-1B)": {"batch": 1, "P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2},
    "P 96 (Llamba-3B), bf16": {
        "batch": 1, "P": 96, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "dtype": torch.bfloat16,
    },
    "P 128, N 128": {
        "batch": 1, "length": 33, "P": 128, "N": 128, "H": 2, "Hx": 1, "Gb": 1, "Gc": 2,
    },
    "odd extents": {"P": 7, "N": 5},
    "zero decay": {"decay": 0.0},
    "decay -20": {"decay": 20.0},
    "decay -1000": {"decay": 1000.0},
    "packed": {"lengths": [33, 0, 1, 32, 47]},
    "packed, shared, no initial state, bf16": {
        "lengths": [5, 64], "Hx": 1, "Gb": 2, "initial_state": False, "dtype": torch.bfloat16,
    },
    "only empty sequences": {"lengths": [0, 0]},
}  # fmt: skip

"""A fused mixer's decode step, from in_proj's row to out_proj's, over the batch: plain and deferred writes.

Its target is a share of the bare update: at most 1.15 of it for the plain form at batch 512.
"""

import cost
import peers
import pytest
import torch

from reasoners import ops, reference

HEADS, HEAD_DIM, STATE_DIM, WIDTH = 32, 64, 64, 4  # Llamba-1B
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * (HEAD_DIM + 2 * STATE_DIM)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make(batch, state_dtype, period):
    """Arguments of ops.discrete_mamba2_update; with a period the rows stand at random places of it."""

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda").to(dtype)

    recent = recent_decay = pending = None
    if period > 1:
        recent = normal(batch, period - 1, INNER + HEADS * STATE_DIM)
        recent_decay = -torch.rand(batch, period - 1, 2, HEADS, device="cuda")
        pending = torch.randperm(batch, device="cuda").remainder(period).int()
    return {
        "conv_state": normal(batch, WIDTH, CHANNELS),
        "state": normal(batch, HEADS, HEAD_DIM, STATE_DIM, dtype=state_dtype),
        "recent": recent,
        "recent_decay": recent_decay,
        "pending": pending,
        "slots": torch.arange(batch, dtype=torch.int32, device="cuda"),
        "lengths": torch.randint(4, 99, (batch,), dtype=torch.int32, device="cuda"),
        "projected": normal(batch, CHANNELS + INNER + HEADS),
        "conv_weight": normal(CHANNELS, WIDTH),
        "conv_bias": normal(CHANNELS),
        "z_bias": normal(INNER),
        "D": normal(HEADS, dtype=torch.float32),
        "period": period,
    }


def mixer_bytes(batch, state_bytes, period):
    """State, ring of the convolution, row in, row out; deferred: recent tokens read and written."""
    state = HEADS * HEAD_DIM * STATE_DIM * state_bytes * (1 + 1 / period)
    rows = CHANNELS * WIDTH * 2 + (CHANNELS + 2 * INNER + HEADS) * 2
    recent = (period - 1) / 2 + (period - 1) / period if period > 1 else 0
    return round(batch * (state + rows + recent * (INNER + HEADS * STATE_DIM) * 2))


OF_A_ROW = {
    "conv_state", "state", "recent", "recent_decay", "pending", "slots", "lengths", "projected", "dt",
}  # fmt: skip


def check(operator, definition, inputs):
    """The first call on `inputs` agrees with float64 on a few rows."""
    batch = len(inputs["slots"])
    rows = sorted({0, batch // 2, batch - 1})
    few = {n: v[rows] if n in OF_A_ROW and v is not None else v for n, v in inputs.items()}
    few = {n: reference.widen(v.cpu()) if torch.is_tensor(v) else v for n, v in few.items()}
    oracle = definition(**few | {"slots": torch.arange(len(rows))})[0]
    out = operator(**inputs)
    peers.require_close((out if torch.is_tensor(out) else out[0])[rows].cpu(), oracle, most=0.02)


@pytest.mark.cuda("discrete_mamba2_update")
@pytest.mark.parametrize("period", [1, 8], ids=["plain", "deferred"])
@pytest.mark.parametrize("batch", [1, 16, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("state", DTYPES)
def bench_mixer_update(measure, state, batch, period):
    num_bytes = mixer_bytes(batch, DTYPES[state].itemsize, period)
    torch.manual_seed(0)
    sets = [make(batch, DTYPES[state], period) for _ in range(cost.rotation(num_bytes / 2))]
    check(ops.discrete_mamba2_update, reference.discrete_mamba2_update, sets[0])
    measure(
        [lambda inputs=inputs: ops.discrete_mamba2_update(**inputs) for inputs in sets],
        num_bytes=num_bytes,
        tokens=batch,
    )


# MambaInLlama-1B's Mamba-1 mixer
MAMBA1_CHANNELS, MAMBA1_STATE_DIM, KV_DIM = 2048, 16, 512


def make_mamba1(batch, state_dtype):
    """Arguments of ops.mamba1_update."""

    def normal(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda").to(dtype)

    return {
        "conv_state": normal(batch, WIDTH, MAMBA1_CHANNELS),
        "state": normal(batch, MAMBA1_CHANNELS, MAMBA1_STATE_DIM, dtype=state_dtype),
        "slots": torch.arange(batch, dtype=torch.int32, device="cuda"),
        "lengths": torch.randint(4, 99, (batch,), dtype=torch.int32, device="cuda"),
        "projected": normal(batch, 2 * MAMBA1_CHANNELS + 2 * KV_DIM),
        "dt": normal(batch, MAMBA1_CHANNELS),
        "conv_weight": normal(MAMBA1_CHANNELS, WIDTH),
        "conv_bias": normal(MAMBA1_CHANNELS),
        "dt_bias": normal(MAMBA1_CHANNELS),
        "A_log": normal(MAMBA1_CHANNELS, MAMBA1_STATE_DIM, dtype=torch.float32),
        "D": normal(MAMBA1_CHANNELS, dtype=torch.float32),
        "kv_dim": KV_DIM,
    }


@pytest.mark.cuda("mamba1_update")
@pytest.mark.parametrize("batch", [1, 16, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("state", DTYPES)
def bench_mamba1_update(measure, state, batch):
    """State and ring of the convolution, then z, x, B, C, dt in and the result out."""
    rows = MAMBA1_CHANNELS * (WIDTH + 4) + 2 * KV_DIM
    num_bytes = (
        cost.selective_update_bytes(
            batch, MAMBA1_CHANNELS, MAMBA1_STATE_DIM, DTYPES[state].itemsize
        )
        + 2 * batch * rows
    )
    torch.manual_seed(0)
    sets = [make_mamba1(batch, DTYPES[state]) for _ in range(cost.rotation(num_bytes / 2))]
    check(ops.mamba1_update, reference.mamba1_update, sets[0])
    measure(
        [lambda inputs=inputs: ops.mamba1_update(**inputs) for inputs in sets],
        num_bytes=num_bytes,
        tokens=batch,
    )

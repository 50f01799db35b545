"""One decode token of the SSD recurrence: our kernel beside plain PyTorch at the same dtype."""

import cost
import pytest
import torch

from reasoners import ops

HEADS, HEAD_DIM, STATE_DIM = 32, 64, 64  # Llamba-1B


def make(batch, dtype):
    def normal(*shape):
        return torch.randn(*shape).to(dtype)

    return {
        "state": torch.randn(batch, HEADS, HEAD_DIM, STATE_DIM),
        "slots": torch.arange(batch, dtype=torch.int32),
        "x": normal(batch, HEADS, HEAD_DIM),
        "log_decay": -torch.rand(batch, HEADS),
        "B": normal(batch, HEADS, STATE_DIM),
        "C": normal(batch, HEADS, STATE_DIM),
        "scale": None,
        "D": torch.randn(HEADS),
    }


def einsum_update(state, slots, x, log_decay, B, C, scale, D):
    """The usual PyTorch formulation, on a state that is already gathered."""
    step = torch.einsum("bhp,bhn->bhpn", x, B)
    state.mul_(log_decay.exp()[..., None, None]).add_(step)
    return torch.einsum("bhpn,bhn->bhp", state.to(x.dtype), C) + D[:, None].to(x.dtype) * x


@pytest.mark.parametrize("impl", [ops.state_update, einsum_update], ids=["reasoners", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("batch", [1, 16, 64])
def bench_state_update(measure, batch, dtype, impl):
    inputs = make(batch, dtype)
    num_bytes = cost.state_update_bytes(
        batch, HEADS, HEAD_DIM, STATE_DIM, data_bytes=inputs["x"].element_size()
    )
    measure(lambda: impl(**inputs), num_bytes=num_bytes, tokens=batch)

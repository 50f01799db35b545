"""The Mamba-1 mixer's operators at MambaInLlama-1B shapes, beside plain PyTorch at the same dtype."""

import cost
import pytest
import torch
import torch.nn.functional as F

from reasoners import ops, reference

CHANNELS, STATE_DIM, B_GROUPS, C_GROUPS = 2048, 16, 32, 128
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def torch_conv(x, weight, bias):
    return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=weight.shape[0]).mT)


def our_conv(x, weight, bias):
    return ops.causal_conv1d(x, weight, bias, silu=True)[0]


@pytest.mark.parametrize("impl", [our_conv, torch_conv], ids=["reasoners", "torch"])
@DTYPES
@pytest.mark.parametrize("length", [128, 1024])
def bench_causal_conv1d(measure, length, dtype, impl):
    x, weight, bias = (
        torch.randn(s).to(dtype) for s in ((1, length, CHANNELS), (CHANNELS, 4), (CHANNELS,))
    )
    num_bytes = 2 * x.numel() * x.element_size()
    measure(lambda: impl(x, weight, bias), num_bytes=num_bytes, tokens=length)


@pytest.mark.parametrize("impl", [ops, reference], ids=["reasoners", "torch"])
@DTYPES
@pytest.mark.parametrize("length", [128, 1024])
def bench_selective_scan(measure, length, dtype, impl):
    inputs = reference.selective_scan_inputs(
        1, length, CHANNELS, STATE_DIM, B_GROUPS, C_GROUPS, dtype, initial_state=False
    )
    num_bytes = cost.selective_scan_bytes(length, CHANNELS, inputs["x"].element_size())
    measure(lambda: impl.selective_scan(**inputs), num_bytes=num_bytes, tokens=length, rounds=5)


def torch_update(state, slots, x, delta, A, B, C, D):
    """The usual formulation, on a state that is already gathered and with its groups repeated."""
    state.mul_((delta[..., None] * A).exp()).add_((delta * x)[..., None] * B)
    return (state * C).sum(-1).to(x.dtype) + D.to(x.dtype) * x


@pytest.mark.parametrize("impl", ["reasoners", "torch"])
@DTYPES
@pytest.mark.parametrize("batch", [1, 16, 64])
def bench_selective_update(measure, batch, dtype, impl):
    inputs = reference.selective_update_inputs(
        batch, CHANNELS, STATE_DIM, B_GROUPS, C_GROUPS, dtype, slots=list(range(batch))
    )
    inputs["state"] = inputs["state"][:batch].contiguous()
    run = ops.selective_update
    if impl == "torch":
        run = torch_update
        inputs |= {n: reference.share(inputs[n], CHANNELS, 1) for n in ("B", "C")}
    num_bytes = cost.selective_update_bytes(batch, CHANNELS, STATE_DIM)
    measure(lambda: run(**inputs), num_bytes=num_bytes, tokens=batch)

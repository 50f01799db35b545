"""The Mamba-1 mixer's operators at MambaInLlama-1B shapes, beside plain PyTorch at the same dtype.

On CUDA the scan and its derivative alone: the roof is the longer of the bytes' time and that of one
exponential for every state entry and token.
"""

from functools import partial

import cost
import peers
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


# ---- CUDA, bf16

CASES = {  # batch, length
    "mambainllama-1b 1 x 2048": (1, 2048),
    "mambainllama-1b 8 x 4096": (8, 4096),
    "mambainllama-1b 64 x 512": (64, 512),
    "mambainllama-1b 1 x 32768": (1, 32768),
}


def make_cuda(batch, length):
    def normal(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()

    return {
        "x": normal(batch, length, CHANNELS),
        "delta": F.softplus(torch.randn(batch, length, CHANNELS, device="cuda") - 3),
        "A": -torch.arange(1.0, STATE_DIM + 1, device="cuda").repeat(CHANNELS, 1),
        "B": normal(batch, length, B_GROUPS, STATE_DIM),
        "C": normal(batch, length, C_GROUPS, STATE_DIM),
        "D": torch.randn(CHANNELS, device="cuda"),
    }


def roof_cuda(bytes_of, batch, length):
    tokens = batch * length
    num_bytes = bytes_of(tokens, CHANNELS, 2)
    roof_s = cost.selective_scan_s(num_bytes, tokens, CHANNELS, STATE_DIM)
    return {"num_bytes": num_bytes, "roof_s": roof_s, "tokens": tokens}


def last_group(inputs, tokens):
    """Arguments of the last row's first tokens and last group of C, in float64 on the CPU."""
    x, delta, A, B, C, D = inputs.values()
    channels = CHANNELS // C_GROUPS
    rows = [t[-1:, :tokens] for t in (x, delta, B, C)]
    part = rows[0][..., -channels:], rows[1][..., -channels:], A[-channels:]
    part += rows[2][:, :, -1:], rows[3][:, :, -1:], D[-channels:]
    return [t.double().cpu() for t in part]


@pytest.mark.cuda("selective_scan")
@pytest.mark.parametrize("impl", ["reasoners"])
@pytest.mark.parametrize("case", CASES)
def bench_selective_scan_cuda(measure, case, impl):
    torch.manual_seed(0)
    inputs = make_cuda(*CASES[case])
    call = partial(ops.selective_scan, **inputs)
    expected, _ = reference.selective_scan(*last_group(inputs, 4096))
    channels, tokens = expected.shape[2], expected.shape[1]
    peers.require_close(call()[0][-1:, :tokens, -channels:].cpu(), expected)
    measure(call, **roof_cuda(cost.selective_scan_bytes, *CASES[case]))


@pytest.mark.cuda("selective_scan_backward")
@pytest.mark.parametrize("impl", ["reasoners"])
@pytest.mark.parametrize("case", CASES)
def bench_selective_scan_backward_cuda(measure, case, impl):
    torch.manual_seed(0)
    inputs = make_cuda(*CASES[case])
    dy = torch.randn_like(inputs["x"])
    tokens = min(CASES[case][1], 4096)
    dy[:, tokens:] = 0  # so that the first tokens can be checked alone
    dfinal = torch.zeros(dy.shape[0], CHANNELS, STATE_DIM, device="cuda")
    backward = torch.ops.reasoners.selective_scan_backward
    call = partial(backward, dy, dfinal, *inputs.values(), None, None)
    part = last_group(inputs, tokens)
    x, delta, A, B, C, D = (t.requires_grad_() for t in part)
    channels = x.shape[2]
    with torch.enable_grad():
        y, _ = reference.selective_scan(x, delta, A, B, C, D)
        wanted = torch.autograd.grad(y, (x, delta, C), dy[-1:, :tokens, -channels:].double().cpu())
    dx, ddelta, _, _, dC, *_ = call()
    found = dx[..., -channels:], ddelta[..., -channels:], dC[:, :, -1:]
    for name, actual, expected in zip(("dx", "ddelta", "dC"), found, wanted):
        peers.require_close(actual[-1:, :tokens].cpu(), expected, name)
    measure(call, **roof_cuda(cost.selective_scan_backward_bytes, *CASES[case]))

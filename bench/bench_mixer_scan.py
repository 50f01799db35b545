"""A fused mixer over whole sequences, from in_proj's rows to out_proj's, beside the operators it is made of.

Its roof reads every projected row once and writes y once; the composition also writes and reads x, B,
C, the decays and the scan's y. "peers" is the composition of FLA's conv, mamba_ssm's scan and a gate
compiled by torch.
"""

import cost
import peers
import pytest
import torch
import torch.nn.functional as F

from reasoners import ops, reference

WIDTH = 4
SHAPES = {"8 x 4096": (8, 4096), "1 x 2048": (1, 2048), "64 x 512": (64, 512)}
TARGET_US = {"8 x 4096": 360}  # of Llamba-1B
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["reasoners", "composition"])


def normal(*shape, dtype=torch.bfloat16, size=1.0):
    return (size * torch.randn(*shape, device="cuda")).to(dtype)


def mixer_bytes(tokens, columns, inner):
    """A row of in_proj comes in, a row for out_proj goes out, in 16 bits."""
    return 2 * tokens * (columns + inner)


def run(measure, calls, batch, length, columns, inner, heads, target_us):
    tokens = batch * length
    measure(
        calls,
        num_bytes=mixer_bytes(tokens, columns, inner),
        flops=cost.ssd_scan_flops(tokens, heads, inner // heads, inner // heads),
        tokens=tokens,
        target_us=target_us,
    )


# Llamba-1B
HEADS, HEAD_DIM = 32, 64
INNER, CHANNELS = HEADS * HEAD_DIM, 3 * HEADS * HEAD_DIM


def make_discrete_mamba2(batch, length):
    """Arguments of ops.discrete_mamba2_scan, in the model's ranges: a decay of 0.88 a token."""
    projected = normal(batch, length, CHANNELS + INNER + HEADS)
    projected[..., -HEADS:] -= 2
    return {
        "projected": projected,
        "conv_weight": normal(CHANNELS, WIDTH, size=WIDTH**-0.5),
        "conv_bias": normal(CHANNELS, size=0.1),
        "z_bias": normal(INNER),
        "D": normal(HEADS, dtype=torch.float32),
        "state_dim": HEAD_DIM,
    }


def discrete_mamba2(projected, conv_weight, conv_bias, z_bias, D, state_dim, weighed=False):
    """weighed: x by softplus(a), as the peers' scan has it."""
    xBC, z, a = projected.split((CHANNELS, INNER, HEADS), -1)
    conv, _ = ops.causal_conv1d(xBC, conv_weight, conv_bias)
    x, B, C = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in conv.chunk(3, -1))
    delta = ops.softplus(a)
    y, _ = ops.ssd_scan(x, -delta, B, C, delta if weighed else None, D)
    return ops.gate(y.flatten(-2), z, z_bias)


def check(y, definition, inputs):
    """The beginning of the last row against float64."""
    few = inputs | {"projected": inputs["projected"][-1:, :160]}
    few = {name: v.cpu() if torch.is_tensor(v) else v for name, v in few.items()}
    oracle = definition(**{name: reference.widen(value) for name, value in few.items()})[0]
    peers.require_close(y[-1:, :160].cpu(), oracle, most=0.02)


@pytest.mark.cuda("discrete_mamba2_scan")
@pytest.mark.parametrize("impl", ["reasoners", "composition", "peers"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_discrete_mamba2_scan(measure, shape, impl):
    batch, length = SHAPES[shape]
    num_bytes = mixer_bytes(batch * length, CHANNELS + INNER + HEADS, INNER)
    torch.manual_seed(0)
    sets = [make_discrete_mamba2(batch, length) for _ in range(cost.rotation(num_bytes))]
    sizes = batch, length, CHANNELS + INNER + HEADS, INNER, HEADS
    if impl == "peers":
        with peers.skip_if_it_fails(), torch.inference_mode():
            prepare = peers.llamba_mixer(chunk=128)
            calls = [prepare(**inputs) for inputs in sets]
            peers.require_close(calls[0](), discrete_mamba2(**sets[0], weighed=True), most=0.02)
            run(measure, calls, *sizes, None)
        return
    fn = ops.discrete_mamba2_scan if impl == "reasoners" else discrete_mamba2
    calls = [lambda inputs=inputs: fn(**inputs) for inputs in sets]
    if impl == "reasoners":
        check(calls[0]()[0], reference.discrete_mamba2_scan, sets[0])
    run(measure, calls, *sizes, TARGET_US.get(shape) if impl == "reasoners" else None)


# MambaInLlama-1B's Mamba-2 mixer: 32 query heads, 8 kv heads
KV_HEADS = 8
HYBRID_CHANNELS = (2 * KV_HEADS + HEADS) * HEAD_DIM


def make_mamba2(batch, length):
    """Arguments of ops.mamba2_scan, in the model's ranges."""
    return {
        "projected": normal(batch, length, INNER + HYBRID_CHANNELS + HEADS),
        "conv_weight": normal(HYBRID_CHANNELS, WIDTH, size=WIDTH**-0.5),
        "conv_bias": normal(HYBRID_CHANNELS, size=0.1),
        "dt_bias": normal(HEADS, dtype=torch.float32) - 4,
        "A_log": torch.rand(HEADS, device="cuda") * 2.7,
        "D": normal(HEADS, dtype=torch.float32),
        "norm_weight": normal(INNER),
        "eps": 1e-5,
        "state_dim": HEAD_DIM,
    }


def mamba2(
    projected, conv_weight, conv_bias, dt_bias, A_log, D, norm_weight, eps, state_dim
):  # fmt: skip
    z, xBC, dt = projected.split((INNER, HYBRID_CHANNELS, HEADS), -1)
    conv, _ = ops.causal_conv1d(xBC, conv_weight, conv_bias, silu=True)
    kv = KV_HEADS * HEAD_DIM
    x, B, C = (t.unflatten(-1, (-1, HEAD_DIM)) for t in conv.split((kv, kv, INNER), -1))
    delta = ops.softplus(dt, dt_bias)
    y, _ = ops.ssd_scan(x, -delta * A_log.exp(), B, C, delta, D)
    g = ops.gate(y, z.unflatten(-1, (HEADS, HEAD_DIM)))
    return F.rms_norm(g, (HEAD_DIM,), None, eps).flatten(-2) * norm_weight


@pytest.mark.cuda("mamba2_scan")
@IMPLEMENTATIONS
@pytest.mark.parametrize("shape", SHAPES)
def bench_mamba2_scan(measure, shape, impl):
    batch, length = SHAPES[shape]
    columns = INNER + HYBRID_CHANNELS + HEADS
    fn = ops.mamba2_scan if impl == "reasoners" else mamba2
    num_bytes = mixer_bytes(batch * length, columns, INNER)
    torch.manual_seed(0)
    sets = [make_mamba2(batch, length) for _ in range(cost.rotation(num_bytes))]
    calls = [lambda inputs=inputs: fn(**inputs) for inputs in sets]
    if impl == "reasoners":
        check(calls[0]()[0], reference.mamba2_scan, sets[0])
    run(measure, calls, batch, length, columns, INNER, HEADS, None)

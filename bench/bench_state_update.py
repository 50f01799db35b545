"""One decode token of the SSD recurrence: our kernel beside plain PyTorch at the same dtype (CPU), and
beside mamba_ssm's and flashinfer's kernels (CUDA)."""

from functools import partial

import cost
import peers
import pytest
import torch

from reasoners import ops, reference

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


# ---- CUDA

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (heads, P, N, heads of x and B); C is per head.
SHAPES = {
    "llamba-1b": (32, 64, 64, 32),
    "llamba-3b": (32, 96, 64, 32),
    "24x128x128/8kv": (24, 128, 128, 8),
}
TARGET_US = {
    ("llamba-1b", 1): {"fp32": 2.3, "bf16": 2.3},
    ("llamba-1b", 16): {"fp32": 7, "bf16": 4.5},
    ("llamba-1b", 128): {"fp32": 47, "bf16": 25},
    ("llamba-1b", 512): {"fp32": 184, "bf16": 95},
    ("24x128x128/8kv", 512): {"fp32": 555, "bf16": 285},
}
DEFERRED_TARGET_US = {
    ("llamba-1b", 128): {"fp32": 30, "bf16": 18},
    ("llamba-1b", 512): {"fp32": 115, "bf16": 65},
    ("24x128x128/8kv", 512): {"fp32": 330, "bf16": 180},
}


def make_cuda(batch, shape, state_dtype):
    """bf16 inputs of ops.state_update, and A where log_decay = scale A, which peers take instead."""
    heads, head_dim, state_dim, kv_heads = shape

    def normal(*shape):
        return torch.randn(*shape, device="cuda")

    A = -0.1 - normal(heads).abs()
    scale = torch.nn.functional.softplus(normal(batch, heads))
    return {
        "state": normal(batch, heads, head_dim, state_dim).to(state_dtype),
        "slots": torch.arange(batch, dtype=torch.int32, device="cuda"),
        "x": normal(batch, kv_heads, head_dim).bfloat16(),
        "log_decay": scale * A,
        "B": normal(batch, kv_heads, state_dim).bfloat16(),
        "C": normal(batch, heads, state_dim).bfloat16(),
        "scale": scale,
        "D": normal(heads),
        "A": A,
    }


def ours(inputs):
    return partial(ops.state_update, **{k: v for k, v in inputs.items() if k != "A"})


PERIOD = 8


def deferred(inputs, period=PERIOD):
    """The same with the state written every `period` tokens, the rows at random places of it."""
    batch, heads = inputs["scale"].shape
    dims = [inputs[n].shape[1] * inputs[n].shape[2] for n in ("x", "B")]
    recent = torch.randn(batch, period - 1, sum(dims), device="cuda").bfloat16()
    decay = -torch.rand(batch, period - 1, 2, heads, device="cuda")
    pending = torch.randperm(batch, device="cuda").remainder(period).int()
    arguments = {k: v for k, v in inputs.items() if k != "A"}
    return partial(
        ops.deferred_state_update, recent=recent, recent_decay=decay, pending=pending,
        period=period, **arguments,
    )  # fmt: skip


def implementation(impl):
    """prepare(inputs) -> call() -> y"""
    if impl == "reasoners":
        if not ops.has_kernel("state_update", "cuda"):
            pytest.skip("no CUDA kernel of state_update")
        return ours
    return deferred if impl == "deferred" else peers.STATE_UPDATE[impl]()


def check(call, inputs):
    """The first call on `inputs` agrees with the float64 reference on a few rows."""
    batch = inputs["slots"].shape[0]
    rows = sorted({0, batch // 2, batch - 1})
    shared = {"D": inputs["D"].cpu(), "slots": torch.arange(len(rows), dtype=torch.int32)}
    few = {k: v[rows].cpu() for k, v in inputs.items() if k not in (*shared, "A")} | shared
    oracle = reference.state_update(**{k: reference.widen(v) for k, v in few.items()})
    plain = reference.state_update(**few)
    y = call()
    reference.assert_close(y[rows], oracle[0], plain[0], "y")
    reference.assert_close(inputs["state"][rows], oracle[1], plain[1], "state")


@pytest.mark.cuda
@pytest.mark.parametrize("impl", ["reasoners", "deferred", *peers.STATE_UPDATE])
@pytest.mark.parametrize("batch", [1, 16, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def bench_state_update_cuda(measure, shape, state, batch, impl):
    heads, head_dim, state_dim, kv_heads = SHAPES[shape]
    dtype = DTYPES[state]
    num_bytes = cost.state_update_bytes(
        batch, heads, head_dim, state_dim, dtype.itemsize, data_bytes=2, kv_heads=kv_heads,
        period=PERIOD if impl == "deferred" else 1,
    )  # fmt: skip
    torch.manual_seed(0)
    targets = {"reasoners": TARGET_US, "deferred": DEFERRED_TARGET_US}.get(impl, {})
    target = targets.get((shape, batch), {}).get(state)
    with peers.skip_if_it_fails(impl in peers.STATE_UPDATE):
        prepare = implementation(impl)
        sets = [make_cuda(batch, SHAPES[shape], dtype) for _ in range(cost.rotation(num_bytes / 2))]
        calls = [prepare(inputs) for inputs in sets]
        if impl != "deferred":  # which tests/test_deferred_state_update.py checks over many steps
            check(calls[0], sets[0])
        measure(calls, num_bytes=num_bytes, tokens=batch, target_us=target)

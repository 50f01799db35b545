"""The chunked scan, its derivative and both: our kernel beside chunked PyTorch at its best chunk size.

Two sweeps at Llamba-1B's shapes: batch at fixed length, length at fixed tokens. On CUDA beside
mamba_ssm's kernels at several chunk sizes and FLA's simple_gla, which is spared D x. Theirs are tuned at
first use, which takes minutes; `pytest -n 8 --benchmark-disable` beforehand compiles for all of them.
"""

from functools import partial

import cost
import peers
import pytest
import torch
import torch.nn.functional as F

from reasoners import ops

HEADS, HEAD_DIM, STATE_DIM = 32, 64, 64  # Llamba-1B
# (batch, length): batch at length 512, then length at 2048 tokens (4 x 512 belongs to both).
SHAPES = [(1, 512), (2, 512), (8, 512), (4, 512), (1, 2048), (16, 128), (64, 32)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(batch, length, dtype, requires_grad=False):
    def normal(*shape):
        return torch.randn(*shape).to(dtype)

    inputs = {
        "x": normal(batch, length, HEADS, HEAD_DIM),
        "log_decay": F.logsigmoid(torch.randn(batch, length, HEADS)),
        "B": normal(batch, length, HEADS, STATE_DIM),
        "C": normal(batch, length, HEADS, STATE_DIM),
        "D": torch.randn(HEADS),
    }
    return {k: v.requires_grad_(requires_grad) for k, v in inputs.items()}


def chunked(x, log_decay, B, C, D, chunk):
    """The usual PyTorch formulation: matrix products batched over chunks and heads, one head a group."""
    batch, length, heads, head_dim = x.shape
    pad = -length % chunk

    def split(t):  # (batch, heads, chunks, chunk, width)
        t = F.pad(t, (0, 0, 0, 0, 0, pad)) if pad else t
        return t.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)

    u, b, c = split(x), split(B), split(C)
    total = split(log_decay[..., None]).squeeze(-1).cumsum(-1)
    difference = total[..., :, None] - total[..., None, :]
    upper = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    L = difference.masked_fill(upper, float("-inf")).exp().to(x.dtype)
    y = (c @ b.mT * L) @ u
    until = (total[..., -1:] - total).exp().to(x.dtype)
    added = (u * until[..., None]).mT @ b
    whole = total[..., -1].exp()[..., None, None]
    state = log_decay.new_zeros(batch, heads, head_dim, B.shape[3])
    before = []
    for decay, step in zip(whole.unbind(2), added.unbind(2)):
        before.append(state)
        state = torch.addcmul(step, decay, state)
    before = torch.stack(before, 2).to(x.dtype)
    y = y + (c * total.exp().to(x.dtype)[..., None]) @ before.mT
    y = y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
    return torch.addcmul(y, D[:, None].to(x.dtype), x), state


def reasoners(x, log_decay, B, C, D, chunk):
    return ops.ssd_scan(x, log_decay, B, C, None, D)


IMPLEMENTATIONS = pytest.mark.parametrize("impl", [reasoners, chunked], ids=["reasoners", "torch"])
FORWARD_CHUNK, BACKWARD_CHUNK = 32, 64  # PyTorch's best of 16, 32, 64, 128, 256 at 1 x 2048


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def bench_ssd_scan(measure, batch, length, dtype, impl):
    inputs = make(batch, length, dtype)
    shape = batch * length, HEADS, HEAD_DIM, STATE_DIM
    measure(
        lambda: impl(**inputs, chunk=FORWARD_CHUNK),
        num_bytes=cost.ssd_scan_bytes(*shape, data_bytes=dtype.itemsize),
        flops=cost.ssd_scan_flops(*shape),
        tokens=batch * length,
        rounds=7,
        warmup_rounds=1,
    )


@IMPLEMENTATIONS
@DTYPES
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def bench_ssd_scan_backward(measure, batch, length, dtype, impl):
    inputs = make(batch, length, dtype, requires_grad=True)
    y, state = impl(**inputs, chunk=BACKWARD_CHUNK)
    gradients = torch.randn_like(y), torch.zeros_like(state)
    shape = batch * length, HEADS, HEAD_DIM, STATE_DIM
    measure(
        lambda: torch.autograd.grad(
            (y, state), list(inputs.values()), gradients, retain_graph=True
        ),
        num_bytes=cost.ssd_scan_backward_bytes(*shape, data_bytes=dtype.itemsize),
        flops=cost.ssd_scan_backward_flops(*shape),
        tokens=batch * length,
        rounds=5,
        warmup_rounds=1,
    )


# ---- CUDA, bf16

CASES = {  # batch, length, heads, head_dim, state_dim, heads or groups of x, B and C
    "llamba-1b 1 x 2048": (1, 2048, 32, 64, 64, (32, 32, 32)),
    "llamba-1b 8 x 4096": (8, 4096, 32, 64, 64, (32, 32, 32)),
    "llamba-1b 64 x 512": (64, 512, 32, 64, 64, (32, 32, 32)),
    "llamba-1b 512 x 512": (512, 512, 32, 64, 64, (32, 32, 32)),
    "llamba-1b 1 x 32768": (1, 32768, 32, 64, 64, (32, 32, 32)),
    "llamba-1b 1 x 131072": (1, 131072, 32, 64, 64, (32, 32, 32)),
    "llamba-3b 1 x 4096": (1, 4096, 24, 96, 64, (24, 24, 24)),
    "llamba-3b 8 x 4096": (8, 4096, 24, 96, 64, (24, 24, 24)),
    "llamba-8b 8 x 4096": (8, 4096, 32, 128, 64, (32, 32, 32)),
    "mambainllama-1b kv 8 x 4096": (8, 4096, 32, 64, 64, (8, 8, 32)),
    "mambainllama-1b kv 64 x 512": (64, 512, 32, 64, 64, (8, 8, 32)),
    "mambainllama-1b kv 1 x 32768": (1, 32768, 32, 64, 64, (8, 8, 32)),
    "mambainllama-3b 8 x 4096": (8, 4096, 24, 128, 128, (24, 24, 24)),
    "mambainllama-3b kv 8 x 4096": (8, 4096, 24, 128, 128, (8, 8, 24)),
    "mambainllama-3b kv 1 x 4096": (1, 4096, 24, 128, 128, (8, 8, 24)),
    "mamba-2 8 x 4096": (8, 4096, 80, 64, 128, (80, 1, 1)),
    "mamba-2 64 x 512": (64, 512, 80, 64, 128, (80, 1, 1)),
    "mamba-2 1 x 4096": (1, 4096, 80, 64, 128, (80, 1, 1)),
}
TARGET_US = {
    "llamba-1b 1 x 2048": 18,
    "llamba-1b 8 x 4096": 225,
    "llamba-1b 64 x 512": 225,
    "llamba-1b 1 x 32768": 235,
    "llamba-3b 8 x 4096": 280,
    "mamba-2 8 x 4096": 330,
}


def make_cuda(batch, length, heads, head_dim, state_dim, shared):
    x_heads, b_groups, c_groups = shared

    def normal(*shape):
        return torch.randn(*shape, device="cuda").bfloat16()

    return {
        "x": normal(batch, length, x_heads, head_dim),
        "log_decay": F.logsigmoid(torch.randn(batch, length, heads, device="cuda") + 2),
        "B": normal(batch, length, b_groups, state_dim),
        "C": normal(batch, length, c_groups, state_dim),
        "D": torch.randn(heads, device="cuda"),
    }


def roof_cuda(bytes_of, flops_of, case, outputs):
    """Bytes with what heads share read once, FLOPs, tokens; `outputs`: how often x, B, C move."""
    batch, length, heads, head_dim, state_dim, (x_heads, b_groups, c_groups) = CASES[case]
    shape = batch * length, heads, head_dim, state_dim
    repeats = (heads - x_heads) * head_dim + (2 * heads - b_groups - c_groups) * state_dim
    shared = outputs * batch * length * repeats * 2
    return {
        "num_bytes": bytes_of(*shape, data_bytes=2) - shared,
        "flops": flops_of(*shape),
        "tokens": batch * length,
    }


SCANS = {
    **{f"mamba_ssm-{chunk}": partial(peers.mamba_ssm_scan, chunk) for chunk in (64, 128, 256)},
    "fla": peers.fla_scan,
}
BACKWARDS = {
    f"mamba_ssm-{chunk}": partial(peers.mamba_ssm_scan_backward, chunk) for chunk in (128, 256)
}
TRAININGS = {
    f"mamba_ssm-{chunk}": partial(peers.mamba_ssm_scan_backward, chunk, forward=True)
    for chunk in (64, 128, 256)
}
TRAINING_TARGET_US = {
    "llamba-1b 8 x 4096": 1100,
    "llamba-1b 64 x 512": 1100,
    "llamba-1b 1 x 32768": 1100,
    "llamba-3b 8 x 4096": 1400,
}


def last_head(inputs):
    """(x, log_decay, B, C, D) of the last row's last head, in float64."""
    *data, D = inputs.values()
    return *(t[-1:, :, -1:].double() for t in data), D[-1:].double()


def check(y, inputs):
    """The last row's last head against float64."""
    peers.require_close(y[-1:, :, -1:], chunked(*last_head(inputs), FORWARD_CHUNK)[0])


def check_backward(gradients, dy, inputs):
    """The same of the gradients (dx, dlog_decay, dB, dC) of what heads do not share."""
    x, log_decay, B, C, D = last_head(inputs)
    wanted = [t.requires_grad_() for t in (x, log_decay, B, C)]
    with torch.enable_grad():
        y, _ = chunked(*wanted, D, BACKWARD_CHUNK)
        expected = torch.autograd.grad(y, wanted, dy[-1:, :, -1:].double())
    heads = inputs["log_decay"].shape[2]
    for name, actual, oracle in zip(("dx", "da", "dB", "dC"), gradients, expected):
        if actual.shape[2] == heads:
            peers.require_close(actual[-1:, :, -1:], oracle, name, most=0.02)


def check_peer(theirs, ours):
    """mamba_ssm's (dx, ddt, dB, dC, dD) against our gradients with scale = dt = -log_decay.

    Loosely: it only has to be the same function, and theirs keeps states in bfloat16.
    """
    dx, da, dB, dC, dscale, dD, _ = ours
    expected = {"dx": dx, "ddt": dscale - da, "dB": dB, "dC": dC, "dD": dD}
    for actual, (name, tensor) in zip(theirs, expected.items(), strict=True):
        peers.require_close(actual, tensor, name, most=0.05)


@pytest.mark.cuda("ssd_scan")
@pytest.mark.parametrize("impl", ["reasoners", *SCANS])
@pytest.mark.parametrize("case", CASES)
def bench_ssd_scan_cuda(measure, case, impl):
    torch.manual_seed(0)
    inputs = make_cuda(*CASES[case])
    roof = roof_cuda(cost.ssd_scan_bytes, cost.ssd_scan_flops, case, 1)
    if impl == "reasoners":
        call = partial(ops.ssd_scan, **inputs)
        check(call()[0], inputs)
        measure(call, **roof, target_us=TARGET_US.get(case))
        return
    if "kv" in case:
        pytest.skip("has x for each head, and as many groups of B as of C")
    with peers.skip_if_it_fails():
        if impl == "fla":
            inputs["D"] = torch.zeros_like(inputs["D"])
            x, log_decay, B, C, _ = inputs.values()
            call, scale = SCANS[impl]()(x, log_decay, B, C), None
        else:
            call, scale = SCANS[impl]()(**inputs), -inputs["log_decay"]
        peers.require_close(call(), ops.ssd_scan(**inputs, scale=scale)[0])
        measure(call, **roof)


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize("impl", ["reasoners", *BACKWARDS])
@pytest.mark.parametrize(
    "case", [case for case in CASES if "512 x" not in case and "131072" not in case]
)
def bench_ssd_scan_backward_cuda(measure, case, impl):
    torch.manual_seed(0)
    inputs = make_cuda(*CASES[case])
    batch, _, heads, head_dim, state_dim, _ = CASES[case]
    dy = torch.randn(*inputs["log_decay"].shape, head_dim, device="cuda").bfloat16()
    dfinal = torch.zeros(batch, heads, head_dim, state_dim, device="cuda")
    x, log_decay, B, C, D = inputs.values()

    def ours(scale=None):
        return torch.ops.reasoners.ssd_scan_backward(
            dy, dfinal, x, log_decay, B, C, scale, D, None, None
        )

    roof = roof_cuda(cost.ssd_scan_backward_bytes, cost.ssd_scan_backward_flops, case, 2)
    if impl == "reasoners":
        check_backward(ours(), dy, inputs)
        measure(ours, **roof)
        return
    if "kv" in case:
        pytest.skip("has x for each head, and as many groups of B as of C")
    expected = ours(scale=-log_decay)
    with peers.skip_if_it_fails():
        call = BACKWARDS[impl]()(dy, **inputs)
        check_peer(call(), expected)
        measure(call, **roof)


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize("impl", ["reasoners", *TRAININGS])
@pytest.mark.parametrize("case", TRAINING_TARGET_US)
def bench_ssd_scan_forward_backward_cuda(measure, case, impl):
    """Forward and backward in one: y, then the gradients of x, the decay (theirs: dt), B, C and D."""
    torch.manual_seed(0)
    inputs = make_cuda(*CASES[case])
    x, log_decay, B, C, D = inputs.values()
    dy = torch.randn(*log_decay.shape, x.shape[3], device="cuda").bfloat16()

    def ours(scale=None):
        arguments = x, log_decay, B, C, scale, D, None, None
        y, state = torch.ops.reasoners.ssd_scan(*arguments)
        # As under autograd where nothing depends on the final state.
        return y, torch.ops.reasoners.ssd_scan_backward(dy, torch.zeros_like(state), *arguments)

    forward = roof_cuda(cost.ssd_scan_bytes, cost.ssd_scan_flops, case, 1)
    backward = roof_cuda(cost.ssd_scan_backward_bytes, cost.ssd_scan_backward_flops, case, 2)
    timed = partial(
        measure, tokens=forward["tokens"], rounds=7, warmup_rounds=1,
        **{name: forward[name] + backward[name] for name in ("num_bytes", "flops")},
    )  # fmt: skip
    if impl == "reasoners":
        y, gradients = ours()
        check(y, inputs)
        check_backward(gradients, dy, inputs)
        timed(ours, target_us=TRAINING_TARGET_US[case])
        return
    _, expected = ours(scale=-log_decay)
    with peers.skip_if_it_fails():
        call = TRAININGS[impl]()(dy, **inputs)
        check_peer(call(), expected)
        timed(call)

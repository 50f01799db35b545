import pytest
import torch
from cases import CUDA_N_CASES, SSD_SCAN_CASES

from reasoners import ops, reference
from reasoners.reference import assert_close, ssd_scan_inputs, widen

NAMES = ("x", "log_decay", "B", "C", "scale", "D", "initial_state")
DATA = ("x", "B", "C")
TOKENS = ("x", "log_decay", "B", "C", "scale")


def sequence_of(packed, index, where):
    """The arguments of one of several packed sequences, whose tokens are there."""
    alone = {**packed, "cu_seqlens": None}
    alone["initial_state"] = packed["initial_state"][index : index + 1]
    return alone | {k: packed[k][:, where] for k in TOKENS if packed[k] is not None}


def run(fn, inputs, weights, like=None):
    """(y, final state) of fn, and the gradients of a random weighted sum of both, by name."""
    leaves = {k: v if v is None else v.detach().clone() for k, v in inputs.items()}
    for name in NAMES:
        if leaves[name] is not None:
            leaves[name].requires_grad_()
    outputs = fn(**leaves)
    loss = sum((w.to(o.device) * o).sum() for w, o in zip(weights, outputs))
    names = [n for n in NAMES if leaves[n] is not None]
    # A batch or sequence without tokens may leave the reference's outputs unconnected to an input.
    gradients = torch.autograd.grad(
        loss + 0 * leaves["x"].sum(), [leaves[n] for n in names], allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return outputs, dict(zip(names, gradients))


def random_like(outputs, dtype):
    g = torch.Generator().manual_seed(1)
    y, state = (torch.randn(o.shape, generator=g, dtype=torch.float64) for o in outputs)
    return y.to(dtype).double(), state.float().double()


def error_ratio(actual, oracle):
    return ((actual.double().cpu() - oracle).norm() / oracle.norm().clamp_min(1e-12)).item()


def check(case, device="cpu"):
    inputs = ssd_scan_inputs(**case)
    dtype = inputs["x"].dtype
    wide = {k: widen(v) for k, v in inputs.items()}
    weights = random_like(reference.ssd_scan(**wide), dtype)
    oracle, oracle_grads = run(reference.ssd_scan, wide, weights)
    plain, plain_grads = run(reference.ssd_scan, inputs, weights)
    moved = {k: v if v is None else v.to(device) for k, v in inputs.items()}
    actual, grads = run(ops.ssd_scan, moved, weights)
    assert actual[0].dtype == dtype and actual[1].dtype == torch.float32
    for name, *results in zip(("y", "final_state"), actual, oracle, plain):
        assert_close(*results, name)
        if dtype == torch.bfloat16:
            assert error_ratio(*results[:2]) <= 0.005, name
    for name in oracle_grads:
        results = [g[name] for g in (grads, oracle_grads, plain_grads)]
        assert results[0].dtype == inputs[name].dtype
        assert_close(*results, f"d{name}")
        if dtype == torch.bfloat16:
            assert error_ratio(*results[:2]) <= 0.01, f"d{name}"


@pytest.mark.parametrize("case", SSD_SCAN_CASES.values(), ids=SSD_SCAN_CASES.keys())
def test_against_reference(case):
    check(case)


# Where CUDA takes other ways: chunks of 64 tokens in segments of 256 on tensor cores, rows of the
# state in tiles for what these do not serve.
CUDA_TABLE = SSD_SCAN_CASES | CUDA_N_CASES | {
    "a large chunk less one, bf16": {"batch": 1, "length": 63, "dtype": torch.bfloat16},
    "a large chunk, bf16": {"batch": 1, "length": 64, "dtype": torch.bfloat16},
    "a large chunk and one, bf16": {"batch": 1, "length": 65, "dtype": torch.bfloat16},
    "several segments, bf16": {
        "batch": 1, "length": 600, "H": 1, "Hx": 1, "Gb": 1, "Gc": 1, "dtype": torch.bfloat16,
    },
    "packed, several segments, bf16": {
        "lengths": [33, 0, 1, 64, 130, 300], "H": 2, "Hx": 1, "Gb": 2, "Gc": 1,
        "dtype": torch.bfloat16,
    },
    "P 64, N 64, bf16": {
        "batch": 1, "length": 200, "P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2,
        "dtype": torch.bfloat16,
    },
    "P 64, N 64, fp16": {
        "batch": 1, "length": 200, "P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2,
        "dtype": torch.float16,
    },
    "P 96, N 64, shared, bf16": {
        "batch": 1, "length": 150, "P": 96, "N": 64, "H": 2, "Hx": 1, "Gb": 1, "Gc": 2,
        "dtype": torch.bfloat16,
    },
    "P 128, N 64, bf16": {
        "batch": 1, "length": 150, "P": 128, "N": 64, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1,
        "dtype": torch.bfloat16,
    },
    "P 64, N 128, bf16": {
        "batch": 1, "length": 150, "P": 64, "N": 128, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1,
        "dtype": torch.bfloat16,
    },
    "P 128, N 128, bf16": {
        "batch": 1, "length": 150, "P": 128, "N": 128, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1,
        "dtype": torch.bfloat16,
    },
    # Warpgroups: pairs of heads in the same groups, or a head of more than 64 columns.
    "P 64, N 128, one group, packed, bf16": {
        "lengths": [63, 0, 1, 64, 65, 131, 300], "P": 64, "N": 128, "H": 4, "Hx": 4, "Gb": 1, "Gc": 1,
        "dtype": torch.bfloat16,
    },
    "P 64, N 128, one group, fp16": {
        "length": 131, "P": 64, "N": 128, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1, "dtype": torch.float16,
    },
    "P 64, N 128, sharing out of step, bf16": {
        "length": 65, "P": 64, "N": 128, "H": 12, "Hx": 4, "Gb": 6, "Gc": 2, "dtype": torch.bfloat16,
    },
    "P 64, N 128, a group a head, bf16": {
        "length": 65, "P": 64, "N": 128, "H": 2, "Hx": 2, "Gb": 1, "Gc": 2, "dtype": torch.bfloat16,
    },
    "P 56, N 72, pairs, several segments, bf16": {
        "batch": 1, "length": 600, "P": 56, "N": 72, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "P 64, N 128, one group, decay -20, bf16": {
        "length": 100, "P": 64, "N": 128, "H": 2, "Hx": 1, "Gb": 1, "Gc": 1, "decay": 20.0,
        "dtype": torch.bfloat16,
    },
    # Or any heads of 64 x 64, one a warpgroup.
    "P 64, N 64, three heads, packed, bf16": {
        "lengths": [63, 0, 1, 64, 65, 131, 300], "P": 64, "N": 64, "H": 3, "Hx": 1, "Gb": 3, "Gc": 1,
        "dtype": torch.bfloat16,
    },
    "P 56, N 40, one head, several segments, fp16": {
        "batch": 1, "length": 523, "P": 56, "N": 40, "H": 1, "Hx": 1, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.float16,
    },
    "P 64, N 64, no option, decay -1000, bf16": {
        "length": 130, "P": 64, "N": 64, "H": 5, "Hx": 5, "Gb": 5, "Gc": 5, "scale": False, "D": False,
        "initial_state": False, "decay": 1000.0, "dtype": torch.bfloat16,
    },
    "P 128, N 128, (kv, kv, H), packed, bf16": {
        "lengths": [63, 0, 1, 64, 65, 131, 300], "P": 128, "N": 128, "H": 4, "Hx": 2, "Gb": 2, "Gc": 4,
        "dtype": torch.bfloat16,
    },
    "P 128, N 128, no option, bf16": {
        "batch": 1, "length": 127, "P": 128, "N": 128, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "scale": False,
        "D": False, "initial_state": False, "dtype": torch.bfloat16,
    },
    "P 128, N 128, decay -1000, bf16": {
        "batch": 1, "length": 100, "P": 128, "N": 128, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2,
        "decay": 1000.0, "dtype": torch.bfloat16,
    },
    "P 104, N 120, several segments, fp16": {
        "batch": 1, "length": 523, "P": 104, "N": 120, "H": 2, "Hx": 1, "Gb": 1, "Gc": 2, "decay": 0.02,
        "dtype": torch.float16,
    },
    "P 128, N 64, zero decay, bf16": {
        "batch": 1, "length": 257, "P": 128, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "decay": 0.0,
        "dtype": torch.bfloat16,
    },
    "P 72, N 40, bf16": {
        "batch": 1, "length": 70, "P": 72, "N": 40, "H": 1, "Hx": 1, "Gb": 1, "Gc": 1,
        "dtype": torch.bfloat16,
    },
    # Where the derivative keeps states on its way: in rows of dB and dC, or of dC, dB or dx alone, of
    # one chunk or of two.
    "several chunks, P 128, N 128, (kv, kv, H), bf16": {
        "batch": 1, "length": 330, "P": 128, "N": 128, "H": 3, "Hx": 1, "Gb": 1, "Gc": 3, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "several chunks, P 128, N 64, B of each head, bf16": {
        "batch": 1, "length": 330, "P": 128, "N": 64, "H": 2, "Hx": 1, "Gb": 2, "Gc": 1, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "several chunks, P 128, N 64, one group, bf16": {
        "batch": 1, "length": 330, "P": 128, "N": 64, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "several chunks, P 64, N 64, one group, bf16": {
        "batch": 1, "length": 330, "P": 64, "N": 64, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "several chunks, P 40, N 64, one group, bf16": {
        "batch": 1, "length": 330, "P": 40, "N": 64, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "several chunks, P 104, N 120, one group, bf16": {
        "batch": 1, "length": 330, "P": 104, "N": 120, "H": 2, "Hx": 2, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "several chunks, all shared, fp16": {
        "batch": 1, "length": 330, "P": 64, "N": 64, "H": 4, "Hx": 1, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.float16,
    },
    # The derivative by warpgroups: states in rows of dB and dC as they are.
    "several chunks, P 64, N 64, no scale, (kv, kv, H), packed, bf16": {
        "lengths": [63, 0, 1, 64, 65, 131, 300], "P": 64, "N": 64, "H": 4, "Hx": 2, "Gb": 2, "Gc": 4,
        "scale": False, "decay": 0.02, "dtype": torch.bfloat16,
    },
    "several chunks, P 88, N 64, bf16": {
        "batch": 2, "length": 330, "P": 88, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "several chunks, P 96, N 64, no scale, packed, bf16": {
        "lengths": [63, 0, 1, 64, 65, 131, 300], "P": 96, "N": 64, "H": 3, "Hx": 3, "Gb": 3, "Gc": 3,
        "scale": False, "decay": 0.02, "dtype": torch.bfloat16,
    },
    "several chunks, P 128, N 64, fp16": {
        "batch": 1, "length": 330, "P": 128, "N": 64, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "decay": 0.02,
        "dtype": torch.float16,
    },
    "several chunks, P 128, N 64, x shared, no scale, bf16": {
        "length": 193, "P": 128, "N": 64, "H": 4, "Hx": 2, "Gb": 4, "Gc": 4, "scale": False,
        "decay": 0.02, "dtype": torch.bfloat16,
    },
    # States in rows of two chunks of dC, and sums from head to head.
    "P 128, N 128, x and B of eight heads, bf16": {
        "batch": 1, "length": 130, "P": 128, "N": 128, "H": 8, "Hx": 1, "Gb": 1, "Gc": 8,
        "dtype": torch.bfloat16,
    },
    "P 104, N 120, x and B of five heads, no option, bf16": {
        "batch": 2, "length": 70, "P": 104, "N": 120, "H": 5, "Hx": 1, "Gb": 1, "Gc": 5, "scale": False,
        "D": False, "initial_state": False, "dtype": torch.bfloat16,
    },
    "P 128, N 128, x and B of ten heads, bf16": {
        "batch": 1, "length": 130, "P": 128, "N": 128, "H": 10, "Hx": 1, "Gb": 1, "Gc": 10,
        "dtype": torch.bfloat16,
    },
    # Sums in chains of heads.
    "P 64, N 128, one group of 32 heads, bf16": {
        "batch": 1, "length": 200, "P": 64, "N": 128, "H": 32, "Hx": 32, "Gb": 1, "Gc": 1, "decay": 0.02,
        "dtype": torch.bfloat16,
    },
    "P 64, N 128, x and C of 40 heads, no scale, fp16": {
        "batch": 1, "length": 130, "P": 64, "N": 128, "H": 40, "Hx": 1, "Gb": 40, "Gc": 1, "scale": False,
        "dtype": torch.float16,
    },
    "odd extents, bf16": {"P": 7, "N": 5, "dtype": torch.bfloat16},
    "P 136, bf16": {"P": 136, "length": 20, "dtype": torch.bfloat16},
    "no scale, bf16": {"scale": False, "length": 70, "dtype": torch.bfloat16},
    "no D, bf16": {"D": False, "length": 70, "dtype": torch.bfloat16},
    "zero decay, bf16": {"decay": 0.0, "length": 100, "dtype": torch.bfloat16},
    "decay -20, bf16": {"decay": 20.0, "length": 100, "dtype": torch.bfloat16},
    "several tiles of rows": {"P": 80, "N": 20},
    "several spans": {"batch": 1, "length": 200},
}  # fmt: skip


FORWARD_TABLE = CUDA_TABLE | {
    # Few long sequences, whose segments are dealt to several blocks.
    "1,800 tokens of one head, bf16": {
        "batch": 1, "length": 1800, "P": 64, "N": 64, "H": 1, "Hx": 1, "Gb": 1, "Gc": 1, "decay": 0.01,
        "dtype": torch.bfloat16,
    },
    "2,305 tokens of one head, no option, fp16": {
        "batch": 1, "length": 2305, "P": 64, "N": 64, "H": 1, "Hx": 1, "Gb": 1, "Gc": 1, "decay": 0.01,
        "scale": False, "D": False, "initial_state": False, "dtype": torch.float16,
    },
    "2 x 1,000 tokens, P 56, N 40, bf16": {
        "length": 1000, "P": 56, "N": 40, "H": 2, "Hx": 1, "Gb": 1, "Gc": 2, "decay": 0.01,
        "dtype": torch.bfloat16,
    },
}  # fmt: skip


@pytest.mark.cuda("ssd_scan")
@pytest.mark.parametrize("case", FORWARD_TABLE.values(), ids=FORWARD_TABLE.keys())
def test_forward_against_reference_cuda(case):
    reference.check(ops.ssd_scan, "ssd_scan", "cuda", **case)


@pytest.mark.cuda("ssd_scan", "ssd_scan_backward")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    check(case, "cuda")


SIZES_CUDA = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"P": 64, "N": 64}),
]


def backward_arguments_cuda(dtype, **case):
    """(dy, dfinal_state), and by name the arguments of the forward."""
    inputs = ssd_scan_inputs(dtype=dtype, **case)
    g = torch.Generator().manual_seed(2)
    batch, length, heads = inputs["log_decay"].shape
    dy = torch.randn(batch, length, heads, inputs["x"].shape[3], generator=g).to(dtype).cuda()
    dfinal = torch.randn(inputs["initial_state"].shape, generator=g).cuda()
    return (dy, dfinal), {k: v if v is None else v.cuda() for k, v in inputs.items()}


def tokens_of(gradients, where):
    """Of what is there."""
    return [gradient[:, where] if gradient.numel() else gradient for gradient in gradients]


def assert_equal_alone(together, outer, alone, index, where):
    """The gradients of one of several packed sequences, by itself, and its part of all of them."""
    dy, dfinal = outer
    one = slice(index, index + 1)
    backward = torch.ops.reasoners.ssd_scan_backward
    *tokens, _, dinitial = backward(dy[:, where], dfinal[one], *alone.values())
    assert_equal(tokens, tokens_of(together[:5], where))
    assert torch.equal(dinitial, together[6][one])


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [*SIZES_CUDA,
     (torch.bfloat16, {"P": 96, "N": 64, "H": 3, "Hx": 3, "Gb": 3, "Gc": 3}),
     (torch.float16, {"P": 128, "N": 64, "H": 4, "Hx": 2, "Gb": 4, "Gc": 4, "scale": False}),
     (torch.bfloat16, {"P": 128, "N": 128, "H": 6, "Gb": 2, "Gc": 6}),
     (torch.bfloat16, {"P": 64, "N": 128, "H": 80, "Hx": 80, "Gc": 1})],
)  # fmt: skip
def test_gradients_of_packed_and_strided_equal_separate_bitwise_cuda(dtype, sizes):
    """And two runs give the same bits, of the sums over all tokens too."""
    lengths, backward = [33, 1, 64, 300], torch.ops.reasoners.ssd_scan_backward
    shared = {"Hx": 2, "Gb": 1} | sizes
    (dy, dfinal), packed = backward_arguments_cuda(dtype, lengths=lengths, **shared)
    together = backward(dy, dfinal, *packed.values())
    assert_equal(backward(dy, dfinal, *packed.values()), together)
    begin = 0
    for i, length in enumerate(lengths):
        where = slice(begin, begin + length)
        alone = sequence_of(packed, i, where)
        for name in TOKENS:
            rows = alone[name]
            if rows is None:
                continue
            wide = rows.new_zeros(1, length, rows[0, 0].numel() + 3)
            alone[name] = wide[..., 3:].view(rows.shape).copy_(rows)
        assert_equal_alone(together, (dy, dfinal), alone, i, where)
        begin += length


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize(
    "sizes",
    [
        {"H": 32, "Hx": 8, "Gb": 8, "Gc": 32, "P": 64, "N": 64},
        {"H": 12, "Hx": 4, "Gb": 6, "Gc": 1, "P": 96, "N": 64},
        {"H": 24, "Hx": 24, "Gb": 24, "Gc": 24, "P": 96, "N": 64, "scale": False},
        {"H": 80, "Hx": 80, "Gb": 1, "Gc": 1, "P": 64, "N": 128},
        {"H": 144, "Hx": 144, "Gb": 1, "Gc": 2, "P": 64, "N": 128},
        {"H": 256, "Hx": 256, "Gb": 1, "Gc": 2, "P": 32, "N": 32},
    ],
)
def test_gradients_among_many_equal_alone_bitwise_cuda(sizes):
    """Of many more groups of heads than have places for their sums at a time."""
    lengths = [300, 0, 64, 1500, 1, 700] * 6
    outer, inputs = backward_arguments_cuda(torch.bfloat16, lengths=lengths, **sizes)
    together = torch.ops.reasoners.ssd_scan_backward(*outer, *inputs.values())
    begin = 0
    for i, length in enumerate(lengths[:6]):
        where = slice(begin, begin + length)
        assert_equal_alone(together, outer, sequence_of(inputs, i, where), i, where)
        begin += length


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize(
    ("empty", "sizes"),
    [
        (135, {"H": 4, "Hx": 4, "Gb": 1, "Gc": 1, "P": 32, "N": 32}),
        (16, {"H": 32, "Hx": 8, "Gb": 8, "Gc": 32, "P": 64, "N": 64}),
        (5, {"H": 80, "Hx": 80, "Gb": 1, "Gc": 1, "P": 64, "N": 128}),
    ],
)
def test_gradients_after_empty_sequences_equal_alone_bitwise_cuda(empty, sizes):
    """Whose places for sums are those of a sequence that is not through, and of empty ones between."""
    lengths = [4000, *[0] * empty, 300]
    outer, inputs = backward_arguments_cuda(torch.bfloat16, lengths=lengths, **sizes)
    together = torch.ops.reasoners.ssd_scan_backward(*outer, *inputs.values())
    for i, where in ((0, slice(0, 4000)), (len(lengths) - 1, slice(4000, 4300))):
        assert_equal_alone(together, outer, sequence_of(inputs, i, where), i, where)


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize(
    "sizes",
    [
        {"H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "P": 64, "N": 64},
        {"H": 2, "Hx": 2, "Gb": 1, "Gc": 1, "P": 64, "N": 64},
        {"H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "P": 128, "N": 64, "scale": False},
        {"H": 2, "Hx": 1, "Gb": 1, "Gc": 2, "P": 128, "N": 128},
        # Here of more than 4,736, into whole pairs of chunks.
        {"H": 16, "Hx": 16, "Gb": 1, "Gc": 1, "P": 64, "N": 128},
    ],
)
def test_gradients_of_long_sequences_cuda(sizes):
    """Those of more than 4,352 tokens are dealt to several blocks; beside float32 on the CPU."""
    lengths, backward = [4353, 100, 9000], torch.ops.reasoners.ssd_scan_backward
    (dy, dfinal), inputs = backward_arguments_cuda(torch.bfloat16, lengths=lengths, **sizes)
    found = backward(dy, dfinal, *inputs.values())
    assert_equal(backward(dy, dfinal, *inputs.values()), found)

    def wide(t):
        if t is None:
            return None
        return t.cpu().float() if t.is_floating_point() else t.cpu()

    expected = backward(*map(wide, (dy, dfinal, *inputs.values())))
    for ours, exact in zip(found, expected, strict=True):
        if not exact.numel():
            continue
        ours = ours.cpu().float()
        assert (ours - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()
    where = slice(4453, None)
    assert_equal_alone(found, (dy, dfinal), sequence_of(inputs, 2, where), 2, where)


MEMORY_CUDA = {  # H, Hx, Gb, Gc, P, N, and the most, of what the inputs take
    "Llamba-1B": (32, 32, 32, 32, 64, 64, 0.05),
    "Llamba-3B": (24, 24, 24, 24, 96, 64, 0.05),
    "Llamba-8B": (32, 32, 32, 32, 128, 64, 0.05),
    "P 128, N 128": (24, 24, 24, 24, 128, 128, 0.05),
    # States of all heads weigh more beside inputs that are shared.
    "MambaInLlama-3B": (24, 8, 8, 24, 128, 128, 0.1),
    "MambaInLlama-8B": (32, 8, 8, 32, 128, 128, 0.1),
    "MambaInLlama-1B": (32, 8, 8, 32, 64, 64, 0.1),
    "Mamba-2, one group": (80, 80, 1, 1, 64, 128, 0.1),
}


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize(
    "extents", [{"length": 4096, "batch": 1}, {"length": 512}, {"length": 8200, "batch": 1},
                {"length": 12300, "batch": 1}, {"lengths": [1000, 10, 5000, 300]}],
    ids=["4096", "2 x 512", "8200", "12300", "packed"],
)  # fmt: skip
@pytest.mark.parametrize("model", MEMORY_CUDA)
def test_memory_for_gradients_cuda(model, extents):
    """What is allocated beyond inputs and gradients."""
    *sizes, most = MEMORY_CUDA[model]
    case = dict(zip(("H", "Hx", "Gb", "Gc", "P", "N"), sizes)) | extents
    outer, inputs = backward_arguments_cuda(torch.bfloat16, **case)
    backward = torch.ops.reasoners.ssd_scan_backward
    backward(*outer, *inputs.values())
    torch.cuda.reset_peak_memory_stats()
    gradients = backward(*outer, *inputs.values())
    # What is asked for: the allocator may give a megabyte more.
    stats = torch.cuda.memory_stats()
    beyond = stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"]
    data = [inputs[name] for name in TOKENS]
    assert beyond <= most * sum(t.nbytes for t in data)
    del gradients


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize(("dtype", "sizes"), SIZES_CUDA)
def test_minus_infinity_passes_nothing_back_cuda(dtype, sizes):
    (dy, dfinal), inputs = backward_arguments_cuda(dtype, length=150, batch=1, **sizes)
    inputs["log_decay"][:, [20, 130]] = float("-inf")
    gradients = torch.ops.reasoners.ssd_scan_backward(dy, dfinal, *inputs.values())
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[1][:, [20, 130]] == 0).all()
    dy[:, :20] = 0  # all that the tokens before the reset are for
    gradients = torch.ops.reasoners.ssd_scan_backward(dy, dfinal, *inputs.values())
    for gradient in (*gradients[:5], gradients[6]):
        assert (gradient[:, :20] == 0).all()


@pytest.mark.cuda("ssd_scan_backward")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("dtype", "sizes"), SIZES_CUDA)
def test_bad_values_stay_in_their_sequence_cuda(dtype, sizes, bad):
    (dy, dfinal), inputs = backward_arguments_cuda(dtype, lengths=[37, 40, 20], **sizes)
    clean = torch.ops.reasoners.ssd_scan_backward(dy, dfinal, *inputs.values())
    for name in ("x", "B", "C", "scale"):
        inputs[name][0, 57] = bad
    inputs["log_decay"][:, 58] = float("nan")
    spoilt = torch.ops.reasoners.ssd_scan_backward(dy, dfinal, *inputs.values())
    for got, expected in zip(spoilt[:5], clean[:5]):
        assert torch.equal(got[:, :37], expected[:, :37])
        assert torch.equal(got[:, 77:], expected[:, 77:])
    assert not spoilt[1][:, 37:58].isfinite().any()


@pytest.mark.cuda("ssd_scan")
@pytest.mark.parametrize(
    ("P", "N", "Gb"),
    [(64, 64, 4), (96, 64, 4), (128, 64, 4), (64, 128, 4), (64, 128, 2), (128, 128, 4)],
)
@pytest.mark.parametrize(("batch", "length"), [(42, 257), (72, 257), (72, 700), (132, 257)])
def test_a_sequence_is_the_same_bits_alone_and_among_many_cuda(batch, length, P, N, Gb):
    """Alone it is dealt to several blocks; among many one walks it, or two, each a part."""
    sizes = {"H": 4, "Hx": 2, "Gb": Gb, "Gc": 1, "P": P, "N": N, "dtype": torch.bfloat16}
    inputs = ssd_scan_inputs(batch=batch, length=length, **sizes)
    inputs = {k: v if v is None else v.cuda() for k, v in inputs.items()}
    y, final = ops.ssd_scan(**inputs)
    assert_equal(ops.ssd_scan(**inputs), (y, final))
    for i in (0, 1, 35, batch - 1):
        alone = {k: v if v is None or k == "D" else v[i : i + 1] for k, v in inputs.items()}
        assert_equal(ops.ssd_scan(**alone), (y[i : i + 1], final[i : i + 1]))


@pytest.mark.cuda("ssd_scan")
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.bfloat16, {"H": 32, "Hx": 32, "Gb": 32, "Gc": 32}),
        (torch.bfloat16, {"H": 16, "Hx": 4, "Gb": 4, "Gc": 16}),
        (torch.bfloat16, {"H": 8, "Hx": 8, "Gb": 1, "Gc": 1, "scale": False, "D": False}),
        (torch.float16, {"H": 16, "Hx": 16, "Gb": 16, "Gc": 16, "P": 56, "N": 40}),
        (torch.bfloat16, {"H": 24, "Hx": 24, "Gb": 24, "Gc": 24, "P": 96}),
        (torch.bfloat16, {"H": 32, "Hx": 8, "Gb": 8, "Gc": 32, "P": 128}),
        (torch.bfloat16, {"H": 48, "Hx": 48, "Gb": 48, "Gc": 48}),
        (torch.bfloat16, {"H": 8, "Hx": 8, "Gb": 1, "Gc": 1, "N": 128}),
        (torch.bfloat16, {"H": 1, "Hx": 1, "Gb": 1, "Gc": 1}),
        # Segments of more chunks where a sequence is long, and of four in the others.
        (torch.bfloat16, {"H": 80, "Hx": 80, "Gb": 80, "Gc": 80, "lengths": [5000, 700]}),
        (torch.bfloat16, {"H": 80, "Hx": 80, "Gb": 1, "Gc": 1, "N": 128, "lengths": [700, 5000]}),
    ],
)
def test_long_sequences_are_the_same_bits_alone_packed_and_among_many_cuda(dtype, sizes):
    """Alone and packed the longer ones are dealt to several blocks; among many one walks each."""
    lengths = [2049, 0, 1, 5000, 256, 257, 255][: 128 // sizes["H"]]
    sizes = {"P": 64, "N": 64, "decay": 0.01, "lengths": lengths} | sizes
    lengths = sizes["lengths"]
    packed = ssd_scan_inputs(dtype=dtype, **sizes)
    packed = {k: v if v is None else v.cuda() for k, v in packed.items()}
    y, final = ops.ssd_scan(**packed)
    assert_equal(ops.ssd_scan(**packed), (y, final))
    tokens = [name for name in TOKENS if packed[name] is not None]
    begin = 0
    for i, length in enumerate(lengths):
        expected = (y[:, begin : begin + length], final[i : i + 1])
        alone = sequence_of(packed, i, slice(begin, begin + length))
        assert_equal(ops.ssd_scan(**alone), expected)
        for copies in (2, 4, 160 // sizes["H"]):
            several = {**alone, "initial_state": torch.cat([alone["initial_state"]] * copies)}
            several |= {name: torch.cat([alone[name]] * copies) for name in tokens}
            y_several, final_several = ops.ssd_scan(**several)
            for k in range(copies):
                assert_equal((y_several[k : k + 1], final_several[k : k + 1]), expected)
        begin += length


@pytest.mark.cuda("ssd_scan")
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [*SIZES_CUDA, (torch.bfloat16, {"P": 64, "N": 128}), (torch.bfloat16, {"P": 128, "N": 128})],
)
def test_packed_and_strided_equal_separate_bitwise_cuda(dtype, sizes):
    lengths = [33, 0, 1, 64, 40, 600]
    packed = ssd_scan_inputs(lengths=lengths, dtype=dtype, Hx=2, Gb=1, **{"Gc": 2} | sizes)
    packed = {k: v.cuda() for k, v in packed.items()}
    y, final = ops.ssd_scan(**packed)
    begin = 0
    for i, length in enumerate(lengths):
        alone = sequence_of(packed, i, slice(begin, begin + length))
        for name in TOKENS:
            rows = alone[name]
            wide = rows.new_zeros(1, length, rows[0, 0].numel() + 3 if length else 8)
            alone[name] = wide[..., 3:].view(rows.shape).copy_(rows) if length else rows
        y1, final1 = ops.ssd_scan(**alone)
        assert torch.equal(y1, y[:, begin : begin + length])
        assert torch.equal(final1, final[i : i + 1])
        begin += length


@pytest.mark.cuda("ssd_scan")
@pytest.mark.parametrize(
    ("sizes", "tolerance"),
    [
        ({}, 2e-5),
        ({"P": 64, "N": 64}, 0.02),
        ({"P": 64, "N": 128, "Gb": 1, "Gc": 1}, 0.02),
        ({"P": 128, "N": 128}, 0.02),
    ],
)
def test_minus_infinity_resets_cuda(sizes, tolerance):
    dtype = torch.bfloat16 if sizes else torch.float32
    inputs = ssd_scan_inputs(length=50, dtype=dtype, **sizes)
    inputs = {k: v if v is None else v.cuda() for k, v in inputs.items()}
    inputs["log_decay"][:, 20] = float("-inf")
    y, final = ops.ssd_scan(**inputs)
    tail = {**inputs, "initial_state": torch.zeros_like(final)}
    for name in ("x", "log_decay", "B", "C", "scale"):
        tail[name] = inputs[name][:, 20:]
    y_tail, final_tail = ops.ssd_scan(**tail)
    for found, expected in ((y[:, 20:], y_tail), (final, final_tail)):
        largest = expected.abs().max().item() if sizes else 1
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.cuda("ssd_scan")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [*SIZES_CUDA, (torch.bfloat16, {"P": 64, "N": 128, "Gb": 1, "Gc": 1}),
     (torch.bfloat16, {"P": 128, "N": 128})],
)  # fmt: skip
def test_bad_values_stay_in_their_sequence_forward_cuda(dtype, sizes, bad):
    inputs = ssd_scan_inputs(lengths=[37, 40, 20], dtype=dtype, **sizes)
    inputs = {k: v if v is None else v.cuda() for k, v in inputs.items()}
    y, final = ops.ssd_scan(**inputs)
    for name in ("x", "B", "C", "scale"):
        inputs[name][0, 57] = bad
    inputs["log_decay"][:, 58] = float("nan")
    y_bad, final_bad = ops.ssd_scan(**inputs)
    assert not y_bad[:, 57:77].isfinite().any()
    for i, where in ((0, slice(37)), (2, slice(77, None))):
        assert torch.equal(y_bad[:, where], y[:, where])
        assert torch.equal(final_bad[i], final[i])


@pytest.mark.cuda("ssd_scan")
def test_too_large_a_state_cuda():
    inputs = ssd_scan_inputs(N=257, length=2)
    inputs = {k: v if v is None else v.cuda() for k, v in inputs.items()}
    with pytest.raises(
        NotImplementedError, match="ssd_scan: N expected at most 256 on CUDA, got 257"
    ):
        ops.ssd_scan(**inputs)


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"scale": False, "D": False, "initial_state": False},
        {"Hx": 1, "Gb": 2},
        {"batch": 1, "length": 35},
        {"lengths": [2, 0, 33], "Gc": 1},
    ],
    ids=["all options", "no option", "shared", "two chunks", "packed"],
)
def test_gradcheck(case):
    sizes = {"batch": 2, "length": 3, "H": 2, "Hx": 2, "Gb": 2, "Gc": 2, "P": 2, "N": 3}
    inputs = ssd_scan_inputs(**sizes | case, dtype=torch.float64)
    cu_seqlens = inputs.pop("cu_seqlens")
    leaves = [v if v is None else v.requires_grad_() for v in inputs.values()]
    assert torch.autograd.gradcheck(
        lambda *a: ops.ssd_scan(*a, cu_seqlens), leaves, fast_mode=len(leaves[0][0]) > 3
    )


def test_float64_is_exact_to_rounding():
    inputs = ssd_scan_inputs(dtype=torch.float64, length=70)
    for actual, expected in zip(ops.ssd_scan(**inputs), reference.ssd_scan(**inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_scan_is_a_fold_of_updates():
    inputs = ssd_scan_inputs(length=45, Hx=2, Gb=1)
    y, final = ops.ssd_scan(**inputs)
    state, slots = inputs["initial_state"].clone(), torch.arange(2, dtype=torch.int32)
    steps = []
    for t in range(45):
        token = [inputs[k][:, t] for k in ("x", "log_decay", "B", "C", "scale")]
        steps.append(ops.state_update(state, slots, *token, inputs["D"]))
    torch.testing.assert_close(y, torch.stack(steps, 1), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(final, state, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("at", [1, 31, 32, 50, 99])
def test_split_with_carried_state_equals_whole(at):
    inputs = ssd_scan_inputs(length=100)
    y, final = ops.ssd_scan(**inputs)
    first, second = dict(inputs), dict(inputs)
    for name in ("x", "log_decay", "B", "C", "scale"):
        first[name], second[name] = inputs[name][:, :at], inputs[name][:, at:]
    y1, second["initial_state"] = ops.ssd_scan(**first)
    y2, final2 = ops.ssd_scan(**second)
    torch.testing.assert_close(torch.cat([y1, y2], 1), y, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(final2, final, rtol=2e-5, atol=2e-5)


def assert_equal(results, others):
    for a, b in zip(results, others):
        assert torch.equal(a, b)


def forward_and_backward(inputs):
    y, final = ops.ssd_scan(**inputs)
    g = torch.Generator().manual_seed(2)
    dy = torch.randn(y.shape, generator=g).to(y)
    return [y, final, *torch.ops.reasoners.ssd_scan_backward(dy, final, *inputs.values())], dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_separate_bitwise(dtype):
    lengths = [33, 0, 1, 64, 40]
    packed = ssd_scan_inputs(lengths=lengths, dtype=dtype, Hx=2, Gb=1)
    (y, final, *gradients), dy = forward_and_backward(packed)
    dD, begin = torch.zeros(4), 0
    for i, length in enumerate(lengths):
        where = slice(begin, begin + length)
        alone = sequence_of(packed, i, where)
        y1, final1 = ops.ssd_scan(**alone)
        assert torch.equal(y1, y[:, where]) and torch.equal(final1, final[i : i + 1])
        *tokens, dD1, dinitial = torch.ops.reasoners.ssd_scan_backward(
            dy[:, where], final1, *alone.values()
        )
        assert_equal(tokens, [g[:, where] for g in gradients[:5]])
        assert torch.equal(dinitial, gradients[6][i : i + 1])
        dD, begin = dD + dD1, begin + length
    torch.testing.assert_close(dD, gradients[5], rtol=1e-4, atol=1e-3)


def test_same_bits_again_and_at_any_number_of_threads():
    inputs = ssd_scan_inputs(lengths=[70, 3, 40], Hx=2, Gb=1, Gc=4, P=64, N=64)
    results, _ = forward_and_backward(inputs)
    assert_equal(forward_and_backward(inputs)[0], results)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert_equal(forward_and_backward(inputs)[0], results)
    finally:
        torch.set_num_threads(threads)


def test_batch_mates_change_nothing():
    inputs = ssd_scan_inputs(batch=3, dtype=torch.bfloat16)
    alone = {k: v if v is None or k == "D" else v[1:2] for k, v in inputs.items()}
    results, dy = forward_and_backward(inputs)
    y, final = ops.ssd_scan(**alone)
    *gradients, _, dinitial = torch.ops.reasoners.ssd_scan_backward(dy[1:2], final, *alone.values())
    rows = [r[1:2] for i, r in enumerate(results) if i != 7]
    assert_equal([y, final, *gradients, dinitial], rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_in_their_sequence_and_their_future(bad):
    inputs = ssd_scan_inputs(lengths=[37, 40, 20])
    clean, _ = forward_and_backward(inputs)
    spoilt = {**inputs}
    for name in ("x", "B", "C", "scale"):
        spoilt[name] = inputs[name].clone()
        spoilt[name][0, 57] = bad
    spoilt["log_decay"] = inputs["log_decay"].clone()
    spoilt["log_decay"][0, 58] = float("nan")
    results, _ = forward_and_backward(spoilt)
    assert torch.equal(results[0][:, :57], clean[0][:, :57])
    assert not results[0][:, 57:77].isfinite().any()
    assert torch.equal(results[0][:, 77:], clean[0][:, 77:])
    assert_equal([results[1][i] for i in (0, 2)], [clean[1][i] for i in (0, 2)])
    for result, expected in zip(results[2:7], clean[2:7]):
        assert torch.equal(result[:, :37], expected[:, :37])
        assert torch.equal(result[:, 77:], expected[:, 77:])


def test_minus_infinity_resets():
    inputs = ssd_scan_inputs(length=50)
    inputs["log_decay"][:, 20] = float("-inf")
    y, final = ops.ssd_scan(**inputs)
    tail = {**inputs, "initial_state": None}
    for name in ("x", "log_decay", "B", "C", "scale"):
        tail[name] = inputs[name][:, 20:]
    y_tail, final_tail = ops.ssd_scan(**tail)
    torch.testing.assert_close(y[:, 20:], y_tail, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(final, final_tail, rtol=2e-5, atol=2e-5)
    results, _ = forward_and_backward(inputs)
    assert all(r.isfinite().all() for r in results)
    assert (results[3][:, 20] == 0).all()


def test_a_strong_step_beside_weak_ones_costs_no_accuracy():
    inputs = ssd_scan_inputs(length=64, decay=0.01)
    inputs["log_decay"][:, ::16] = -1000.0
    oracle = reference.ssd_scan(**{k: widen(v) for k, v in inputs.items()})
    for actual, expected in zip(ops.ssd_scan(**inputs), oracle):
        assert error_ratio(actual, expected) <= 5e-7


def test_strided_inputs_equal_contiguous():
    inputs = ssd_scan_inputs()
    strided = dict(inputs)
    for name in ("x", "log_decay", "B", "C", "scale"):
        wider = torch.randn(*inputs[name].shape[:-1], 40).transpose(0, 1).contiguous()
        strided[name] = wider.transpose(0, 1)[..., 8 : 8 + inputs[name].shape[-1]]
        strided[name].copy_(inputs[name])
    strided["C"] = inputs["C"].mT.contiguous().mT
    assert_equal(forward_and_backward(strided)[0], forward_and_backward(inputs)[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 40, 3, 16)}, ValueError, "Hx expected to divide H = 4, got 3"),
        ({"x": torch.zeros(2, 40, 16)}, ValueError, r"x expected shape \(batch, length, Hx, P\)"),
        ({"B": torch.zeros(2, 40, 4, 8)}, ValueError, r"C expected shape .* \(2, 40, \*, 8\)"),
        ({"C": torch.zeros(2, 40, 4, 16).half()}, TypeError, "C expected dtype Float, got Half"),
        ({"log_decay": torch.zeros(2, 40, 4).double()}, TypeError, "log_decay expected dtype Float"),
        ({"scale": torch.zeros(2, 40, 1)}, ValueError, r"scale expected shape .* = \(2, 40, 4\)"),
        ({"D": torch.zeros(5)}, ValueError, r"D expected shape \(H\) = \(4\), got \(5\)"),
        ({"initial_state": torch.zeros(1, 4, 16, 16)}, ValueError, "initial_state expected shape"),
        ({"cu_seqlens": torch.tensor([0, 40]).int()}, ValueError, "x expected batch 1 with cu_seql"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    inputs = ssd_scan_inputs() | change
    with pytest.raises(error, match=f"ssd_scan: .*{words}"):
        ops.ssd_scan(**inputs)
    y, state = torch.zeros(2, 40, 4, 16), torch.zeros(2, 4, 16, 16)
    with pytest.raises(error, match=f"ssd_scan_backward: .*{words}"):
        torch.ops.reasoners.ssd_scan_backward(y, state, *inputs.values())


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ([0, 10, 39], "run from 0 to 40, got 0 to 39"),
        ([1, 40], "run from 0 to 40, got 1 to 40"),
        ([0, 30, 20, 40], "non-decreasing, got 30 before 20"),
        ([], "at least 1 entry"),
    ],
)
def test_bad_offsets(offsets, words):
    inputs = ssd_scan_inputs(batch=1, initial_state=False)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"ssd_scan: cu_seqlens expected .*{words}"):
        ops.ssd_scan(**inputs)


@pytest.mark.parametrize("case", [{}, {"lengths": [30, 10], "scale": False, "D": False}])
def test_opcheck(case):
    inputs = ssd_scan_inputs(**case)
    y, final = ops.ssd_scan(**inputs)
    plain = tuple(inputs.values())
    torch.library.opcheck(torch.ops.reasoners.ssd_scan_backward.default, (y, final, *plain))
    leaves = tuple(
        v.requires_grad_() if n in NAMES and v is not None else v for n, v in inputs.items()
    )
    torch.library.opcheck(torch.ops.reasoners.ssd_scan.default, leaves)


def test_only_wanted_gradients():
    inputs = ssd_scan_inputs()
    inputs["B"].requires_grad_()
    y, final = ops.ssd_scan(**inputs)
    (from_y,) = torch.autograd.grad(y.sum(), inputs["B"], retain_graph=True)
    (from_final,) = torch.autograd.grad(final.sum(), inputs["B"], retain_graph=True)
    (both,) = torch.autograd.grad(y.sum() + final.sum(), inputs["B"])
    torch.testing.assert_close(from_y + from_final, both, rtol=1e-4, atol=1e-4)


def mamba_inputs(**case):
    inputs = ssd_scan_inputs(batch=1, length=50, Gb=2, Gc=2, **case)
    g = torch.Generator().manual_seed(3)
    names = ("x", "B", "C", "D", "cu_seqlens")
    return {k: inputs[k] for k in names} | {
        "dt": torch.randn(1, inputs["x"].shape[1], 4, generator=g).to(inputs["x"].dtype),
        "A": -1 - torch.rand(4, generator=g),
        "z": torch.randn(inputs["x"].shape, generator=g).to(inputs["x"].dtype),
        "dt_bias": torch.randn(4, generator=g),
        "initial_states": inputs["initial_state"],
        "dt_softplus": True,
        "chunk_size": 256,
    }


@pytest.mark.parametrize(
    "change", [{}, {"z": None, "D": None}, {"D": torch.randn(4, 16)}, {"dt_limit": (0.1, 0.9)}]
)
def test_mamba_names(change):
    inputs = mamba_inputs() | change
    y, final = ops.mamba_chunk_scan(**inputs, return_final_states=True)
    w = {k: widen(v) for k, v in inputs.items()}
    delta = torch.nn.functional.softplus(w["dt"] + w["dt_bias"])
    delta = delta.clamp(*change.get("dt_limit", (0, float("inf"))))
    expected, state = reference.ssd_scan(
        w["x"], delta * w["A"], w["B"], w["C"], delta, None, w["initial_states"]
    )
    if w["D"] is not None:
        expected = expected + w["D"].reshape(4, -1) * w["x"]
    if w["z"] is not None:
        expected = expected * torch.nn.functional.silu(w["z"])
    assert error_ratio(y, expected) <= 1e-6
    assert error_ratio(final, state) <= 1e-6


def test_mamba_states_of_packed_sequences():
    inputs = mamba_inputs(lengths=[30, 40], dtype=torch.bfloat16)
    y, final, states = ops.mamba_chunk_scan(
        **inputs, return_final_states=True, return_varlen_states=True
    )
    assert y.dtype == torch.bfloat16 and states.shape == (2, 4, 16, 16)
    assert torch.equal(final, states[1:])
    assert torch.equal(ops.mamba_chunk_scan(**inputs), y)


def test_mamba_options_that_cannot_be_honoured():
    with pytest.raises(NotImplementedError, match="mamba_chunk_scan: seq_idx expected None"):
        ops.mamba_chunk_scan(**mamba_inputs(), seq_idx=torch.zeros(1, 50, dtype=torch.int32))
    with pytest.raises(ValueError, match="mamba_chunk_scan: cu_seqlens expected with return_varl"):
        ops.mamba_chunk_scan(**mamba_inputs(), return_varlen_states=True)


def test_compiles_whole_with_dynamic_shapes():
    def loss(*arguments):
        y, final = ops.ssd_scan(*arguments)
        return (y * 2).square().sum() + final.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (40, 50):
        inputs = ssd_scan_inputs(length=length)
        leaves = [inputs[n].requires_grad_() for n in NAMES]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        assert_equal(torch.autograd.grad(compiled(*leaves), leaves), expected)

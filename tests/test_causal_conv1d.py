"""causal_conv1d and conv_update."""

import pytest
import torch
import torch.nn.functional as F
from cases import CAUSAL_CONV1D_CASES, CONV_UPDATE_CASES, CUDA_CASES
from gradients import check_gradients

from reasoners import ops, reference
from reasoners.reference import causal_conv1d_inputs, conv_update_inputs

TENSORS = ("x", "weight", "bias", "initial_state")


@pytest.mark.parametrize("case", CAUSAL_CONV1D_CASES.values(), ids=CAUSAL_CONV1D_CASES.keys())
def test_against_reference(case):
    reference.check(ops.causal_conv1d, "causal_conv1d", **case)
    check_gradients(ops.causal_conv1d, "causal_conv1d", TENSORS, case)


CUDA_TABLE = (
    CAUSAL_CONV1D_CASES
    | CUDA_CASES
    | {
        "packed, width 3, odd channels": {"lengths": [0, 7, 0, 40, 1], "width": 3, "channels": 7},
        "no sequences": {"lengths": []},
        "several runs and tiles": {"length": 300, "channels": 136},
        "packed, ends within runs, bf16": {
            "lengths": [100, 3, 0, 1, 200, 64, 32, 1], "channels": 136, "dtype": torch.bfloat16,
        },
        "packed, no activation, blocks of channels, bf16": {
            "lengths": [130, 62, 0, 1, 2, 261], "channels": 264, "silu": False, "dtype": torch.bfloat16,
        },
        "more sequences than a warp has threads": {"lengths": [3, 0, 1, 5] * 20},
        "so many tokens that the forward's runs are long": {
            "lengths": [30000, 5, 0, 1, 70, 40000], "channels": 8, "dtype": torch.bfloat16,
        },
        "batch, channels in no vectors, bf16": {"length": 70, "channels": 132, "dtype": torch.bfloat16},
    }
)  # fmt: skip


@pytest.mark.cuda("causal_conv1d")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    reference.check(ops.causal_conv1d, "causal_conv1d", "cuda", **case)


@pytest.mark.cuda("causal_conv1d", "causal_conv1d_backward")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_gradients_against_reference_cuda(case):
    check_gradients(ops.causal_conv1d, "causal_conv1d", TENSORS, case, "cuda")


@pytest.mark.cuda("causal_conv1d_backward")
@pytest.mark.parametrize("shift", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_packed_and_strided_equal_separate_bitwise_cuda(dtype, shift):
    """And two runs give the same bits, of the sums over all tokens too."""
    lengths, backward = [7, 2, 0, 40, 100, 1, 33], torch.ops.reasoners.causal_conv1d_backward
    packed = causal_conv1d_inputs(lengths=lengths, dtype=dtype)
    packed = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
    dy, dfinal = torch.randn_like(packed["x"]), torch.randn_like(packed["initial_state"])
    together = backward(dy, dfinal, *packed.values())
    assert all(map(torch.equal, backward(dy, dfinal, *packed.values()), together))
    x, dy = (
        rows.new_zeros(1, rows.shape[1], 40)[..., shift : shift + 24].copy_(rows)
        for rows in (packed["x"], dy)
    )
    begin = 0
    for i, length in enumerate(lengths):
        where = slice(begin, begin + length)
        alone = {**packed, "x": x[:, where], "cu_seqlens": None}
        alone["initial_state"] = packed["initial_state"][i : i + 1]
        dx, _, _, dinitial = backward(dy[:, where], dfinal[i : i + 1], *alone.values())
        assert torch.equal(dx, together[0][:, where])
        assert torch.equal(dinitial[0], together[3][i])
        begin += length


@pytest.mark.cuda("causal_conv1d")
@pytest.mark.parametrize("shift", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_strided_equal_separate_bitwise_cuda(dtype, shift):
    packed = causal_conv1d_inputs(lengths=[7, 2, 40], dtype=dtype)
    packed = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
    y, final = ops.causal_conv1d(**packed)
    wide = packed["x"].new_zeros(1, 49, 40)
    x = wide[..., shift : shift + 24].copy_(packed["x"])
    for i, (start, stop) in enumerate(((0, 7), (7, 9), (9, 49))):
        alone = {**packed, "x": x[:, start:stop], "cu_seqlens": None}
        alone["initial_state"] = packed["initial_state"][i : i + 1]
        y_i, final_i = ops.causal_conv1d(**alone)
        assert torch.equal(y_i, y[:, start:stop])
        assert torch.equal(final_i[0], final[i])


CUDA_UPDATES = CONV_UPDATE_CASES | CUDA_CASES


@pytest.mark.parametrize("case", CONV_UPDATE_CASES.values(), ids=CONV_UPDATE_CASES.keys())
def test_update_against_reference(case):
    before = conv_update_inputs(**case)
    after = reference.check(ops.conv_update, "conv_update", **case)
    named = before["slots"].tolist()
    others = [s for s in range(before["state"].shape[0]) if s not in named]
    assert torch.equal(after["state"][others], before["state"][others])


@pytest.mark.parametrize("case", ["base", "no option, bf16", "packed", "width 2"])
def test_gradcheck(case):
    inputs = causal_conv1d_inputs(
        **{**CAUSAL_CONV1D_CASES[case], "dtype": torch.float64, "channels": 5}
    )
    for name in TENSORS:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    assert torch.autograd.gradcheck(ops.causal_conv1d, tuple(inputs.values()))


def test_equals_conv1d():
    inputs = causal_conv1d_inputs(initial_state=False, silu=False, dtype=torch.float64)
    x, weight = inputs["x"].mT, inputs["weight"][:, None]
    expected = F.conv1d(F.pad(x, (3, 0)), weight, inputs["bias"], groups=24).mT
    torch.testing.assert_close(ops.causal_conv1d(**inputs)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.cuda("conv_update")
@pytest.mark.parametrize("case", CUDA_UPDATES.values(), ids=CUDA_UPDATES.keys())
def test_update_against_reference_cuda(case):
    reference.check(ops.conv_update, "conv_update", "cuda", **case)


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_is_a_fold_of_updates_bit_for_bit(dtype, width):
    """The rows start at different places of their rings."""
    inputs = causal_conv1d_inputs(dtype=dtype, channels=300, width=width, length=10)
    y, final = ops.causal_conv1d(**inputs)
    ring, slots = torch.full((2, width, 300), float("nan"), dtype=dtype), torch.tensor([1, 0]).int()
    lengths, past = torch.tensor([6, 17], dtype=torch.int32), torch.arange(1, width)
    entries = (slots.long()[:, None], (lengths[:, None] + past) % width)
    ring[entries] = inputs["initial_state"]
    for t in range(10):
        lengths += 1
        step = ops.conv_update(
            ring, slots, lengths, inputs["x"][:, t], inputs["weight"], inputs["bias"], True
        )
        assert torch.equal(step, y[:, t])
    assert torch.equal(ring[slots.long()[:, None], (lengths[:, None] + past) % width], final)


def test_update_from_nothing_is_the_convolution():
    inputs = causal_conv1d_inputs(initial_state=False, length=10)
    y, _ = ops.causal_conv1d(**inputs)
    ring, slots = torch.zeros(3, 4, 24), torch.tensor([2, 0], dtype=torch.int32)
    for t in range(10):
        lengths = torch.full((2,), t + 1, dtype=torch.int32)
        step = ops.conv_update(
            ring, slots, lengths, inputs["x"][:, t], inputs["weight"], inputs["bias"], True
        )
        assert torch.equal(step, y[:, t])
    assert (ring[1] == 0).all()


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 10, 19])
def test_split_with_carried_state_equals_whole(cut):
    inputs = causal_conv1d_inputs()
    whole, final = ops.causal_conv1d(**inputs)
    first, state = ops.causal_conv1d(**{**inputs, "x": inputs["x"][:, :cut]})
    second, last = ops.causal_conv1d(
        **{**inputs, "x": inputs["x"][:, cut:], "initial_state": state}
    )
    assert torch.equal(torch.cat((first, second), 1), whole)
    assert torch.equal(last, final)


def test_packed_equals_separate_and_nan_stays_home():
    inputs = causal_conv1d_inputs(lengths=[7, 2, 12])
    y, final = ops.causal_conv1d(**inputs)
    for i, (start, stop) in enumerate(((0, 7), (7, 9), (9, 21))):
        alone = {**inputs, "x": inputs["x"][:, start:stop], "cu_seqlens": None}
        alone["initial_state"] = inputs["initial_state"][i : i + 1]
        y_i, final_i = ops.causal_conv1d(**alone)
        assert torch.equal(y_i, y[:, start:stop])
        assert torch.equal(final_i[0], final[i])
    inputs["x"][:, 7:9] = float("nan")
    poisoned = ops.causal_conv1d(**inputs)[0]
    assert torch.equal(poisoned[:, :7], y[:, :7])
    assert torch.equal(poisoned[:, 9:], y[:, 9:])


def test_same_bits_on_one_thread_and_again():
    inputs = causal_conv1d_inputs(batch=3, length=70, channels=900)
    inputs = {k: v.requires_grad_() if k in TENSORS else v for k, v in inputs.items()}

    def run():
        outputs = ops.causal_conv1d(**inputs)
        return *outputs, *torch.autograd.grad(
            sum(o.sum() for o in outputs), [inputs[n] for n in TENSORS]
        )

    expected, threads = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, run(), expected))


def test_large_inputs_saturate():
    inputs = causal_conv1d_inputs()
    inputs["x"] *= 1e4
    reference_y = reference.causal_conv1d(**{k: reference.widen(v) for k, v in inputs.items()})[0]
    torch.testing.assert_close(
        ops.causal_conv1d(**inputs)[0].double(), reference_y, rtol=1e-5, atol=1e-3
    )


def test_strided_input_equals_contiguous():
    inputs = causal_conv1d_inputs()
    wide = torch.randn(2, 19, 60)
    wide[..., 11:35] = inputs["x"]
    strided = {**inputs, "x": wide[..., 11:35]}
    assert all(map(torch.equal, ops.causal_conv1d(**strided), ops.causal_conv1d(**inputs)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.zeros(23, 4)}, ValueError, r"weight expected shape .* \(24, \*\), got \(23, 4\)"),
        ({"weight": torch.zeros(24, 5)}, ValueError, "width expected 2 to 4, got 5"),
        ({"bias": torch.zeros(24).half()}, TypeError, "bias expected dtype Float, got Half"),
        ({"initial_state": torch.zeros(2, 2, 24)}, ValueError, "initial_state expected shape"),
        ({"cu_seqlens": torch.tensor([0, 19], dtype=torch.int32)}, ValueError, "batch 1 with cu_seqlens"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    with pytest.raises(error, match=f"causal_conv1d: .*{words}"):
        ops.causal_conv1d(**causal_conv1d_inputs() | change)


@pytest.mark.parametrize("offsets", [[0, 5, 3, 21], [1, 7, 21], [0, 7, 20]])
def test_bad_offsets(offsets):
    inputs = causal_conv1d_inputs(lengths=[7, 2, 12], initial_state=False)
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens expected"):
        ops.causal_conv1d(**inputs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"slots": torch.tensor([0, 1, 1], dtype=torch.int32)}, "slots expected distinct, got 1 twice"),
        ({"lengths": torch.tensor([3, 0, 1], dtype=torch.int32)}, r"lengths\[1\] expected at least 1, got 0"),
        ({"lengths": torch.ones(2, dtype=torch.int32)}, r"lengths expected shape \(batch\) = \(3\)"),
        ({"state": torch.zeros(5, 3, 24)}, r"state expected shape .* = \(\*, 4, 24\), got \(5, 3, 24\)"),
    ],
)  # fmt: skip
def test_update_errors_change_nothing(change, words):
    inputs = conv_update_inputs() | change
    before = inputs["state"].clone()
    with pytest.raises(ValueError, match=f"conv_update: {words}"):
        ops.conv_update(**inputs)
    assert torch.equal(inputs["state"], before)


def test_opcheck():
    inputs = {
        k: v.requires_grad_() if k in TENSORS else v for k, v in causal_conv1d_inputs().items()
    }
    torch.library.opcheck(torch.ops.reasoners.causal_conv1d.default, tuple(inputs.values()))
    dy, dfinal = torch.randn(2, 19, 24), torch.randn(2, 3, 24)
    plain = [v.detach() if isinstance(v, torch.Tensor) else v for v in inputs.values()]
    torch.library.opcheck(torch.ops.reasoners.causal_conv1d_backward.default, (dy, dfinal, *plain))
    torch.library.opcheck(
        torch.ops.reasoners.conv_update.default, tuple(conv_update_inputs().values())
    )


def test_compiles_whole_with_dynamic_shapes():
    def loss(x, weight, bias):
        return ops.causal_conv1d(x, weight, bias, silu=True)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 14):
        inputs = causal_conv1d_inputs(length=length)
        leaves = [inputs[n].requires_grad_() for n in ("x", "weight", "bias")]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
            torch.testing.assert_close(got, want)

"""selective_scan and selective_update."""

import pytest
import torch
from cases import CUDA_N_CASES, SELECTIVE_SCAN_CASES, SELECTIVE_UPDATE_CASES
from gradients import check_gradients

from reasoners import ops, reference
from reasoners.reference import selective_scan_inputs, selective_update_inputs

TENSORS = ("x", "delta", "A", "B", "C", "D", "initial_state")


@pytest.mark.parametrize("case", SELECTIVE_SCAN_CASES.values(), ids=SELECTIVE_SCAN_CASES.keys())
def test_against_reference(case):
    reference.check(ops.selective_scan, "selective_scan", **case)
    check_gradients(ops.selective_scan, "selective_scan", TENSORS, case)


CUDA_TABLE = (
    SELECTIVE_SCAN_CASES
    | CUDA_N_CASES
    | {
        "N 32": {"N": 32},
        "several spans": {"length": 200, "batch": 1},
        "several spans, packed, bf16": {
            "lengths": [100, 3, 0, 64, 65, 1], "dtype": torch.bfloat16,
        },
        "several tiles of a group": {"channels": 200, "Gb": 1, "Gc": 1, "length": 20},
        "a tile and a rest of a group": {"channels": 20, "Gb": 1, "Gc": 1, "length": 70},
        "groups of tiles out of step, bf16": {
            "channels": 192, "Gb": 2, "Gc": 6, "length": 130, "dtype": torch.bfloat16,
        },
    }
)  # fmt: skip


@pytest.mark.cuda("selective_scan")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    reference.check(ops.selective_scan, "selective_scan", "cuda", **case)


@pytest.mark.cuda("selective_scan", "selective_scan_backward")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_gradients_against_reference_cuda(case):
    check_gradients(ops.selective_scan, "selective_scan", TENSORS, case, "cuda")


@pytest.mark.cuda("selective_scan_backward")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_packed_and_strided_equal_separate_bitwise_cuda(dtype):
    """And two runs give the same bits, of the sums over all tokens too."""
    lengths, backward = [33, 2, 130], torch.ops.reasoners.selective_scan_backward
    packed = {k: v.cuda() for k, v in selective_scan_inputs(lengths=lengths, dtype=dtype).items()}
    dy, dfinal = torch.randn_like(packed["x"]), torch.randn_like(packed["initial_state"])
    together = backward(dy, dfinal, *packed.values())
    assert all(map(torch.equal, backward(dy, dfinal, *packed.values()), together))
    begin = 0
    for i, length in enumerate(lengths):
        where = slice(begin, begin + length)
        part = {"initial_state": packed["initial_state"][i : i + 1], "cu_seqlens": None}
        for name in ("x", "delta", "B", "C"):
            rows = packed[name][:, where]
            wide = rows.new_zeros(1, length, rows[0, 0].numel() + 3)
            part[name] = wide[..., 3:].view(rows.shape).copy_(rows)
        alone = backward(dy[:, where], dfinal[i : i + 1], *(packed | part).values())
        for gradient in (0, 1, 3, 4):
            assert torch.equal(alone[gradient], together[gradient][:, where])
        assert torch.equal(alone[6][0], together[6][i])
        begin += length


@pytest.mark.cuda("selective_scan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_strided_equal_separate_bitwise_cuda(dtype):
    packed = selective_scan_inputs(lengths=[33, 2, 40], dtype=dtype)
    packed = {k: v.cuda() for k, v in packed.items()}
    y, final = ops.selective_scan(**packed)
    for i, (start, stop) in enumerate(((0, 33), (33, 35), (35, 75))):
        part = {"initial_state": packed["initial_state"][i : i + 1], "cu_seqlens": None}
        for name in ("x", "delta", "B", "C"):
            rows = packed[name][:, start:stop]
            wide = rows.new_zeros(1, stop - start, rows[0, 0].numel() + 3)
            part[name] = wide[..., 3:].view(rows.shape).copy_(rows)
        y_i, final_i = ops.selective_scan(**packed | part)
        assert torch.equal(y_i, y[:, start:stop])
        assert torch.equal(final_i[0], final[i])


@pytest.mark.cuda("selective_scan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_sequences_equal_many_bitwise_cuda(dtype):
    """The number of tiles decides how states are dealt out to threads: each of the three ways here."""
    inputs = selective_scan_inputs(7, 75, channels=2048, Gb=32, Gc=128, dtype=dtype)
    inputs = {k: v if v is None else v.cuda() for k, v in inputs.items()}
    y, final = ops.selective_scan(**inputs)
    for rows in (slice(2, 6), slice(6, 7)):
        part = {k: inputs[k][rows] for k in ("x", "delta", "B", "C", "initial_state")}
        y_part, final_part = ops.selective_scan(**inputs | part)
        assert torch.equal(y_part, y[rows])
        assert torch.equal(final_part, final[rows])


@pytest.mark.parametrize("case", SELECTIVE_UPDATE_CASES.values(), ids=SELECTIVE_UPDATE_CASES.keys())
def test_update_against_reference(case):
    before = selective_update_inputs(**case)
    after = reference.check(ops.selective_update, "selective_update", **case)
    named = before["slots"].tolist()
    others = [s for s in range(before["state"].shape[0]) if s not in named]
    assert torch.equal(after["state"][others], before["state"][others])


CUDA_UPDATE_TABLE = SELECTIVE_UPDATE_CASES | {
    "fp16": {"dtype": torch.float16},
    "N 8": {"N": 8},
    "N 64": {"N": 64},
    "300 rows": {"batch": 300, "channels": 512, "Gc": 32, "dtype": torch.bfloat16},
    "300 rows, bf16 state": {
        "batch": 300, "channels": 512, "Gb": 2, "Gc": 8, "dtype": torch.bfloat16,
        "state_dtype": torch.bfloat16,
    },
    "300 rows, fp32": {"batch": 300, "channels": 528, "Gb": 11, "Gc": 33},
    "100 rows, groups of no whole chunks": {"batch": 100, "channels": 520, "Gb": 13, "Gc": 65},
    "a few of them padding": {
        "batch": 300, "channels": 512, "Gc": 1, "dtype": torch.bfloat16,
        "slots": [-1 if i % 7 == 3 else i for i in range(300)],
    },
}  # fmt: skip


@pytest.mark.cuda("selective_update")
@pytest.mark.parametrize("case", CUDA_UPDATE_TABLE.values(), ids=CUDA_UPDATE_TABLE.keys())
def test_update_against_reference_cuda(case):
    before = selective_update_inputs(**case)
    after = reference.check(ops.selective_update, "selective_update", "cuda", **case)
    named = before["slots"].tolist()
    others = [s for s in range(before["state"].shape[0]) if s not in named]
    assert torch.equal(after["state"].cpu()[others], before["state"][others])


@pytest.mark.cuda("selective_update")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_update_of_many_rows_equals_that_of_few_bitwise_cuda(state_dtype):
    many = {"batch": 700, "channels": 2048, "dtype": torch.bfloat16, "state_dtype": state_dtype}
    inputs = {k: v.cuda() for k, v in selective_update_inputs(Gb=32, Gc=128, **many).items()}
    state = inputs["state"].clone()
    y = ops.selective_update(**inputs)
    for rows in torch.arange(700, device="cuda").split(8):
        few = {k: inputs[k][rows] for k in ("slots", "x", "delta", "B", "C")}
        few = {"A": inputs["A"], "D": inputs["D"], "state": state} | few
        assert torch.equal(ops.selective_update(**few), y[rows])
    assert torch.equal(state, inputs["state"])


@pytest.mark.parametrize("case", ["base", "no option, bf16", "packed", "groups out of step"])
def test_gradcheck(case):
    small = {"dtype": torch.float64, "channels": 6, "N": 3, "length": 5}
    inputs = selective_scan_inputs(**{**SELECTIVE_SCAN_CASES[case], **small})
    if case == "packed":
        inputs = selective_scan_inputs(lengths=[3, 0, 4], **small)
    for name in TENSORS:
        if inputs[name] is not None:
            inputs[name].requires_grad_()
    assert torch.autograd.gradcheck(ops.selective_scan, tuple(inputs.values()))


def test_scan_is_a_fold_of_updates():
    inputs = selective_scan_inputs()
    y, final = ops.selective_scan(**inputs)
    state, slots = inputs["initial_state"].clone(), torch.arange(2, dtype=torch.int32)
    for t in range(21):
        x, delta, B, C = (inputs[n][:, t] for n in ("x", "delta", "B", "C"))
        step = ops.selective_update(state, slots, x, delta, inputs["A"], B, C, inputs["D"])
        torch.testing.assert_close(step, y[:, t], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [0, 1, 10, 21])
def test_split_with_carried_state_equals_whole(cut):
    inputs = selective_scan_inputs()
    whole, final = ops.selective_scan(**inputs)
    along = ("x", "delta", "B", "C")
    first, state = ops.selective_scan(**inputs | {n: inputs[n][:, :cut] for n in along})
    rest = {n: inputs[n][:, cut:] for n in along} | {"initial_state": state}
    second, last = ops.selective_scan(**inputs | rest)
    assert torch.equal(torch.cat((first, second), 1), whole)
    assert torch.equal(last, final)


def test_packed_equals_separate_and_nan_stays_home():
    inputs = selective_scan_inputs(lengths=[33, 2, 40])
    y, final = ops.selective_scan(**inputs)
    for i, (start, stop) in enumerate(((0, 33), (33, 35), (35, 75))):
        part = {n: inputs[n][:, start:stop] for n in ("x", "delta", "B", "C")}
        part |= {"initial_state": inputs["initial_state"][i : i + 1], "cu_seqlens": None}
        y_i, final_i = ops.selective_scan(**inputs | part)
        assert torch.equal(y_i, y[:, start:stop])
        assert torch.equal(final_i[0], final[i])
    inputs["x"][:, 33:35] = float("nan")
    poisoned = ops.selective_scan(**inputs)[0]
    assert torch.equal(poisoned[:, :33], y[:, :33])
    assert torch.equal(poisoned[:, 35:], y[:, 35:])


def test_same_bits_on_one_thread_and_again():
    inputs = selective_scan_inputs(batch=3, length=50, channels=192)
    inputs = {k: v.requires_grad_() if k in TENSORS else v for k, v in inputs.items()}

    def run():
        outputs = ops.selective_scan(**inputs)
        leaves = [inputs[n] for n in TENSORS]
        return *outputs, *torch.autograd.grad(sum(o.sum() for o in outputs), leaves)

    expected, threads = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, run(), expected))


def test_strided_inputs_equal_contiguous():
    inputs = selective_scan_inputs()
    wide = torch.randn(2, 21, 100)
    wide[..., 9:57] = inputs["x"]
    strided = inputs | {"x": wide[..., 9:57]}
    assert all(map(torch.equal, ops.selective_scan(**strided), ops.selective_scan(**inputs)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"A": torch.zeros(47, 16)}, ValueError, r"A expected shape .* \(48, \*\), got \(47, 16\)"),
        ({"delta": torch.zeros(2, 21, 48).bfloat16()}, TypeError, "delta expected dtype Float"),
        (
            {"B": torch.zeros(2, 21, 5, 16)},
            ValueError,
            "Gb expected to divide channels = 48, got 5",
        ),
        ({"initial_state": torch.zeros(1, 48, 16)}, ValueError, "initial_state expected shape"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=f"selective_scan: .*{words}"):
        ops.selective_scan(**selective_scan_inputs() | change)


def test_update_refuses_a_slot_out_of_range_and_changes_nothing():
    inputs = selective_update_inputs(slots=[0, 1, 9])
    before = inputs["state"].clone()
    with pytest.raises(ValueError, match="selective_update: slots expected below 5, got 9"):
        ops.selective_update(**inputs)
    assert torch.equal(inputs["state"], before)


def test_opcheck():
    inputs = selective_scan_inputs()
    leaves = {k: v.requires_grad_() if k in TENSORS else v for k, v in inputs.items()}
    torch.library.opcheck(torch.ops.reasoners.selective_scan.default, tuple(leaves.values()))
    dy, dfinal = torch.randn(2, 21, 48), torch.randn(2, 48, 16)
    plain = [v if v is None else v.detach() for v in inputs.values()]
    torch.library.opcheck(torch.ops.reasoners.selective_scan_backward.default, (dy, dfinal, *plain))
    update = tuple(selective_update_inputs().values())
    torch.library.opcheck(torch.ops.reasoners.selective_update.default, update)


def test_compiles_whole_with_dynamic_shapes():
    def loss(x, delta, A, B, C):
        return ops.selective_scan(x, delta, A, B, C)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 14):
        inputs = selective_scan_inputs(length=length)
        leaves = [inputs[n].requires_grad_() for n in ("x", "delta", "A", "B", "C")]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for got, want in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
            torch.testing.assert_close(got, want)

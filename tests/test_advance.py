import pytest
import torch
from cases import ADVANCE_CASES

from reasoners import ops, reference
from reasoners.reference import advance_inputs

ROWS = ("last", "slots", "lengths", "remaining", "rng_key")
MUTATED = (*ROWS, "drawn", "logprobs", "step")


@pytest.mark.parametrize("case", ADVANCE_CASES.values(), ids=ADVANCE_CASES.keys())
def test_against_reference(case):
    reference.check(ops.advance, "advance", **case)


@pytest.mark.cuda("advance")
@pytest.mark.parametrize("case", ADVANCE_CASES.values(), ids=ADVANCE_CASES.keys())
def test_against_reference_cuda(case):
    reference.check(ops.advance, "advance", "cuda", **case)


def check_every_way_to_end(device):
    """Rows: goes on, draws its second stop id, draws another row's, is cut, has failed, has ended."""

    def ints(*values, dtype=torch.int32):
        return torch.tensor(values, dtype=dtype, device=device)

    token = ints(7, 8, 9, 7, -1, 7, dtype=torch.int64)
    stop_ids = ints([3, -1], [3, 8], [8, -1], [-1, -1], [3, -1], [7, -1], dtype=torch.int64)
    last, slots = ints(*range(6), dtype=torch.int64), ints(4, 3, 2, 1, 0, -1)
    lengths = ints(11, 12, 13, 14, 15, 0)
    remaining, step = ints(5, 5, 2, 1, 5, 5), ints(1)
    rng_key = torch.zeros(6, 4, dtype=torch.int64, device=device)
    drawn = torch.full((3, 6), -5, dtype=torch.int64, device=device)
    logprobs = torch.zeros(3, 6, device=device)
    logprob = torch.arange(6.0, device=device) - 6
    moved = (last, slots, lengths, remaining, rng_key, drawn, logprobs, step)
    ops.advance(token, logprob, stop_ids, *moved)
    assert slots.tolist() == [4, -1, 2, -1, -1, -1]
    assert lengths.tolist() == [12, 0, 14, 0, 0, 0]
    assert remaining.tolist() == [4, 4, 1, 0, 4, 5]
    assert last.tolist() == [7, 8, 9, 7, -1, 5]
    assert rng_key[:, 3].tolist() == [1, 0, 1, 0, 0, 0]
    assert rng_key[:, :3].eq(0).all()
    assert drawn.tolist() == [[-5] * 6, [7, 8, 9, 7, -1, -2], [-5] * 6]
    assert logprobs[1].tolist() == [-6, -5, -4, -3, -2, 0]
    assert logprobs[[0, 2]].eq(0).all()
    assert step.tolist() == [2]


def test_every_way_to_end():
    check_every_way_to_end("cpu")


@pytest.mark.cuda("advance")
def test_every_way_to_end_cuda():
    check_every_way_to_end("cuda")


def test_first_rows_of_larger_buffers():
    inputs = advance_inputs()
    buffers = {name: torch.cat((inputs[name], inputs[name])) for name in ROWS}
    views = inputs | {name: value[:12] for name, value in buffers.items()}
    views |= {name: inputs[name].clone() for name in ("drawn", "logprobs", "step")}
    behind = {name: value[12:].clone() for name, value in buffers.items()}
    ops.advance(**inputs)
    ops.advance(**views)
    for name in MUTATED:
        assert torch.equal(views[name], inputs[name]), name
    for name in ROWS:
        assert torch.equal(buffers[name][12:], behind[name]), name


NARROW = {"drawn": torch.zeros(5, 11).long(), "logprobs": torch.zeros(5, 11)}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"step": torch.tensor([5], dtype=torch.int32)}, ValueError, "step expected 0 to 4, got 5"),
        ({"step": torch.tensor([-1], dtype=torch.int32)}, ValueError, "step expected 0 to 4, got -1"),
        (NARROW, ValueError, "drawn expected at least 12 columns, got 11"),
        ({"logprobs": torch.zeros(5, 13)}, ValueError, r"logprobs expected shape .* \(5, 14\)"),
        ({"slots": torch.zeros(12).long()}, TypeError, "slots expected dtype Int, got Long"),
        ({"slots": torch.zeros(24).int()[::2]}, ValueError, "slots expected contiguous"),
        ({"rng_key": torch.zeros(12, 3).long()}, ValueError, "rng_key expected shape"),
        ({"stop_ids": torch.zeros(11, 3).long()}, ValueError, "stop_ids expected shape"),
        ({"logprob": torch.zeros(12).double()}, TypeError, "logprob expected dtype Float"),
    ],
)  # fmt: skip
def test_errors_change_nothing(change, error, words):
    inputs = advance_inputs() | change
    before = [inputs[name].clone() for name in MUTATED]
    with pytest.raises(error, match=f"advance: {words}"):
        ops.advance(**inputs)
    assert all(torch.equal(inputs[n], value) for n, value in zip(MUTATED, before, strict=True))


def test_opcheck():
    torch.library.opcheck(torch.ops.reasoners.advance.default, tuple(advance_inputs().values()))


def test_compiles_whole_with_dynamic_shapes():
    def step(inputs):
        ops.advance(**inputs)
        return inputs["lengths"] * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        inputs = advance_inputs(rows=rows)
        other = inputs | {name: inputs[name].clone() for name in MUTATED}
        assert torch.equal(compiled(inputs), step(other))
        assert all(torch.equal(inputs[name], other[name]) for name in MUTATED)

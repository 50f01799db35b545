import pytest
import torch
from cases import STATE_UPDATE_CASES

from reasoners import ops, reference
from reasoners.reference import assert_close, state_update_inputs, widen


def check(case, device="cpu"):
    inputs = state_update_inputs(**case)
    oracle = reference.state_update(**{k: widen(v) for k, v in inputs.items()})
    plain = reference.state_update(**inputs)
    moved = {k: v if v is None else v.to(device) for k, v in inputs.items()}
    before = inputs["state"]
    y = ops.state_update(**moved)
    assert y.dtype == inputs["x"].dtype
    assert_close(y, oracle[0], plain[0], "y")
    assert_close(moved["state"], oracle[1], plain[1], "state")
    slots = inputs["slots"]
    untouched = [s for s in range(before.shape[0]) if s not in slots.tolist()]
    assert torch.equal(moved["state"].cpu()[untouched], before[untouched])
    assert (y.cpu()[slots < 0] == 0).all()


@pytest.mark.parametrize("case", STATE_UPDATE_CASES.values(), ids=STATE_UPDATE_CASES.keys())
def test_against_reference(case):
    check(case)


@pytest.mark.cuda("state_update")
@pytest.mark.parametrize("case", STATE_UPDATE_CASES.values(), ids=STATE_UPDATE_CASES.keys())
def test_against_reference_cuda(case):
    check(case, "cuda")


def test_float64_is_exact_to_rounding():
    inputs = state_update_inputs(dtype=torch.float64, state_dtype=torch.float64)
    y, state = reference.state_update(**inputs)
    torch.testing.assert_close(ops.state_update(**inputs), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(inputs["state"], state, rtol=1e-13, atol=1e-13)


def test_batch_mates_change_nothing():
    inputs = state_update_inputs(batch=6, dtype=torch.bfloat16)
    alone = {k: v[2:3] if k not in ("state", "D") else v for k, v in inputs.items()}
    alone["state"] = inputs["state"].clone()
    y = ops.state_update(**inputs)
    assert torch.equal(ops.state_update(**alone), y[2:3])
    slot = int(inputs["slots"][2])
    assert torch.equal(alone["state"][slot], inputs["state"][slot])


def test_strided_inputs_equal_contiguous():
    inputs = state_update_inputs()
    padded = torch.randn(3, 4, 40)
    padded[..., 8:24] = inputs["x"]
    strided = {**inputs, "x": padded[..., 8:24], "state": inputs["state"].clone()}
    assert torch.equal(ops.state_update(**strided), ops.state_update(**inputs))


def test_nan_in_other_slots_does_not_leak():
    inputs = state_update_inputs(slots=[4, 0, 2])
    inputs["state"][[1, 3]] = float("nan")
    assert ops.state_update(**inputs).isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(3, 3, 16)}, ValueError, "Hx expected to divide H = 4, got 3"),
        ({"B": torch.zeros(3, 4, 8)}, ValueError, r"C expected shape .* \(3, \*, 8\), got \(3, 4, 16\)"),
        ({"C": torch.zeros(3, 4, 16).half()}, TypeError, "C expected dtype Float, got Half"),
        ({"log_decay": torch.zeros(3, 4).bfloat16()}, TypeError, "log_decay expected dtype Float"),
        ({"slots": torch.tensor([0, 1, 9], dtype=torch.int32)}, ValueError, "slots expected below 5"),
        ({"slots": torch.tensor([0, 1, 1], dtype=torch.int32)}, ValueError, "got 1 twice"),
        ({"state": torch.zeros(5, 4, 16, 32)[..., ::2]}, ValueError, "state expected contiguous"),
        ({"D": torch.zeros(5)}, ValueError, r"D expected shape \(H\) = \(4\), got \(5\)"),
    ],
)  # fmt: skip
def test_errors(change, error, words):
    inputs = state_update_inputs() | change
    before = inputs["state"].clone()
    with pytest.raises(error, match=f"state_update: .*{words}"):
        ops.state_update(**inputs)
    assert torch.equal(inputs["state"], before)


def test_opcheck():
    inputs = state_update_inputs()
    torch.library.opcheck(torch.ops.reasoners.state_update.default, tuple(inputs.values()))


def test_compiles_whole_with_dynamic_shapes():
    def step(state, *rest):
        return ops.state_update(state, *rest) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        inputs = state_update_inputs(batch=batch)
        other = {**inputs, "state": inputs["state"].clone()}
        assert torch.equal(compiled(*inputs.values()), step(*other.values()))
        assert torch.equal(inputs["state"], other["state"])

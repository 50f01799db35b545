import pytest
import torch
from cases import CUDA_STATE_CASES, STATE_UPDATE_CASES

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


CUDA_TABLE = STATE_UPDATE_CASES | CUDA_STATE_CASES


@pytest.mark.cuda("state_update")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    check(case, "cuda")


def test_float64_is_exact_to_rounding():
    inputs = state_update_inputs(dtype=torch.float64, state_dtype=torch.float64)
    y, state = reference.state_update(**inputs)
    torch.testing.assert_close(ops.state_update(**inputs), y, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(inputs["state"], state, rtol=1e-13, atol=1e-13)


def test_batch_mates_change_nothing():
    inputs = state_update_inputs(
        batch=6, dtype=torch.bfloat16, state_dtype=torch.bfloat16, noise=True
    )
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


def states_of(values, keys, device="cpu"):
    """The bf16 states (keys, H, P) that hold `values` (H, P) after one token, one for each key."""
    H, P = values.shape
    count = len(keys)
    state = torch.zeros(count, H, P, 1, dtype=torch.bfloat16, device=device)
    slots = torch.arange(count, dtype=torch.int32, device=device)
    one = torch.ones(count, 1, 1, device=device)
    x, log_decay = values.expand(count, H, P).to(device), torch.zeros(count, H, device=device)
    y = ops.state_update(state, slots, x, log_decay, one, one, rng_key=keys.to(device))
    finite = values.isfinite()
    assert torch.equal(y[:, finite], x[:, finite])  # y is of the unrounded state
    return state[..., 0].cpu()


def noise_keys(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count, 4), generator=g)


def check_noise(device):
    g = torch.Generator().manual_seed(3)
    values = torch.randn(5, 7, generator=g) * 10.0 ** torch.randint(-20, 20, (5, 7), generator=g)
    values[0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0])
    keys = noise_keys(4000)
    states = states_of(values, keys, device)
    for i in range(0, len(keys), 500):
        expected = reference.rounded(values, torch.bfloat16, keys[i])
        torch.testing.assert_close(states[i], expected, rtol=0, atol=0, equal_nan=True)
    finite = values.isfinite() & (values != 0)
    exact, drawn = values[finite].double(), states[:, finite].double()
    below = (values[finite].view(torch.int32) & -65536).view(torch.float32).double()
    ulp = 2.0 ** (torch.frexp(exact.abs())[1] - 8)
    assert ((drawn - exact).abs() < ulp).all()
    part = (exact - below).abs() / ulp
    sigma = ulp * (part * (1 - part) / len(keys)).sqrt()
    assert ((drawn.mean(0) - exact).abs() <= 4 * sigma + 1e-12 * exact.abs()).all()


def test_noise_is_unbiased_and_that_of_the_key():
    check_noise("cpu")


@pytest.mark.cuda("state_update")
def test_noise_is_unbiased_and_that_of_the_key_cuda():
    check_noise("cuda")


def test_noise_depends_on_the_whole_key_and_nothing_else():
    values = torch.randn(4, 8)
    keys = noise_keys(1).repeat(6, 1)
    for i in range(4):
        keys[i + 1, i] += 1
    states = states_of(values, keys)
    assert torch.equal(states[0], states[5])
    for i in range(4):
        assert not torch.equal(states[0], states[i + 1])


def test_noise_lets_small_increments_through():
    """A bf16 state of 256 never moves by 0.25 when rounded to nearest."""
    state = torch.full((1, 1, 64, 64), 256.0, dtype=torch.bfloat16)
    nearest, slots = state.clone(), torch.zeros(1, dtype=torch.int32)
    x, one = torch.full((1, 1, 64), 0.25), torch.ones(1, 1, 64)
    for position in range(64):
        key = torch.tensor([[1, 2, 3, position]])
        ops.state_update(state, slots, x, torch.zeros(1, 1), one, one, rng_key=key)
        ops.state_update(nearest, slots, x, torch.zeros(1, 1), one, one)
    assert (nearest == 256).all()
    assert abs(state.float().mean() - 272) < 0.2


BF16 = torch.zeros(5, 4, 16, 16, dtype=torch.bfloat16)


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
        ({"rng_key": noise_keys(3)}, ValueError, "rng_key expected None for a float32 state, got a tensor"),
        ({"rng_key": noise_keys(2), "state": BF16}, ValueError, r"rng_key expected shape .* \(3, 4\)"),
        ({"state": BF16.double()}, TypeError, "state and x expected both or neither float64"),
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
    for case in ("base", "noise"):
        inputs = state_update_inputs(**STATE_UPDATE_CASES[case])
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

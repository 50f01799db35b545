"""discrete_mamba2_update, mamba2_update and mamba1_update."""

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CUDA_MAMBA1_CASES,
    CUDA_STATE_CASES,
    DISCRETE_MAMBA2_UPDATE_CASES,
    MAMBA1_UPDATE_CASES,
    MAMBA2_UPDATE_CASES,
)

from reasoners import ops, reference
from reasoners.reference import same

MIXERS = ("discrete_mamba2_update", "mamba2_update", "mamba1_update")
OPERATORS = {
    "discrete_mamba2_update": ops.discrete_mamba2_update,
    "mamba2_update": ops.mamba2_update,
    "mamba1_update": ops.mamba1_update,
}
CPU_CASES = {
    "discrete_mamba2_update": DISCRETE_MAMBA2_UPDATE_CASES,
    "mamba2_update": MAMBA2_UPDATE_CASES,
    "mamba1_update": MAMBA1_UPDATE_CASES,
}
CUDA_ONLY = {
    "discrete_mamba2_update": CUDA_STATE_CASES,
    "mamba2_update": CUDA_STATE_CASES,
    "mamba1_update": CUDA_MAMBA1_CASES,
}
TABLE = [(n, c) for n in MIXERS for c in CPU_CASES[n]]
CUDA_TABLE = [
    pytest.param(n, case, marks=pytest.mark.cuda(n), id=f"{n}-{c}")
    for n in MIXERS
    for c, case in (CPU_CASES[n] | CUDA_ONLY[n]).items()
]


def inputs_of(name, **case):
    return reference.OPERATORS[name][1](**case)


def mutated_of(name, inputs):
    return [m for m in reference.OPERATORS[name][2] if inputs[m] is not None]


def check(name, case, device="cpu"):
    before = inputs_of(name, **case)
    after = reference.check(OPERATORS[name], name, device, **case)
    named = before["slots"].tolist()
    others = [s for s in range(before["state"].shape[0]) if s not in named]
    for argument in mutated_of(name, before):
        assert same(after[argument].cpu()[others], before[argument][others]), argument


@pytest.mark.parametrize(("name", "case"), TABLE)
def test_against_reference(name, case):
    check(name, CPU_CASES[name][case])


@pytest.mark.parametrize(("name", "case"), CUDA_TABLE)
def test_against_reference_cuda(name, case):
    check(name, case, "cuda")


# ---- the compositions that they stand for


def recurrence(i, x, log_decay, B, C, scale, D):
    token = (i["slots"], x, log_decay, B, C, scale, D)
    if i["recent"] is None:
        return ops.state_update(i["state"], *token, i["rng_key"])
    held = (i["state"], i["recent"], i["recent_decay"], i["pending"])
    return ops.deferred_state_update(*held, *token, i["period"], i["rng_key"])


def convolved(i, x, silu):
    where = (i["conv_state"], i["slots"], i["lengths"])
    return ops.conv_update(*where, x, i["conv_weight"], i["conv_bias"], silu)


def discrete_mamba2(i):
    H, P, N = i["state"].shape[1:]
    channels = i["conv_state"].shape[2]
    group = (channels - H * P) // 2
    xBC, z, a = i["projected"].split((channels, H * P, H), -1)
    x, B, C = convolved(i, xBC, False).split((H * P, group, group), -1)
    x, B, C = x.unflatten(-1, (H, P)), B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N))
    y = recurrence(i, x, -ops.softplus(a), B, C, None, i["D"].float())
    return ops.gate(y.flatten(1), z, i["z_bias"])


def mamba2(i):
    H, P, N = i["state"].shape[1:]
    channels = i["conv_state"].shape[2]
    K = (channels - H * N) // (P + N)
    z, xBC, dt = i["projected"].split((H * P, channels, H), -1)
    x, B, C = convolved(i, xBC, True).split((K * P, K * N, H * N), -1)
    x, B, C = x.unflatten(-1, (K, P)), B.unflatten(-1, (K, N)), C.unflatten(-1, (H, N))
    delta = ops.softplus(dt, i["dt_bias"].float())
    y = recurrence(i, x, -delta * i["A_log"].float().exp(), B, C, delta, i["D"].float())
    g = ops.gate(y, z.unflatten(-1, (H, P)))
    normal = F.rms_norm(g.float(), (P,), eps=i["eps"]).to(g.dtype)
    return normal.flatten(1) * i["norm_weight"]


def mamba1(i):
    inner, N = i["A_log"].shape
    kv = i["kv_dim"]
    z, x, B, C, _ = i["projected"].split((inner, kv, kv, inner, 6), -1)
    x = x.unflatten(-1, (-1, N)).repeat_interleave(inner // kv, -2).flatten(-2)
    x = convolved(i, x, True)
    delta = ops.softplus(i["dt"], i["dt_bias"].float())
    B, C = B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N))
    A, D = -i["A_log"].float().exp(), i["D"].float()
    return ops.gate(ops.selective_update(i["state"], i["slots"], x, delta, A, B, C, D), z)


COMPOSITIONS = dict(zip(MIXERS, (discrete_mamba2, mamba2, mamba1)))
NOTHING_KEPT = {"recent": False, "period": 1}
NOTHING = dict.fromkeys(("recent", "recent_decay", "pending"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("discrete_mamba2_update", {"pending": [2, 3, 2, 3, 2]}),
        ("discrete_mamba2_update", NOTHING_KEPT),
        ("mamba2_update", {"pending": [2, 3, 2, 3, 2]}),
        ("mamba2_update", NOTHING_KEPT),
        ("mamba1_update", {}),
    ],
)
def test_equals_the_composition(name, case, dtype):
    inputs = inputs_of(name, dtype=dtype, **case)
    mutated = mutated_of(name, inputs)
    other = inputs | {m: inputs[m].clone() for m in mutated}
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(OPERATORS[name](**inputs), COMPOSITIONS[name](other), **tight)
    for m in mutated:
        torch.testing.assert_close(inputs[m], other[m], equal_nan=True, **tight)


@pytest.mark.parametrize("name", MIXERS[:2])
def test_keeping_nothing_is_period_1(name):
    inputs = inputs_of(name, period=1, pending=0)
    plain = inputs | NOTHING
    plain |= {m: inputs[m].clone() for m in ("conv_state", "state")}
    y = OPERATORS[name](**inputs)
    torch.testing.assert_close(OPERATORS[name](**plain), y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(plain["state"], inputs["state"], rtol=1e-6, atol=1e-6)


def test_float64():
    for name in MIXERS:
        inputs = inputs_of(name, dtype=torch.float64, state_dtype=torch.float64)
        expected = [v for v in reference.OPERATORS[name][0](**inputs) if v is not None]
        actual = [OPERATORS[name](**inputs), *(inputs[m] for m in mutated_of(name, inputs))]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


SHARED = {
    "conv_state", "state", "recent", "recent_decay", "pending", "conv_weight", "conv_bias",
    "z_bias", "dt_bias", "A_log", "D", "norm_weight", "eps", "period", "kv_dim",
}  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_batch_mates_and_threads_change_nothing(name):
    inputs = inputs_of(name, batch=6, dtype=torch.bfloat16)
    mutated = mutated_of(name, inputs)
    alone = {k: v if k in SHARED or v is None else v[2:3] for k, v in inputs.items()}
    alone |= {m: inputs[m].clone() for m in mutated}
    y, slot = OPERATORS[name](**inputs), int(inputs["slots"][2])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(OPERATORS[name](**alone), y[2:3])
    finally:
        torch.set_num_threads(threads)
    for m in mutated:
        assert same(alone[m][slot], inputs[m][slot])


@pytest.mark.parametrize("name", MIXERS)
def test_strided_projection_equals_contiguous(name):
    inputs = inputs_of(name)
    wide = torch.randn(3, inputs["projected"].shape[1] + 9)
    wide[:, 5:-4] = inputs["projected"]
    strided = inputs | {m: inputs[m].clone() for m in mutated_of(name, inputs)}
    strided["projected"] = wide[:, 5:-4]
    expected = OPERATORS[name](**inputs)
    assert torch.equal(OPERATORS[name](**strided), expected)


BOTH = [
    ({"slots": torch.tensor([0, 1, 1]).int()}, ValueError, "slots expected distinct, got 1 twice"),
    ({"slots": torch.tensor([0, 1, 5]).int()}, ValueError, "slots expected below 5, got 5"),
    ({"lengths": torch.tensor([3, 0, 1]).int()}, ValueError, r"lengths\[1\] expected at least 1, got 0"),
    ({"projected": torch.zeros(3, 17)}, ValueError, "projected expected"),
    ({"conv_weight": torch.zeros(7, 4)}, ValueError, "conv_weight expected shape"),
    ({"conv_bias": torch.zeros(7)}, ValueError, "conv_bias expected shape"),
    ({"D": torch.zeros(7)}, ValueError, "D expected shape"),
    ({"D": torch.zeros(4).half()}, TypeError, "D expected dtype Float, got Half"),
]  # fmt: skip
OF_MAMBA2 = [
    ({"recent": None}, ValueError, "expected together or not at all, got 2 of 3"),
    (NOTHING, ValueError, "period expected 1 without recent, got 4"),
    ({"period": 9}, ValueError, "period expected 1 to 8, got 9"),
    ({"pending": torch.full((5,), 9).int()}, ValueError, "expected 0 to 7, got 9"),
    ({"rng_key": torch.zeros(3, 4).long()}, ValueError, "rng_key expected None for a float32 state"),
    ({"state": torch.zeros(5, 4, 16, 16).double()}, TypeError, "expected both or neither float64"),
]  # fmt: skip
ERRORS = [(n, *e) for n in MIXERS for e in BOTH] + [(n, *e) for n in MIXERS[:2] for e in OF_MAMBA2]
ERRORS += [
    ("discrete_mamba2_update", {"conv_state": torch.zeros(5, 4, 70)}, ValueError, r"I \+ 2 G N channels"),
    ("discrete_mamba2_update", {"z_bias": torch.zeros(3)}, ValueError, "z_bias expected shape"),
    ("mamba2_update", {"conv_state": torch.zeros(5, 4, 70)}, ValueError, r"K \(P \+ N\) \+ H N channels"),
    ("mamba2_update", {"norm_weight": torch.zeros(3)}, ValueError, "norm_weight expected shape"),
    ("mamba2_update", {"eps": -1.0}, ValueError, "eps expected at least 0, got -1"),
    ("mamba1_update", {"kv_dim": 36}, ValueError, "kv_dim expected to divide I = 96, got 36"),
    ("mamba1_update", {"kv_dim": 24}, ValueError, "N expected to divide kv_dim = 24, got 16"),
    ("mamba1_update", {"dt": torch.zeros(3, 4)}, ValueError, "dt expected shape"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "error", "words"), ERRORS)
def test_errors_change_nothing(name, change, error, words):
    inputs = inputs_of(name, slots=[0, 2, 4]) | change
    mutated = mutated_of(name, inputs)
    before = [inputs[m].clone() for m in mutated]
    with pytest.raises(error, match=f"{name}: .*{words}"):
        OPERATORS[name](**inputs)
    assert all(same(inputs[m], value) for m, value in zip(mutated, before, strict=True))


@pytest.mark.parametrize("name", MIXERS)
def test_opcheck(name):
    for case in ({}, NOTHING_KEPT) if name != "mamba1_update" else ({"rest": 0},):
        inputs = inputs_of(name, **case)
        for held in ("recent", "recent_decay"):
            if inputs.get(held) is not None:
                inputs[held].nan_to_num_(0.5)
        torch.library.opcheck(getattr(torch.ops.reasoners, name).default, tuple(inputs.values()))


@pytest.mark.parametrize("name", MIXERS)
def test_compiles_whole_with_dynamic_shapes(name):
    def step(inputs):
        return OPERATORS[name](**inputs) * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5):
        inputs = inputs_of(name, batch=batch)
        mutated = mutated_of(name, inputs)
        other = inputs | {m: inputs[m].clone() for m in mutated}
        assert torch.equal(compiled(inputs), step(other))
        assert all(same(inputs[m], other[m]) for m in mutated)

"""discrete_mamba2_scan and mamba2_scan."""

import pytest
import torch
import torch.nn.functional as F
from cases import CUDA_MIXER_SCAN_CASES, DISCRETE_MAMBA2_SCAN_CASES, MAMBA2_SCAN_CASES

from reasoners import ops, reference

OPERATORS = {
    "discrete_mamba2_scan": ops.discrete_mamba2_scan,
    "mamba2_scan": ops.mamba2_scan,
}
CASES = {
    "discrete_mamba2_scan": DISCRETE_MAMBA2_SCAN_CASES,
    "mamba2_scan": MAMBA2_SCAN_CASES,
}
TABLE = [(n, c) for n in OPERATORS for c in CASES[n]]
CUDA_TABLE = [
    pytest.param(n, case, marks=pytest.mark.cuda(n), id=f"{n}-{c}")
    for n in OPERATORS
    for c, case in (CASES[n] | CUDA_MIXER_SCAN_CASES).items()
]
MIXERS = pytest.mark.parametrize("name", OPERATORS)
ON_CUDA = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.cuda(n)) for n in OPERATORS]
)


def inputs_of(name, **case):
    return reference.OPERATORS[name][1](**case)


def moved(inputs, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize(("name", "case"), TABLE)
def test_against_reference(name, case):
    reference.check(OPERATORS[name], name, **CASES[name][case])


@pytest.mark.parametrize(("name", "case"), CUDA_TABLE)
def test_against_reference_cuda(name, case):
    reference.check(OPERATORS[name], name, "cuda", **case)


def test_float64():
    for name in OPERATORS:
        inputs = inputs_of(name, dtype=torch.float64)
        results = zip(
            OPERATORS[name](**inputs), reference.OPERATORS[name][0](**inputs), strict=True
        )
        for actual, expected in results:
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def test_a_token_by_hand():
    # One head of one channel: the convolution adds the input before to twice this one, so x = B = C
    # = 2 * 3 + 1 = 7; the state halves, sigmoid(0), to 5, and gains 49; y = 54 * 7 + 0.5 * 7.
    y, last, state = ops.discrete_mamba2_scan(
        torch.tensor([[[3.0, 3.0, 3.0, 0.0, 0.0]]]), torch.tensor([[1.0, 2.0]] * 3), torch.zeros(3),
        torch.tensor([100.0]), torch.tensor([0.5]), 1, torch.ones(1, 1, 3),
        torch.full((1, 1, 1, 1), 10.0),
    )  # fmt: skip
    assert state.item() == 54
    assert last.tolist() == [[[3, 3, 3]]]
    torch.testing.assert_close(y, torch.tensor([[[38150.0]]]))  # 381.5 silu(100)


# ---- the compositions that they stand for


def discrete_mamba2(i):
    I, H, channels, N = len(i["z_bias"]), len(i["D"]), len(i["conv_weight"]), i["state_dim"]
    xBC, z, a = i["projected"].split((channels, I, H), -1)
    conv, last = ops.causal_conv1d(
        xBC, i["conv_weight"], i["conv_bias"], i["past"], i["cu_seqlens"]
    )
    group = (channels - I) // 2
    x, B, C = conv.split((I, group, group), -1)
    x, B, C = x.unflatten(-1, (H, I // H)), B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N))
    where = i["initial_state"], i["cu_seqlens"]
    y, final = ops.ssd_scan(x, -ops.softplus(a), B, C, None, i["D"], *where)
    return ops.gate(y.flatten(2), z, i["z_bias"]), last, final


def mamba2(i):
    I, H, channels, N = len(i["norm_weight"]), len(i["D"]), len(i["conv_weight"]), i["state_dim"]
    P = I // H
    K = (channels - H * N) // (P + N)
    z, xBC, dt = i["projected"].split((I, channels, H), -1)
    conv, last = ops.causal_conv1d(
        xBC, i["conv_weight"], i["conv_bias"], i["past"], i["cu_seqlens"], True
    )
    x, B, C = conv.split((K * P, K * N, H * N), -1)
    x, B, C = x.unflatten(-1, (K, P)), B.unflatten(-1, (K, N)), C.unflatten(-1, (H, N))
    delta = ops.softplus(dt, i["dt_bias"])
    where = i["initial_state"], i["cu_seqlens"]
    y, final = ops.ssd_scan(x, -delta * i["A_log"].exp(), B, C, delta, i["D"], *where)
    g = ops.gate(y, z.unflatten(-1, (H, P)))
    return F.rms_norm(g, (P,), None, i["eps"]).flatten(2) * i["norm_weight"], last, final


COMPOSITIONS = dict(zip(OPERATORS, (discrete_mamba2, mamba2)))


def check_composition(name, dtype, device, **case):
    inputs = moved(inputs_of(name, dtype=dtype, **case), device)
    y, last, final = OPERATORS[name](**inputs)
    expected = COMPOSITIONS[name](inputs)
    # A result of 16 bits may be a step or two off, of the size that its row's sums have: among
    # others ssd_scan rounds D with the weight of the token itself, and a mixer does not.
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    tight = {"rtol": 2 * step, "atol": 2 * step * expected[0].abs().max().item()}
    torch.testing.assert_close(y, expected[0], **tight)
    assert torch.equal(last, expected[1])
    size = expected[2].abs().max().item()
    torch.testing.assert_close(final, expected[2], rtol=1e-3, atol=1e-3 * size)


@MIXERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_the_composition(name, dtype):
    check_composition(name, dtype, "cpu", lengths=[33, 0, 1, 40])


@ON_CUDA
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_equals_the_composition_cuda(name, dtype):
    check_composition(name, dtype, "cuda", H=8, lengths=[330, 0, 1, 65, 2], P=64, N=64)


def check_halves(name, device, at, **case):
    inputs = moved(inputs_of(name, **case), device)
    whole = OPERATORS[name](**inputs)
    first = OPERATORS[name](**inputs | {"projected": inputs["projected"][:, :at]})
    rest = inputs | {"projected": inputs["projected"][:, at:]}
    second = OPERATORS[name](**rest | {"past": first[1], "initial_state": first[2]})
    step = 1e-5 if case.get("dtype") is None else 2**-6
    y = torch.cat((first[0], second[0]), 1)
    torch.testing.assert_close(y, whole[0], rtol=step, atol=step * whole[0].abs().max().item())
    assert torch.equal(second[1], whole[1])
    # One rounding of x times its gain, to the dtype, is in proportion to the largest terms.
    rounding = 1e-5 if case.get("dtype") is None else 2**-8
    size = whole[2].abs().max().item()
    torch.testing.assert_close(second[2], whole[2], rtol=1e-2, atol=rounding * size)


@MIXERS
@pytest.mark.parametrize("at", [1, 2, 32, 40])
def test_two_halves_are_the_whole(name, at):
    check_halves(name, "cpu", at, length=41)


@ON_CUDA
@pytest.mark.parametrize("at", [1, 2, 64, 300])
def test_two_halves_are_the_whole_cuda(name, at):
    check_halves(name, "cuda", at, H=8, length=301, P=64, N=64, dtype=torch.bfloat16)


def check_packed(name, device, lengths, **case):
    inputs = moved(inputs_of(name, lengths=lengths, **case), device)
    y, last, final = OPERATORS[name](**inputs)
    begin = 0
    for i, length in enumerate(lengths):
        where = slice(begin, begin + length)
        alone = inputs | {"projected": inputs["projected"][:, where], "cu_seqlens": None}
        alone |= {k: inputs[k][i : i + 1] for k in ("past", "initial_state")}
        results = OPERATORS[name](**alone)
        assert torch.equal(results[0], y[:, where]), i
        assert torch.equal(results[1][0], last[i]), i
        assert torch.equal(results[2][0], final[i]), i
        begin += length


@MIXERS
def test_packed_is_separate(name):
    check_packed(name, "cpu", [33, 0, 1, 2, 47], dtype=torch.bfloat16)


@ON_CUDA
@pytest.mark.parametrize(
    ("lengths", "heads"),
    [([33, 0, 1, 2, 64, 300, 600], 8), ([33, 0, 1, 2, 64, 300, 600] * 30, 8), ([5000, 700], 72)],
    ids=["dealt", "walked", "long ones, dealt alone"],
)
def test_packed_is_separate_cuda(name, lengths, heads):
    check_packed(name, "cuda", lengths, H=heads, dtype=torch.bfloat16, P=64, N=64)


@MIXERS
def test_strided_projection_equals_contiguous(name):
    inputs = inputs_of(name)
    projected = inputs["projected"]
    wide = torch.randn(*projected.shape[:2], projected.shape[2] + 9)
    wide[..., 5:-4] = projected
    for a, b in zip(
        OPERATORS[name](**inputs | {"projected": wide[..., 5:-4]}), OPERATORS[name](**inputs)
    ):
        assert torch.equal(a, b)


@ON_CUDA
@pytest.mark.parametrize("offset", [8, 3], ids=["aligned", "composed"])
def test_strided_projection_cuda(name, offset):
    inputs = moved(inputs_of(name, dtype=torch.bfloat16, P=64, N=64, H=8, length=70), "cuda")
    projected = inputs["projected"]
    wide = projected.new_zeros(*projected.shape[:2], projected.shape[2] + 16)
    wide[..., offset : offset - 16] = projected
    size = OPERATORS[name](**inputs)[0].abs().max().item()
    strided = inputs | {"projected": wide[..., offset : offset - 16]}
    for a, b in zip(OPERATORS[name](**strided), OPERATORS[name](**inputs)):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-6 * size)


BOTH = [
    ({"projected": torch.zeros(2, 20, 17)}, ValueError, "projected expected shape"),
    ({"projected": torch.zeros(2, 20, 17).int()}, TypeError, "projected expected dtype"),
    ({"conv_weight": torch.zeros(7, 4)}, ValueError, "conv_weight expected"),
    ({"conv_bias": torch.zeros(7)}, ValueError, "conv_bias expected shape"),
    ({"D": torch.zeros(3)}, ValueError, "H expected to divide I = 64, got 3"),
    ({"D": torch.zeros(4).half()}, TypeError, "D expected dtype Float, got Half"),
    ({"state_dim": 0}, ValueError, "state_dim expected at least 1, got 0"),
    ({"past": torch.zeros(2, 2, 7)}, ValueError, "past expected shape"),
    ({"initial_state": torch.zeros(2, 4, 16, 8)}, ValueError, "initial_state expected shape"),
    ({"cu_seqlens": torch.tensor([0, 20]).int()}, ValueError, "projected expected batch 1"),
]  # fmt: skip
ERRORS = [(n, *e) for n in OPERATORS for e in BOTH] + [
    ("discrete_mamba2_scan", {"state_dim": 24}, ValueError, r"I \+ 2 G N channels"),
    (
        "discrete_mamba2_scan",
        {"z_bias": torch.zeros(64).half()},
        TypeError,
        "z_bias expected dtype",
    ),
    ("mamba2_scan", {"state_dim": 24}, ValueError, r"K \(P \+ N\) \+ H N channels"),
    ("mamba2_scan", {"dt_bias": torch.zeros(3)}, ValueError, "dt_bias expected shape"),
    ("mamba2_scan", {"A_log": torch.zeros(3)}, ValueError, "A_log expected shape"),
    ("mamba2_scan", {"eps": -1.0}, ValueError, "eps expected at least 0, got -1"),
]


@pytest.mark.parametrize(("name", "change", "error", "words"), ERRORS)
def test_errors(name, change, error, words):
    with pytest.raises(error, match=f"{name}: .*{words}"):
        OPERATORS[name](**inputs_of(name) | change)


@MIXERS
def test_boundaries_are_checked(name):
    inputs = inputs_of(name, lengths=[5, 6]) | {"cu_seqlens": torch.tensor([0, 5, 9]).int()}
    with pytest.raises(ValueError, match="cu_seqlens expected to run from 0 to 11, got 0 to 9"):
        OPERATORS[name](**inputs)


@MIXERS
def test_opcheck(name):
    for case in ({}, {"lengths": [3, 0, 5], "past": False}, {"initial_state": False}):
        inputs = inputs_of(name, **case)
        torch.library.opcheck(getattr(torch.ops.reasoners, name).default, tuple(inputs.values()))


@MIXERS
def test_compiles_whole_with_dynamic_shapes(name):
    def step(inputs):
        return OPERATORS[name](**inputs)[0] * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length in ((2, 7), (3, 9)):
        inputs = inputs_of(name, batch=batch, length=length)
        assert torch.equal(compiled(inputs), step(inputs))

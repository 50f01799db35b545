"""gate, swiglu and their derivatives; softplus."""

import pytest
import torch
from cases import CUDA_CASES, GATE_CASES
from gradients import check_gradients

from reasoners import ops, reference
from reasoners.reference import gate_inputs, same, softplus_inputs, swiglu_inputs

TENSORS = {"gate": ("x", "z", "bias"), "swiglu": ("gate_up",), "softplus": ("x", "bias")}
EACH = pytest.mark.parametrize("name", TENSORS)
CUDA = pytest.mark.cuda("gate", "gate_backward", "swiglu", "swiglu_backward", "softplus")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
gate_backward = torch.ops.reasoners.gate_backward
swiglu_backward = torch.ops.reasoners.swiglu_backward


def each_of(table):
    """The operators with all cases of a table that they know."""
    return pytest.mark.parametrize(
        ("name", "case"),
        [
            pytest.param(name, case, id=f"{name}, {row}")
            for name in TENSORS
            for row, case in table.items()
            if name != "swiglu" or "bias" not in case
        ],
    )


@each_of(GATE_CASES)
def test_against_reference(name, case):
    reference.check(getattr(ops, name), name, **case)
    check_gradients(getattr(ops, name), name, TENSORS[name], case)


CUDA_TABLE = (
    GATE_CASES
    | CUDA_CASES
    | {
        "whole vectors": {"shape": (7, 64)},
        "whole vectors, bf16": {"shape": (3, 5, 64), "dtype": torch.bfloat16},
        "no channels": {"shape": (3, 0)},
    }
)


@CUDA
@each_of(CUDA_TABLE)
def test_against_reference_cuda(name, case):
    reference.check(getattr(ops, name), name, "cuda", **case)
    check_gradients(getattr(ops, name), name, TENSORS[name], case, "cuda")


@pytest.mark.cuda("gate", "softplus")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1, 8])
def test_an_element_has_the_same_bits_wherever_it_stands_cuda(dtype, shift):
    inputs = {k: v.cuda() for k, v in gate_inputs(shape=(70, 64), dtype=dtype).items()}
    y, step = ops.gate(**inputs), ops.softplus(inputs["x"])
    wide = torch.zeros(70, 144, dtype=dtype, device="cuda")
    x = wide[:, shift : shift + 64].copy_(inputs["x"])
    z = wide[:, shift + 64 : shift + 128].copy_(inputs["z"])
    for rows in (slice(0, 1), slice(3, 70)):
        assert torch.equal(ops.gate(x[rows], z[rows], inputs["bias"]), y[rows])
        assert torch.equal(ops.softplus(x[rows]), step[rows])
    assert torch.equal(ops.gate(x[:, :37], z[:, :37], inputs["bias"][:37]), y[:, :37])
    assert torch.equal(ops.gate(x.mT, z.mT), ops.gate(x, z).mT)


def arguments_of_derivative(device, dtype, channels=64, rows=70):
    """dy, x, z, bias"""
    inputs = gate_inputs(shape=(rows, channels), dtype=dtype)
    g = torch.Generator().manual_seed(2)
    dy = torch.randn(rows, channels, generator=g).to(dtype)
    return [t.to(device) for t in (dy, *inputs.values())]


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [1, 8])
@pytest.mark.parametrize("channels", [37, 64])
def test_a_gradient_has_the_same_bits_wherever_it_stands(device, dtype, shift, channels):
    dy, x, z, bias = arguments_of_derivative(device, dtype, channels, rows=700)
    dx, dz = gate_backward(dy, x, z, bias)
    wide = torch.zeros(3, 700, channels + 16, dtype=dtype, device=device)
    strided = [w[:, shift : shift + channels].copy_(t) for w, t in zip(wide, (dy, x, z))]
    for rows in (slice(0, 1), slice(3, 8), slice(100, 613)):
        part = gate_backward(*(t[rows] for t in strided), bias)
        assert torch.equal(part[0], dx[rows])
        assert torch.equal(part[1], dz[rows])
    some = gate_backward(dy[:, :29], x[:, :29], z[:, :29], bias[:29])
    assert torch.equal(some[0], dx[:, :29])
    assert torch.equal(some[1], dz[:, :29])
    flipped = gate_backward(dy.mT, x.mT, z.mT, None)
    for got, expected in zip(flipped, gate_backward(dy, x, z, None)):
        assert torch.equal(got.mT, expected)
    one = dy[:1].expand(700, channels)  # a gradient that all rows share
    for got, expected in zip(
        gate_backward(one, x, z, bias), gate_backward(one.contiguous(), x, z, bias)
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=CUDA),
        pytest.param("cuda", torch.float16, marks=CUDA),
    ],
)
def test_gradients_of_16_bits_are_those_of_float32_rounded_once(device, dtype):
    arguments = arguments_of_derivative(device, dtype)
    wide = gate_backward(*(t.float() for t in arguments))
    for got, expected in zip(gate_backward(*arguments), wide):
        assert torch.equal(got, expected.to(dtype))


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 37, 64])
def test_swiglu_is_the_gate_of_the_halves(device, dtype, channels):
    dy, x, z, _ = arguments_of_derivative(device, dtype, channels)
    gate_up = torch.cat((z, x), -1)
    dx, dz = gate_backward(dy, x, z, None)
    aligned, odd = torch.zeros(2, 70, 2 * channels + 16, dtype=dtype, device=device)
    for rows in (gate_up, aligned[:, 8:-8].copy_(gate_up), odd[:, 3:-13].copy_(gate_up)):
        assert torch.equal(ops.swiglu(rows), ops.gate(x, z))
        gradient = swiglu_backward(dy, rows)
        assert gradient.is_contiguous()
        assert torch.equal(gradient, torch.cat((dz, dx), -1))
    deep = gate_up.view(2, 5, 7, 2 * channels)
    assert torch.equal(ops.swiglu(deep).flatten(0, 2), ops.swiglu(gate_up))
    gradient = swiglu_backward(dy.view(2, 5, 7, channels), deep)
    assert torch.equal(gradient.flatten(0, 2), swiglu_backward(dy, gate_up))
    assert torch.equal(ops.swiglu(gate_up[0]), ops.swiglu(gate_up)[0])
    assert torch.equal(swiglu_backward(dy[0], gate_up[0]), swiglu_backward(dy, gate_up)[0])


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_extremes_of_derivative(device, dtype, with_bias):
    """NaN where the definition has it, and nothing but zeros or the whole gradient far out."""
    nan, inf = float("nan"), float("inf")
    z = [nan, inf, -1e30, -1e4, -104.0, -89.0, -88.0, -87.0, -20.0, 0.0, 20.0, 89.0, 1e4]
    z = torch.tensor([*z, 1.0, 1.0, 1.0, 3e38], dtype=dtype)
    x, dy = torch.full_like(z, 1.5), torch.full_like(z, -2.0)
    x[-4], dy[-3], x[-2] = nan, nan, inf
    bias = torch.zeros_like(z) if with_bias else None

    def derivative(operator, *tensors):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = operator(*leaves, None if bias is None else bias.to(leaves[0]))
        return torch.autograd.grad(y, leaves, dy.to(y))

    found = derivative(ops.gate, x.to(device), z.to(device))
    for got, expected, name in zip(
        found, derivative(reference.gate, x.double(), z.double()), ("dx", "dz")
    ):
        got, expected = got.double().cpu(), expected.to(dtype).double()
        torch.testing.assert_close(
            got, expected, rtol=8e-3, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    if bias is None:
        gate_up = torch.cat((z, x)).to(device)
        assert same(swiglu_backward(dy.to(device), gate_up), torch.cat(found[::-1]))


def test_only_wanted_gradients():
    x, z, bias = gate_inputs().values()
    y = ops.gate(x, z.requires_grad_(), bias)
    (dz,) = torch.autograd.grad(y.sum(), z)
    assert same(dz, gate_backward(torch.ones_like(y), x, z.detach(), bias)[1])


@EACH
def test_gradcheck(name):
    inputs = reference.OPERATORS[name][1](dtype=torch.float64, shape=(3, 5))
    for tensor in inputs.values():
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(getattr(ops, name), tuple(inputs.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [6, 37, 96])
def test_an_element_has_the_same_bits_wherever_it_stands(dtype, channels):
    inputs = gate_inputs(shape=(700, channels), dtype=dtype)
    y = ops.gate(**inputs)
    step = ops.softplus(inputs["x"])
    for rows in (slice(0, 1), slice(3, 8), slice(100, 613)):
        part = ops.gate(inputs["x"][rows], inputs["z"][rows], inputs["bias"])
        assert torch.equal(part, y[rows])
        assert torch.equal(ops.softplus(inputs["x"][rows]), step[rows])


def test_extremes():
    z = torch.tensor([-float("inf"), -1e4, -89.0, -20.0, 0.0, 20.0, 1e4])
    y = ops.gate(torch.ones(7), z)
    assert y[1:].tolist() == pytest.approx([0, 0, -20 * 2.0611537e-9, 0, 20, 1e4], rel=1e-6)
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    assert ops.softplus(x).tolist() == pytest.approx([0, 0, 0.6931472, 100, 1e4], rel=1e-6)


def test_strided_slices_equal_contiguous():
    wide = torch.randn(2, 5, 90)
    x, z = wide[..., 3:40], wide[..., 40:77]
    assert torch.equal(ops.gate(x, z), ops.gate(x.contiguous(), z.contiguous()))
    assert torch.equal(ops.gate(x.mT, z.mT), ops.gate(x, z).mT)
    assert torch.equal(ops.softplus(x), ops.softplus(x.contiguous()))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z": torch.zeros(5, 36)}, ValueError, r"z expected shape \(5, 37\) as x, got \(5, 36\)"),
        (
            {"bias": torch.zeros(5)},
            ValueError,
            r"bias expected shape \(channels\) = \(37\), got \(5\)",
        ),
        ({"z": torch.zeros(5, 37).double()}, TypeError, "z expected dtype Float, got Double"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=f"gate: {words}"):
        ops.gate(**gate_inputs() | change)


@pytest.mark.parametrize(
    ("function", "arguments", "words"),
    [
        (ops.swiglu, [(5, 37)], "swiglu: gate_up expected an even number of channels, got 37"),
        (ops.swiglu, [()], "swiglu: gate_up expected at least 1 dimension, got 0"),
        (swiglu_backward, [(5, 8), (5, 8)], r"swiglu_backward: dy expected shape \(5, 4\), got"),
        (
            lambda *t: gate_backward(*t, None),
            [(5, 8), (5, 4), (5, 4)],
            r"gate_backward: dy expected shape \(5, 4\) as x, got \(5, 8\)",
        ),
    ],
)
def test_errors_of_shapes(function, arguments, words):
    with pytest.raises(ValueError, match=words):
        function(*map(torch.zeros, arguments))


def test_opcheck_and_compile():
    inputs = [t.requires_grad_() for t in gate_inputs().values()]
    torch.library.opcheck(torch.ops.reasoners.gate.default, tuple(inputs))
    halves = swiglu_inputs(shape=(5, 38))["gate_up"].requires_grad_()
    torch.library.opcheck(torch.ops.reasoners.swiglu.default, (halves,))
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(gate_backward.default, (plain[0], *plain))
    torch.library.opcheck(swiglu_backward.default, (torch.ones(5, 38), halves.detach()))
    steps = [t.requires_grad_() for t in softplus_inputs().values()]
    torch.library.opcheck(torch.ops.reasoners.softplus.default, tuple(steps))

    def all_three(x, z, bias, gate_up):
        y = ops.swiglu(gate_up)[:, :37] * ops.gate(x, z, bias)
        return ops.softplus(y).sum()

    inputs.append(halves)
    compiled = torch.compile(all_three, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(all_three(*inputs), inputs)
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        torch.testing.assert_close(got, want)

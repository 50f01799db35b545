"""gate and softplus."""

import pytest
import torch
from cases import CUDA_CASES, GATE_CASES
from gradients import check_gradients

from reasoners import ops, reference
from reasoners.reference import gate_inputs, softplus_inputs

EACH = pytest.mark.parametrize(
    ("name", "tensors"), [("gate", ("x", "z", "bias")), ("softplus", ("x", "bias"))]
)


@EACH
@pytest.mark.parametrize("case", GATE_CASES.values(), ids=GATE_CASES.keys())
def test_against_reference(name, tensors, case):
    reference.check(getattr(ops, name), name, **case)
    if case.get("dtype") != torch.bfloat16:
        check_gradients(getattr(ops, name), name, tensors, case)


CUDA_TABLE = (
    GATE_CASES
    | CUDA_CASES
    | {
        "whole vectors": {"shape": (7, 64)},
        "whole vectors, bf16": {"shape": (3, 5, 64), "dtype": torch.bfloat16},
        "no channels": {"shape": (3, 0)},
    }
)
EACH_CUDA = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.cuda(name)) for name in ("gate", "softplus")]
)


@EACH_CUDA
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(name, case):
    reference.check(getattr(ops, name), name, "cuda", **case)


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


@EACH
def test_gradcheck(name, tensors):
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


def test_opcheck_and_compile():
    inputs = [t.requires_grad_() for t in gate_inputs().values()]
    torch.library.opcheck(torch.ops.reasoners.gate.default, tuple(inputs))
    steps = [t.requires_grad_() for t in softplus_inputs().values()]
    torch.library.opcheck(torch.ops.reasoners.softplus.default, tuple(steps))

    def both(x, z, bias):
        return ops.softplus(ops.gate(x, z, bias)).sum()

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(both(*inputs), inputs)
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected):
        torch.testing.assert_close(got, want)

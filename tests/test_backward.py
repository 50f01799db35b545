"""The derivatives that are made of forward operators, on the CPU, against the CPU's own kernels."""

import pytest
import torch
from cases import CAUSAL_CONV1D_CASES, SSD_SCAN_CASES

from reasoners import backward, ops, reference

NAMES = {
    "ssd_scan": ("x", "log_decay", "B", "C", "scale", "D", "initial_state", "cu_seqlens"),
    "causal_conv1d": ("x", "weight", "bias", "initial_state", "cu_seqlens"),
}


def arguments_of(op, case):
    """The operator's arguments, and gradients of its outputs."""
    inputs = getattr(reference, f"{op}_inputs")(**case)
    arguments = [inputs.get(name) for name in NAMES[op]]
    if op == "causal_conv1d":
        arguments.append(inputs.get("silu", False))
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(t.shape, generator=generator).to(t.dtype) for t in getattr(ops, op)(*arguments)
    ]
    return arguments, gradients


def assert_near(found, expected, tolerance):
    for gradient, kernel in zip(found, expected, strict=True):
        if gradient is None:
            assert kernel.numel() == 0
            continue
        assert (gradient.shape, gradient.dtype) == (kernel.shape, kernel.dtype)
        difference = (gradient.double() - kernel.double()).norm()
        assert difference <= tolerance * kernel.double().norm() + 1e-6


def not_double(cases):
    rows = {name: case for name, case in cases.items() if case.get("dtype") != torch.float64}
    return pytest.mark.parametrize("case", rows.values(), ids=rows.keys())


@not_double(SSD_SCAN_CASES)
def test_three_scans_are_the_derivative_of_one(case):
    arguments, gradients = arguments_of("ssd_scan", case)
    found = backward.ssd_scan_backward(ops.ssd_scan, *gradients, *arguments)
    expected = torch.ops.reasoners.ssd_scan_backward(*gradients, *arguments)
    assert_near(found, expected, 1e-3 if arguments[0].dtype == torch.float32 else 1e-2)


@not_double(CAUSAL_CONV1D_CASES)
def test_shifts_are_the_derivative_of_a_convolution(case):
    arguments, gradients = arguments_of("causal_conv1d", case)
    found = backward.causal_conv1d_backward(*gradients, *arguments)
    expected = torch.ops.reasoners.causal_conv1d_backward(*gradients, *arguments)
    assert_near(found, expected, 1e-5 if arguments[0].dtype == torch.float32 else 1e-2)

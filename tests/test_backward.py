"""The derivative that is made of forward scans, on the CPU, against the CPU's own kernel."""

import pytest
import torch
from cases import SSD_SCAN_CASES

from reasoners import backward, ops, reference

NAMES = ("x", "log_decay", "B", "C", "scale", "D", "initial_state", "cu_seqlens")


def assert_near(found, expected, tolerance):
    for gradient, kernel in zip(found, expected, strict=True):
        if gradient is None:
            assert kernel.numel() == 0
            continue
        assert (gradient.shape, gradient.dtype) == (kernel.shape, kernel.dtype)
        difference = (gradient.double() - kernel.double()).norm()
        assert difference <= tolerance * kernel.double().norm() + 1e-6


@pytest.mark.parametrize("case", SSD_SCAN_CASES.values(), ids=SSD_SCAN_CASES.keys())
def test_three_scans_are_the_derivative_of_one(case):
    inputs = reference.ssd_scan_inputs(**case)
    arguments = [inputs.get(name) for name in NAMES]
    generator = torch.Generator().manual_seed(1)
    gradients = [
        torch.randn(t.shape, generator=generator).to(t.dtype) for t in ops.ssd_scan(*arguments)
    ]
    found = backward.ssd_scan_backward(ops.ssd_scan, *gradients, *arguments)
    expected = torch.ops.reasoners.ssd_scan_backward(*gradients, *arguments)
    assert_near(found, expected, 1e-3 if arguments[0].dtype == torch.float32 else 1e-2)

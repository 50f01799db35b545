"""Gradients of an operator against autograd through its float64 definition."""

import torch

from reasoners.reference import OPERATORS, assert_close, widen


def gradients(fn, inputs, names, seed=1):
    """Of a random weighted sum of everything `fn` returns, by argument name."""
    leaves = {
        k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }
    present = [n for n in names if leaves[n] is not None]
    for name in present:
        leaves[name].requires_grad_()
    outputs = fn(**leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64).bfloat16() for o in outputs]
    loss = sum((w.to(o) * o).sum() for w, o in zip(weights, outputs))
    loss = loss + 0 * leaves[present[0]].sum().to(loss.dtype)
    found = torch.autograd.grad(
        loss, [leaves[n] for n in present], allow_unused=True, materialize_grads=True
    )
    return dict(zip(present, found))


def check_gradients(operator, name, names, case, device="cpu"):
    """Raises AssertionError naming the argument; bfloat16 gradients also within 1 % in RMS."""
    definition, make, _ = OPERATORS[name]
    inputs = make(**case)
    oracle = gradients(definition, {k: widen(v) for k, v in inputs.items()}, names)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    plain, actual = gradients(definition, inputs, names), gradients(operator, moved, names)
    for argument, got in actual.items():
        assert got.dtype == inputs[argument].dtype
        assert_close(got, oracle[argument], plain[argument], f"d{argument}", floor=2e-6)
        if got.dtype == torch.bfloat16 and got.numel():
            error = (got.double().cpu() - oracle[argument]).norm() / oracle[
                argument
            ].norm().clamp_min(1e-12)
            assert error <= 0.01, f"d{argument}: RMS error ratio {error:.4f}"

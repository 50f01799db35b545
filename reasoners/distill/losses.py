"""What distillation minimises, as pure functions of tensors: divergences and distances.

Everything is computed in float32 whatever the inputs' dtype; float64 stays float64.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from reasoners import ops


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float = 1.0
) -> Tensor:
    """Divergence of two next-token distributions s and t, token by token.

    beta = 0: KL(t || s), forward. beta = 1: KL(s || t), reverse. Between, with
    M = (1 - beta) s + beta t: beta KL(t || M) + (1 - beta) KL(s || M), which tends to 0, not to
    either KL, as beta nears an end. No factor temperature^2.

    student_logits, teacher_logits: (tokens, vocab), of any floating dtypes; divided by temperature.
    A logit of -inf is a probability of 0, and 0 log 0 = 0.
    Returns (tokens,) float32, or float64 if a side is. Differentiable in both.
    Raises ValueError. Source: Agarwal et al. 2023 (GKD), equation 1; beta as in TRL's GKD trainer.
    """
    _require_divergence("generalized_jsd", beta, temperature)
    _require_matrix("generalized_jsd", "student_logits", student_logits, "(tokens, vocab)")
    _require_matrix("generalized_jsd", "teacher_logits", teacher_logits, "(tokens, vocab)")
    _require_vocabulary("generalized_jsd", student_logits.shape[1], teacher_logits.shape[1])
    _require_same_shape(
        "generalized_jsd", "student_logits", student_logits, "teacher_logits", teacher_logits
    )
    log_s = (_wide(student_logits) / temperature).log_softmax(-1)
    log_t = (_wide(teacher_logits) / temperature).log_softmax(-1)
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    # Where both are -inf logaddexp has the gradient NaN, which the zero that _kl sends cannot undo.
    nowhere = (log_s == -math.inf) & (log_t == -math.inf)
    log_m = torch.logaddexp(
        log_s.masked_fill(nowhere, 0.0) + math.log1p(-beta), log_t + math.log(beta)
    )
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis. Masked by p, not log p: p may underflow where q is 0."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)


def distillation_loss(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_head: Tensor | None = None,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over tokens of (1 - kl_weight) CE + kl_weight KL, from hidden states: no logits kept.

    CE is the cross entropy of softmax(hidden head^T) with labels, KL is `generalized_jsd` to the
    teacher's softmax(teacher_hidden teacher_head^T). The temperature is of KL alone.

    hidden: (n, channels), the student's after its final norm, counted tokens only; n = 0 is a sum
    of 0 with gradients of 0. head: (vocab, channels), of the same dtype. labels: (n) int64, all of
    them counted. teacher_hidden, teacher_head: likewise, of their own channels and dtype, taken as
    constants; None where kl_weight is 0. chunk: tokens whose logits exist at a time; None for as many as
    have 2^25 logits, on CUDA 2^28, but 1,024 at least.

    Returns (total, ce, kl), float32 scalars, or float64 for float64: total is differentiable once,
    in hidden and head; ce and kl are the two sums, to report. ce is measured whatever its weight,
    kl is 0 without a teacher. Gradients are computed here, in the forward pass, and kept: hidden's
    in its dtype, head's added up in float32. Without anything to differentiate none are.
    Raises ValueError, TypeError; a label outside the vocabulary raises IndexError, on CUDA it makes ce
    NaN; a second derivative raises NotImplementedError.
    """
    name = "distillation_loss"
    _require_divergence(name, beta, temperature)
    if not 0 <= kl_weight <= 1:
        raise ValueError(f"{name}: kl_weight expected between 0 and 1, got {kl_weight}")
    if chunk is None:
        chunk = max(1024, 2 ** (28 if hidden.is_cuda else 25) // max(len(head), 1))
    if chunk < 1:
        raise ValueError(f"{name}: chunk expected at least 1, got {chunk}")
    _require_head(name, "hidden", hidden, "head", head)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}: labels expected int64, got {labels.dtype}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{name}: labels expected {(hidden.shape[0],)}, got {tuple(labels.shape)}")
    if (teacher_hidden is None) != (teacher_head is None):
        missing = "teacher_hidden" if teacher_hidden is None else "teacher_head"
        raise ValueError(f"{name}: {missing} expected beside the other of the two, got None")
    if teacher_hidden is not None:
        _require_head(name, "teacher_hidden", teacher_hidden, "teacher_head", teacher_head)
        _require_vocabulary(name, head.shape[0], teacher_head.shape[0])
        if teacher_hidden.shape[0] != hidden.shape[0]:
            raise ValueError(
                f"{name}: teacher_hidden expected {hidden.shape[0]} tokens as hidden, got "
                f"{teacher_hidden.shape[0]}"
            )
    elif kl_weight > 0:
        raise ValueError(
            f"{name}: teacher_hidden expected a tensor where kl_weight = {kl_weight}, got None"
        )
    rest = (labels, teacher_hidden, teacher_head, beta, temperature, kl_weight, chunk)
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return _DistillationLoss.apply(hidden, head, *rest)
    return _sum_chunks(hidden, head, *rest, (False, False))[:3]


class _DistillationLoss(torch.autograd.Function):
    """Gradients in the forward pass, so that the backward pass needs no logits."""

    @staticmethod
    def forward(ctx, hidden, head, *rest):
        *sums, d_hidden, d_head = _sum_chunks(hidden, head, *rest, ctx.needs_input_grad[:2])
        ctx.save_for_backward(d_hidden, d_head)
        ctx.dtype = head.dtype
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, weight, *_):
        if torch.is_grad_enabled():  # the kept gradients would pass for constants
            raise NotImplementedError(
                "distillation_loss: backward expected create_graph=False, got True"
            )
        d_hidden, d_head = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * weight
        if d_head is not None:
            d_head = torch.mul(d_head, weight, out=d_head.new_empty(d_head.shape, dtype=ctx.dtype))
        return d_hidden, d_head, *[None] * 7


@torch.no_grad()
def _sum_chunks(
    hidden, head, labels, teacher_hidden, teacher_head, beta, temperature, kl_weight, chunk, wanted
):
    """total, ce, kl, d hidden, d head; `wanted`: of which of the two, the other's is None."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ce, kl = (torch.zeros((), dtype=dtype, device=hidden.device) for _ in range(2))
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_head = torch.zeros_like(head, dtype=dtype) if wanted[1] else None

    # A function, so that one chunk's logits are gone before the next one's are made.
    def add_chunk(rows):
        logits, taught = F.linear(hidden[rows], head), None
        if teacher_hidden is not None:
            taught = F.linear(teacher_hidden[rows], teacher_head)
            if taught.dtype != logits.dtype:
                both = torch.promote_types(taught.dtype, logits.dtype)
                logits, taught = logits.to(both), taught.to(both)
        settings = (labels[rows], beta, temperature, kl_weight)
        of_ce, of_kl = ops.distillation_losses(logits, taught, *settings, gradient=any(wanted))
        ce.add_(of_ce.sum())
        kl.add_(of_kl.sum())
        gradient = logits.to(head.dtype)
        if wanted[0]:
            torch.mm(gradient, head, out=d_hidden[rows])
        if wanted[1]:
            _add_product(d_head, gradient.T, hidden[rows])

    for start in range(0, len(hidden), chunk):
        add_chunk(slice(start, start + chunk))
    # What has no weight stays out: 0 times an infinite sum would be NaN.
    parts = [weight * part for weight, part in ((1 - kl_weight, ce), (kl_weight, kl)) if weight > 0]
    return sum(parts), ce, kl, d_hidden, d_head


def _add_product(sum: Tensor, a: Tensor, b: Tensor):
    """sum += a b, where sum may be wider than a and b."""
    if sum.dtype == a.dtype:
        sum.addmm_(a, b)
    elif sum.is_cuda:
        torch.addmm(sum, a, b, out_dtype=sum.dtype, out=sum)
    else:
        sum.add_(a @ b)


def matrix_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Frobenius norm of the difference of two mixing matrices, head by head.

    student, teacher: (batch, heads, length, length), of any floating dtypes.
    Returns (batch, heads) float32, or float64 if a side is; its gradient where they are equal is 0.
    Raises ValueError. Source: Bick et al. 2024 (MOHAWK), matrix orientation.
    """
    if student.ndim != 4 or student.shape[-1] != student.shape[-2]:
        raise ValueError(
            "matrix_distance: student expected (batch, heads, length, length), got "
            f"{tuple(student.shape)}"
        )
    _require_same_shape("matrix_distance", "student", student, "teacher", teacher)
    return torch.linalg.vector_norm(_wide(student) - _wide(teacher), dim=(-2, -1))


def hidden_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """L2 norm over channels of the difference of two layers' outputs, token by token.

    student, teacher: (tokens, channels), of any floating dtypes.
    Returns (tokens,) float32, or float64 if a side is; its gradient where they are equal is 0.
    Raises ValueError. Source: Bick et al. 2024 (MOHAWK), hidden-state alignment.
    """
    _require_matrix("hidden_distance", "student", student, "(tokens, channels)")
    _require_same_shape("hidden_distance", "student", student, "teacher", teacher)
    return torch.linalg.vector_norm(_wide(student) - _wide(teacher), dim=-1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _require_divergence(name: str, beta: float, temperature: float):
    if not 0 <= beta <= 1:
        raise ValueError(f"{name}: beta expected between 0 and 1, got {beta}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"{name}: temperature expected above 0 and finite, got {temperature}")


def _require_matrix(name: str, argument: str, tensor: Tensor, axes: str):
    if tensor.ndim != 2:
        raise ValueError(f"{name}: {argument} expected {axes}, got {tuple(tensor.shape)}")


def _require_same_shape(
    name: str, argument: str, tensor: Tensor, other_argument: str, other: Tensor
):
    if other.shape != tensor.shape:
        raise ValueError(
            f"{name}: {other_argument} expected {tuple(tensor.shape)} as {argument}, got "
            f"{tuple(other.shape)}"
        )


def _require_vocabulary(name: str, student: int, teacher: int):
    if student != teacher:
        raise ValueError(
            f"{name}: student and teacher vocabularies expected equal, got {student} and {teacher}"
        )


def _require_head(name: str, argument: str, hidden: Tensor, head_argument: str, head: Tensor):
    _require_matrix(name, argument, hidden, "(n, channels)")
    _require_matrix(name, head_argument, head, "(vocab, channels)")
    if head.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{name}: {head_argument} expected {hidden.shape[1]} channels as {argument}, got "
            f"{head.shape[1]}"
        )
    if head.dtype != hidden.dtype:
        raise TypeError(
            f"{name}: {head_argument} expected {hidden.dtype} as {argument}, got {head.dtype}"
        )

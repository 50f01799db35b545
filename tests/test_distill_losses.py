"""Divergences, the chunked loss on a head's logits, and distances between layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reasoners.distill.losses import (
    distillation_loss,
    generalized_jsd,
    hidden_distance,
    matrix_distance,
)
from reasoners.reference import assert_close

INF = math.inf


def random(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def log(*probabilities):
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize(
    "beta, expected",
    [
        (0.0, 0.130812),  # 1/4 log 1/2 + 3/4 log 3/2
        (1.0, 0.143841),  # 1/2 log 2 + 1/2 log 2/3
        (0.5, 0.033822),  # M = (3/8, 5/8): the mean of 0.035375 and 0.032269
        (0.25, 0.024870),  # M = (7/16, 9/16): 1/4 of 0.075858 and 3/4 of 0.007874
    ],
)
def test_divergence_by_hand(beta, expected):
    found = generalized_jsd(log(0.5, 0.5), log(0.25, 0.75), beta)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_temperature_divides_the_logits_and_nothing_else():
    student, teacher = log(1, 1), log(1, 9)  # at temperature 2: (1/2, 1/2) and (1/4, 3/4)
    assert generalized_jsd(student, teacher, 1.0, 2.0).item() == pytest.approx(0.143841, abs=1e-6)


def test_ends_are_the_two_kl_divergences():
    student, teacher = random(6, 11, seed=1), random(6, 11, seed=2)
    s, t = (torch.distributions.Categorical(logits=logits) for logits in (student, teacher))
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(generalized_jsd(student, teacher, 0), kl(t, s), rtol=1e-12, atol=0)
    torch.testing.assert_close(generalized_jsd(student, teacher, 1), kl(s, t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_mixture_against_its_definition(beta):
    student, teacher = random(6, 11, seed=1), random(6, 11, seed=2)
    s, t = student.softmax(-1), teacher.softmax(-1)
    log_m = ((1 - beta) * s + beta * t).log()
    expected = beta * F.kl_div(log_m, t, reduction="none") + (1 - beta) * F.kl_div(
        log_m, s, reduction="none"
    )
    found = generalized_jsd(student, teacher, beta)
    torch.testing.assert_close(found, expected.sum(-1), rtol=1e-12, atol=1e-14)


def test_mixture_near_the_ends():
    """It vanishes there: divided by its small weight it is the divergence of that end."""
    student, teacher = random(6, 11, seed=1), random(6, 11, seed=2)
    small = 1e-6
    forward = generalized_jsd(student, teacher, small)
    reverse = generalized_jsd(student, teacher, 1 - small)
    assert max(forward.max(), reverse.max()) < 1e-5
    torch.testing.assert_close(
        forward / small, generalized_jsd(student, teacher, 0), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        reverse / small, generalized_jsd(student, teacher, 1), rtol=1e-4, atol=0
    )


def test_sides_may_be_swapped_with_beta():
    student, teacher = random(6, 11, seed=1), random(6, 11, seed=2)
    for beta in (0.0, 0.25, 0.5, 1.0):  # so that beta = 0.5 is symmetric
        found = generalized_jsd(student, teacher, beta)
        swapped = generalized_jsd(teacher, student, 1 - beta)
        torch.testing.assert_close(found, swapped, rtol=1e-12, atol=1e-14)
    found, swapped = (
        generalized_jsd(student, teacher, 0.25),
        generalized_jsd(teacher, student, 0.25),
    )
    assert not torch.allclose(found, swapped, rtol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_tokens_without_probability_on_both_sides_count_nothing(beta):
    student, teacher = random(4, 7, seed=1), random(4, 7, seed=2)
    keep = [0, 1, 3, 4, 6]
    masked = []
    for logits in (student, teacher):
        logits[:, [2, 5]] = -INF
        masked.append(logits.requires_grad_())
    dense = [logits.detach()[:, keep].requires_grad_() for logits in masked]
    found, expected = generalized_jsd(*masked, beta), generalized_jsd(*dense, beta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = torch.autograd.grad(found.sum(), masked)
    for got, wanted in zip(gradients, torch.autograd.grad(expected.sum(), dense)):
        assert (got[:, [2, 5]] == 0).all()
        torch.testing.assert_close(got[:, keep], wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "beta, expected",
    [
        (0.0, math.log(2)),  # 0 log 0 on the teacher's side
        (1.0, INF),
        (0.5, 0.215762),  # M = (3/4, 1/4): 3/4 log 4/3
    ],
)
def test_tokens_without_probability_in_the_teacher(beta, expected):
    student = log(0.5, 0.5).requires_grad_()
    found = generalized_jsd(student, log(1, 0), beta)
    assert found.item() == pytest.approx(expected, abs=1e-6)
    if expected < INF:
        assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def test_probability_too_small_for_float32_against_none():
    student, teacher = torch.tensor([[0.0, -INF]]), torch.tensor([[0.0, -200.0]])
    assert generalized_jsd(student, teacher, 0.0).item() == 0.0


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergence_has_two_derivatives_in_both_sides(beta):
    both = [random(2, 4, seed=seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(lambda s, t: generalized_jsd(s, t, beta, 1.5), both)
    assert torch.autograd.gradgradcheck(lambda s, t: generalized_jsd(s, t, beta, 1.5), both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_divergence_is_computed_in_float32(dtype):
    student, teacher = random(4, 500, seed=1, dtype=dtype), random(4, 500, seed=2)
    found = generalized_jsd(student, teacher.float(), 1.0)
    assert found.dtype == torch.float32
    expected = generalized_jsd(student.double(), teacher.float().double(), 1.0)
    assert expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def case(n=5, channels=3, vocab=7, teacher_channels=4, dtype=torch.float64, wanted=(True, True)):
    """hidden, head, labels, teacher_hidden, teacher_head"""
    return (
        random(n, channels, seed=1, dtype=dtype).requires_grad_(wanted[0]),
        random(vocab, channels, seed=2, dtype=dtype).requires_grad_(wanted[1]),
        torch.arange(n) * 3 % vocab,
        random(n, teacher_channels, seed=3, dtype=dtype),
        random(vocab, teacher_channels, seed=4, dtype=dtype),
    )


def composition(
    hidden, head, labels, taught, taught_head, beta=1.0, temperature=1.0, kl_weight=1.0
):
    """What distillation_loss computes, with all logits at once."""
    logits = (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    ce = F.cross_entropy(logits, labels, reduction="sum")
    kl = generalized_jsd(logits, taught @ taught_head.T, beta, temperature).sum()
    return (1 - kl_weight) * ce + kl_weight * kl, ce, kl


def test_loss_by_hand():
    hidden = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    head = torch.eye(2, dtype=torch.float64)  # logits are the hidden state
    taught, taught_head = torch.ones(1, 1, dtype=torch.float64), log(0.25, 0.75).T
    total, ce, kl = distillation_loss(
        hidden, head, torch.tensor([0]), taught, taught_head, kl_weight=0.25
    )
    assert ce.item() == pytest.approx(0.693147, abs=1e-6)
    assert kl.item() == pytest.approx(0.143841, abs=1e-6)
    assert total.item() == pytest.approx(0.555821, abs=1e-6)
    total.backward()  # 3/4 (s - onehot) + 1/4 s (log s/t - KL)
    assert hidden.grad[0].tolist() == pytest.approx([-0.306337, 0.306337], abs=1e-6)


LOSSES = [
    {},
    {"kl_weight": 0.3},
    {"kl_weight": 0.0},
    {"beta": 0.0},
    {"beta": 0.4, "kl_weight": 0.3},
    {"temperature": 2.0, "kl_weight": 0.3},
]


@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("chunk", [1, 2, 5, 1024])
def test_loss_equals_the_unchunked_composition(chunk, loss):
    inputs = case()
    found, expected = distillation_loss(*inputs, chunk=chunk, **loss), composition(*inputs, **loss)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    assert found[0].requires_grad
    assert not found[1].requires_grad and not found[2].requires_grad
    # Gradients of another sum than the loss itself, so that what comes in counts.
    gradients = torch.autograd.grad(found[0] ** 2 / 3, inputs[:2])
    for got, wanted in zip(gradients, torch.autograd.grad(expected[0] ** 2 / 3, inputs[:2])):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_loss_gradcheck(loss):
    hidden, head, *rest = case()
    assert torch.autograd.gradcheck(
        lambda hidden, head: distillation_loss(hidden, head, *rest, chunk=2, **loss)[0],
        (hidden, head),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_the_dtype_of_the_model(dtype):
    inputs = case(n=40, channels=16, vocab=50, dtype=dtype)
    wide = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    for leaf in wide[:2]:
        leaf.requires_grad_()
    found, plain, oracle = (
        distillation_loss(*inputs, kl_weight=0.5, chunk=16),
        composition(*inputs, kl_weight=0.5),
        composition(*wide, kl_weight=0.5),
    )
    for got, other, wanted in zip(found, plain, oracle, strict=True):
        assert got.dtype == torch.float32
        # In one number plain's errors may cancel by luck: one rounding of the dtype is allowed.
        assert_close(got, wanted, other, "sum", floor=torch.finfo(dtype).eps)
    for leaf, other, got in zip(
        torch.autograd.grad(plain[0], inputs[:2]),
        torch.autograd.grad(oracle[0], wide[:2]),
        torch.autograd.grad(found[0], inputs[:2]),
    ):
        assert got.dtype == dtype
        assert_close(got, other, leaf, "gradient", floor=torch.finfo(dtype).eps)


def test_logits_are_of_the_models_dtype_and_summed_in_float32():
    inputs = case(n=40, channels=16, vocab=50, dtype=torch.bfloat16)
    hidden, head, labels, taught, taught_head = inputs
    logits, teacher_logits = (hidden @ head.T).double(), (taught @ taught_head.T).double()
    _, ce, kl = distillation_loss(*inputs)
    expected = F.cross_entropy(logits, labels, reduction="sum")
    assert ce.item() == pytest.approx(expected.item(), rel=1e-5)
    expected = generalized_jsd(logits, teacher_logits, 1.0).sum()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_of_the_head_add_up_in_float32():
    hidden, head, labels, taught, taught_head = case(n=1, dtype=torch.bfloat16)
    (one,) = torch.autograd.grad(
        distillation_loss(hidden, head, labels, taught, taught_head)[0], [head]
    )
    (many,) = torch.autograd.grad(
        distillation_loss(
            hidden.expand(512, -1), head, labels.expand(512), taught.expand(512, -1), taught_head,
            chunk=1,
        )[0],
        [head],
    )  # fmt: skip
    assert one.count_nonzero() == one.numel()
    assert torch.equal(many, 512 * one)  # in bfloat16 the sum would stay at 256 times one


def test_teacher_of_another_dtype():
    hidden, head, labels, taught, taught_head = case()
    rounded = (taught.bfloat16(), taught_head.bfloat16())
    logits = (rounded[0] @ rounded[1].T).double()
    expected = generalized_jsd(hidden @ head.T, logits, 1.0).sum()
    total, _, _ = distillation_loss(hidden, head, labels, *rounded)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_teacher_is_a_constant():
    hidden, head, labels, taught, taught_head = case()
    taught.requires_grad_(), taught_head.requires_grad_()
    distillation_loss(hidden, head, labels, taught, taught_head)[0].backward()
    assert taught.grad is None and taught_head.grad is None
    total, _, _ = distillation_loss(hidden.detach(), head.detach(), labels, taught, taught_head)
    assert not total.requires_grad


def test_cross_entropy_without_a_teacher():
    hidden, head, labels, *_ = case()
    total, ce, kl = distillation_loss(hidden, head, labels, kl_weight=0)
    expected = F.cross_entropy(hidden @ head.T, labels, reduction="sum")
    assert total.item() == ce.item() == pytest.approx(expected.item(), rel=1e-12)
    assert kl.item() == 0.0


def test_infinite_cross_entropy_without_weight_stays_out():
    hidden, head = torch.ones(1, 1), torch.tensor([[0.0], [-INF]])
    total, ce, kl = distillation_loss(hidden, head, torch.tensor([1]), hidden, head)
    assert (total.item(), ce.item(), kl.item()) == (0.0, INF, 0.0)


def test_no_tokens():
    hidden, head, *rest = case(n=0)
    sums = distillation_loss(hidden, head, *rest)
    assert [s.item() for s in sums] == [0.0, 0.0, 0.0]
    sums[0].backward()
    assert hidden.grad.shape == (0, 3)
    assert head.grad.shape == (7, 3) and head.grad.count_nonzero() == 0


def test_tied_embedding_gets_both_gradients():
    _, weight, labels, taught, taught_head = case()
    tokens, mix = torch.tensor([0, 6, 2, 2, 1]), random(3, 3, seed=5)

    def loss(of):
        hidden = torch.tanh(F.embedding(tokens, weight) @ mix)
        return of(hidden, weight, labels, taught, taught_head, kl_weight=0.5)[0]

    (found,) = torch.autograd.grad(loss(distillation_loss), [weight])
    (expected,) = torch.autograd.grad(loss(composition), [weight])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_loss_is_deterministic_and_its_backward_repeats():
    inputs = case(n=64, channels=8, vocab=50, dtype=torch.float32)
    first, second = (distillation_loss(*inputs, kl_weight=0.5, chunk=16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    gradients = torch.autograd.grad(first[0], inputs[:2], retain_graph=True)
    for other in (first[0], second[0]):
        again = torch.autograd.grad(other, inputs[:2])
        assert all(torch.equal(a, b) for a, b in zip(gradients, again))


def test_loss_is_differentiable_once():
    inputs = case()
    total, _, _ = distillation_loss(*inputs)
    with pytest.raises(NotImplementedError, match="backward expected create_graph=False"):
        torch.autograd.grad(total, inputs[:2], create_graph=True)


class Trace(TorchDispatchMode):
    """Names of the operators that ran, and sizes of what they made."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        made = out if isinstance(out, tuple | list) else [out]
        self.sizes += [t.numel() for t in made if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_logits_exist_for_one_chunk_at_a_time(beta):
    inputs = case(n=64, channels=4, vocab=96)
    with Trace() as trace:
        distillation_loss(*inputs, beta=beta, kl_weight=0.5, chunk=8)[0].backward()
    assert max(trace.sizes) == 8 * 96
    with Trace() as trace:
        composition(*inputs, beta=beta, kl_weight=0.5)[0].backward()
    assert max(trace.sizes) == 64 * 96


@pytest.mark.parametrize(
    "wanted, products",
    [
        ((False, False), 2),  # student's and teacher's logits
        ((True, False), 3),
        ((False, True), 3),
        ((True, True), 4),
    ],
)
def test_only_wanted_gradients_are_computed(wanted, products):
    inputs = case(wanted=wanted)
    with Trace() as trace:
        total, _, _ = distillation_loss(*inputs, kl_weight=0.5, chunk=2)
    assert sum("mm" in name for name in trace.names) == 3 * products
    assert total.requires_grad == any(wanted)
    leaves = [leaf for leaf in inputs[:2] if leaf.requires_grad]
    if leaves:
        found = torch.autograd.grad(total, leaves)
        expected = torch.autograd.grad(composition(*inputs, kl_weight=0.5)[0], leaves)
        for got, other in zip(found, expected):
            torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-12)


def test_no_gradients_are_computed_under_no_grad():
    inputs = case()
    with torch.no_grad(), Trace() as trace:
        found = distillation_loss(*inputs, kl_weight=0.5, chunk=2)
    assert trace.names.count("mm") == 3 * 2
    for got, wanted in zip(found, composition(*inputs, kl_weight=0.5)):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", [7, -1, -100])
def test_label_outside_the_vocabulary(label):
    hidden, head, labels, *teacher = case()
    labels[2] = label
    with pytest.raises(IndexError, match=f"labels expected from 0 to 6, got {label}"):
        distillation_loss(hidden, head, labels, *teacher)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": zeros(5)}, ValueError, r"hidden expected \(n, channels\), got \(5,\)"),
        ({"head": zeros(7)}, ValueError, r"head expected \(vocab, channels\), got \(7,\)"),
        ({"head": zeros(7, 4)}, ValueError, "head expected 3 channels as hidden, got 4"),
        (
            {"head": zeros(7, 3, dtype=torch.bfloat16)},
            TypeError,
            "head expected torch.float32 as hidden, got torch.bfloat16",
        ),
        ({"labels": zeros(5)}, TypeError, "labels expected int64, got torch.float32"),
        (
            {"labels": zeros(4, dtype=torch.int64)},
            ValueError,
            r"labels expected \(5,\), got \(4,\)",
        ),
        ({"teacher_hidden": zeros(4, 4)}, ValueError, "teacher_hidden expected 5 tokens .* got 4"),
        ({"teacher_head": zeros(7, 5)}, ValueError, "teacher_head expected 4 channels .* got 5"),
        (
            {"teacher_head": zeros(8, 4)},
            ValueError,
            "student and teacher vocabularies expected equal, got 7 and 8",
        ),
        ({"teacher_head": None}, ValueError, "teacher_head expected .* got None"),
        ({"teacher_hidden": None}, ValueError, "teacher_hidden expected .* got None"),
        (
            {"teacher_hidden": None, "teacher_head": None, "kl_weight": 0.1},
            ValueError,
            "teacher_hidden expected a tensor where kl_weight = 0.1, got None",
        ),
        ({"kl_weight": 1.5}, ValueError, "kl_weight expected between 0 and 1, got 1.5"),
        ({"kl_weight": -0.5}, ValueError, "kl_weight expected between 0 and 1, got -0.5"),
        ({"kl_weight": math.nan}, ValueError, "kl_weight expected between 0 and 1, got nan"),
        ({"beta": 1.5}, ValueError, "beta expected between 0 and 1, got 1.5"),
        ({"temperature": 0}, ValueError, "temperature expected above 0 and finite, got 0"),
        ({"chunk": 0}, ValueError, "chunk expected at least 1, got 0"),
    ],
)
def test_errors_of_the_loss(change, error, message):
    names = ("hidden", "head", "labels", "teacher_hidden", "teacher_head")
    inputs = dict(zip(names, case(dtype=torch.float32, wanted=(False, False))))
    with pytest.raises(error, match=f"^distillation_loss: {message}$"):
        distillation_loss(**inputs | change)


@pytest.mark.parametrize(
    "student, teacher, settings, message",
    [
        ((2, 3, 4), (2, 3, 4), {}, r"student_logits expected \(tokens, vocab\), got \(2, 3, 4\)"),
        ((2, 3), (3,), {}, r"teacher_logits expected \(tokens, vocab\), got \(3,\)"),
        ((2, 3), (2, 4), {}, "student and teacher vocabularies expected equal, got 3 and 4"),
        ((2, 3), (1, 3), {}, r"teacher_logits expected \(2, 3\) as student_logits, got \(1, 3\)"),
        ((2, 3), (2, 3), {"beta": -0.1}, "beta expected between 0 and 1, got -0.1"),
        ((2, 3), (2, 3), {"beta": math.nan}, "beta expected between 0 and 1, got nan"),
        (
            (2, 3),
            (2, 3),
            {"temperature": -1.0},
            "temperature expected above 0 and finite, got -1.0",
        ),
        ((2, 3), (2, 3), {"temperature": INF}, "temperature expected above 0 and finite, got inf"),
    ],
)
def test_errors_of_the_divergence(student, teacher, settings, message):
    with pytest.raises(ValueError, match=f"^generalized_jsd: {message}$"):
        generalized_jsd(zeros(*student), zeros(*teacher), **{"beta": 0.5} | settings)


def test_matrix_distance_by_hand():
    student = torch.zeros(1, 3, 2, 2)
    student[0, 0] = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    student[0, 1] = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    teacher = torch.zeros(1, 3, 2, 2)
    teacher[0, 0, 1, 1] = 1.0
    student.requires_grad_()
    found = matrix_distance(student, teacher)
    assert found.tolist() == [[5.0, 5.0, 0.0]]
    found.sum().backward()
    assert student.grad[0, 0].flatten().tolist() == pytest.approx([0.6, 0.0, 0.8, 0.0])
    assert student.grad[0, 1].flatten().tolist() == pytest.approx([0.2, 0.4, 0.4, 0.8])
    assert student.grad[0, 2].count_nonzero() == 0  # equal: neither NaN nor a direction


def test_hidden_distance_by_hand():
    student = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 1.0], [5.0, 5.0, 5.0]])
    found = hidden_distance(student, teacher)
    assert found.tolist() == [3.0, 0.0]
    found.sum().backward()
    assert student.grad[0].tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert student.grad[1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "distance, shape", [(matrix_distance, (2, 3, 4, 4)), (hidden_distance, (6, 5))]
)
def test_distances_have_gradients_on_both_sides(distance, shape):
    both = [random(*shape, seed=seed).requires_grad_() for seed in (1, 2)]
    assert distance(*both).dtype == torch.float64
    assert torch.autograd.gradcheck(distance, both)


@pytest.mark.parametrize(
    "distance, shape", [(matrix_distance, (1, 1, 1, 1)), (hidden_distance, (1, 1))]
)
def test_distances_are_computed_in_float32(distance, shape):
    student, teacher = torch.full(shape, 300.0).half(), torch.full(shape, -0.25).half()
    found = distance(student, teacher)  # 300.25 squared is no float16, and rounds to 300.2
    assert found.dtype == torch.float32
    assert found.item() == 300.25


@pytest.mark.parametrize(
    "distance, student, teacher, message",
    [
        (
            matrix_distance,
            (2, 3, 3),
            (2, 3, 3),
            r"student expected \(batch, heads, length, length\)",
        ),
        (matrix_distance, (1, 2, 3, 4), (1, 2, 3, 4), "student expected"),
        (
            matrix_distance,
            (1, 4, 3, 3),
            (1, 1, 3, 3),
            r"teacher expected \(1, 4, 3, 3\) as student",
        ),
        (hidden_distance, (1, 6, 5), (1, 6, 5), r"student expected \(tokens, channels\)"),
        (hidden_distance, (6, 5), (1, 5), r"teacher expected \(6, 5\) as student"),
    ],
)
def test_errors_of_distances(distance, student, teacher, message):
    with pytest.raises(ValueError, match=f"^{distance.__name__}: {message}"):
        distance(zeros(*student), zeros(*teacher))

"""distillation_losses: cross entropy and divergence, and their gradient in place of the logits."""

import math

import pytest
import torch
from cases import CUDA_CASES, DISTILLATION_LOSSES_CASES

from reasoners import ops, reference
from reasoners.reference import distillation_losses_inputs

CUDA_TABLE = (
    DISTILLATION_LOSSES_CASES
    | CUDA_CASES
    | {
        "odd, bf16": {"shape": (4, 1237), "dtype": torch.bfloat16, "kl_weight": 0.5},
        "a large vocabulary": {"shape": (3, 128256), "kl_weight": 0.5},
        "a large vocabulary, bf16, between": {
            "shape": (3, 128256), "dtype": torch.bfloat16, "beta": 0.5, "kl_weight": 0.5,
        },
        "a large vocabulary, fp16, temperature": {
            "shape": (3, 128256), "dtype": torch.float16, "temperature": 3.0, "beta": 0.0,
        },
    }
)  # fmt: skip


@pytest.mark.parametrize(
    "case", DISTILLATION_LOSSES_CASES.values(), ids=DISTILLATION_LOSSES_CASES.keys()
)
def test_against_reference(case):
    reference.check(ops.distillation_losses, "distillation_losses", **case)


@pytest.mark.cuda("distillation_losses")
@pytest.mark.parametrize("case", CUDA_TABLE.values(), ids=CUDA_TABLE.keys())
def test_against_reference_cuda(case):
    reference.check(ops.distillation_losses, "distillation_losses", "cuda", **case)


DEVICES = [
    pytest.param("cpu", torch.float64),
    pytest.param("cpu", torch.float32),
    pytest.param("cuda", torch.float32, marks=pytest.mark.cuda("distillation_losses")),
]


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_logits_of_minus_infinity_have_no_probability(device, dtype, beta):
    """On both sides they change nothing; on the student's alone KL(teacher || student) is infinite."""
    inputs = distillation_losses_inputs((4, 70), dtype, beta, kl_weight=0.5, temperature=1.5)
    inputs["labels"] %= 60
    more = {k: v.clone().to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
    for name in ("logits", "taught"):
        more[name][:, 60:] = -math.inf
        inputs[name] = inputs[name][:, :60].contiguous()
    found, expected = ops.distillation_losses(**more), reference.distillation_losses(**inputs)
    for got, wanted in zip(found, expected):
        torch.testing.assert_close(got.cpu(), wanted.to(dtype), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        more["logits"][:, :60].cpu(), expected[2].to(dtype), rtol=1e-5, atol=1e-6
    )
    assert (more["logits"][:, 60:] == 0).all()


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_one_side_without_probability(device, dtype):
    half = torch.zeros(1, 2, dtype=dtype, device=device)
    one = torch.tensor([[0.0, -math.inf]], dtype=dtype, device=device)
    label = torch.tensor([0], device=device)

    def kl(student, teacher, beta):
        logits = student.clone()
        found = ops.distillation_losses(logits, teacher, label, beta)[1].item()
        assert math.isinf(found) or logits.isfinite().all()
        return found

    assert kl(half, one, 0.0) == pytest.approx(math.log(2), abs=1e-6)
    assert kl(half, one, 1.0) == math.inf
    assert kl(half, one, 0.5) == pytest.approx(0.215762, abs=1e-6)
    assert kl(one, half, 0.0) == math.inf
    assert kl(one, half, 1.0) == pytest.approx(math.log(2), abs=1e-6)
    assert kl(one, half, 0.5) == pytest.approx(0.215762, abs=1e-6)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_equal_sides_and_far_ones(device, dtype):
    logits = 30 * torch.randn(5, 100, dtype=dtype, device=device)
    labels = torch.zeros(5, dtype=torch.int64, device=device)
    for beta in (0.0, 0.5, 1.0):
        same = logits.clone()
        _, kl = ops.distillation_losses(same, logits, labels, beta)
        assert kl.abs().max() < 1e-5 and same.abs().max() < 1e-5
        far = -logits
        ops.distillation_losses(far, logits, labels, beta)
        assert far.isfinite().all()


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_a_row_has_the_same_bits_alone_and_nan_stays_in_its_row(device, dtype):
    inputs = distillation_losses_inputs((6, 300), dtype, beta=0.5, kl_weight=0.5)
    inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}
    inputs["logits"][3, 7] = math.nan
    before = inputs["logits"].clone()
    ce, kl = ops.distillation_losses(**inputs)
    rows = [0, 1, 2, 4, 5]
    assert ce[3].isnan() and kl[3].isnan() and inputs["logits"][3].isnan().all()
    assert ce[rows].isfinite().all() and inputs["logits"][rows].isfinite().all()
    alone = inputs | {name: inputs[name][4:5] for name in ("taught", "labels")}
    alone["logits"] = before[4:5].clone()
    again = ops.distillation_losses(**alone)
    assert torch.equal(again[0], ce[4:5]) and torch.equal(again[1], kl[4:5])
    assert torch.equal(alone["logits"], inputs["logits"][4:5])


@pytest.mark.cuda("distillation_losses")
def test_a_label_outside_the_vocabulary_is_nan_cuda():
    inputs = distillation_losses_inputs((3, 8), kl_weight=0.0)
    inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in inputs.items()}
    inputs["labels"][:2] = torch.tensor([-1, 8])
    assert ops.distillation_losses(**inputs)[0].isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits expected shape \(tokens, vocab\)"),
        ({"logits": torch.zeros(4, 3).mT}, ValueError, "logits expected contiguous"),
        ({"logits": torch.zeros(3, 0)}, ValueError, "vocab expected at least 1, got 0"),
        ({"taught": torch.zeros(3, 5)}, ValueError, r"taught expected shape \(tokens, vocab\)"),
        ({"taught": torch.zeros(3, 4).double()}, TypeError, "taught expected dtype Float"),
        ({"labels": torch.zeros(2).long()}, ValueError, r"labels expected shape \(tokens\)"),
        ({"labels": torch.tensor([0, 4, 1])}, IndexError, "labels expected from 0 to 3, got 4"),
        ({"beta": 1.5}, ValueError, "beta expected between 0 and 1, got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature expected above 0 and finite, got 0"),
        ({"kl_weight": 2.0}, ValueError, "kl_weight expected between 0 and 1, got 2"),
        ({"taught": None}, ValueError, "taught expected a tensor where kl_weight = 1, got None"),
    ],
)
def test_errors(change, error, message):
    inputs = {
        "logits": torch.zeros(3, 4), "taught": torch.zeros(3, 4),
        "labels": torch.zeros(3).long(), "beta": 1.0,
    }  # fmt: skip
    with pytest.raises(error, match=f"^distillation_losses: {message}"):
        ops.distillation_losses(**inputs | change)

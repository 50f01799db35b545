"""What the stages minimise: zero where there is nothing to learn, and the same however a batch is cut."""

import pytest
import torch
from test_model import random_model

from reasoners.distill.data import Batch
from reasoners.distill.objectives import Objective
from reasoners.distill.recipe import Stage
from reasoners.model import CONFIGS, HybridLM

MATRICES = Stage("m", "matrix_orientation", 1, 1, 1e-3)
HIDDEN = Stage("h", "hidden_alignment", 1, 1, 1e-3)
KL = Stage("k", "end_to_end", 1, 1, 1e-3, beta=1.0)
SFT = Stage("s", "end_to_end", 1, 1, 1e-3, kl_weight=0.0)
LENGTH = 12


def batch(seed=0):
    """Two packed sequences of two documents; the second ends in 3 tokens of padding."""
    torch.manual_seed(seed)
    tokens = torch.randint(1, 256, (1, 2 * LENGTH))
    tokens[0, -3:] = 0
    boundaries = [0, 7, 12, 16, 21, 24]
    counted = [i for i in range(23) if i + 1 not in boundaries and i < 21 and i % 3]
    return Batch(
        tokens=tokens,
        cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        targets=torch.tensor(counted),
        labels=tokens[0, 1:][counted],
        real=torch.arange(2 * LENGTH) < 21,
        num_sequences=2,
    )


def gradients(stage, student, teacher, batches, recompute=False):
    objective = Objective(stage, student, teacher, recompute)
    student.zero_grad()
    count = sum(objective.count(b) for b in batches)
    loss = 0.0
    for b in batches:
        total, _ = objective(b)
        (total / count).backward()
        loss += total.item() / count
    return loss, {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}


@pytest.fixture
def teacher():
    return random_model("tiny-llama").requires_grad_(False)


@pytest.mark.parametrize("stage", [MATRICES, HIDDEN, KL], ids=lambda s: s.objective)
def test_a_copy_has_nothing_to_learn(stage, teacher):
    copy = random_model("tiny-llama")
    loss, found = gradients(stage, copy, teacher, [batch()])
    assert loss == pytest.approx(0.0, abs=1e-12)
    assert all(g.abs().max() < 1e-10 for g in found.values())


@pytest.mark.parametrize("stage", [MATRICES, HIDDEN, KL, SFT], ids=lambda s: f"{s.name}")
@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_may_be_cut(stage, recompute, teacher):
    student = random_model("tiny-llamba", seed=1)
    whole = batch()
    loss, found = gradients(stage, student, teacher, [whole])
    loss_cut, found_cut = gradients(stage, student, teacher, whole.split(2), recompute)
    assert loss > 0.1
    assert loss_cut == pytest.approx(loss, rel=1e-12)
    assert found.keys() == found_cut.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(found_cut[name], gradient, rtol=1e-9, atol=1e-12)


def test_matrices_train_what_makes_them(teacher):
    _, found = gradients(MATRICES, random_model("tiny-llamba"), teacher, [batch()])
    parts = {name.split(".", 2)[2] for name in found}
    assert parts == {"mixer.in_proj.weight", "mixer.conv.weight", "mixer.conv.bias", "mixer.D"}
    inner = 96
    gate = found["layers.0.mixer.in_proj.weight"][3 * inner : 4 * inner]
    assert gate.abs().max() == 0


def test_matrices_by_hand(teacher):
    """One document of one sequence: the mean over heads of the Frobenius norms, summed over layers."""
    student = random_model("tiny-llamba")
    tokens = torch.randint(1, 256, (1, 9))
    alone = Batch(
        tokens=tokens, cu_seqlens=torch.tensor([0, 9], dtype=torch.int32),
        targets=torch.arange(8), labels=tokens[0, 1:], real=torch.ones(9, dtype=torch.bool),
        num_sequences=1,
    )  # fmt: skip
    expected = 0.0
    with torch.no_grad():
        this, h = teacher.whole_pass(tokens), teacher.embedding(tokens)
        for taught, learning in zip(teacher.layers, student.layers):
            u = taught.norm1(h)
            difference = learning.mixer.mixing_matrix(u, this) - taught.mixer.mixing_matrix(u, this)
            expected += difference.square().sum((-1, -2)).sqrt().mean().item()
            h = taught(h, this)
    loss, _ = gradients(MATRICES, student, teacher, [alone])
    assert loss == pytest.approx(expected, rel=1e-12)


def test_hidden_states_leave_padding_out(teacher):
    student = random_model("tiny-llamba", seed=1)
    one, other = batch(), batch()
    other.tokens[0, -3:] = 77
    assert gradients(HIDDEN, student, teacher, [one])[0] == pytest.approx(
        gradients(HIDDEN, student, teacher, [other])[0], rel=1e-12
    )
    assert Objective(HIDDEN, student, teacher).count(one) == 21


def test_end_to_end_counts_targets_alone(teacher):
    student = random_model("tiny-mamba2", seed=1)
    whole = batch()
    objective = Objective(SFT, student, None)
    total, reported = objective(whole)
    logits = student(whole.tokens, whole.cu_seqlens)[0]
    log_p = logits[whole.targets].log_softmax(-1)
    expected = -log_p.gather(-1, whole.labels[:, None]).sum()
    torch.testing.assert_close(total, expected)
    assert reported.keys() == {"ce"}
    assert objective.count(whole) == len(whole.targets)
    assert Objective(KL, student, teacher)(whole)[1].keys() == {"ce", "kl"}


def test_more_student_heads_take_the_map_in_the_same_place(teacher):
    config = CONFIGS["tiny-llamba"]
    wide = {**vars(config), "num_heads": 12, "num_kv_heads": 12, "head_dim": 8}
    student = HybridLM(type(config)(**wide)).double()
    loss, _ = gradients(MATRICES, student, teacher, [batch()])
    assert loss > 0


def test_errors(teacher):
    student = random_model("tiny-mamba2")
    with pytest.raises(ValueError, match="expected mixers with a matrix"):
        Objective(MATRICES, student, teacher)(batch())
    with pytest.raises(ValueError, match="stage 'h' expected a teacher, got none"):
        Objective(HIDDEN, student, None)
    with pytest.raises(ValueError, match="stage 'k' expected a teacher, got none"):
        Objective(KL, student, None)

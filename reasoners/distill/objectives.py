"""What a stage minimises: one row of OBJECTIVES each, from a batch to a sum and what it is a sum of.

The loop divides sums by the counts of all micro-batches and processes, so a loss does not depend on
how a batch is cut. Teachers run without gradients, in the dtype they were loaded in.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reasoners.distill.data import Batch
from reasoners.distill.losses import distillation_loss, hidden_distance, matrix_distance
from reasoners.distill.recipe import Stage
from reasoners.model import HybridLM


class Objective(nn.Module):
    """The sum of a stage's loss over a batch; a module, so that sharded weights gather around it."""

    def __init__(
        self, stage: Stage, student: HybridLM, teacher: HybridLM | None, recompute: bool = False
    ):
        super().__init__()
        self.stage = stage
        self.student = student
        self.recompute = recompute
        self._teacher = [teacher]  # in a list: its weights are not this module's parameters
        needs_teacher = OBJECTIVES[stage.objective].needs_teacher or stage.kl_weight > 0
        if needs_teacher and teacher is None:
            raise ValueError(f"distill: stage {stage.name!r} expected a teacher, got none")

    @property
    def teacher(self) -> HybridLM:
        """The model to learn from."""
        return self._teacher[0]

    def count(self, batch: Batch) -> int:
        """How many terms the sum over a batch has."""
        return OBJECTIVES[self.stage.objective].count(batch)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum, with gradients, and sums to report beside it."""
        return OBJECTIVES[self.stage.objective].sum(self, batch)


def _taught_layers(objective: Objective, batch: Batch):
    """Every layer's input in the teacher, with the teacher's and the student's layer and the pass."""
    teacher = objective.teacher
    with torch.no_grad():
        this = teacher.whole_pass(batch.tokens, batch.cu_seqlens)
        h = teacher.embedding(batch.tokens)
    for taught, learning in zip(teacher.layers, objective.student.layers, strict=True):
        with torch.no_grad():
            after = taught(h, this)
        yield h, after, taught, learning, this
        h = after


def matrix_orientation(objective: Objective, batch: Batch):
    """MOHAWK's first stage: each mixer's matrix against the teacher's attention map, head by head.

    Frobenius norm of the difference over each packed sequence; student heads that are more or fewer
    than the teacher's take the map of the teacher head in the same place.
    """
    total = torch.zeros((), device=batch.tokens.device)
    rows = batch.num_sequences
    for h, _, taught, learning, this in _taught_layers(objective, batch):
        if not hasattr(learning.mixer, "mixing_matrix"):
            raise ValueError(
                f"distill: matrix_orientation expected mixers with a matrix (attention, discrete_mamba2), "
                f"got {type(learning.mixer).__name__}"
            )
        with torch.no_grad():
            u = taught.norm1(h)

        def distance(u, taught=taught, learning=learning, this=this):
            with torch.no_grad():
                wanted = taught.mixer.mixing_matrix(u, this, rows)
            got = learning.mixer.mixing_matrix(u, this, rows)
            heads = torch.arange(got.shape[1], device=got.device)
            return matrix_distance(got, wanted[:, heads * wanted.shape[1] // got.shape[1]])

        # One layer's matrices at a time: they are made again in the backward pass.
        total = total + checkpoint(distance, u, use_reentrant=False).mean(1).sum()
    return total, {}


def hidden_alignment(objective: Objective, batch: Batch):
    """MOHAWK's second stage: each layer's output from the teacher's input, against the teacher's output."""
    total = torch.zeros((), device=batch.tokens.device)
    real = batch.real
    for h, after, _, learning, this in _taught_layers(objective, batch):
        if objective.recompute:
            got = checkpoint(learning, h, this, use_reentrant=False)
        else:
            got = learning(h, this)
        total = total + hidden_distance(got[0], after[0])[real].sum()
    return total, {}


def end_to_end(objective: Objective, batch: Batch):
    """The teacher's distribution, the data's tokens, or both: (1 - w) CE + w KL at every counted token."""
    stage, student = objective.stage, objective.student
    hidden = student.hidden(batch.tokens, batch.cu_seqlens, objective.recompute)
    hidden = hidden[0, batch.targets]
    taught, taught_head = None, None
    if stage.kl_weight > 0:
        with torch.no_grad():
            taught = objective.teacher.hidden(batch.tokens, batch.cu_seqlens)[0, batch.targets]
        taught_head = objective.teacher.head.weight
    total, ce, kl = distillation_loss(
        hidden, student.head.weight, batch.labels, taught, taught_head, beta=stage.beta,
        temperature=stage.temperature, kl_weight=stage.kl_weight,
    )  # fmt: skip
    return total, {"ce": ce, "kl": kl} if stage.kl_weight > 0 else {"ce": ce}


@dataclass(frozen=True)
class _Row:
    """sum: objective, batch -> sum and reported sums. count: batch -> terms of the sum."""

    sum: Callable[[Objective, Batch], tuple[Tensor, dict[str, Tensor]]]
    count: Callable[[Batch], int]
    needs_teacher: bool


OBJECTIVES = {
    "matrix_orientation": _Row(matrix_orientation, lambda batch: batch.num_sequences, True),
    "hidden_alignment": _Row(hidden_alignment, lambda batch: batch.num_tokens, True),
    "end_to_end": _Row(end_to_end, lambda batch: len(batch.targets), False),
}

"""The processes of one training: one by itself, or several under torchrun with sharded weights."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from reasoners.distill.objectives import Objective
from reasoners.model import parameter_dtype


@dataclass(frozen=True)
class Workers:
    """This process among the others. rank: which; count: of how many; device: its own."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """The sums of numbers over all processes, in float64."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def wait(self):
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()

    def shard(self, objective: Objective, dtype: torch.dtype):
        """Spread the student's weights, in float32, over the processes; layers gather theirs as they run.

        Decay parameters stay whole and float32 everywhere, see model.parameter_dtype.
        """
        if self.count == 1:
            return
        student = objective.student.float()
        fine = {p for n, p in student.named_parameters() if _is_fine(n)}
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        settings = {"mp_policy": precision, "ignored_params": fine}
        for layer in student.layers:
            fully_shard(layer.mixer, **settings)
            if hasattr(layer.mixer, "mixing_matrix"):
                register_fsdp_forward_method(layer.mixer, "mixing_matrix")
            fully_shard(layer, **settings)
        fully_shard(objective, **settings)

    def reduce_whole(self, objective: Objective):
        """Add up the gradients of the parameters that are not sharded, as FSDP averages the others."""
        if self.count == 1:
            return
        for name, parameter in objective.student.named_parameters():
            if _is_fine(name) and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.count


def _is_fine(name: str) -> bool:
    return parameter_dtype(name, torch.bfloat16) == torch.float32


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@contextmanager
def join(device: str | None) -> Iterator[Workers]:
    """Become one of torchrun's processes, or stay alone.

    device: "cpu", "cuda" or None for CUDA if there is a GPU. What was sharded must not outlive the
    block: gloo's threads end with the last object that names their group, and one that lets go of a
    tensor while the interpreter shuts down aborts the process.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    count, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    own = torch.device(kind)
    if own.type == "cuda" and own.index is None:
        own = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(own)
    if count == 1:
        yield Workers(0, 1, own)
        return
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Workers(rank, count, own)
    finally:
        dist.destroy_process_group()
        gc.collect()  # sharded modules are in cycles

"""A training's folder of checkpoints: each written whole or not at all, the last good one kept.

A checkpoint is a folder of torch.distributed.checkpoint, which several processes write together and
any number of them can read, beside a small JSON file of facts. A new one is complete before it takes
its name, and only then the one before it goes.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

PREFIX = "checkpoint-"


class Checkpoints:
    """The checkpoints in `folder`; processes of one training call its methods together."""

    def __init__(self, folder: Path):
        self.folder = folder

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return max(self.folder.glob(f"{PREFIX}*/facts.json"), default=None, key=_order)

    def facts(self) -> dict | None:
        """What the newest checkpoint says of itself, None without one."""
        latest = self.latest()
        return None if latest is None else json.loads(latest.read_text())

    def save(self, number: int, facts: dict, tensors: dict[str, Tensor]):
        """Write checkpoint `number`, unless it is there, then remove the older ones.

        Raises OSError when it cannot be written, a full disk for one; what was there stays.
        """
        first = not dist.is_initialized() or dist.get_rank() == 0
        scratch, final = self.folder / "saving", self.folder / f"{PREFIX}{number:08d}"
        before = self.latest()
        if before is not None and before.parent == final:
            return
        try:
            if first:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(scratch, ignore_errors=True)
            with _no_word_of_one_process():
                dcp.save(tensors, checkpoint_id=scratch, no_dist=not dist.is_initialized())
            if first:
                Path(scratch, "facts.json").write_text(json.dumps(facts))
                os.replace(scratch, final)
        except Exception as error:
            if first:
                shutil.rmtree(scratch, ignore_errors=True)
            last = f"the last good one is {before.parent}" if before else "there is none before it"
            raise OSError(
                f"{final}: the checkpoint could not be written ({error}); {last}"
            ) from error
        if first:
            for old in self.folder.glob(f"{PREFIX}*"):
                if old != final:
                    shutil.rmtree(old)

    def load(self, tensors: dict[str, Tensor]):
        """Read the newest checkpoint into these tensors, in place.

        Raises ValueError if it lacks one of them or has it in another shape.
        """
        path = self.latest().parent
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            size = getattr(saved.get(name), "size", None)
            if size is None or tuple(size) != tuple(tensor.shape):
                found = "none" if size is None else f"shape {tuple(size)}"
                raise ValueError(
                    f"{path}: tensor {name!r} expected with shape {tuple(tensor.shape)}, got {found}"
                )
        with _no_word_of_one_process():
            dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())

    def remove(self):
        """Remove all of them: the training has ended."""
        for old in self.folder.glob(f"{PREFIX}*"):
            shutil.rmtree(old)


@contextmanager
def _no_word_of_one_process() -> Iterator[None]:
    """Saving without other processes is meant here, not a mistake to be warned of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _order(facts: Path) -> str:
    return facts.parent.name

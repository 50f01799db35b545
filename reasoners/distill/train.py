"""The training loop: from a teacher's folder to a student's, stage by stage, resumable anywhere.

Beside the student's files the folder gets `training/`: metrics.jsonl, curves.png, recipe.json and, until
the end, the newest checkpoint. The same command goes on from there, to the same weights (bit for bit
on a CPU). Weights and gradients add up in float32 whatever the dtype of the model.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from reasoners.checkpoint import (
    copy_tokenizer,
    load_model,
    load_tokenizer,
    save_model,
    student_from_teacher,
)
from reasoners.distill.checkpoints import Checkpoints
from reasoners.distill.data import Batch, Batches, open_source
from reasoners.distill.objectives import Objective
from reasoners.distill.optimizer import Optimizer, decayed_names, learning_rate
from reasoners.distill.progress import Metrics, Rate, bar
from reasoners.distill.recipe import Recipe, Stage
from reasoners.distill.tokenizer import build_tokenizer
from reasoners.distill.workers import Workers, join, whole
from reasoners.interrupt import deferred_interrupt
from reasoners.model import HybridLM, parameter_dtype

TOKENIZER_EXAMPLES = 20000


def distill(
    recipe: Recipe,
    out: str | os.PathLike,
    *,
    teacher: str | os.PathLike | None = None,
    data: str | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    save_every_s: float = 600.0,
    show: bool = True,
) -> Path:
    """Train the student of a recipe into the model folder `out`; a second call resumes or returns at once.

    teacher: a Llama's folder, None for a recipe that starts from nothing. data: where problems come
    from, see open_source; None for the recipe's. device: None for CUDA if there is a GPU. dtype: of the
    model's products; None for bfloat16 on CUDA, float32 on a CPU. save_every_s: seconds between
    checkpoints; Ctrl-C writes one too. Under torchrun the processes share the work.

    Raises ValueError for a teacher, recipe or data that do not fit each other, or a folder that holds
    another training; FloatingPointError when loss or gradients are not finite: the step is not taken and
    its batch is stored; OSError when a checkpoint cannot be written; KeyboardInterrupt after Ctrl-C.
    """
    with join(device) as workers:
        if dtype is None:
            dtype = torch.bfloat16 if workers.device.type == "cuda" else torch.float32
        _train(_Training(recipe, Path(out), teacher, data, workers, dtype), save_every_s, show)
    return Path(out)


def _train(training: "_Training", save_every_s: float, show: bool):
    if not training.finished:
        try:
            training.run(save_every_s, show)
        finally:
            training.batches.close()


class _Training:
    """What all stages share: teacher, tokenizer, data, and the folder."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        teacher: str | os.PathLike | None,
        data: str | None,
        workers: Workers,
        dtype: torch.dtype,
    ):
        self.recipe, self.out, self.workers, self.dtype = recipe, out, workers, dtype
        self.folder = out / "training"
        self.checkpoints = Checkpoints(self.folder)
        self.metrics = Metrics(self.folder)
        self.source_name = data or recipe.data
        if self.source_name is None:
            raise ValueError(f"distill: data expected, recipe {recipe.name!r} names none")
        if (teacher is None) != (recipe.student.kind == "llama"):
            wanted = "none" if recipe.student.kind == "llama" else "a folder"
            raise ValueError(
                f"distill: teacher of recipe {recipe.name!r} expected {wanted}, got {teacher}"
            )
        self._claim(teacher)
        if self.finished:
            return
        self.teacher_folder = teacher
        self.teacher = None
        if teacher is not None:
            self.teacher = load_model(teacher, dtype=dtype, device=workers.device)
            self.teacher.requires_grad_(False)
        source = open_source(self.source_name, recipe.seed, recipe.instruction)
        self.tokenizer = self._tokenizer(source)
        vocab = len(self.tokenizer)
        if self.teacher is not None and vocab > self.teacher.config.vocab_size:
            raise ValueError(
                f"distill: teacher and student vocabularies expected to be one, got a tokenizer of "
                f"{vocab} tokens and a teacher of {self.teacher.config.vocab_size}"
            )
        # A GPU takes in tokens faster than one process makes them.
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        processes = min(cores - 1, 12) if workers.device.type == "cuda" else 0
        self.batches = Batches(
            source, self.tokenizer, length=recipe.length, processes=max(processes, 0)
        )

    @property
    def finished(self) -> bool:
        """Whether the student is there already."""
        return (self.out / "config.json").exists() and self.checkpoints.latest() is None

    def _claim(self, teacher):
        """Write down what this folder is a training of, or see that it is this one.

        A folder in which nothing was saved yet is free: a first try may have had a typo.
        """
        path = self.folder / "recipe.json"
        ours = {
            "recipe": json.loads(json.dumps(dataclasses.asdict(self.recipe))),
            "teacher": None if teacher is None else str(teacher),
            "data": self.source_name,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        begun = self.finished or self.checkpoints.latest() is not None
        if begun and not path.exists():
            raise ValueError(f"distill: {self.out} expected new or a training, got a model folder")
        if begun:
            differing = _difference(json.loads(path.read_text()), ours)
            if differing:
                raise ValueError(f"distill: {self.out} holds another training: {differing}")
        elif self.workers.first:
            shutil.rmtree(self.folder / "tokenizer", ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".tmp")
            scratch.write_text(json.dumps(ours, indent=2) + "\n")
            os.replace(scratch, path)

    def _tokenizer(self, source):
        if self.teacher_folder is not None:
            return load_tokenizer(self.teacher_folder)
        folder = self.folder / "tokenizer"
        if self.workers.first and not (folder / "tokenizer.json").exists():
            examples = (source.example(index) for index in range(TOKENIZER_EXAMPLES))
            texts = (
                text
                for example in examples
                for text in (example.text, *(m["content"] for m in example.messages))
                if text
            )
            build_tokenizer(texts, self.recipe.student.vocabulary).save_pretrained(folder)
        self.workers.wait()
        return load_tokenizer(folder)

    def run(self, save_every_s: float, show: bool):
        """All stages from where the newest checkpoint stands."""
        facts = self.checkpoints.facts()
        first = facts["stage"] if facts else 0
        if self.workers.first:
            self.metrics.restart(first, facts["step"] if facts else 0)
        student = None
        with deferred_interrupt() as interrupted:
            for index, stage in enumerate(self.recipe.stages):
                if index < first:
                    continue
                student = self._student(student, stage)
                run = _StageRun(self, index, student, facts if index == first else None)
                run.run(save_every_s, show and self.workers.first, interrupted)
                run.save()
                student = self._whole(student)
        self._write(student)

    def _student(self, previous: HybridLM | None, stage: Stage) -> HybridLM:
        """The model a stage begins with: fresh, or the stage before's with more layers replaced."""
        teacher = self.teacher
        config = self.recipe.student.model_config(
            teacher.config if teacher else None, len(self.tokenizer), stage.keep
        )
        if previous is not None and previous.config == config:
            return previous
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            if teacher is None:
                student = HybridLM(config)
                for name, parameter in student.named_parameters():
                    parameter.data = parameter.data.to(parameter_dtype(name, self.dtype))
            else:
                student = student_from_teacher(teacher, config)
        student = student.to(self.workers.device)
        if previous is not None:
            _copy_common(previous, student)
        return student

    def _whole(self, student: HybridLM) -> HybridLM:
        """A student whose weights are not sharded; itself, where there is one process."""
        if self.workers.count == 1:
            return student
        with torch.device("meta"):
            gathered = HybridLM(student.config)
        state = {name: whole(tensor) for name, tensor in student.state_dict().items()}
        return gathered.assign(state)

    def _write(self, student: HybridLM):
        """The finished student, in the model's dtype, with its tokenizer."""
        if not self.workers.first:
            return
        for name, parameter in student.named_parameters():
            parameter.data = parameter.data.to(parameter_dtype(name, self.dtype))
        save_model(student, self.out)
        if self.teacher_folder is not None:
            copy_tokenizer(self.teacher_folder, self.out)
        else:
            copy_tokenizer(self.folder / "tokenizer", self.out)
        self.metrics.draw([stage.name for stage in self.recipe.stages])
        self.checkpoints.remove()


class _StageRun:
    """One stage: objective, optimizer and the position in it."""

    def __init__(self, training: _Training, index: int, student: HybridLM, facts: dict | None):
        self.training, self.index = training, index
        self.workers, self.recipe = training.workers, training.recipe
        self.stage = stage = self.recipe.stages[index]
        if stage.batch % (self.recipe.micro_batch * self.workers.count):
            raise ValueError(
                f"distill: stage {stage.name!r}: batch expected a multiple of micro_batch times "
                f"processes = {self.recipe.micro_batch * self.workers.count}, got {stage.batch}"
            )
        self.steps = stage.num_steps(self.recipe.length)
        self.step = self.tokens = 0
        self.objective = Objective(stage, student, training.teacher, self.recipe.recompute)
        decayed = decayed_names(student)
        student.requires_grad_(False)
        for _, parameter in stage.trained(student):
            parameter.requires_grad_(True)
        self.workers.shard(self.objective, training.dtype)
        if self.recipe.compile:
            for layer in [*student.layers, *(training.teacher.layers if training.teacher else ())]:
                layer.compile()
        self.optimizer = Optimizer(
            stage.trained(student),
            betas=stage.betas,
            weight_decay=stage.weight_decay,
            decayed=decayed,
        )
        if facts is not None:
            training.checkpoints.load(self._tensors())
            self.optimizer.round()
            self.step, self.tokens = facts["step"], facts["tokens"]
            training.batches.load_state_dict(facts["batches"])

    def _tensors(self) -> dict[str, Tensor]:
        model = {n: p.detach() for n, p in self.objective.student.named_parameters()}
        return {**{f"{n}/weight": t for n, t in model.items()}, **self.optimizer.tensors()}

    def save(self):
        """Write a checkpoint of this moment."""
        training = self.training
        before = sum(s.num_steps(self.recipe.length) for s in self.recipe.stages[: self.index])
        facts = {
            "stage": self.index,
            "step": self.step,
            "tokens": self.tokens,
            "batches": training.batches.state_dict(),
        }
        training.checkpoints.save(before + self.step, facts, self._tensors())
        if self.workers.first:
            training.metrics.draw([stage.name for stage in self.recipe.stages])

    def run(self, save_every_s: float, show: bool, interrupted: Callable[[], bool]):
        """Steps until the stage ends; leaves a checkpoint behind at Ctrl-C and now and then."""
        saved_s = time.perf_counter()
        rate = Rate()
        title = f"{self.stage.name} ({self.index + 1} of {len(self.recipe.stages)})"
        with bar(title, self.step, self.steps, show) as advance:
            while self.step < self.steps:
                line, stop, due = self._step(
                    interrupted(), time.perf_counter() - saved_s > save_every_s
                )
                line["tokens_per_s"] = round(rate.add(line.pop("new_tokens")), 1)
                if self.workers.first:
                    self.training.metrics.write(line)
                advance(line)
                if stop or due:
                    self.save()
                    saved_s = time.perf_counter()
                if stop:
                    raise KeyboardInterrupt
        self.optimizer.close()

    def _step(self, stop: bool, due: bool) -> tuple[dict, bool, bool]:
        """One optimizer step; the metrics, and what any process wants: to stop, to save."""
        stage, workers = self.stage, self.workers
        batch = self.training.batches.take(stage.batch)
        count = max(self.objective.count(batch), 1)
        parts = batch.split(stage.batch // self.recipe.micro_batch)[workers.rank :: workers.count]
        sums: dict[str, Tensor] = {}
        for part in parts:
            total, reported = self.objective(part.to(workers.device))
            # FSDP averages gradients over the processes; the sum over them is wanted.
            (total * (workers.count / count)).backward()
            for name, value in {"loss": total.detach(), **reported}.items():
                sums[name] = sums.get(name, 0) + value
        workers.reduce_whole(self.objective)
        values = [float(value) for value in sums.values()]
        *values, stop, due = workers.sum([*values, float(stop), float(due)])
        found = {name: value / count for name, value in zip(sums, values, strict=True)}
        norm = self.optimizer.clip(stage.clip)
        if not (math.isfinite(found["loss"]) and math.isfinite(norm)):
            self._fail(batch, found["loss"], norm)
        schedule = (stage.schedule, stage.warmup, stage.decay)
        lr = learning_rate(self.step, self.steps, stage.lr, *schedule)
        self.optimizer.step(lr)
        self.step += 1
        self.tokens += batch.tokens.numel()
        line = {"stage": self.index, "step": self.step - 1, "tokens": self.tokens, **found}
        line |= {"lr": lr, "grad_norm": norm, "new_tokens": batch.num_tokens}
        return line, stop > 0, due > 0

    def _fail(self, batch: Batch, loss: float, norm: float):
        """The step is not taken; the batch is stored, so that it can be looked at."""
        self.optimizer.forget_gradients()
        path = self.training.folder / "bad_batch.json"
        if self.workers.first:
            fields = {"tokens": batch.tokens[0].tolist(), "cu_seqlens": batch.cu_seqlens.tolist()}
            path.write_text(json.dumps(fields))
        last = self.training.checkpoints.latest()
        raise FloatingPointError(
            f"distill: stage {self.stage.name!r}, step {self.step}: loss {loss}, gradient norm {norm}; "
            f"the batch is stored in {path}; "
            + (
                f"the last good checkpoint is {last.parent}"
                if last
                else "there is no checkpoint yet"
            )
        )


def _copy_common(source: HybridLM, target: HybridLM):
    """Copy all but the mixers whose kind differs."""
    state = source.state_dict()
    with torch.no_grad():
        for name, tensor in target.state_dict().items():
            layer = int(name.split(".")[1]) if ".mixer." in name else None
            if layer is None or source.config.mixers[layer] == target.config.mixers[layer]:
                tensor.copy_(whole(state[name]))


def _difference(theirs: dict, ours: dict, prefix: str = "") -> str:
    """The first place where two nested tables differ, in words; empty where they are equal."""
    for name in {**theirs, **ours}:
        a, b = theirs.get(name), ours.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _difference(a, b, f"{prefix}{name}.")
            if inner:
                return inner
        elif a != b:
            return f"{prefix}{name} was {a!r}, now it is {b!r}"
    return ""

"""Recipes: what a student is and the table of stages that trains it, as TOML.

Those that come with the package stand in `reasoners/distill/recipes/`; `load_recipe` takes their names
or any file. A key that is not listed below is an error, not a silent default.
"""

import dataclasses
import math
import os
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from reasoners.model import HybridLM, ModelConfig, student_config

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    objective: "matrix_orientation" and "hidden_alignment" (MOHAWK's first two stages, layer by layer
    on the teacher's inputs) or "end_to_end": (1 - kl_weight) CE + kl_weight D, where D is the
    generalised Jensen-Shannon divergence at `temperature`: beta 0 is KL(teacher || student), 1
    KL(student || teacher), as in TRL and Liger.
    tokens: to read, padding included. batch: packed sequences of a step. train: patterns of parameter
    names, the others are frozen. keep: attention layers that a hybrid still has in this stage (stepwise
    replacement); None for those of the student. schedule, warmup, decay: see learning_rate.
    """

    name: str
    objective: Literal["matrix_orientation", "hidden_alignment", "end_to_end"]
    tokens: int
    batch: int
    lr: float
    train: tuple[str, ...] = ("*",)
    keep: tuple[int, ...] | None = None
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.1
    decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    beta: float = 0.0
    temperature: float = 1.0
    kl_weight: float = 1.0

    def __post_init__(self):
        for name in ("tokens", "batch", "lr", "clip", "temperature"):
            _check(
                getattr(self, name) > 0, f"stage {self.name!r}: {name}", "> 0", getattr(self, name)
            )
        for name in ("beta", "kl_weight"):
            value = getattr(self, name)
            _check(0 <= value <= 1, f"stage {self.name!r}: {name}", "0 to 1", value)

    def num_steps(self, length: int) -> int:
        """Steps that read `tokens` tokens in sequences of `length`."""
        return math.ceil(self.tokens / (self.batch * length))

    def trained(self, model: HybridLM) -> list[tuple[str, object]]:
        """The (name, parameter) pairs that `train` names; ValueError for a pattern that names none."""
        parameters = list(model.named_parameters())
        for pattern in self.train:
            if not any(fnmatchcase(name, pattern) for name, _ in parameters):
                raise ValueError(
                    f"distill: stage {self.name!r}: train expected patterns of parameter names such as "
                    f"{parameters[-1][0]!r}, got {pattern!r}, which names none"
                )
        return [(n, p) for n, p in parameters if any(fnmatchcase(n, t) for t in self.train)]


@dataclass(frozen=True)
class Student:
    """What is trained.

    kind: "llamba", "mamba1" or "mamba2" start from the teacher, see student_config; "llama" starts
    from nothing, shaped by `config` (fields of ModelConfig; `layers` for the number of them) with a
    tokenizer of `vocabulary` entries that is trained on the data.
    """

    kind: Literal["llamba", "mamba1", "mamba2", "llama"]
    keep: tuple[int, ...] = ()
    state_dim: int | None = None
    config: dict | None = None
    vocabulary: int | None = None

    def __post_init__(self):
        if self.kind == "llama":
            _check(
                self.config and self.vocabulary,
                "student",
                "config and vocabulary",
                "neither or one",
            )
        else:
            given = [n for n in ("config", "vocabulary") if getattr(self, n) is not None]
            _check(not given, "student", "config and vocabulary for kind llama alone", given)

    def model_config(
        self, teacher: ModelConfig | None, vocab_size: int, keep: tuple[int, ...] | None
    ) -> ModelConfig:
        """The student's shape, with other attention layers if `keep` is not None."""
        if self.kind == "llama":
            fields = dict(self.config)
            layers = fields.pop("layers")
            return ModelConfig(vocab_size=vocab_size, mixers=("attention",) * layers, **fields)
        return student_config(
            teacher, self.kind, self.keep if keep is None else keep, self.state_dim
        )


@dataclass(frozen=True)
class Recipe:
    """A student and its stages.

    length: tokens of a packed sequence. micro_batch: sequences of one forward and backward pass.
    recompute: keep only the layers' inputs for the backward pass. compile: run layers through
    torch.compile. seed: of fresh weights and of the data's order. data: where problems come from when the
    command does not say, see open_source; instruction: follows every question.
    """

    name: str
    student: Student
    stages: tuple[Stage, ...]
    length: int = 2048
    micro_batch: int = 1
    recompute: bool = False
    compile: bool = False
    seed: int = 0
    data: str | None = None
    instruction: str = ""

    def __post_init__(self):
        _check(self.stages, "recipe: stages", "one or more", "none")
        _check(self.length > 1, "recipe: length", "> 1", self.length)
        for stage in self.stages:
            _check(
                stage.batch % self.micro_batch == 0,
                f"stage {stage.name!r}: batch",
                f"a multiple of micro_batch = {self.micro_batch}",
                stage.batch,
            )


def load_recipe(name: str | os.PathLike) -> Recipe:
    """A recipe of the package by its name, or any TOML file.

    Raises FileNotFoundError, or ValueError for a missing, unknown or wrong field.
    """
    path = Path(name)
    known = {p.stem: p for p in RECIPES.glob("*.toml")}
    path = known.get(str(name), path)
    if not path.is_file():
        raise FileNotFoundError(
            f"recipe expected a file or one of {', '.join(sorted(known))}, got {str(name)!r}"
        )
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, got {error}") from error
    try:
        return recipe_from_dict({"name": path.stem, **data})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def recipe_from_dict(data: dict) -> Recipe:
    """The inverse of dataclasses.asdict, and the content of a TOML file."""
    return _build(Recipe, data, "recipe")


def _build(kind: type, data: dict, where: str):
    """A dataclass from a table, every field checked against its annotation."""
    _check(isinstance(data, dict), where, "a table", data)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    _check(not unknown, where, f"keys among {', '.join(fields)}", ", ".join(unknown))
    hints = get_type_hints(kind)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        _check(not required or name in data, where, f"a key {name!r}", "none")
    return kind(**{name: _value(hints[name], v, f"{where}: {name}") for name, v in data.items()})


def _value(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    options = get_args(hint)
    if get_origin(hint) is Literal:
        _check(value in options, where, " or ".join(options), repr(value))
        return value
    if get_origin(hint) is tuple:
        _check(isinstance(value, list | tuple), where, "a list", repr(value))
        item = options[0]
        return tuple(_value(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if type(None) in options:
        (inner,) = set(options) - {type(None)}
        return None if value is None else _value(inner, value, where)
    accepted = (int, float) if hint is float else hint
    right = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
    _check(right, where, hint.__name__, repr(value))
    return float(value) if hint is float else value


def _check(holds, what: str, expected: str, got):
    if not holds:
        raise ValueError(f"{what} expected {expected}, got {got}")

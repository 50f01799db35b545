"""Trainings of tiny models, end to end: what they leave behind, and what may happen on the way."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import make_folder
from safetensors.torch import load_file

import reasoners.distill.checkpoints
from reasoners.checkpoint import load_config, load_model
from reasoners.distill import Recipe, Stage, Student, distill
from reasoners.distill.objectives import Objective
from reasoners.distill.train import _StageRun
from reasoners.llm import LLM
from reasoners.sampling import SamplingParams

LENGTH = 64
KL = Stage("kl", "end_to_end", tokens=6 * 2 * LENGTH, batch=2, lr=3e-3, warmup=1)
MATRICES = replace(KL, name="m", objective="matrix_orientation", train=("layers.*.mixer.*",))
HIDDEN = replace(MATRICES, name="h", objective="hidden_alignment")
SFT = replace(KL, name="sft", kl_weight=0.0)


def recipe(kind="llamba", stages=(KL,), keep=(), **fields):
    return Recipe("tiny", Student(kind, keep, state_dim=16), stages, length=LENGTH, **fields)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "teacher")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"question": f"{a} + {b}?", "answer": f"#### {a + b}"} for a in range(9) for b in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def train(teacher, data):
    def train(recipe, out, **options):
        options = {"teacher": teacher, "data": data, "device": "cpu", "show": False} | options
        return distill(recipe, out, **options)

    return train


def metrics(out):
    return [json.loads(line) for line in (out / "training/metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(out / "model.safetensors")


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_mohawk_from_folder_to_folder(train, tmp_path):
    long = replace(KL, tokens=24 * 2 * LENGTH)
    out = train(recipe(stages=(MATRICES, HIDDEN, long)), tmp_path / "student")
    lines = metrics(out)
    assert [sum(m["stage"] == s for m in lines) for s in range(3)] == [6, 6, 24]
    for stage in range(3):
        losses = [m["loss"] for m in lines if m["stage"] == stage]
        assert losses[-1] < losses[0]
    assert {"step", "tokens", "lr", "grad_norm", "tokens_per_s", "ce", "kl"} <= lines[-1].keys()
    assert (out / "training/curves.png").stat().st_size > 10_000
    assert not list(out.glob("training/checkpoint-*"))
    assert load_config(out)[1] == "llamba"
    output = LLM(out, device="cpu").generate(["2 + 2?"], SamplingParams(n=2, max_tokens=4))
    assert len(output[0].outputs) == 2


def test_hybrid_by_stepwise_replacement(train, tmp_path):
    first = replace(KL, name="one layer", keep=(0, 1, 3), train=("layers.*.mixer.*",), beta=1.0)
    second = replace(KL, name="two layers", beta=0.5)
    out = train(recipe("mamba2", (first, second, SFT), keep=(0, 3)), tmp_path / "student")
    config, layout = load_config(out)
    assert (config.mixers, layout) == (
        ("attention", "mamba2", "mamba2", "attention"),
        "mambainllama",
    )
    assert "kl" not in metrics(out)[-1]


def test_what_is_frozen_stays(train, teacher, tmp_path):
    out = train(
        recipe("mamba1", (replace(KL, train=("layers.*.mixer.in_proj.*",)),)), tmp_path / "s"
    )
    before, after = load_model(teacher, dtype=torch.float32), load_model(out, dtype=torch.float32)
    changed = set()
    for name, tensor in after.state_dict().items():
        if ".mixer." not in name:
            assert torch.equal(tensor, before.state_dict()[name]), name
        elif name.endswith("mixer.D"):
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif name.endswith("in_proj.weight"):
            changed.add(name)
    assert len(changed) == 4


def test_a_second_call_does_nothing(train, tmp_path, monkeypatch):
    out = train(recipe(), tmp_path / "student")
    before = (out / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(_StageRun, "run", None)
    assert train(recipe(), out) == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_micro_batches_do_not_change_the_training(train, tmp_path):
    stages = (replace(KL, batch=4),)
    whole = train(recipe(stages=stages, micro_batch=4), tmp_path / "whole")
    cut = train(recipe(stages=stages, micro_batch=1, recompute=True), tmp_path / "cut")
    for one, other in zip(metrics(whole), metrics(cut), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_compiled_layers_train_the_same(train, tmp_path):
    table = recipe("mamba2", (replace(KL, tokens=3 * 2 * LENGTH),), keep=(1,))
    plain = train(table, tmp_path / "plain")
    compiled = train(replace(table, compile=True), tmp_path / "compiled")
    for one, other in zip(metrics(plain), metrics(compiled), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize("stop_at", [1, 5, 8])
@pytest.mark.parametrize("how", ["interrupt", "crash"])
def test_interrupt_anywhere_and_resume(train, tmp_path, monkeypatch, stop_at, how):
    """Ctrl-C leaves a checkpoint; a crash the one before it. The weights at the end are the same."""
    table = recipe(stages=(HIDDEN, KL))
    whole = train(table, tmp_path / "whole")
    with monkeypatch.context() as patch:
        step, count = _StageRun._step, iter(range(100))

        def failing(self, *arguments):
            if next(count) == stop_at:
                if how == "crash":
                    raise RuntimeError("power cut")
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, *arguments)

        patch.setattr(_StageRun, "_step", failing)
        with pytest.raises(KeyboardInterrupt if how == "interrupt" else RuntimeError):
            train(table, tmp_path / "parts", save_every_s=0.0)
    (checkpoint,) = (tmp_path / "parts/training").glob("checkpoint-*")
    if how == "crash":
        assert checkpoint.name == f"checkpoint-{stop_at:08d}"
    parts = train(table, tmp_path / "parts")
    assert same_weights(whole, parts)
    losses = [[m["loss"] for m in metrics(out)] for out in (whole, parts)]
    assert losses[0] == losses[1]


def test_half_precision_resumes_with_its_float32_weights(train, tmp_path, monkeypatch):
    table = recipe(stages=(replace(KL, lr=1e-5),))
    whole = train(table, tmp_path / "whole", dtype=torch.bfloat16)
    with monkeypatch.context() as patch:
        step, count = _StageRun._step, iter(range(100))

        def failing(self, *arguments):
            if next(count) == 3:
                raise RuntimeError("power cut")
            return step(self, *arguments)

        patch.setattr(_StageRun, "_step", failing)
        with pytest.raises(RuntimeError):
            train(table, tmp_path / "parts", dtype=torch.bfloat16, save_every_s=0.0)
    assert same_weights(whole, train(table, tmp_path / "parts", dtype=torch.bfloat16))
    assert weights(whole)["backbone.embedding.weight"].dtype == torch.bfloat16


def test_nan_stops_before_it_spreads(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        forward, count = Objective.forward, iter(range(100))

        def poisoned(self, batch):
            total, reported = forward(self, batch)
            return (total * float("nan") if next(count) == 6 else total), reported

        patch.setattr(Objective, "forward", poisoned)
        message = (
            r"stage 'kl', step 3: loss nan, .* batch is stored in .*bad_batch\.json; the last good"
        )
        with pytest.raises(FloatingPointError, match=message):
            train(recipe(), tmp_path / "student", save_every_s=0.0)
    stored = json.loads((tmp_path / "student/training/bad_batch.json").read_text())
    assert len(stored["tokens"]) == 2 * LENGTH
    whole = train(recipe(), tmp_path / "whole")
    assert same_weights(whole, train(recipe(), tmp_path / "student"))


def test_a_full_disk_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        save, count = reasoners.distill.checkpoints.dcp.save, iter(range(100))

        def full(state, checkpoint_id, no_dist):
            if next(count) == 2:
                Path(checkpoint_id).mkdir(exist_ok=True)
                Path(checkpoint_id, "half").write_text("x")
                raise OSError(errno.ENOSPC, "No space left on device")
            return save(state, checkpoint_id=checkpoint_id, no_dist=no_dist)

        patch.setattr(reasoners.distill.checkpoints.dcp, "save", full)
        message = (
            r"checkpoint-00000003: .* No space left on device.*the last good one is .*-00000002"
        )
        with pytest.raises(OSError, match=message):
            train(recipe(), out, save_every_s=0.0)
    assert [p.name for p in out.glob("training/checkpoint-*")] == ["checkpoint-00000002"]
    assert not (out / "training/saving").exists()
    assert same_weights(train(recipe(), tmp_path / "whole"), train(recipe(), out))


def test_another_recipe_does_not_mix_in(train, tmp_path):
    out = train(recipe(), tmp_path / "student")
    other = recipe(stages=(replace(KL, lr=1e-4),))
    with pytest.raises(
        ValueError, match=r"holds another training: recipe\.stages was .*0\.003.*0\.0001"
    ):
        train(other, out)


def test_a_first_try_with_a_typo_holds_no_folder(train, tmp_path):
    out = tmp_path / "student"
    with pytest.raises(ValueError, match="which names none"):
        train(recipe(stages=(replace(KL, train=("layers.*.mixers.*",)),)), out)
    with pytest.raises(FileNotFoundError):
        train(recipe(), out, teacher=tmp_path / "no-such-teacher")
    assert (train(recipe(), out) / "model.safetensors").exists()


def test_bad_input(train, teacher, data, tmp_path):
    with pytest.raises(ValueError, match="expected new or a training, got a model folder"):
        train(recipe(), teacher)
    with pytest.raises(ValueError, match="teacher of recipe 'tiny' expected a folder, got None"):
        train(recipe(), tmp_path / "a", teacher=None)
    with pytest.raises(ValueError, match="data expected, recipe 'tiny' names none"):
        train(recipe(), tmp_path / "b", data=None)
    with pytest.raises(ValueError, match="keep expected layers below 4, got 7"):
        train(recipe("mamba2", keep=(7,)), tmp_path / "c")
    config = json.loads((teacher / "config.json").read_text())
    small = make_folder(tmp_path / "small")
    model = load_model(small)
    assert config["vocab_size"] == 257
    shrunk = replace(model.config, vocab_size=200)
    from reasoners.checkpoint import save_model
    from reasoners.model import HybridLM

    save_model(HybridLM(shrunk), small)
    with pytest.raises(
        ValueError, match="vocabularies expected to be one, got a tokenizer of 257 tokens"
    ):
        train(recipe(), tmp_path / "d", teacher=small)


def test_a_model_from_nothing_has_its_own_tokenizer(train, tmp_path):
    fields = {
        "d_model": 32,
        "mlp_dim": 64,
        "layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
    student = Student("llama", config=fields, vocabulary=300)
    table = Recipe("nothing", student, (replace(SFT, tokens=20 * 2 * LENGTH),), length=LENGTH)
    out = train(table, tmp_path / "teacher", teacher=None)
    losses = [m["loss"] for m in metrics(out)]
    assert losses[-1] < 0.8 * losses[0]
    llm = LLM(out, device="cpu")
    assert llm.generate(["2 + 2?"], SamplingParams(max_tokens=4))[0].outputs[0].token_ids
    assert same_weights(out, train(table, tmp_path / "again", teacher=None))


WORKER = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_distill_train import recipe, MATRICES, HIDDEN, KL, replace
from reasoners.distill import distill
stages = tuple(replace(s, tokens=s.tokens // 2) for s in (MATRICES, HIDDEN, KL))
table = recipe({kind!r}, stages[{first}:])
distill(table, {out!r}, teacher={teacher!r}, data={data!r}, device="cpu", show=False)
"""


@pytest.mark.parametrize("kind", ["llamba", "mamba2"])
def test_two_processes_train_as_one(kind, teacher, data, tmp_path):
    """Sharded weights over gloo: the same losses, and a folder like any other."""
    found = []
    for count in (1, 2):
        script = tmp_path / f"{count}.py"
        fields = {
            "tests": str(Path(__file__).parent), "kind": kind, "out": str(tmp_path / f"out{count}"),
            "first": 0 if kind == "llamba" else 2, "teacher": str(teacher), "data": data,
        }  # fmt: skip
        script.write_text(WORKER.format(**fields))
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        result = subprocess.run(
            [sys.executable, *launch, str(script)], capture_output=True, text=True, timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(metrics(tmp_path / f"out{count}"))
    for one, two in zip(*found, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    first, second = (weights(tmp_path / f"out{count}") for count in (1, 2))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-2, atol=2e-3)

"""The command line, end to end on tiny models: what a user types, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from folders import make_folder
from typer.testing import CliRunner

from reasoners import trio
from reasoners.checkpoint import load_config
from reasoners.cli import app

DATA = [
    {
        "question": f"What is {a} plus {a}?",
        "answer": f"{a}+{a}=<<{a}+{a}={2 * a}>>{2 * a}\n#### {2 * a}",
    }
    for a in range(1, 5)
]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in DATA))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "teacher")


def invoke(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, " ".join(result.output.split())


def samples_of(out):
    lines = (out / "samples.jsonl").read_text().splitlines()
    return {(s["problem_id"], s["sample"]): s["text"] for s in map(json.loads, lines)}


def test_sample_resume_and_report(folder, data, tmp_path):
    common = ["sample", folder, "--data", data, "--max-tokens", 6, "--dtype", "float32"]
    code, output = invoke(*common, "-o", tmp_path / "whole", "-n", 3)
    assert code == 0, output
    assert "12 samples" in output
    code, output = invoke(*common, "-o", tmp_path / "parts", "-n", 1)
    assert code == 0, output
    code, output = invoke(*common, "-o", tmp_path / "parts", "-n", 3, "--max-rows", 2)
    assert code == 0, output
    assert "8 samples" in output
    assert samples_of(tmp_path / "parts") == samples_of(tmp_path / "whole")
    out = tmp_path / "new" / "report"
    code, output = invoke("report", tmp_path / "whole", tmp_path / "parts", "-o", out)
    assert code == 0, output
    assert json.loads((out / "report.json").read_text())
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folder": "nowhere"}, "FileNotFoundError: nowhere: expected a model folder"),
        ({"data": "nowhere.jsonl"}, "FileNotFoundError"),
        ({"-n": 0}, "samples expected at least 1, got 0"),
        ({"--temperature": -1}, "temperature expected at least 0, got -1.0"),
        ({"--dtype": "int8"}, "dtype expected one of auto, float32, bfloat16, got 'int8'"),
        ({"--task": "chess"}, "task expected one of gsm8k, math500, arithmetic, got 'chess'"),
        ({"--max-tokens": 600}, "at most max_length = 512 tokens"),
        ({"--shots": 99}, "shots expected 0 to"),
    ],
)
def test_bad_input_is_one_sentence(folder, data, tmp_path, change, words):
    options = {"-o": tmp_path / "run", "-n": 1} | {k: v for k, v in change.items() if k[0] == "-"}
    options["--data"] = change.get("data", data)
    flat = [part for pair in options.items() for part in pair]
    code, output = invoke("sample", change.get("folder", folder), *flat)
    assert code == 1
    assert words in output
    assert "Traceback" not in output


def test_neither_samples_nor_budget(folder, data, tmp_path):
    code, output = invoke("sample", folder, "--data", data, "-o", tmp_path / "run")
    assert code == 1
    assert "expected samples, budget_s or both" in output


def test_malformed_line_is_named(folder, data, tmp_path):
    data.write_text(data.read_text() + "{broken\n")
    code, output = invoke("sample", folder, "--data", data, "-o", tmp_path / "run", "-n", 1)
    assert code == 1
    assert "line 5" in output


def test_other_parameters_do_not_mix_into_a_run(folder, data, tmp_path):
    common = ["sample", folder, "--data", data, "-o", tmp_path / "run", "-n", 1, "--max-tokens", 4]
    assert invoke(*common)[0] == 0
    before = samples_of(tmp_path / "run")
    code, output = invoke(*common, "--seed", 7)
    assert code == 1
    assert "seed" in output
    assert samples_of(tmp_path / "run") == before


def test_convert_layouts_and_students(folder, tmp_path):
    assert (
        invoke("convert", folder, tmp_path / "student", "--student", "mamba1", "--keep", "1,3")[0]
        == 0
    )
    config, layout = load_config(tmp_path / "student")
    assert config.mixers == ("mamba1", "attention", "mamba1", "attention")
    assert layout == "mambainllama"
    code, _ = invoke(
        "convert", tmp_path / "student", tmp_path / "fused", "--layout", "mambainllama-fused"
    )
    assert code == 0
    assert load_config(tmp_path / "fused") == (config, "mambainllama-fused")
    assert (tmp_path / "fused" / "tokenizer.json").exists()
    code, output = invoke("convert", folder, tmp_path / "bad", "--student", "mamba2", "--keep", "9")
    assert code == 1
    assert "keep expected layers below 4, got 9" in output
    assert not (tmp_path / "bad").exists()


RECIPE = """
length = 64
[student]
kind = "llamba"
state_dim = 16
[[stages]]
name = "all at once"
objective = "end_to_end"
tokens = 512
batch = 2
lr = 1e-3
"""


def test_distill_a_folder_into_one_that_samples(folder, data, tmp_path):
    (tmp_path / "small.toml").write_text(RECIPE)
    command = [
        "distill", tmp_path / "student", "--recipe", tmp_path / "small.toml", "--teacher", folder,
        "--data", data, "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    code, output = invoke(*command)
    assert code == 0, output
    assert "curves.png" in output
    lines = (tmp_path / "student/training/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert load_config(tmp_path / "student")[1] == "llamba"
    code, output = invoke(
        "sample", tmp_path / "student", "--data", data, "-o", tmp_path / "run", "-n", 1,
        "--max-tokens", 4,
    )  # fmt: skip
    assert code == 0, output
    code, output = invoke(*command[:3], "lamba", *command[4:])
    assert code == 1
    assert "recipe expected a file or one of llamba" in output


def test_student_folder_is_sampled_as_it_is(folder, data, tmp_path):
    for kind in ("llamba", "mamba2"):
        assert (
            invoke("convert", folder, tmp_path / kind, "--student", kind, "--state-dim", 16)[0] == 0
        )
        code, output = invoke(
            "sample", tmp_path / kind, "--data", data, "-o", tmp_path / f"run-{kind}", "-n", 1,
            "--max-tokens", 4,
        )  # fmt: skip
        assert code == 0, output


def test_doctor_is_well():
    code, output = invoke("doctor")
    assert code == 0, output
    assert "ssd_scan (cpu) right in float32 and bfloat16" in output


def test_ctrl_c_keeps_what_was_finished_and_resumes(folder, data, tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "reasoners.cli", "sample", str(folder), "--data", str(data), "-o", str(out),
        "-n", "200", "--max-tokens", "40", "--max-rows", "4", "--dtype", "float32",
    ]  # fmt: skip
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    store, deadline = out / "samples.jsonl", time.monotonic() + 90
    while not (store.exists() and store.read_text().count("\n") >= 5):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, output = invoke("sample", folder, "--data", data, "-o", out, "-n", 1)
    assert code == 1  # a second process on the same store
    assert "another process" in output or "BlockingIOError" in output
    os.kill(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert "what was finished is stored" in errors
    kept = samples_of(out)
    assert 5 <= len(kept) < 800
    command[command.index("200")] = str(-(-len(kept) // 4) + 1)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    resumed = samples_of(out)
    assert kept.items() <= resumed.items()
    assert len(resumed) > len(kept)


def test_demo_of_the_trio(tmp_path):
    code, output = invoke("demo", "-o", tmp_path, "--problems", 4, "-n", 2, "--budget-s", 60)
    assert code == 0, output
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert [run["name"] for run in runs] == list(trio.NAMES)
    assert [len(samples_of(tmp_path / name)) for name in trio.NAMES] == [8, 8, 8]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_trio_reasons(tmp_path):
    """Held-out problems; of 1,000 the worst of the three solves more than half at the first try."""
    for name in trio.NAMES:
        code, output = invoke(
            "sample", name, "-o", tmp_path / name, "--task", "arithmetic", "--limit", 24, "-n", 4,
            "--max-tokens", 320, "--dtype", "float32",
        )  # fmt: skip
        assert code == 0, output
        lines = (tmp_path / name / "samples.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["correct"] for line in lines) >= 0.4 * 96, name

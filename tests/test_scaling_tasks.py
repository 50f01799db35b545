import json
import sys
from pathlib import Path

import pytest

from reasoners.scaling.grading import extract_answer
from reasoners.scaling.tasks import GSM8K, MATH500, TASKS, Problem, load_problems, messages

DATA = Path(__file__).parents[2] / "shared" / "data"


def write_jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_gsm8k_jsonl(tmp_path):
    path = write_jsonl(
        tmp_path / "problems.jsonl",
        {"question": "How many? ", "answer": "1000 + 125 = <<1000+125=1125>>1125\n#### 1,125"},
        {"question": "How cold?", "answer": "It falls.\n#### -3"},
    )
    assert load_problems(GSM8K, path) == [
        Problem("gsm8k/0", "How many?", "1125", 1),
        Problem("gsm8k/1", "How cold?", "-3"),
    ]
    assert [problem.id for problem in load_problems(GSM8K, path, limit=1)] == ["gsm8k/0"]


def test_math500_json(tmp_path):
    path = tmp_path / "problems.json"
    record = {"problem": "p?", "answer": "\\frac12", "difficulty": 3.0, "unique_id": "test/7.json"}
    path.write_text(json.dumps([record]))
    assert load_problems(MATH500, path) == [Problem("test/7.json", "p?", "\\frac12", 3.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "q", "answer": "#### 1"}\n{"question": ', r"jsonl, line 2: expected a JSON"),
        ('["q"]\n', r"line 1: expected a JSON object, got '\[\"q\"\]'"),
        ('{"question": "q"}\n', r"line 1: .* field 'answer', got fields \['question'\]"),
        ('{"question": "q", "answer": 7}\n', r"line 1: .* field 'answer', got 'answer' = 7"),
        ('{"question": " ", "answer": "#### 1"}\n', r"line 1: .* field 'question', got 'question'"),
        ('{"question": "q", "answer": "It is 7."}\n', r"'#### answer', got 'It is 7.'"),
        ("", r"expected at least one problem, got none"),
        ("\n\n", r"expected at least one problem, got none"),
    ],
)
def test_malformed_jsonl(tmp_path, text, message):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_problems(GSM8K, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", "expected a JSON list, got malformed text"),
        ('{"problem": "p"}', r"expected a JSON list, got '\{"),
        ("[]", "expected at least one problem, got none"),
        ("[3]", "item 1: expected a JSON object, got '3'"),
        (
            '[{"problem": "p", "answer": "1", "unique_id": "a"},'
            ' {"problem": "q", "answer": "2", "unique_id": "a"}]',
            "item 2: expected a new problem id, got 'a' again .first at .*item 1",
        ),
        (
            '[{"problem": "p", "answer": "1", "unique_id": "a", "level": "hard"}]',
            "item 1: expected a number as level, got 'hard'",
        ),
    ],
)
def test_malformed_json(tmp_path, text, message):
    path = tmp_path / "problems.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_problems(MATH500, path)


def test_a_line_that_is_no_utf8(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b'{"question": "q", "answer": "#### 1"}\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match=r"jsonl, line 2: expected a JSON object, got .*utf-8"):
        load_problems(GSM8K, path)


def test_a_malformed_line_after_the_limit_is_not_read(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\nnonsense\n')
    assert len(load_problems(GSM8K, path, limit=1)) == 1


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        load_problems(GSM8K, tmp_path / "absent.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'distilled-reasoners\[datasets\]'"):
        load_problems(GSM8K, "openai/gsm8k")
    with pytest.raises(ValueError, match="limit expected None or at least 1, got 0"):
        load_problems(GSM8K, tmp_path / "absent.jsonl", limit=0)


def test_messages():
    problem = Problem("p", "How many?", "3")
    (message,) = messages(GSM8K, problem)
    assert message["role"] == "user"
    assert message["content"].startswith("How many?\n\n")
    assert "####" in message["content"]
    chat = messages(MATH500, problem, shots=2)
    assert [turn["role"] for turn in chat] == ["user", "assistant"] * 2 + ["user"]
    assert "\\boxed{}" in chat[-1]["content"] and "\\boxed{2, 3}" in chat[1]["content"]
    with pytest.raises(ValueError, match="shots expected 0 to 4 for gsm8k, got 5"):
        messages(GSM8K, problem, shots=5)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no evaluation data in {DATA}")
@pytest.mark.parametrize(
    ("name", "file", "num_problems", "first"),
    [
        ("gsm8k", "gsm8k_test.jsonl", 1319, ("gsm8k/0", "18", 2)),
        (
            "math500",
            "math500.json",
            500,
            ("test/precalculus/807.json", "\\left( 3, \\frac{\\pi}{2} \\right)", 2.0),
        ),
    ],
)
def test_real_files(name, file, num_problems, first):
    problems = load_problems(TASKS[name], DATA / file)
    assert len(problems) == num_problems
    assert (problems[0].id, problems[0].answer, problems[0].level) == first


def test_examples_end_in_their_answers():
    answers = {
        name: [extract_answer(solution) for _, solution in task.examples]
        for name, task in TASKS.items()
    }
    assert answers == {
        "gsm8k": ["134", "4", "8", "48"],
        "math500": ["2, 3", "4\\sqrt{3}", "\\frac{1}{9}", "4"],
        "arithmetic": ["77", "12", "36"],
    }

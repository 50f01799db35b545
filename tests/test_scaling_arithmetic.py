"""The generated word problems: right, grammatical, the same for ever, and no test problem in training."""

import hashlib
import re
from collections import Counter

import pytest
from folders import make_folder
from typer.testing import CliRunner

from reasoners.cli import app
from reasoners.scaling import TASKS, Grader, load_problems, messages
from reasoners.scaling.arithmetic import problem, split_of

CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
NUMBER_WORDS = {
    "half": 2, "third": 3, "quarter": 4, "fifth": 5, "sixth": 6, "twice": 2, "three": 3, "four": 4,
    "five": 5, "six": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def problems():
    return [problem(i, split) for split in ("train", "test") for i in range(1000)]


def calculations(made):
    return [
        (int(a), operator, int(b), int(c))
        for a, operator, b, c in CALCULATION.findall(made.solution)
    ]


@pytest.mark.parametrize(
    ("arguments", "question", "solution", "formula"),
    [
        (
            (0, "train"),
            "Ivan hits 9 targets for 2 points each. After that Ivan scores 98 more points. Nora "
            "scores 16 points. She loses half of her points. How many more points does Ivan have "
            "than Nora?",
            "Ivan has 9 * 2 = 18 points.\n"
            "Ivan has 18 + 98 = 116 points.\n"
            "Nora has 16 / 2 = 8 points.\n"
            "Ivan has 116 - 8 = 108 more points than Nora.\n"
            "#### 108",
            "(((2*9)+98)-(16/2))",
        ),
        (
            (0, "test"),
            "Leo scores 8 points in each of 2 rounds. He loses a quarter of his points. How many "
            "points does Leo have now?",
            "Leo has 2 * 8 = 16 points.\n"
            "That is 16 / 4 = 4 points.\n"
            "Leo has 16 - 4 = 12 points.\n"
            "#### 12",
            "((2*8)-((2*8)/4))",
        ),
        (
            (3, "test", 6),
            "The south lot holds 6 rows of 44 cars. In each of the next 2 hours 44 cars come to the "
            "south lot. The north lot holds 6 cars. The east lot holds 29 more than twice as many "
            "cars as the south lot. How many more cars does the east lot hold than the south lot?",
            "The south lot holds 6 * 44 = 264 cars.\n"
            "That is 2 * 44 = 88 cars.\n"
            "The south lot holds 264 + 88 = 352 cars.\n"
            "Twice as many as the south lot is 2 * 352 = 704 cars.\n"
            "The east lot holds 704 + 29 = 733 cars.\n"
            "The east lot holds 733 - 352 = 381 more cars than the south lot.\n"
            "#### 381",
            "(((((2*44)+(44*6))*2)+29)-((2*44)+(44*6)))",
        ),
    ],
)
def test_what_a_problem_is_like(arguments, question, solution, formula):
    made = problem(*arguments)
    assert made.question == question
    assert made.solution == solution
    assert made.formula == formula


def test_the_problems_never_change(problems):
    """Runs and models refer to them by index: another digest takes another key in `problem`."""
    text = "\n\n".join(f"{made.question}\n{made.solution}" for made in problems)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "a5b820f9355d56b9e90cb75b1022d87aa4409c8466f72b12105af1c7fbaa6137"
    )


def test_every_calculation_is_right(problems):
    for made in problems:
        found = calculations(made)
        for a, operator, b, c in found:
            right = {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": a == b * c}
            assert right[operator], made.solution
            assert all(2 <= number <= 999 for number in (a, b, c)), made.solution
        *lines, last = made.solution.splitlines()
        assert len(found) == len(lines) == made.steps
        assert all(len(CALCULATION.findall(line)) == 1 for line in lines)
        assert last == f"#### {made.answer}" == f"#### {found[-1][3]}"
        assert eval(made.formula.replace("/", "//")) == made.answer


def test_every_number_has_a_source_and_every_result_a_use(problems):
    """Operands are told in the question or calculated before; results are needed for the answer."""
    for made in problems:
        words = re.findall(r"[a-z]+", made.question.lower())
        known = {int(n) for n in re.findall(r"\d+", made.question)}
        known |= {NUMBER_WORDS[word] for word in words if word in NUMBER_WORDS}
        found = calculations(made)
        for a, _, b, c in found:
            assert {a, b} <= known, made
            known.add(c)
        for i, (*_, c) in enumerate(found[:-1]):
            assert any(c in (a, b) for a, _, b, _ in found[i + 1 :]), made


def test_sentences(problems):
    words = Counter()
    for made in problems:
        sentences = re.split(r"(?<=[.?]) ", made.question)
        for sentence in sentences + made.solution.splitlines()[:-1]:
            assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9',+*/= -]*[.?]", sentence), sentence
            assert "  " not in sentence
            # A plural has a verb without -s, a singular one with it.
            assert not re.search(r"\b(?:[Tt]hey|[A-Z]\w+ and [A-Z]\w+) [a-z]+s\b", sentence), (
                sentence
            )
            assert not re.search(r"\b(?:[Hh]e|[Ss]he|[Ii]t) (?!can\b)[a-z]*[a-rt-z]\b", sentence), (
                sentence
            )
        assert [s.endswith("?") for s in sentences] == [False] * (len(sentences) - 1) + [True]
        words[made.steps] = max(words[made.steps], len(made.question.split()))
    assert words[2] < 65 and words[8] < 130


def test_no_formula_is_in_both_splits():
    """With 2 steps there are few enough formulas that splits by chance would share hundreds."""
    train = [problem(i, "train", steps=2) for i in range(10000)]
    test = [problem(i, "test", steps=2) for i in range(2000)]
    first, more = ({made.formula for made in part} for part in (train[:8000], train[8000:]))
    assert len(first & more) > 100
    assert not first & {made.formula for made in test}
    assert {split_of(made.formula) for made in train} == {"train"}
    assert {split_of(made.formula) for made in test} == {"test"}


def test_the_story_is_no_part_of_the_formula():
    by_formula = {}
    for made in (problem(i, steps=2) for i in range(5000)):
        by_formula.setdefault(made.formula, set()).add(made.question)
    # Other people, things, places and ways to tell, and operands the other way round.
    assert sum(len(questions) > 1 for questions in by_formula.values()) > 50


def test_one_formula_in_sixteen_is_for_tests():
    formulas = [f"(({a}+{b})*{c})" for a in range(2, 42) for b in range(2, 42) for c in range(2, 7)]
    share = sum(split_of(formula) == "test" for formula in formulas) / len(formulas)
    assert abs(share - 1 / 16) < 4 * (1 / 16 * 15 / 16 / len(formulas)) ** 0.5
    assert split_of("((12+7)*2)") == "train"


def test_steps(problems):
    counts = Counter(made.steps for made in problems)
    assert sorted(counts) == [2, 3, 4, 5, 6, 7, 8]
    expected = len(problems) / 7
    assert all(abs(count - expected) < 4.5 * expected**0.5 for count in counts.values())
    for steps in range(2, 9):
        assert problem(5, "test", steps).steps == steps
    assert problem(5, steps=problem(5).steps) == problem(5)


def test_the_same_index_gives_the_same_problem_in_any_order(problems):
    for i in (999, 0, 500):
        assert problem(i) == problems[i]
        assert problem(i, "test") == problems[1000 + i]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"index": -1}, "problem: index expected at least 0, got -1"),
        ({"index": 0, "split": "dev"}, "problem: split expected train or test, got 'dev'"),
        ({"index": 0, "steps": 1}, "problem: steps expected 2 to 8, got 1"),
        ({"index": 0, "steps": 9}, "problem: steps expected 2 to 8, got 9"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        problem(**arguments)


def test_grading(problems):
    with Grader() as grader:
        for i, made in enumerate(problems[:50]):
            grader.submit((i, True), made.solution, str(made.answer))
            wrong = made.solution.replace(f"#### {made.answer}", f"#### {made.answer + 1}")
            grader.submit((i, False), wrong, str(made.answer))
        verdicts = list(grader.drain())
    assert len(verdicts) == 100
    assert all(verdict.correct is verdict.key[1] for verdict in verdicts)


def test_the_task(problems):
    task = TASKS["arithmetic"]
    loaded = load_problems(task, task.dataset)
    assert len(loaded) == 1000
    for i, made in enumerate(problems[1000:]):
        found = loaded[i]
        assert (found.id, found.question) == (f"arithmetic/{i}", made.question)
        assert (found.answer, found.level) == (str(made.answer), made.steps)
    assert load_problems(task, "arithmetic", limit=3) == loaded[:3]
    assert len(load_problems(task, "arithmetic", limit=1001)) == 1001
    with pytest.raises(ValueError, match="limit expected None or at least 1, got 0"):
        load_problems(task, "arithmetic", limit=0)


def test_the_prompt_is_the_question_alone():
    task = TASKS["arithmetic"]
    (first,) = load_problems(task, "arithmetic", limit=1)
    asked = {"role": "user", "content": first.question}
    assert messages(task, first) == [asked]
    *examples, last = messages(task, first, shots=3)
    assert last == asked
    for i, (question, solution) in enumerate(zip(examples[::2], examples[1::2])):
        made = problem(i, "train", steps=i + 2)
        assert question == {"role": "user", "content": made.question}
        assert solution == {"role": "assistant", "content": made.solution}


def test_a_model_is_sampled_without_data(tmp_path):
    folder, out = make_folder(tmp_path / "model"), tmp_path / "run"
    options = ["-o", out, "--task", "arithmetic", "--limit", 2, "-n", 1, "--max-tokens", 4]
    result = CliRunner().invoke(app, ["sample", *map(str, [folder, *options])])
    assert result.exit_code == 0, result.output
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2

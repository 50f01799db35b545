"""Tasks: where problems come from, and how they are put to a model.

A task is a row of `TASKS`: the field names of its records, how the gold answer is read from one,
the instruction that follows each question and a few worked examples. Records come from a JSON or
JSONL file, from the Hugging Face hub or, for arithmetic, from a generator that needs no data.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

from reasoners.scaling.arithmetic import problem as arithmetic_problem
from reasoners.scaling.grading import extract_answer

GENERATED_PROBLEMS = 1000  # of a source without an end, where no limit is given


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; `level` is its difficulty where the task has one."""

    id: str
    question: str
    answer: str
    level: float | None = None


@dataclass(frozen=True)
class Task:
    """How one benchmark is read and asked.

    Args:
        name: The key in `TASKS`, and the prefix of problem ids that a record does not name.
        question_field: The field of a record that holds the question.
        answer_field: The field that holds the gold answer, or a worked solution that ends in it.
        worked_answer: Whether `answer_field` is such a worked solution (last line `#### N`).
        id_field: The field that names the problem; None numbers the records instead.
        level_fields: Fields that may hold the difficulty, first one present wins. Without one, and
            where a worked answer marks its calculations `<<...>>`, their number is the difficulty.
        dataset: Its Hugging Face dataset id, or "arithmetic".
        config: Configuration to ask the Hugging Face hub for; "arithmetic" has none.
        split: Split to ask the Hugging Face hub or the generator for.
        instruction: Text that follows every question; "" for none.
        examples: Worked (question, solution) pairs for few-shot prompts.
    """

    name: str
    question_field: str
    answer_field: str
    worked_answer: bool
    id_field: str | None
    level_fields: tuple[str, ...]
    dataset: str
    config: str
    split: str
    instruction: str
    examples: tuple[tuple[str, str], ...]


GSM8K = Task(
    name="gsm8k",
    question_field="question",
    answer_field="answer",
    worked_answer=True,
    id_field=None,
    level_fields=(),
    dataset="openai/gsm8k",
    config="main",
    split="test",
    instruction=(
        "Solve the problem step by step. Then write the final answer, a single number without "
        "units, on a last line of its own in the form: #### number"
    ),
    examples=(
        (
            "A baker fills 6 trays with 12 rolls each. She drops 5 rolls and sells the rest for "
            "$2 a roll. How many dollars does she take in?",
            "She bakes 6 * 12 = 72 rolls.\n"
            "After the fall 72 - 5 = 67 rolls are left.\n"
            "She takes in 67 * 2 = 134 dollars.\n"
            "#### 134",
        ),
        (
            "Omar reads 15 pages a day on the five weekdays and 40 pages on each day of the "
            "weekend. How many weeks does a book of 620 pages last him?",
            "On weekdays he reads 5 * 15 = 75 pages.\n"
            "On the weekend he reads 2 * 40 = 80 pages.\n"
            "That makes 75 + 80 = 155 pages a week.\n"
            "The book lasts 620 / 155 = 4 weeks.\n"
            "#### 4",
        ),
        (
            "A tank holds 240 litres and is one third full. A pump adds 20 litres a minute. How "
            "many minutes does it take to fill the tank?",
            "The tank holds 240 / 3 = 80 litres now.\n"
            "It still takes 240 - 80 = 160 litres.\n"
            "At 20 litres a minute that is 160 / 20 = 8 minutes.\n"
            "#### 8",
        ),
        (
            "Lena has three times as many stamps as Paul. Together they have 96 stamps. How many "
            "more stamps than Paul has Lena?",
            "Paul has one part and Lena three, so 96 stamps are 1 + 3 = 4 parts.\n"
            "One part is 96 / 4 = 24 stamps, which is what Paul has.\n"
            "Lena has 3 * 24 = 72 stamps.\n"
            "She has 72 - 24 = 48 more.\n"
            "#### 48",
        ),
    ),
)

MATH500 = Task(
    name="math500",
    question_field="problem",
    answer_field="answer",
    worked_answer=False,
    id_field="unique_id",
    level_fields=("level", "difficulty"),
    dataset="HuggingFaceH4/MATH-500",
    config="default",
    split="test",
    instruction="Reason step by step, and put your final answer within \\boxed{}.",
    examples=(
        (
            "Find all real $x$ with $x^2 - 5x + 6 = 0$.",
            "The product $(x - 2)(x - 3)$ expands to $x^2 - 5x + 6$, so one of the factors must be "
            "zero. Hence $x = 2$ or $x = 3$.\n\nThe final answer is $\\boxed{2, 3}$.",
        ),
        (
            "What is the area of an equilateral triangle with side $4$?",
            "The height splits a side in half, so it is $\\sqrt{4^2 - 2^2} = \\sqrt{12} = "
            "2\\sqrt{3}$. The area is $\\frac{1}{2} \\cdot 4 \\cdot 2\\sqrt{3} = 4\\sqrt{3}$.\n\n"
            "The final answer is $\\boxed{4\\sqrt{3}}$.",
        ),
        (
            "Two fair dice are rolled. What is the probability that the sum is $5$?",
            "The sum is $5$ for $(1,4), (2,3), (3,2), (4,1)$: four of the $36$ equally likely "
            "outcomes. The probability is $\\frac{4}{36} = \\frac{1}{9}$.\n\n"
            "The final answer is $\\boxed{\\frac{1}{9}}$.",
        ),
        (
            "What is the remainder when $7^{10}$ is divided by $5$?",
            "Modulo $5$ we have $7 \\equiv 2$, $7^2 \\equiv 4 \\equiv -1$ and so "
            "$7^{10} = (7^2)^5 \\equiv (-1)^5 = -1 \\equiv 4$.\n\n"
            "The final answer is $\\boxed{4}$.",
        ),
    ),
)

ARITHMETIC = Task(
    name="arithmetic",
    question_field="question",
    answer_field="answer",
    worked_answer=True,
    id_field=None,
    level_fields=("steps",),
    dataset="arithmetic",
    config="",
    split="test",
    instruction="",  # its models know nothing else
    examples=tuple(
        (made.question, made.solution)
        for made in (arithmetic_problem(index, "train", steps=2 + index) for index in range(3))
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in (GSM8K, MATH500, ARITHMETIC)}


def load_problems(task: Task, source: str | Path, limit: int | None = None) -> list[Problem]:
    """Read the problems of a task.

    Args:
        task: A row of `TASKS`.
        source: Path of a `.jsonl` file (a record per line) or `.json` file (a list of records),
            or "arithmetic" for the generator; anything else is taken for a Hugging Face dataset
            id such as "openai/gsm8k".
        limit: Keep the first this many problems; None keeps all, and 1000 of the generator's.

    Returns:
        The problems in the order of the source, with distinct ids.

    Raises:
        FileNotFoundError: `source` is a `.json` or `.jsonl` path that does not exist.
        ValueError: A malformed record (with file, line, what was expected and what came), an
            empty source, two problems of one id, or a `limit` below 1.
        ModuleNotFoundError: `source` is a dataset id and `datasets` is not installed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"load_problems: limit expected None or at least 1, got {limit}")
    path = Path(source)
    if str(source) == ARITHMETIC.dataset:
        records = _records_of_arithmetic(task.split)
        limit = GENERATED_PROBLEMS if limit is None else limit
    elif path.suffix == ".jsonl":
        records = _records_of_jsonl(path)
    elif path.suffix == ".json":
        records = _records_of_json(path)
    else:
        records = _records_of_hub(task, str(source))
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for index, (where, record) in enumerate(islice(records, limit)):
        problem = _read_problem(task, record, where, index)
        if problem.id in seen:
            raise ValueError(
                f"{where}: expected a new problem id, got {problem.id!r} again "
                f"(first at {seen[problem.id]})"
            )
        seen[problem.id] = where
        problems.append(problem)
    if not problems:
        raise ValueError(f"{source}: expected at least one problem, got none")
    return problems


def messages(task: Task, problem: Problem, shots: int = 0) -> list[dict[str, str]]:
    """Write the chat that asks a problem, the form every chat template takes.

    Args:
        task: The row of `TASKS` whose instruction and examples are used.
        problem: The problem to ask.
        shots: Number of worked examples before it, as turns of user and assistant.

    Returns:
        Messages `{"role": ..., "content": ...}`, the last one the user's.

    Raises:
        ValueError: The task has fewer than `shots` examples, or `shots` is negative.
    """
    if not 0 <= shots <= len(task.examples):
        raise ValueError(
            f"messages: shots expected 0 to {len(task.examples)} for {task.name}, got {shots}"
        )
    chat = []
    for question, solution in task.examples[:shots]:
        chat.append({"role": "user", "content": _ask(task, question)})
        chat.append({"role": "assistant", "content": solution})
    chat.append({"role": "user", "content": _ask(task, problem.question)})
    return chat


def _ask(task: Task, question: str) -> str:
    return f"{question}\n\n{task.instruction}" if task.instruction else question


def _records_of_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:  # of JSON, or of UTF-8
                text = line.decode(errors="replace")
                raise ValueError(
                    f"{where}: expected a JSON object, got {_excerpt(text)} ({error})"
                ) from None


def _records_of_json(path: Path) -> Iterator[tuple[str, object]]:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path}: expected a JSON list, got malformed text ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON list, got {_excerpt(json.dumps(records))}")
    for number, record in enumerate(records, start=1):
        yield f"{path}, item {number}", record


def _records_of_hub(task: Task, dataset_id: str) -> Iterator[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{dataset_id!r} is no .json or .jsonl path, and to read it from the Hugging Face hub "
            "takes: pip install 'distilled-reasoners[datasets]'"
        ) from None
    for number, record in enumerate(load_dataset(dataset_id, task.config, split=task.split)):
        yield f"{dataset_id}, row {number}", record


def _records_of_arithmetic(split: str) -> Iterator[tuple[str, object]]:
    for index in count():
        made = arithmetic_problem(index, split)
        record = {"question": made.question, "answer": made.solution, "steps": made.steps}
        yield f"arithmetic, {split} problem {index}", record


def _read_problem(task: Task, record: object, where: str, index: int) -> Problem:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {_excerpt(json.dumps(record))}")

    def text_of(field: str) -> str:
        value = record.get(field)
        if not isinstance(value, str) or not value.strip():
            found = f"{field!r} = {value!r}" if field in record else f"fields {sorted(record)}"
            raise ValueError(f"{where}: expected non-empty text in field {field!r}, got {found}")
        return value.strip()

    answer = text_of(task.answer_field)
    level = next((record[field] for field in task.level_fields if field in record), None)
    if task.worked_answer:
        if level is None:
            level = answer.count("<<") or None
        last_line = answer.splitlines()[-1]
        if not last_line.startswith("####") or (answer := extract_answer(last_line)) is None:
            raise ValueError(
                f"{where}: expected {task.answer_field!r} to end in a line '#### answer', "
                f"got {_excerpt(last_line)}"
            )
    if level is not None and not isinstance(level, int | float):
        raise ValueError(f"{where}: expected a number as level, got {level!r}")
    return Problem(
        id=text_of(task.id_field) if task.id_field else f"{task.name}/{index}",
        question=text_of(task.question_field),
        answer=answer,
        level=level,
    )


def _excerpt(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")

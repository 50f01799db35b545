"""The run: draws samples, has them judged meanwhile, and stores what is finished."""

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from reasoners import __version__
from reasoners.scaling.grading import Grader, Verdict
from reasoners.scaling.store import Sample, SampleStore, Span
from reasoners.scaling.tasks import Problem, Task, messages


@dataclass(frozen=True)
class Request:
    """Samples wanted of one prompt: chat messages and the numbers of the samples."""

    problem_id: str
    messages: list[dict[str, str]]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """One finished sample; seconds are of `time.perf_counter`."""

    problem_id: str
    sample: int
    text: str
    num_tokens: int
    finish_reason: str
    start_s: float
    end_s: float


class Generate(Protocol):
    """A generator function that turns requests into completions.

    It takes a request whenever it has room for one, and yields each sample as it finishes, in any
    order. Between decode steps it may yield None, for the caller to look after other things. Once
    `should_stop()` is true it returns, finished or not; samples that are finished by then it
    yields first.
    """

    def __call__(
        self, requests: Iterator[Request], should_stop: Callable[[], bool]
    ) -> Generator[Completion | None, None, None]:
        """Generate."""


@dataclass(frozen=True)
class RunSummary:
    """What one call of `run` did.

    Args:
        num_samples: Samples added to the store.
        num_correct: Those of them that are right.
        num_errors: Those of them that the verifier failed on.
        num_dropped: Samples asked for that were unfinished at the end.
        num_tokens: Tokens of the samples added.
        run_s: Seconds from the start to the end of generation.
        elapsed_s: Seconds of run time of the store, this run included.
    """

    num_samples: int
    num_correct: int
    num_errors: int
    num_dropped: int
    num_tokens: int
    run_s: float
    elapsed_s: float


def run_manifest(
    task: Task,
    source: str,
    problems: Sequence[Problem],
    model: str,
    sampling: dict[str, Any],
    shots: int = 0,
) -> dict[str, Any]:
    """Describe what the samples of a run depend on, for its `SampleStore`.

    Args:
        task: The task.
        source: Where its problems were read from.
        problems: The problems.
        model: Name of the model.
        sampling: Sampling parameters, as JSON values.
        shots: Worked examples in the prompt.

    Returns:
        The manifest; `prompts_sha256` covers every prompt and gold answer.
    """
    prompts = [[problem.id, messages(task, problem, shots), problem.answer] for problem in problems]
    return {
        "task": task.name,
        "source": str(source),
        "num_problems": len(problems),
        "shots": shots,
        "prompts_sha256": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        "model": model,
        "sampling": sampling,
        "version": __version__,
    }


def run(
    task: Task,
    problems: Sequence[Problem],
    generate: Generate,
    store: SampleStore,
    grader: Grader,
    *,
    samples: int | None = None,
    budget_s: float | None = None,
    shots: int = 0,
    wave: int = 4,
    progress: bool = True,
) -> RunSummary:
    """Draw samples of every problem until there are enough or time is up.

    Samples that the store has are not asked for again. Every problem gets `wave` samples before
    any gets more, so that at any second the problems have had about equal shares. Generation goes
    on while earlier samples are judged. When the budget ends, unfinished samples are dropped;
    finished ones still get their verdict. So they do on Ctrl-C or when `generate` fails, before
    the exception goes on its way; a second Ctrl-C strikes at once.

    Args:
        task: The task, for its prompts.
        problems: The problems.
        generate: Generates completions; see `Generate`.
        store: Takes the graded samples.
        grader: Judges them.
        samples: Samples per problem, with those that the store has; None for as many as the
            budget allows.
        budget_s: Seconds of run time, with those that the store has seen; None for no limit.
        shots: Worked examples in the prompt.
        wave: Samples of one problem that are asked for at a time.
        progress: Whether to show a progress bar, if stderr is a terminal.

    Returns:
        What this call did.

    Raises:
        ValueError: Neither `samples` nor `budget_s`, one of them or `wave` out of range, or a
            completion that was not asked for.
        RuntimeError: `generate` ended before there was nothing left to do.
        OSError: The store cannot be written.
    """
    if not problems:
        raise ValueError("run: expected at least one problem, got none")
    if samples is None and budget_s is None:
        raise ValueError("run: expected samples, budget_s or both, got neither")
    if samples is not None and samples < 1:
        raise ValueError(f"run: samples expected at least 1, got {samples}")
    if budget_s is not None and not budget_s > 0:
        raise ValueError(f"run: budget_s expected more than 0, got {budget_s}")
    if wave < 1:
        raise ValueError(f"run: wave expected at least 1, got {wave}")

    golds = {problem.id: problem.answer for problem in problems}
    unfinished: set[tuple[str, int]] = set()
    judging: dict[tuple[str, int], Completion] = {}
    num_before = len(store)
    num_asked = num_correct = num_errors = num_tokens = 0
    failure: BaseException | None = None
    offset_s = store.elapsed_s
    started_s = time.perf_counter()
    deadline_s = math.inf if budget_s is None else started_s + budget_s - offset_s

    def requests() -> Iterator[Request]:
        nonlocal num_asked
        for first in count(0, wave) if samples is None else range(0, samples, wave):
            last = first + wave if samples is None else min(first + wave, samples)
            for problem in problems:
                wanted = [i for i in range(first, last) if (problem.id, i) not in store]
                if wanted:
                    num_asked += len(wanted)
                    unfinished.update((problem.id, i) for i in wanted)
                    yield Request(problem.id, messages(task, problem, shots), tuple(wanted))

    def accept(completion: Completion) -> None:
        nonlocal num_tokens
        key = (completion.problem_id, completion.sample)
        if key not in unfinished:
            raise ValueError(f"run: expected a sample that is asked for and unfinished, got {key}")
        unfinished.remove(key)
        judging[key] = completion
        num_tokens += completion.num_tokens
        grader.submit(key, completion.text, golds[completion.problem_id])

    def record(verdict: Verdict) -> None:
        nonlocal num_correct, num_errors
        completion = judging.pop(verdict.key)
        store.append(
            Sample(
                problem_id=completion.problem_id,
                sample=completion.sample,
                text=completion.text,
                num_tokens=completion.num_tokens,
                start_s=round(completion.start_s - started_s + offset_s, 6),
                end_s=round(completion.end_s - started_s + offset_s, 6),
                finish_reason=completion.finish_reason,
                answer=verdict.answer,
                vote=verdict.vote,
                correct=verdict.correct,
                error=verdict.error,
            )
        )
        num_correct += verdict.correct is True
        num_errors += verdict.error is not None

    total = None if samples is None else samples * len(problems)
    with _deferred_interrupt() as interrupted, _bar(progress, timed=budget_s is not None) as bar:
        shown = bar.add_task("sampling", total=total or budget_s, status="")

        def should_stop() -> bool:
            return interrupted() or time.perf_counter() >= deadline_s

        def show() -> None:
            run_s = time.perf_counter() - started_s
            num_samples = len(store) - num_before
            status = f"{num_samples} samples, {num_tokens / run_s:.0f} tokens/s"
            if num_samples:
                status += f", {num_correct / num_samples:.0%} right"
            if budget_s is not None:
                status += f", {max(0.0, budget_s - offset_s - run_s):.0f} s left"
            completed = offset_s + run_s if total is None else len(store)
            bar.update(shown, completed=completed, status=status)

        pending = requests()
        with closing(generate(pending, should_stop)) as completions:
            while True:
                try:
                    completion = next(completions)
                except StopIteration:
                    break
                except BaseException as error:  # whatever it is, finished samples come first
                    failure = error
                    break
                if completion is not None and completion.end_s <= deadline_s:
                    accept(completion)
                elif should_stop():
                    break
                for verdict in grader.poll():
                    record(verdict)
                show()
        ended_s = min(time.perf_counter(), deadline_s)
        if failure is None and interrupted():
            failure = KeyboardInterrupt()
        if failure is None and not should_stop() and (unfinished or next(pending, None)):
            failure = RuntimeError(
                "run: expected generate to go on until nothing is left to do, got its end with "
                f"{len(unfinished)} samples unfinished"
            )
        for verdict in grader.drain():
            record(verdict)
            show()

    if num_asked:
        ended_by = "samples" if ended_s < deadline_s else "budget"
        if failure is not None:
            ended_by = type(failure).__name__
        end_s = round(offset_s + ended_s - started_s, 6)
        store.append_span(Span(offset_s, end_s, len(unfinished), ended_by))
    if failure is not None:
        raise failure
    return RunSummary(
        num_samples=len(store) - num_before,
        num_correct=num_correct,
        num_errors=num_errors,
        num_dropped=len(unfinished),
        num_tokens=num_tokens,
        run_s=store.elapsed_s - offset_s,
        elapsed_s=store.elapsed_s,
    )


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag, so that it strikes between steps and not inside one."""
    flag = threading.Event()

    def raise_flag(signal_number: int, frame: object) -> None:
        flag.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set  # signals strike the main thread alone
        return
    before = signal.signal(signal.SIGINT, raise_flag)
    try:
        yield flag.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _bar(progress: bool, timed: bool) -> Progress:
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}")]
    if not timed:
        columns.append(TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (progress and console.is_terminal))

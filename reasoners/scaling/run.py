"""The run: draws samples, has them judged meanwhile, and stores what is finished."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from reasoners import __version__
from reasoners.interrupt import deferred_interrupt
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
    wave: int | None = None,
    progress: bool = True,
) -> RunSummary:
    """Draw samples of every problem until there are enough or time is up.

    Samples that the store has are not asked for again. With a budget every problem gets `wave`
    samples before any gets more, so that at any second the problems have had about equal shares;
    without, it gets all of them at once, from one reading of its prompt. Generation goes on while
    earlier samples are judged. When the budget ends, unfinished samples are dropped; finished ones
    still get their verdict. So they do on Ctrl-C or when `generate` fails, before the exception
    goes on its way; a second Ctrl-C strikes at once.

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
        wave: Samples of one problem that are asked for at a time; None for 8 with a budget, and
            for all of them without.
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
    if wave is None:
        wave = samples if budget_s is None else 8
    if wave < 1:
        raise ValueError(f"run: wave expected at least 1, got {wave}")

    offset_s = store.elapsed_s
    started_s = time.perf_counter()
    deadline_s = math.inf if budget_s is None else started_s + budget_s - offset_s
    ledger = _Ledger(task, problems, shots, store, grader, started_s, offset_s)
    failure: BaseException | None = None
    total = None if samples is None else samples * len(problems)
    with deferred_interrupt() as interrupted, _bar(progress, timed=budget_s is not None) as bar:
        shown = bar.add_task("sampling", total=total or budget_s, status="")

        def should_stop() -> bool:
            return interrupted() or time.perf_counter() >= deadline_s

        def show() -> None:
            now_s = time.perf_counter()
            status = ledger.status(now_s - started_s)
            if budget_s is not None:
                status += f", {max(0.0, deadline_s - now_s):.0f} s left"
            completed = now_s - started_s + offset_s if total is None else len(store)
            bar.update(shown, completed=completed, status=status)

        requests = ledger.requests(samples, wave, should_stop)
        with closing(generate(requests, should_stop)) as completions:
            while True:
                try:
                    completion = next(completions)
                    in_time = completion is not None and completion.end_s <= deadline_s
                    if in_time:
                        ledger.accept(completion)
                except StopIteration:
                    break
                except BaseException as error:  # whatever it is, finished samples come first
                    failure = error
                    break
                if not in_time and should_stop():
                    break
                ledger.record(grader.poll())
                show()
        ended_s = min(time.perf_counter(), deadline_s)
        num_dropped = len(ledger.unfinished)
        if failure is None and not should_stop() and (num_dropped or next(requests, None)):
            failure = RuntimeError(
                "run: expected generate to go on until nothing is left to do, got its end with "
                f"{num_dropped} samples unfinished"
            )
        for verdict in grader.drain():
            ledger.record([verdict])
            show()
        if failure is None and interrupted():
            failure = KeyboardInterrupt()

    if ledger.num_asked:
        ended_by = "samples" if ended_s < deadline_s else "budget"
        if failure is not None:
            ended_by = type(failure).__name__
        end_s = round(ended_s - started_s + offset_s, 6)
        store.append_span(Span(offset_s, end_s, num_dropped, ended_by))
    if failure is not None:
        raise failure
    return RunSummary(
        num_samples=ledger.num_stored,
        num_correct=ledger.num_correct,
        num_errors=ledger.num_errors,
        num_dropped=num_dropped,
        num_tokens=ledger.num_tokens,
        run_s=store.elapsed_s - offset_s,
        elapsed_s=store.elapsed_s,
    )


class _Ledger:
    """The way of each sample: asked for, finished and being judged, stored."""

    def __init__(
        self,
        task: Task,
        problems: Sequence[Problem],
        shots: int,
        store: SampleStore,
        grader: Grader,
        started_s: float,
        offset_s: float,
    ) -> None:
        self._prompts = {problem.id: messages(task, problem, shots) for problem in problems}
        self._golds = {problem.id: problem.answer for problem in problems}
        self._store = store
        self._grader = grader
        self._to_run_time_s = offset_s - started_s
        self._judging: dict[tuple[str, int], Completion] = {}
        self.unfinished: set[tuple[str, int]] = set()
        self.num_asked = self.num_stored = self.num_correct = self.num_errors = 0
        self.num_tokens = 0

    def requests(
        self, samples: int | None, wave: int, should_stop: Callable[[], bool]
    ) -> Iterator[Request]:
        for first in count(0, wave) if samples is None else range(0, samples, wave):
            last = first + wave if samples is None else min(first + wave, samples)
            for problem_id, prompt in self._prompts.items():
                if should_stop():
                    return
                wanted = [i for i in range(first, last) if (problem_id, i) not in self._store]
                if wanted:
                    self.num_asked += len(wanted)
                    self.unfinished.update((problem_id, i) for i in wanted)
                    yield Request(problem_id, prompt, tuple(wanted))

    def accept(self, completion: Completion) -> None:
        key = (completion.problem_id, completion.sample)
        if key not in self.unfinished:
            raise ValueError(f"run: expected a sample that is asked for and unfinished, got {key}")
        self.unfinished.remove(key)
        self._judging[key] = completion
        self.num_tokens += completion.num_tokens
        self._grader.submit(key, completion.text, self._golds[completion.problem_id])

    def record(self, verdicts: Iterable[Verdict]) -> None:
        for verdict in verdicts:
            completion = self._judging.pop(verdict.key)
            self._store.append(
                Sample(
                    problem_id=completion.problem_id,
                    sample=completion.sample,
                    text=completion.text,
                    num_tokens=completion.num_tokens,
                    start_s=round(completion.start_s + self._to_run_time_s, 6),
                    end_s=round(completion.end_s + self._to_run_time_s, 6),
                    finish_reason=completion.finish_reason,
                    answer=verdict.answer,
                    vote=verdict.vote,
                    correct=verdict.correct,
                    error=verdict.error,
                )
            )
            self.num_stored += 1
            self.num_correct += verdict.correct is True
            self.num_errors += verdict.error is not None

    def status(self, run_s: float) -> str:
        status = f"{self.num_stored} samples, {self.num_tokens / run_s:.0f} tokens/s"
        if self.num_stored:
            status += f", {self.num_correct / self.num_stored:.0%} right"
        return status


def _bar(progress: bool, timed: bool) -> Progress:
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}")]
    if not timed:
        columns.append(TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (progress and console.is_terminal))

"""Grading: the answer a chain of thought ends in, and whether it is right.

Reading the answer out of the text takes a few linear regular expressions, here and now. Judging it
takes a computer algebra system, which can hang, exhaust memory or crash; that happens in verifier
processes, which are killed and replaced at will while the caller goes on generating.
"""

import json
import os
import re
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# A program, not a multiprocessing worker: nothing is forked beside torch's threads, the caller's
# __main__ is not imported again, and -P keeps this folder's module names out of its imports.
VERIFIER = (sys.executable, "-P", str(Path(__file__).with_name("verifier.py")))

# Longer text in a box or after "answer is" is no answer but a chain that lost its way, and parsers
# take time that grows faster than its length.
MAX_ANSWER_CHARS = 400

START_LIMIT_S = 120.0

_BRACE = re.compile(r"\\[\\{}]|(?P<box>\\f?boxed\s*)?\{|\}")  # escaped ones are text
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*)")
_PHRASE = re.compile(r"\banswer\b[^\n.:=]{0,60}?(?:\bis\b|:|=)[\s:*]*", re.IGNORECASE)
_PHRASE_END = re.compile(
    r"\n|[.!?;](?=\s|$)|,\s+(?=[A-Za-z]{2,})|\s+(?=(?:because|since|so|which|for)\b)"
)
_MATH_SPAN = re.compile(r"\$([^$\n]+)\$(?!\d)|\\\((.+?)\\\)|\\\[((?s:.+?))\\\]")
_ARITHMETIC = re.compile(r"[\d\s.,()+*/×÷$-]+=\s*(?=\S)")
_QUANTITY = re.compile(
    r"(?P<sign>[-−+]?)\s*\\?[$€£]?\s*(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    # A unit is words, the first of two letters or more, as "5 x" is a product; and it is neither
    # a factor nor a function nor the middle of a list.
    r"\s*(?:\\?%|\\?\$|(?<=\s)"
    r"(?!(?:pi|sqrt|sin|cos|tan|cot|sec|csc|log|ln|exp|mod|and|or|to|plus|minus|times|over)\b)"
    r"(?!dozen|hundred|thousand|(?:m|b|tr)illion)[A-Za-z]{2}[A-Za-z ./-]*)?"
)


def extract_answer(text: str) -> str | None:
    """Read the final answer out of a chain of thought.

    The forms in order of preference, and of each form the last one: `\\boxed{...}`, a line
    `#### ...`, a phrase "answer is ..." or "answer: ...". A bare number at the end is no answer:
    it would make a vote of every chain that was cut short. A plain quantity loses currency, unit,
    percent sign and thousands separators: "$1,800 per week" is "1800".

    Args:
        text: The chain of thought.

    Returns:
        The answer, or None where the text states none.
    """
    if (boxed := _last_boxed(text)) is not None:
        return _cleaned(boxed)
    if stated := _HASHES.findall(text):
        return _cleaned(stated[-1])
    if stated := list(_PHRASE.finditer(text)):
        phrase = text[stated[-1].end() :]
        span = _MATH_SPAN.match(phrase)
        return _cleaned(span[0] if span else _PHRASE_END.split(phrase, maxsplit=1)[0])
    return None


def _last_boxed(text: str) -> str | None:
    open_braces: list[int | None] = []  # where the content of a box begins, None for other braces
    last = slice(0, 0)
    for brace in _BRACE.finditer(text):
        if brace[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and start > last.start:
                last = slice(start, brace.start())
        elif brace[0].endswith("{") and brace[0] != "\\{":
            open_braces.append(brace.end() if brace["box"] else None)
    return text[last] if last.start else None


def _cleaned(answer: str) -> str | None:
    answer = answer.strip().strip("*").strip()
    if len(answer) > MAX_ANSWER_CHARS:
        return None
    if span := _MATH_SPAN.fullmatch(answer.rstrip(".")):
        answer = next(filter(None, span.groups())).strip()
    answer = answer.removesuffix(".").rstrip()
    if worked := _ARITHMETIC.match(answer):
        answer = answer[worked.end() :]
    if quantity := _QUANTITY.fullmatch(answer):
        sign = "-" if quantity["sign"] in ("-", "−") else ""
        return sign + quantity["number"].replace(",", "")
    return answer or None


@dataclass(frozen=True)
class Verdict:
    """What became of one submitted text.

    Args:
        key: The key it was submitted under.
        answer: The answer it ends in; None where it states none.
        vote: Canonical form of the answer, the candidate it votes for (see `verifier`); the
            answer itself where the verifier failed, None where there is no answer.
        correct: Whether the answer equals the gold answer; None where the verifier failed.
        error: Why it failed: "timeout", "died", or the name of the exception it met.
    """

    key: Hashable
    answer: str | None
    vote: str | None
    correct: bool | None
    error: str | None


class Grader:
    """Verifier processes that judge answers while the caller does something else.

    Equal answers to one gold answer are judged once. A verifier that overruns the limit is killed
    and replaced, and its answer reported as an error; no other answer is touched by that. The
    processes end with `close`, and by themselves when this process dies.

    Args:
        workers: Number of verifier processes.
        timeout_s: Seconds that one answer may take.
        command: The verifier program; see `verifier.serve` for what it reads and writes.

    Raises:
        ValueError: `workers` below 1 or `timeout_s` not positive.
        RuntimeError: From any method, when a verifier ends or hangs before it is ready.
    """

    def __init__(
        self, workers: int = 1, timeout_s: float = 5.0, command: Sequence[str] = VERIFIER
    ) -> None:
        if workers < 1:
            raise ValueError(f"Grader: workers expected at least 1, got {workers}")
        if not timeout_s > 0:
            raise ValueError(f"Grader: timeout_s expected more than 0, got {timeout_s}")
        self._timeout_s = timeout_s
        self._command = list(command)
        self._selector = selectors.DefaultSelector()
        self._queue: deque[tuple[str, str]] = deque()
        self._waiting: dict[tuple[str, str], list[Hashable]] = {}
        self._judged: dict[tuple[str, str], dict] = {}
        self._verdicts: list[Verdict] = []
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._start()

    def submit(self, key: Hashable, text: str, gold: str) -> None:
        """Ask for the verdict on a text; returns at once.

        Args:
            key: Comes back with the verdict.
            text: A chain of thought.
            gold: The gold answer.
        """
        answer = extract_answer(text)
        if answer is None:
            self._verdicts.append(Verdict(key, None, None, correct=False, error=None))
            return
        pair = (answer, _cleaned(gold) or gold)
        if pair in self._judged:
            self._verdicts.append(self._verdict(key, pair))
        elif pair in self._waiting:
            self._waiting[pair].append(key)
        else:
            self._waiting[pair] = [key]
            self._queue.append(pair)
            self._advance(timeout_s=0)

    def poll(self) -> list[Verdict]:
        """Return the verdicts reached since the last call, without waiting for any."""
        self._advance(timeout_s=0)
        verdicts, self._verdicts = self._verdicts, []
        return verdicts

    def drain(self) -> Iterator[Verdict]:
        """Yield verdicts until every submitted text has its own."""
        yield from self.poll()
        while self._waiting:
            next_s = min((worker.deadline for worker in self._workers), default=0.0)
            self._advance(timeout_s=max(0.0, next_s - time.monotonic()))
            yield from self.poll()

    def close(self) -> None:
        """End the verifier processes; unjudged texts are forgotten."""
        for worker in list(self._workers):
            self._stop(worker)
        self._selector.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _verdict(self, key: Hashable, pair: tuple[str, str]) -> Verdict:
        reply = self._judged[pair]
        answer = pair[0]
        return Verdict(
            key, answer, reply.get("vote", answer), reply.get("correct"), reply.get("error")
        )

    def _settle(self, pair: tuple[str, str], reply: dict) -> None:
        self._judged[pair] = reply
        self._verdicts.extend(self._verdict(key, pair) for key in self._waiting.pop(pair))

    def _advance(self, timeout_s: float) -> None:
        """Read replies, end what is overdue, hand out what is queued."""
        if not self._workers:
            raise RuntimeError("Grader: expected a verifier to be left, got a closed grader")
        for selected, _ in self._selector.select(timeout_s):
            self._read(selected.data)
        now = time.monotonic()
        for worker in [worker for worker in self._workers if now > worker.deadline]:
            self._replace(worker, "timeout")
        for worker in self._workers:
            if self._queue and worker.ready and worker.pair is None:
                self._send(worker, self._queue.popleft())

    def _send(self, worker: "_Worker", pair: tuple[str, str]) -> None:
        worker.pair = pair
        worker.deadline = time.monotonic() + self._timeout_s
        # Twice the limit: the verifier's own alarm is for the case that no one is left to kill it.
        request = {"answer": pair[0], "gold": pair[1], "limit_s": 2 * self._timeout_s}
        with suppress(BrokenPipeError):  # its end is the next thing read from it
            os.write(worker.process.stdin.fileno(), json.dumps(request).encode() + b"\n")

    def _read(self, worker: "_Worker") -> None:
        chunk = os.read(worker.process.stdout.fileno(), 1 << 16)
        if not chunk:
            self._replace(worker, "died")
            return
        worker.reply += chunk
        if not worker.reply.endswith(b"\n"):
            return
        reply, worker.reply = json.loads(worker.reply), b""
        worker.deadline = float("inf")
        if worker.pair is None:
            worker.ready = True
        else:
            self._settle(worker.pair, reply)
            worker.pair = None

    def _replace(self, worker: "_Worker", error: str) -> None:
        self._stop(worker)
        if not worker.ready:
            raise RuntimeError(
                f"Grader: expected {' '.join(self._command)} to become ready, got {error} "
                f"(exit status {worker.process.returncode})"
            )
        self._start()
        if worker.pair is not None:
            self._settle(worker.pair, {"error": error})

    def _start(self) -> None:
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            process_group=0,  # Ctrl-C is for the caller, who still wants its verdicts
        )
        worker = _Worker(process, deadline=time.monotonic() + START_LIMIT_S)
        self._workers.append(worker)
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)

    def _stop(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        self._selector.unregister(worker.process.stdout)
        worker.process.kill()
        worker.process.wait()
        worker.process.stdin.close()
        worker.process.stdout.close()


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    deadline: float
    ready: bool = False
    pair: tuple[str, str] | None = None
    reply: bytes = b""

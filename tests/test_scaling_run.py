import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reasoners.scaling.grading import Grader
from reasoners.scaling.run import Completion, RunSummary, run, run_manifest
from reasoners.scaling.store import SampleStore, Span, read_samples, read_spans
from reasoners.scaling.tasks import GSM8K, Problem, messages

ROOT = Path(__file__).parents[1]
PROBLEMS = [Problem(f"p/{i}", f"What is {i} + 1?", str(i + 1)) for i in range(3)]
MANIFEST = run_manifest(GSM8K, "here", PROBLEMS, model="fake", sampling={"temperature": 0.6})


def chain(problem_id, sample):
    """Even samples are right, odd ones off by one; every fifth has no answer."""
    number = int(problem_id.removeprefix("p/")) + 1
    return "I wonder." if sample % 5 == 4 else f"Let me see.\n#### {number + sample % 2}"


def complete(problem_id, sample, start_s=None, text=None):
    now_s = time.perf_counter()
    text = chain(problem_id, sample) if text is None else text
    return Completion(problem_id, sample, text, 10, "stop", start_s or now_s, now_s)


def at_once(requests, should_stop):
    for request in requests:
        for sample in request.samples:
            yield complete(request.problem_id, sample)


class Engine:
    """Keeps `slots` samples in flight; each takes `steps` steps, and heartbeats pass between."""

    def __init__(self, slots=4, steps=3, step_s=0.0, at_step=None):
        self.slots, self.steps, self.step_s = slots, steps, step_s
        self.at_step = at_step or (lambda step: None)
        self.asked = []
        self.closed = False

    def __call__(self, requests, should_stop):
        flying, waiting = [], []
        step = 0
        try:
            while not should_stop():
                while len(flying) + len(waiting) < self.slots and (request := next(requests, None)):
                    self.asked.append((request.problem_id, request.samples))
                    waiting += [(request.problem_id, sample) for sample in request.samples]
                while waiting and len(flying) < self.slots:
                    flying.append([*waiting.pop(0), time.perf_counter(), 0])
                if not flying:
                    return
                self.at_step(step)
                step += 1
                time.sleep(self.step_s)
                for row in flying:
                    row[3] += 1
                for row in [row for row in flying if row[3] == self.steps]:
                    flying.remove(row)
                    yield complete(*row[:3])
                yield None
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def grader():
    with Grader() as grader:
        yield grader


@pytest.fixture
def store(tmp_path):
    with SampleStore(tmp_path / "run", MANIFEST) as store:
        yield store


def content(folder):
    """Every sample but for its times, in an order of its own."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        del row["start_s"], row["end_s"]
    return sorted(rows, key=lambda row: (row["problem_id"], row["sample"]))


def test_samples_are_drawn_graded_and_stored(store, grader):
    summary = run(GSM8K, PROBLEMS, Engine(), store, grader, samples=6)
    assert (summary.num_samples, summary.num_correct, summary.num_tokens) == (18, 6, 180)
    assert (summary.num_dropped, summary.num_errors) == (0, 0)
    assert 0 < summary.run_s == summary.elapsed_s < 5
    samples = {
        sample.sample: sample for sample in read_samples(store.folder) if sample.problem_id == "p/1"
    }
    assert [samples[i].correct for i in range(6)] == [True, False, True, False, False, False]
    assert [samples[i].answer for i in range(6)] == ["2", "3", "2", "3", None, "3"]
    assert [samples[i].vote for i in range(6)] == ["2", "3", "2", "3", None, "3"]
    assert samples[0].text == "Let me see.\n#### 2" and samples[0].finish_reason == "stop"
    assert all(0 <= s.start_s <= s.end_s <= summary.elapsed_s for s in samples.values())
    assert read_spans(store.folder) == [Span(0.0, summary.elapsed_s, 0, "samples")]


def test_waves(store, grader):
    engine = Engine(slots=1, steps=1)
    run(GSM8K, PROBLEMS, engine, store, grader, samples=5, wave=2)
    assert engine.asked == [
        *[(f"p/{i}", (0, 1)) for i in range(3)],
        *[(f"p/{i}", (2, 3)) for i in range(3)],
        *[(f"p/{i}", (4,)) for i in range(3)],
    ]


def test_without_a_budget_a_prompt_is_read_once(store, grader):
    engine = Engine(slots=1, steps=1)
    run(GSM8K, PROBLEMS, engine, store, grader, samples=11)
    assert engine.asked == [(f"p/{i}", tuple(range(11))) for i in range(3)]


def test_requests_are_prompts_and_are_taken_one_by_one(store, grader):
    taken = []

    def generate(requests, should_stop):
        for request in requests:
            taken.append(request)
            assert len(taken) == 1 + len(store) + len(grader._waiting)  # one sample per request
            yield complete(request.problem_id, 0)

    run(GSM8K, PROBLEMS, generate, store, grader, samples=1, shots=2)
    assert [request.messages for request in taken] == [messages(GSM8K, p, 2) for p in PROBLEMS]


def test_only_missing_samples_are_asked_for(store, grader):
    run(GSM8K, PROBLEMS, at_once, store, grader, samples=3)
    engine = Engine()
    summary = run(GSM8K, PROBLEMS, engine, store, grader, samples=5, wave=2)
    assert engine.asked == [
        *[(f"p/{i}", (3,)) for i in range(3)],
        *[(f"p/{i}", (4,)) for i in range(3)],
    ]
    assert summary.num_samples == 6 and len(store) == 15
    before = store.elapsed_s
    assert run(GSM8K, PROBLEMS, at_once, store, grader, samples=5).num_samples == 0
    assert store.elapsed_s == before and len(read_spans(store.folder)) == 2


def test_run_time_goes_on_where_it_stopped(store, grader):
    run(GSM8K, PROBLEMS, at_once, store, grader, samples=1)
    store.append_span(Span(store.elapsed_s, 100.0, 0, "samples"))
    summary = run(GSM8K, PROBLEMS, at_once, store, grader, samples=2)
    second = [sample for sample in read_samples(store.folder) if sample.sample == 1]
    assert len(second) == 3 and all(100 < sample.end_s < 102 for sample in second)
    assert 0 < summary.run_s < 2 and summary.elapsed_s == pytest.approx(100 + summary.run_s)


def test_the_budget_drops_what_is_unfinished(store, grader):
    asked = []

    def generate(requests, should_stop):
        for request in requests:
            asked.append((request.problem_id, *request.samples))
            time.sleep(0.01)
            if request.problem_id != "p/2":  # which never ends
                yield complete(request.problem_id, *request.samples)

    summary = run(GSM8K, PROBLEMS, generate, store, grader, budget_s=0.5, wave=1)
    stored = list(read_samples(store.folder))
    assert summary.num_samples == len(stored) > 5
    assert summary.num_dropped == len(asked) - len(stored) > 2
    assert max(sample.end_s for sample in stored) <= 0.5
    assert {sample.problem_id for sample in stored} == {"p/0", "p/1"}
    assert summary.elapsed_s == summary.run_s == 0.5
    assert read_spans(store.folder) == [Span(0.0, 0.5, summary.num_dropped, "budget")]
    # The budget is of the store, not of the call.
    again = run(GSM8K, PROBLEMS, generate, store, grader, budget_s=0.5)
    assert again == RunSummary(0, 0, 0, 0, 0, 0.0, 0.5)
    assert len(read_spans(store.folder)) == 1


def test_a_sample_that_ends_after_the_deadline_is_dropped(store, grader):
    def generate(requests, should_stop):
        yield complete(next(requests).problem_id, 0)
        late = next(requests)
        time.sleep(0.25)  # deaf to should_stop
        yield complete(late.problem_id, 0)
        raise AssertionError("asked for more after the deadline")

    summary = run(GSM8K, PROBLEMS, generate, store, grader, budget_s=0.2, wave=1)
    assert (summary.num_samples, summary.num_dropped) == (1, 1)


def test_enough_samples_end_a_run_before_its_budget(store, grader):
    summary = run(GSM8K, PROBLEMS, Engine(), store, grader, samples=2, budget_s=60)
    assert summary.num_samples == 6 and summary.elapsed_s < 5
    assert read_spans(store.folder)[0].ended_by == "samples"


def ctrl_c(step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGINT)


def raise_interrupt(step):
    if step == 7:
        raise KeyboardInterrupt


def fail(step):
    if step == 7:
        raise MemoryError("no memory left")


@pytest.mark.parametrize(
    ("at_step", "exception", "finished"),
    [
        # Steps 0 to 6 finish two batches of four; Ctrl-C lets the step end, exceptions do not.
        (ctrl_c, KeyboardInterrupt, 8),
        (raise_interrupt, KeyboardInterrupt, 8),
        (fail, MemoryError, 8),
    ],
)
def test_interrupted_and_resumed(tmp_path, grader, at_step, exception, finished):
    """What was finished is graded and stored; the resumed store equals an uninterrupted one."""
    handler = signal.getsignal(signal.SIGINT)
    with SampleStore(tmp_path / "whole", MANIFEST) as store:
        run(GSM8K, PROBLEMS, Engine(), store, grader, samples=6, wave=2)
    engine = Engine(at_step=at_step)
    with SampleStore(tmp_path / "cut", MANIFEST) as store, pytest.raises(exception):
        run(GSM8K, PROBLEMS, engine, store, grader, samples=6, wave=2)
    assert engine.closed
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(content(tmp_path / "cut")) == finished
    (span,) = read_spans(tmp_path / "cut")
    assert (span.ended_by, span.num_dropped) == (exception.__name__, 4)
    with SampleStore(tmp_path / "cut", MANIFEST) as store:
        assert run(GSM8K, PROBLEMS, Engine(), store, grader, samples=6, wave=2).num_samples == 10
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    ends_s = [sample.end_s for sample in read_samples(tmp_path / "cut")]
    assert max(ends_s[:finished]) <= span.end_s <= min(ends_s[finished:])


KILLED = """
import sys
sys.path.insert(0, "tests")
from test_scaling_run import *

with SampleStore(sys.argv[1], MANIFEST) as store, Grader() as grader:
    grader.submit("first", "#### 1", "1")
    list(grader.drain())  # the verifier is ready

    def kill(step):
        if len(store) >= 4:
            os.kill(os.getpid(), signal.SIGKILL)

    run(GSM8K, PROBLEMS, Engine(step_s=0.05, at_step=kill), store, grader, samples=6, wave=2)
"""


def test_killed_and_resumed(tmp_path, grader):
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "cut")], cwd=ROOT)
    assert result.returncode == -signal.SIGKILL
    assert 4 <= len(content(tmp_path / "cut")) < 18
    for name in ("cut", "whole"):
        with SampleStore(tmp_path / name, MANIFEST) as store:
            run(GSM8K, PROBLEMS, Engine(), store, grader, samples=6, wave=2)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_generation_and_verification_overlap(store):
    """While one answer hangs its verifier, generation goes on and other samples are stored."""
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from reasoners.scaling.verifier import serve\n"
        "serve(lambda answer, gold: {'correct': answer == '1' and time.sleep(60)})"
    )

    def generate(requests, should_stop):
        for request in requests:
            yield complete(request.problem_id, 0)
        limit_s = time.monotonic() + 10
        while len(store) < 2 and time.monotonic() < limit_s:
            yield None
        stored_meanwhile.extend(sample.problem_id for sample in read_samples(store.folder))

    stored_meanwhile = []
    with Grader(workers=2, timeout_s=1.0, command=[sys.executable, "-c", code]) as grader:
        summary = run(GSM8K, PROBLEMS, generate, store, grader, samples=1)
    assert sorted(stored_meanwhile) == ["p/1", "p/2"]
    assert (summary.num_samples, summary.num_errors) == (3, 1)
    (hung,) = [sample for sample in read_samples(store.folder) if sample.problem_id == "p/0"]
    assert (hung.answer, hung.vote, hung.correct, hung.error) == ("1", "1", None, "timeout")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected samples, budget_s or both, got neither"),
        ({"samples": 0}, "samples expected at least 1, got 0"),
        ({"budget_s": 0}, "budget_s expected more than 0, got 0"),
        ({"budget_s": float("nan")}, "budget_s expected more than 0, got nan"),
        ({"samples": 1, "wave": 0}, "wave expected at least 1, got 0"),
        ({"samples": 1, "problems": []}, "expected at least one problem, got none"),
        ({"samples": 1, "shots": 9}, "shots expected 0 to 4"),
    ],
)
def test_bad_arguments(store, grader, arguments, message):
    problems = arguments.pop("problems", PROBLEMS)
    with pytest.raises(ValueError, match=message):
        run(GSM8K, problems, at_once, store, grader, **arguments)


def test_a_generator_that_breaks_the_protocol(store, grader):
    def unasked(requests, should_stop):
        request = next(requests)
        yield complete(request.problem_id, 0)
        yield complete(request.problem_id, 7)

    with pytest.raises(ValueError, match=r"asked for and unfinished, got \('p/0', 7\)"):
        run(GSM8K, PROBLEMS, unasked, store, grader, samples=2)

    def twice(requests, should_stop):
        request = next(requests)
        yield complete(request.problem_id, 1)
        yield complete(request.problem_id, 1)

    with pytest.raises(ValueError, match=r"asked for and unfinished, got \('p/0', 1\)"):
        run(GSM8K, PROBLEMS, twice, store, grader, samples=2)

    def lazy(requests, should_stop):
        yield complete(next(requests).problem_id, 0)

    with pytest.raises(RuntimeError, match="until nothing is left to do"):
        run(GSM8K, PROBLEMS[1:], lazy, store, grader, samples=1)
    assert [(s.problem_id, s.sample) for s in read_samples(store.folder)] == [
        ("p/0", 0),
        ("p/0", 1),
        ("p/1", 0),
    ]


def test_manifest():
    assert {key: MANIFEST[key] for key in ("task", "source", "num_problems", "shots", "model")} == {
        "task": "gsm8k",
        "source": "here",
        "num_problems": 3,
        "shots": 0,
        "model": "fake",
    }

    def digest(problems, shots=0):
        return run_manifest(GSM8K, "here", problems, "fake", {}, shots)["prompts_sha256"]

    assert digest(PROBLEMS) == MANIFEST["prompts_sha256"]
    other_gold = [*PROBLEMS[:2], Problem("p/2", PROBLEMS[2].question, "4")]
    assert (
        len({digest(PROBLEMS), digest(PROBLEMS, 1), digest(PROBLEMS[:2]), digest(other_gold)}) == 4
    )


SHOWN = """
import sys
sys.path.insert(0, "tests")
from test_scaling_run import *
with SampleStore(sys.argv[1], MANIFEST) as store, Grader() as grader:
    run(GSM8K, PROBLEMS, Engine(step_s=0.02), store, grader, samples=6, budget_s=60)
"""


def test_progress_bar(tmp_path):
    """On a terminal it shows counts, rates and the time left; elsewhere nothing."""
    command = [sys.executable, "-c", SHOWN, str(tmp_path / "terminal")]
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    process = subprocess.Popen(command, cwd=ROOT, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how a terminal says that its last writer is gone
        pass
    assert process.wait() == 0
    os.close(ours)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"sampling .* 18 samples, \d+ tokens/s, 33% right, \d\d s left", plain)
    command[-1] = str(tmp_path / "pipe")
    quiet = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")

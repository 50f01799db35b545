import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reasoners.scaling.grading import Grader, Verdict, extract_answer
from reasoners.scaling.tasks import GSM8K, MATH500, load_problems
from reasoners.scaling.verifier import canonical, judge

DATA = Path(__file__).parents[2] / "shared" / "data"
ROOT = Path(__file__).parents[1]


def verifier(expression):
    """A verifier program that evaluates `expression` of answer and gold as its verdict."""
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from reasoners.scaling.verifier import serve\n"
        f"serve(lambda answer, gold: {expression})"
    )
    return [sys.executable, "-c", code]


EQUAL = "{'correct': answer == gold, 'vote': answer}"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        # the form asked for
        ("She makes 9 * 2 = $18 a day.\n#### 18", "18"),
        ("#### 1,800", "1800"),
        ("#### $1,234.50.", "1234.50"),
        ("#### -10", "-10"),
        ("#### 75%", "75"),
        ("#### 18 eggs per day", "18"),
        ("####18\n", "18"),
        ("#### **18**", "18"),
        ("#### 2/3", "2/3"),
        ("#### 16 - 3 - 4 = 9", "9"),
        ("#### 5\nNow the next one.\n#### 7", "7"),
        # boxes
        ("Thus \\boxed{18}.", "18"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("First \\boxed{1}, no, \\boxed{\\text{east}}", "\\text{east}"),
        ("\\boxed{\\$18}", "18"),
        ("\\boxed{ 90^\\circ }", "90^\\circ"),
        ("\\boxed{25\\%}", "25"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ 1 \\right]}", "\\left\\{ 1 \\right]"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("a} \\fbox{1} {\\boxed {2}} {b", "2"),
        ("\\boxed{5 x}", "5 x"),
        ("\\boxed{2 pi}", "2 pi"),
        ("\\boxed{2 sin x}", "2 sin x"),
        ("\\boxed{x = 5}", "x = 5"),
        ("\\boxed{3, 5, 7}", "3, 5, 7"),
        ("\\boxed{12 million}", "12 million"),
        ("The answer is \\boxed{4}, and \\boxed{5 was cut", "4"),
        # phrases
        ("The answer is $18.", "18"),
        ("The answer is 18 dollars because eggs are $2 each.", "18"),
        ("So the final answer is: $x = 5$. Check it.", "x = 5"),
        ("The answer is $5 for Ann and $7 for Bob.", "5"),
        ("The answer to the first question is 3. The answer is 4.", "4"),
        ("**Answer:** 42 apples.", "42"),
        ("Answer: The answer is 3.5 kg", "3.5"),
        ("The answer is 3 hours and 20 minutes.", "3 hours and 20 minutes"),
        ("The answer is 1 or 2.", "1 or 2"),
        ("Final answer:\n\\(\\frac{3}{4}\\)", "\\frac{3}{4}"),
        ("Answer:\n\\[\nx^2\n\\]", "x^2"),
        ("The answer is 20, so she has twenty.", "20"),
        ("The answer is −5.", "-5"),
        # preference: box, hashes, phrase, whatever their order in the text
        ("\\boxed{1}\n#### 2\nThe answer is 3.", "1"),
        ("#### 2\nThe answer is 3.", "2"),
        # no answer
        ("", None),
        ("She sells 16 - 3 - 4 = 9 eggs and makes 18", None),
        ("\\boxed{}", None),
        ("\\boxed{cut off", None),
        ("####", None),
        ("#### " + "9 + " * 200, None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "unit", ["\\boxed{", "\\boxed", "answer is ", "#### ", "$", "answer ", "9,999", "{"]
)
def test_extraction_takes_linear_time(unit):
    start_s = time.perf_counter()
    extract_answer(unit * (200_000 // len(unit)))
    assert time.perf_counter() - start_s < 2


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("18", "18.0", True),
        ("18", "19", False),
        ("1000", "1,000", True),
        ("\\frac{14}{3}", "14/3", True),
        ("\\frac43", "\\dfrac{4}{3}", True),
        ("3\\sqrt{13}", "\\sqrt{117}", True),
        ("3\\sqrt{13}", "\\sqrt{118}", False),
        ("p - q", "-q+p", True),
        ("p - q", "q-p", False),
        ("x=5", "5", True),
        ("1,-2", "-2, 1", True),
        ("\\text{Evelyn}", "Evelyn", True),
        ("\\text{Evelyn}", "Carla", False),
        ("(3,4]", "(3, 4]", True),
        ("(3,4]", "[3, 4]", False),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", True),
        ("10,\\!080", "10080", True),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}^\\circ", True),
        ("18", "garbage {{", False),
    ],
)
def test_judge(gold, answer, correct):
    assert judge(answer, gold)["correct"] is correct


@pytest.mark.parametrize(
    ("candidate", "same", "other"),
    [
        ("18", "18.00", "18.5"),
        ("0.5", "\\frac12", "0.51"),
        ("1/(1+\\sqrt2)", "\\sqrt{2} - 1", "\\sqrt{2}"),
        ("(x-1)(x+1)", "x^2-1", "x^2+1"),
        ("3, 5, 7", "7,5,3", "3,5"),
        ("x = 5", "5", "x = 6"),
        ("(0.5, 2]", "(1/2, 2]", "[1/2, 2]"),
        ("\\text{no solution}", "\\text{No solution}", "\\text{one solution}"),
        ("(15, -29)", "(15,-29)", "(6, 1)"),
        ("1 + 1 = 2", "1 + 1 =  2", "2 + 1 = 3"),
    ],
)
def test_canonical(candidate, same, other):
    assert canonical(candidate) == canonical(same)
    assert canonical(candidate) != canonical(other)


def test_right_answers_are_one_candidate():
    # A fraction and its rounding have different canonical forms, but both equal the gold answer.
    assert judge("0.333333", "1/3") == judge("1/3", "1/3") == {"correct": True, "vote": "1/3"}


def test_verdicts():
    with Grader() as grader:
        grader.submit("a", "#### 18", "18")
        grader.submit("b", "The answer is $18.00", "18")
        grader.submit("c", "I do not know.", "18")
        grader.submit("d", "#### 17", "18")
        grader.submit("e", "\\boxed{36/2}", "18")
        verdicts = {verdict.key: verdict for verdict in grader.drain()}
    assert verdicts == {
        "a": Verdict("a", "18", "18", True, None),
        "b": Verdict("b", "18.00", "18", True, None),
        "c": Verdict("c", None, None, False, None),
        "d": Verdict("d", "17", "17", False, None),
        "e": Verdict("e", "36/2", "18", True, None),
    }


def test_equal_answers_are_judged_once(tmp_path):
    log = tmp_path / "log"
    command = verifier(f"print(answer, gold, file=open({str(log)!r}, 'a')) or {EQUAL}")
    with Grader(workers=2, command=command) as grader:
        for key in range(20):
            grader.submit(key, f"Chain {key}.\n#### {key % 2}", "1")
        verdicts = list(grader.drain())
        grader.submit(20, "#### 1", "1")
        verdicts += grader.poll()
    assert {verdict.key for verdict in verdicts if verdict.correct} == {*range(1, 21, 2), 20}
    assert len(verdicts) == 21
    assert sorted(log.read_text().split("\n")) == ["", "0 1", "1 1"]


def test_a_hanging_verifier_is_replaced():
    command = verifier(f"time.sleep(60) if answer == 'hang' else {EQUAL}")
    with Grader(timeout_s=0.5, command=command) as grader:
        for answer in ("1", "hang", "2"):
            grader.submit(answer, f"\\boxed{{{answer}}}", "1")
        verdicts = {verdict.key: verdict for verdict in grader.drain()}
    assert verdicts == {
        "1": Verdict("1", "1", "1", True, None),
        "hang": Verdict("hang", "hang", "hang", None, "timeout"),
        "2": Verdict("2", "2", "2", False, None),
    }


def test_a_dying_verifier_is_replaced():
    command = verifier(f"os._exit(3) if answer == 'die' else {EQUAL}")
    with Grader(workers=2, command=command) as grader:
        for answer in ("1", "die", "2", "3"):
            grader.submit(answer, f"\\boxed{{{answer}}}", "1")
        verdicts = {verdict.key: verdict for verdict in grader.drain()}
    assert verdicts["die"] == Verdict("die", "die", "die", None, "died")
    assert [verdicts[key].correct for key in "123"] == [True, False, False]


def test_an_exception_is_an_error_of_that_answer():
    with Grader(command=verifier(f"1 / 0 if answer == 'bad' else {EQUAL}")) as grader:
        grader.submit("bad", "\\boxed{bad}", "1")
        grader.submit("good", "\\boxed{1}", "1")
        verdicts = {verdict.key: verdict for verdict in grader.drain()}
    assert verdicts["bad"] == Verdict("bad", "bad", "bad", None, "ZeroDivisionError")
    assert verdicts["good"].correct is True


def test_printing_does_not_disturb_replies():
    with Grader(
        command=verifier(f"print('noise') or os.system('echo noise') and 0 or {EQUAL}")
    ) as g:
        g.submit("a", "\\boxed{1}", "1")
        assert [verdict.correct for verdict in g.drain()] == [True]


def test_an_answer_that_sympy_cannot_take():
    with Grader(timeout_s=1) as grader:
        grader.submit("huge", "\\boxed{9^{9^{9^{9}}}}", "5")
        grader.submit("plain", "\\boxed{5}", "5")
        verdicts = {verdict.key: verdict for verdict in grader.drain()}
    assert verdicts["huge"].correct is not True
    assert verdicts["plain"].correct is True


def test_a_verifier_that_cannot_start_is_an_error():
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with (
        Grader(command=command) as grader,
        pytest.raises(RuntimeError, match=r"to become ready, got died \(exit status 7\)"),
    ):
        grader.submit("a", "\\boxed{1}", "1")
        list(grader.drain())
    with pytest.raises(RuntimeError, match="got a closed grader"):
        grader.submit("b", "\\boxed{2}", "1")


def test_polling_does_not_wait():
    with Grader(command=verifier("time.sleep(60)")) as grader:
        grader.submit("a", "\\boxed{1}", "1")
        start_s = time.perf_counter()
        for _ in range(50):
            assert grader.poll() == []
        assert time.perf_counter() - start_s < 0.5


def test_bad_arguments():
    with pytest.raises(ValueError, match="workers expected at least 1, got 0"):
        Grader(workers=0)
    with pytest.raises(ValueError, match="timeout_s expected more than 0, got 0"):
        Grader(timeout_s=0)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("busy", [False, True])
def test_verifiers_end_with_their_parent(tmp_path, busy):
    """Killed without a chance to close: idle verifiers at once, hanging ones by their alarm."""
    pid_file = tmp_path / "pid"
    note_pid = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))"
    hang = f"{note_pid} and answer == '2' and sum(iter(int, 1))"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from reasoners.scaling.grading import Grader\n"
        f"grader = Grader(timeout_s=1, command={verifier(hang)!r})\n"
        f"grader.submit('a', '#### {2 if busy else 1}', '1')\n"
        "import time\n"
        "for _ in range(1000): grader.poll(); time.sleep(0.01)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    limit_s = time.monotonic() + 20
    while not pid_file.exists() or not pid_file.read_text():
        assert time.monotonic() < limit_s
        time.sleep(0.02)
    pid = int(pid_file.read_text())
    assert alive(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    limit_s = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < limit_s
        time.sleep(0.02)


def test_ctrl_c_does_not_reach_verifiers():
    """A terminal sends it to the group of the foreground process."""
    with Grader(workers=2) as grader:
        pids = [worker.process.pid for worker in grader._workers]
        assert [os.getpgid(pid) for pid in pids] == pids


def test_nothing_runs_after_close():
    grader = Grader(workers=2, command=verifier("time.sleep(60)"))
    processes = [worker.process for worker in grader._workers]
    grader.submit("a", "\\boxed{1}", "1")
    grader.close()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no evaluation data in {DATA}")
def test_gold_solutions_are_graded_right():
    """The worked solutions of GSM8K and the boxed answers of MATH-500 equal their gold answers."""
    import json

    gsm8k = load_problems(GSM8K, DATA / "gsm8k_test.jsonl", limit=200)
    lines = (DATA / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()
    math500 = load_problems(MATH500, DATA / "math500.json", limit=50)
    with Grader(workers=2) as grader:
        for problem, line in zip(gsm8k, lines):
            grader.submit(problem.id, json.loads(line)["answer"], problem.answer)
        for problem in math500:
            grader.submit(problem.id, f"So it is $\\boxed{{{problem.answer}}}$.", problem.answer)
        verdicts = list(grader.drain())
    assert len(verdicts) == 250
    assert [verdict for verdict in verdicts if verdict.correct is not True] == []

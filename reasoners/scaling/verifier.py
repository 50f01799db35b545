"""The verifier process: judges one answer at a time with math-verify.

`Grader` runs this file as a program of its own, so that an answer which makes sympy hang, exhaust
memory or crash takes down a process that nobody misses. It imports nothing of `reasoners`, hence
starts in well under a second and holds no model. Lines of JSON go both ways:

    out  {"ready": true}                                  once, when the imports are done
    in   {"answer": "1/2", "gold": "\\\\frac12"}
    out  {"correct": true, "vote": "1/2"}   or   {"error": "MemoryError"}

`vote` is a canonical form of the answer: answers of one form are one candidate in a majority vote.
It is what sympy prints once numbers are exact, products expanded and denominators free of roots,
and the gold answer's form for every answer that math-verify holds equal to it, so the right answer
is never split. Wrong answers that are equal only by a deeper identity (trigonometric, say) stay
apart, as do a fraction and its rounding; to find every such pair takes a comparison of all with
all, each of which can hang.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

MEMORY_BYTES = 4 << 30


def judge(answer: str, gold: str) -> dict:
    """Compare an answer with the gold answer.

    Args:
        answer: The answer, LaTeX or plain.
        gold: The gold answer, likewise.

    Returns:
        `correct`, whether math-verify (https://github.com/huggingface/Math-Verify) holds them
        equal or their canonical forms agree, and `vote`, the canonical form of the answer.
    """
    from math_verify import verify

    # No timeout of its own: that is a SIGALRM handler in Python, which a hang in C never reaches.
    correct = verify(parsed(gold), parsed(answer), timeout_seconds=None)
    vote = canonical(gold) if correct else canonical(answer)
    return {"correct": correct or vote == canonical(gold), "vote": vote}


@lru_cache(maxsize=4096)
def parsed(answer: str) -> list:
    """Parse an answer to what math-verify compares: a sympy expression and the text it read."""
    from math_verify import parse

    return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)


@lru_cache(maxsize=4096)
def canonical(answer: str) -> str:
    """Write the canonical form of an answer, its text in lower case where it is no mathematics."""
    import sympy

    expression = next(iter(parsed(answer)), None)
    if not isinstance(expression, sympy.Basic | sympy.MatrixBase):
        return " ".join(answer.lower().split())
    if isinstance(expression, sympy.Eq) and expression.lhs.is_Symbol:
        expression = expression.rhs  # "x = 5" and "5" answer the same question
    tidied = _tidied(sympy.nsimplify(expression.doit(), rational=True))
    # "1 + 1 = 2" and "2 + 1 = 3" are both a truth, and all empty intervals are one set: forms that
    # keep nothing of what they came from would make one candidate of different answers.
    if tidied in (sympy.S.EmptySet, sympy.true, sympy.false):
        return " ".join(answer.lower().split())
    return str(tidied)


def _tidied(expression):
    import sympy

    if isinstance(expression, sympy.MatrixBase):
        return expression.applyfunc(_tidied)
    if isinstance(expression, sympy.Expr):
        return sympy.radsimp(sympy.expand(expression))
    if expression.args:  # a set, tuple or relation: its members one by one
        return expression.func(*map(_tidied, expression.args))
    return expression


def serve(judge: Callable[[str, str], dict] = judge) -> None:
    """Answer requests from stdin until it closes.

    Args:
        judge: Takes an answer and the gold answer, returns the fields of the reply.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:  # parsers print; neither replies nor terminal want it
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    print(json.dumps({"ready": True}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        # An alarm that nobody handles is death by the kernel's hand: should the grader be gone, and
        # so not kill this process at its deadline, a hang still does not outlive it by much.
        signal.setitimer(signal.ITIMER_REAL, request["limit_s"])
        try:
            reply = judge(request["answer"], request["gold"])
        except Exception as error:
            reply = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies)


if __name__ == "__main__":
    import math_verify  # noqa: F401  (before "ready", so that no answer's time pays for it)

    logging.disable(logging.CRITICAL)
    with suppress(ValueError, OSError):  # not every system limits address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
    serve()

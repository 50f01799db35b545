"""Scaling inference compute: draw many chains of thought, verify them, and see what they buy.

`load_problems` reads a task, `run` draws samples through a `Generate` function into a
`SampleStore` while a `Grader` judges them, and `build_report` turns stores into coverage and
accuracy against samples and against seconds. No model is known here, and no torch.
"""

from reasoners.scaling.grading import Grader
from reasoners.scaling.report import build_report, print_table, save_json, save_plot
from reasoners.scaling.run import Completion, Generate, Request, RunSummary, run, run_manifest
from reasoners.scaling.store import SampleStore
from reasoners.scaling.tasks import TASKS, Problem, Task, load_problems, messages

__all__ = [
    "TASKS",
    "Completion",
    "Generate",
    "Grader",
    "Problem",
    "Request",
    "RunSummary",
    "SampleStore",
    "Task",
    "build_report",
    "load_problems",
    "messages",
    "print_table",
    "run",
    "run_manifest",
    "save_json",
    "save_plot",
]

"""The report: coverage and accuracy of one or several runs, against samples and against seconds.

Against k, a curve takes the problems that have samples, and goes up to the fewest samples that one
of them has: all its points are of the same problems. Against seconds it takes all problems of the
run, and of each the samples finished by then; a problem without any is neither covered nor right.
A sample that the verifier failed on counts as wrong.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from reasoners.scaling.estimators import (
    bootstrap_interval,
    maj_at_k,
    majority_over_time,
    pass_at_k,
)
from reasoners.scaling.store import Sample, read_manifest, read_samples, read_spans, write_json

NUM_TIMES = 64
MEASURES = {
    "coverage": "coverage (any sample right)",
    "accuracy": "accuracy (majority right)",
}


def build_report(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Compute every number of the report.

    Args:
        folders: Folders of `SampleStore`s, which may still be in use.

    Returns:
        `{"runs": [...]}`, JSON values only. Each run has `by_k` and `by_seconds`, lists of points
        with `coverage` and `accuracy`, each of them `mean`, `low` and `high` (95 % bootstrap over
        problems), besides its manifest and totals.

    Raises:
        ValueError: No folders, a run without samples, or a malformed file.
        FileNotFoundError: A folder holds no run.
    """
    if not folders:
        raise ValueError("build_report: expected at least one folder, got none")
    runs = [_read_run(Path(folder)) for folder in folders]
    longest_s = max(run.elapsed_s for run in runs)
    times_s = longest_s * np.arange(1, NUM_TIMES + 1) / NUM_TIMES
    return {"runs": [_describe(run, times_s) for run in runs]}


def save_json(report: dict[str, Any], path: str | Path) -> None:
    """Write a report as JSON.

    Args:
        report: What `build_report` returned.
        path: Where to; what is there is replaced, at once and whole.
    """
    write_json(Path(path), report)


def print_table(report: dict[str, Any], console: Console) -> None:
    """Print a report as tables: totals, measures against k and against seconds.

    Args:
        report: What `build_report` returned.
        console: Where to.
    """
    runs = report["runs"]
    totals = Table(title="Runs")
    totals.add_column("")
    for run in runs:
        totals.add_column(run["name"], justify="right", overflow="fold")
    for label, text_of in _TOTALS.items():
        totals.add_row(label, *map(text_of, runs))
    console.print(totals)
    for axis, key in (("k", "by_k"), ("seconds", "by_seconds")):
        table = Table(
            title=f"Against {axis}",
            caption="%, with 95 % bootstrap interval over problems; accuracy is of the majority",
        )
        table.add_column(axis, justify="right")
        for run in runs:
            prefix = f"{run['name']}\n" if len(runs) > 1 else ""
            for measure in MEASURES:
                table.add_column(prefix + measure, justify="right")
        curves = [{point[axis]: point for point in run[key]} for run in runs]
        for place in _table_rows(axis, sorted(set().union(*curves))):
            cells = [
                _cell(curve[place][measure]) if place in curve else "-"
                for curve in curves
                for measure in MEASURES
            ]
            table.add_row(f"{place:,.2f}" if axis == "seconds" else str(place), *cells)
        console.print(table)


def save_plot(report: dict[str, Any], path: str | Path) -> None:
    """Draw a report as a picture of four panels: two measures against k and against seconds.

    Args:
        report: What `build_report` returned.
        path: Where to; the suffix decides the format (.png, .pdf, .svg).
    """
    from matplotlib.figure import Figure  # slow to import, and needed for nothing else

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharex="col", sharey="row")
    runs = report["runs"]
    for row, (measure, label) in zip(panels, MEASURES.items()):
        for number, run in enumerate(runs):
            for panel, axis, points in zip(row, ("k", "seconds"), (run["by_k"], run["by_seconds"])):
                places = [point[axis] for point in points]
                mean, low, high = (
                    [100 * point[measure][name] for point in points]
                    for name in ("mean", "low", "high")
                )
                stepped = axis == "seconds"  # nothing changes between two samples' ends
                panel.plot(
                    places,
                    mean,
                    color=f"C{number}",
                    drawstyle="steps-post" if stepped else "default",
                    marker=None if stepped else "o",
                    markersize=4,
                    label=run["name"],
                )
                panel.fill_between(
                    places,
                    low,
                    high,
                    step="post" if stepped else None,
                    color=f"C{number}",
                    alpha=0.15,
                    linewidth=0,
                )
                panel.grid(alpha=0.3)
                panel.spines[["top", "right"]].set_visible(False)
        points = [point for run in runs for point in run["by_k"] + run["by_seconds"]]
        highest = max(point[measure]["high"] for point in points)
        row[0].set_ylim(0, 105 * max(highest, 0.05))
        row[0].set_ylabel(f"{label}, %")
    every_k = sorted({point["k"] for run in runs for point in run["by_k"]})
    panels[1, 0].set_xscale("log", base=2)
    panels[1, 0].set_xticks(every_k, labels=map(str, every_k))
    panels[1, 0].minorticks_off()
    panels[1, 0].set_xlabel("samples per problem, k")
    panels[1, 1].set_xlim(left=0)
    panels[1, 1].set_xlabel("run time, s")
    lines, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    tasks = ", ".join(sorted({run["manifest"]["task"] for run in runs}))
    figure.suptitle(f"{tasks}: what more samples buy (bands: 95 % bootstrap over problems)")
    figure.savefig(path, dpi=150)


_TOTALS: dict[str, Callable[[dict[str, Any]], str]] = {
    "task": lambda run: run["manifest"]["task"],
    "model": lambda run: run["manifest"]["model"],
    "problems (with samples)": lambda run: f"{run['num_problems']} ({run['num_sampled_problems']})",
    "samples": lambda run: f"{run['num_samples']:,}",
    "samples per problem": lambda run: f"{run['min_samples']} to {run['max_samples']}",
    "dropped unfinished": lambda run: f"{run['num_dropped']:,}",
    "without answer": lambda run: f"{run['num_unanswered']:,}",
    "finish reasons": lambda run: _tally(run["finish_reasons"]),
    "verifier errors": lambda run: _tally(run["errors"]) or "0",
    "tokens": lambda run: f"{run['num_tokens']:,}",
    "seconds": lambda run: f"{run['elapsed_s']:,.1f}",
    "tokens/s": lambda run: f"{run['tokens_per_s']:,.1f}",
}


def _tally(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _cell(value: dict[str, float]) -> str:
    return f"{100 * value['mean']:.1f} [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def _table_rows(axis: str, places: list[float]) -> list[float]:
    if axis == "k":
        return places
    return [places[i - 1] for i in _powers_of_two(len(places))]


def _powers_of_two(last: int) -> list[int]:
    """1, 2, 4, ... and `last`."""
    powers = takewhile(lambda power: power < last, (1 << i for i in range(last.bit_length())))
    return [*powers, last]


@dataclass
class _Problem:
    """What the estimators want of one problem: a number, an end, a vote and a truth per sample."""

    classes: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[int, float, int, bool]] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        vote = -1
        if sample.vote is not None:
            vote = self.classes.setdefault(sample.vote, len(self.classes))
        self.rows.append((sample.sample, sample.end_s, vote, sample.correct is True))

    def columns(self, order: int) -> Iterator[NDArray[Any]]:
        """Numbers, ends, votes and truths, in ascending order of one of them."""
        return map(np.array, zip(*sorted(self.rows, key=lambda row: (row[order], row[0]))))


@dataclass
class _Run:
    folder: Path
    manifest: dict[str, Any]
    problems: dict[str, _Problem]
    elapsed_s: float
    totals: dict[str, Any]


def _read_run(folder: Path) -> _Run:
    manifest = read_manifest(folder)
    problems: dict[str, _Problem] = {}
    num_tokens = num_unanswered = 0
    elapsed_s = 0.0
    finish_reasons: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for sample in read_samples(folder):
        problems.setdefault(sample.problem_id, _Problem()).add(sample)
        num_tokens += sample.num_tokens
        num_unanswered += sample.answer is None
        elapsed_s = max(elapsed_s, sample.end_s)
        finish_reasons[sample.finish_reason] += 1
        if sample.error is not None:
            errors[sample.error] += 1
    if not problems:
        raise ValueError(f"{folder}: expected a run with samples, got none yet")
    if not {"task", "model", "num_problems"} <= manifest.keys():
        raise ValueError(
            f"{folder}: expected task, model and num_problems in run.json, got {sorted(manifest)}"
        )
    if len(problems) > manifest["num_problems"]:
        raise ValueError(
            f"{folder}: expected samples of {manifest['num_problems']} problems as run.json says, "
            f"got samples of {len(problems)}"
        )
    spans = read_spans(folder)
    elapsed_s = max(elapsed_s, *(span.end_s for span in spans), 0.0)
    lengths = [len(problem.rows) for problem in problems.values()]
    totals = {
        "num_problems": manifest["num_problems"],
        "num_sampled_problems": len(problems),
        "num_samples": sum(lengths),
        "min_samples": min(lengths),
        "max_samples": max(lengths),
        "num_dropped": sum(span.num_dropped for span in spans),
        "num_unanswered": num_unanswered,
        "finish_reasons": dict(finish_reasons.most_common()),
        "errors": dict(errors.most_common()),
        "num_tokens": num_tokens,
        "elapsed_s": elapsed_s,
        "tokens_per_s": num_tokens / elapsed_s,
    }
    return _Run(folder, manifest, problems, elapsed_s, totals)


def _describe(run: _Run, times_s: NDArray[np.float64]) -> dict[str, Any]:
    # The last point is the first one that sees the run ended.
    times_s = times_s[: np.searchsorted(times_s, run.elapsed_s) + 1]
    return {
        "name": run.folder.resolve().name,
        "folder": str(run.folder),
        "manifest": run.manifest,
        **run.totals,
        "by_k": _curve("k", *_against_k(run)),
        "by_seconds": _curve("seconds", *_against_seconds(run, times_s)),
    }


def _against_k(run: _Run) -> tuple[list[int], NDArray[Any], NDArray[Any]]:
    """Places k, and coverage and accuracy of every (k, problem)."""
    every_k = _powers_of_two(run.totals["min_samples"])
    coverage = np.zeros((len(every_k), len(run.problems)))
    accuracy = np.zeros_like(coverage)
    for j, problem in enumerate(run.problems.values()):
        _, _, votes, correct = problem.columns(order=0)
        for i, k in enumerate(every_k):
            coverage[i, j] = pass_at_k(len(correct), int(correct.sum()), k)
            accuracy[i, j] = maj_at_k(votes, correct, k)
    return every_k, coverage, accuracy


def _against_seconds(
    run: _Run, times_s: NDArray[np.float64]
) -> tuple[list[float], NDArray[Any], NDArray[Any]]:
    """Places in seconds, and coverage and accuracy of every (second, problem)."""
    coverage = np.zeros((len(times_s), run.totals["num_problems"]))
    accuracy = np.zeros_like(coverage)
    for j, problem in enumerate(run.problems.values()):
        _, ends_s, votes, correct = problem.columns(order=1)
        finished = np.searchsorted(ends_s, times_s, side="right")
        coverage[:, j] = np.concatenate([[False], np.logical_or.accumulate(correct)])[finished]
        accuracy[:, j] = majority_over_time(votes, correct)[finished]
    return times_s.tolist(), coverage, accuracy


def _curve(
    axis: str, places: list[Any], coverage: NDArray[Any], accuracy: NDArray[Any]
) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = [{axis: place} for place in places]
    for measure, values in (("coverage", coverage), ("accuracy", accuracy)):
        for point, mean, low, high in zip(points, values.mean(axis=1), *bootstrap_interval(values)):
            point[measure] = {"mean": float(mean), "low": float(low), "high": float(high)}
    return points

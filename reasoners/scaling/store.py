"""The sample store: a folder that a run can be killed over at any moment and lose nothing.

    run.json       what the samples are samples of; a run that differs in it may not add to them
    samples.jsonl  one line per graded sample, in the order of their verdicts
    spans.jsonl    one line per stretch of run time, written when it ends

Seconds are seconds of run time: a resumed run goes on from the second at which the last one
stopped (or, where that was killed, from the end of its last sample).
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One graded chain of thought.

    Args:
        problem_id: The problem it answers.
        sample: Its number among the samples of that problem, from 0.
        text: The chain of thought.
        num_tokens: Its length in tokens.
        start_s: Second of run time at which its generation began.
        end_s: Second of run time at which it was finished.
        finish_reason: Why it ended, in the generator's words ("stop", "length", ...).
        answer: The extracted answer; None where the text states none.
        vote: Canonical form of the answer, the candidate it votes for.
        correct: Whether the answer is right; None where the verifier failed.
        error: Why it failed.
    """

    problem_id: str
    sample: int
    text: str
    num_tokens: int
    start_s: float
    end_s: float
    finish_reason: str
    answer: str | None
    vote: str | None
    correct: bool | None
    error: str | None


@dataclass(frozen=True)
class Span:
    """One stretch of run time, from the start of a run to its end.

    Args:
        start_s: Second of run time at which it began.
        end_s: Second of run time at which generation stopped.
        num_dropped: Samples begun or asked for that were unfinished then, and are not stored.
        ended_by: "samples" (all drawn), "budget", "interrupt" or the name of an exception.
    """

    start_s: float
    end_s: float
    num_dropped: int
    ended_by: str


class SampleStore:
    """A folder of samples, open for one writer.

    Opening repairs what a killed run left: a torn last line is cut off.

    Args:
        folder: The folder; made if it does not exist.
        manifest: What the samples depend on (task, model, sampling parameters, ...), as JSON
            values. Written on first opening, compared on every later one.

    Raises:
        ValueError: The folder's manifest differs (every differing field is named), or a line of
            it is no sample.
        BlockingIOError: Another process has the folder open for writing.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._samples = _Log(self.folder / "samples.jsonl")
        self._spans = _Log(self.folder / "spans.jsonl")
        self._keys: set[tuple[str, int]] = set()
        self.elapsed_s = 0.0
        try:
            # The lock comes first: nothing may be repaired under another writer's hands.
            self._samples.lock()
            self._agree(manifest)
            for sample in self._samples.recover(Sample):
                self._expect_new(sample)
                self._count(sample)
            for span in self._spans.recover(Span):
                self.elapsed_s = max(self.elapsed_s, span.end_s)
        except BaseException:
            self.close()
            raise

    def __contains__(self, key: tuple[str, int]) -> bool:
        """Whether the store has sample `key = (problem_id, sample)`."""
        return key in self._keys

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._keys)

    def append(self, sample: Sample) -> None:
        """Add a sample: all of its line or none of it.

        Args:
            sample: A sample that the store does not have.

        Raises:
            ValueError: The store has it already.
            OSError: It could not be written, for want of space say; the store is as before.
        """
        self._expect_new(sample)
        self._samples.append(sample)
        self._count(sample)

    def append_span(self, span: Span) -> None:
        """Add a stretch of run time; raises OSError as `append` does."""
        self._spans.append(span)
        self.elapsed_s = max(self.elapsed_s, span.end_s)

    def close(self) -> None:
        """Flush to the disk, and let the next writer in."""
        self._spans.close()
        self._samples.close()

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _expect_new(self, sample: Sample) -> None:
        if (sample.problem_id, sample.sample) in self:
            raise ValueError(
                f"{self._samples.path}: expected each sample once, got sample {sample.sample} of "
                f"problem {sample.problem_id!r} again"
            )

    def _count(self, sample: Sample) -> None:
        self._keys.add((sample.problem_id, sample.sample))
        self.elapsed_s = max(self.elapsed_s, sample.end_s)

    def _agree(self, manifest: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            write_json(path, manifest)
            return
        stored = _flat(read_manifest(self.folder))
        given = _flat(json.loads(json.dumps(manifest)))
        differences = [
            f"{field}: expected {stored.get(field)!r} as in the store, got {given.get(field)!r}"
            for field in sorted(stored.keys() | given.keys())
            if (field in stored, stored.get(field)) != (field in given, given.get(field))
        ]
        if differences:
            raise ValueError(
                f"{path}: this run is not the one that the store was begun with; use another "
                "folder, or the same settings:\n  " + "\n  ".join(differences)
            )


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read what a store's samples are samples of.

    Args:
        folder: The store's folder.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError: The folder holds no store.
        ValueError: Its manifest is malformed.
    """
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(
            errno.ENOENT, "expected the folder of a run, got none with a run.json", str(folder)
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got malformed text ({error})") from None


def read_samples(folder: str | Path) -> Iterator[Sample]:
    """Read a store's samples without a lock, so also while a run adds to them.

    Args:
        folder: The store's folder.

    Yields:
        The samples in stored order, less a last line that is still being written.

    Raises:
        FileNotFoundError: The folder has no samples file.
        ValueError: A line before the last is no sample.
    """
    with (Path(folder) / "samples.jsonl").open("rb") as lines:
        for _, sample in _read_lines(lines, Sample, lines.name):
            yield sample


def read_spans(folder: str | Path) -> list[Span]:
    """Read a store's stretches of run time, as `read_samples` reads its samples."""
    path = Path(folder) / "spans.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as lines:
        return [span for _, span in _read_lines(lines, Span, str(path))]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file such that it is never seen half written.

    Args:
        path: Where to; what is there is replaced.
        value: What to write.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


class _Log:
    """A file of JSON lines that only grows, by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)

    def lock(self) -> None:
        # The kernel drops the lock with the process, however that ends.
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK,
                "expected to be the only writer, got a store that another process writes to",
                str(self.path.parent),
            ) from None

    def recover(self, kind: type) -> Iterator[Any]:
        """Yield the records and cut off a torn last line."""
        whole = 0
        with self.path.open("rb") as lines:
            for end, record in _read_lines(lines, kind, str(self.path)):
                whole = end
                yield record
        os.ftruncate(self._file, whole)

    def append(self, record: Any) -> None:
        line = memoryview(json.dumps(vars(record)).encode() + b"\n")
        whole = os.fstat(self._file).st_size
        try:
            while line:  # a disk about to be full takes part of a line, and refuses the rest
                line = line[os.write(self._file, line) :]
        except OSError as error:
            os.ftruncate(self._file, whole)
            raise OSError(
                error.errno, f"{error.strerror}; all lines before this one are safe", str(self.path)
            ) from None

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


def _read_lines(lines: Iterator[bytes], kind: type, name: str) -> Iterator[tuple[int, Any]]:
    """Yield (offset of its end, record) of each whole line; a torn one ends the file."""
    end = 0
    torn = None
    for number, line in enumerate(lines, start=1):
        if torn is not None:
            raise ValueError(f"{name}, line {number - 1}: expected a JSON object, got {torn}")
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no end of line")
            value = json.loads(line)
        except ValueError as error:
            torn = f"malformed text ({error})"
            continue
        end += len(line)
        yield end, _read_record(value, kind, f"{name}, line {number}")


def _read_record(value: Any, kind: type, where: str) -> Any:
    expected = kind.__dataclass_fields__.keys()
    if not isinstance(value, dict) or value.keys() != expected:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{where}: expected the fields {sorted(expected)}, got {found}")
    return kind(**value)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    leaves = {}
    for key, inner in value.items():
        leaves |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return leaves

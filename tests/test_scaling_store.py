import json
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from reasoners.scaling.store import (
    Sample,
    SampleStore,
    Span,
    read_manifest,
    read_samples,
    read_spans,
    write_json,
)

MANIFEST = {"task": "gsm8k", "model": "tiny", "sampling": {"temperature": 0.6, "top_p": 0.95}}
SAMPLE = Sample(
    problem_id="p/0",
    sample=0,
    text="Two and two\nmake ½·8 = 4.\n#### 4",
    num_tokens=12,
    start_s=0.5,
    end_s=2.25,
    finish_reason="stop",
    answer="4",
    vote="4",
    correct=True,
    error=None,
)


def samples(count):
    return [replace(SAMPLE, sample=i, end_s=2.25 + i) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A store of three samples."""
    with SampleStore(tmp_path / "run", MANIFEST) as store:
        for sample in samples(3):
            store.append(sample)
    return tmp_path / "run"


def test_round_trip(folder):
    assert list(read_samples(folder)) == samples(3)
    assert read_manifest(folder) == MANIFEST
    with SampleStore(folder, MANIFEST) as store:
        assert len(store) == 3
        assert ("p/0", 2) in store and ("p/0", 3) not in store
        assert store.elapsed_s == 4.25
        store.append_span(Span(0.0, 6.5, num_dropped=1, ended_by="budget"))
        assert store.elapsed_s == 6.5
    assert read_spans(folder) == [Span(0.0, 6.5, 1, "budget")]
    with SampleStore(folder, MANIFEST) as store:
        assert store.elapsed_s == 6.5


@pytest.mark.parametrize("tail", ['{"problem_id": "p/0", "sam', "\0\0\0\0\n", '{"torn": \n'])
def test_a_torn_last_line_is_cut_off(folder, tail):
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail.encode())
    assert list(read_samples(folder)) == samples(3)  # a reader leaves it as it is
    assert path.read_bytes() == whole + tail.encode()
    with SampleStore(folder, MANIFEST) as store:
        assert path.read_bytes() == whole
        store.append(samples(4)[3])
    assert list(read_samples(folder)) == samples(4)


def test_a_complete_line_without_its_end_is_torn(folder):
    path = folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with SampleStore(folder, MANIFEST) as store:
        assert len(store) == 2
        store.append(samples(3)[2])
    assert list(read_samples(folder)) == samples(3)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: expected a JSON object, got malformed text"),
        ("[1]", "line 2: expected the fields .*'answer'.*, got list"),
        ('{"problem_id": "p/0"}', r"line 2: expected the fields .*, got \['problem_id'\]"),
        (json.dumps(asdict(SAMPLE)), "got sample 0 of problem 'p/0' again"),
    ],
)
def test_a_corrupted_middle_is_an_error_and_stays(folder, line, message):
    path = folder / "samples.jsonl"
    lines = path.read_text().split("\n")
    lines[1] = line
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        SampleStore(folder, MANIFEST)
    assert path.read_text() == "\n".join(lines)
    lines[1] = json.dumps(asdict(samples(2)[1]))
    path.write_text("\n".join(lines))
    with SampleStore(folder, MANIFEST) as store:  # the lock of the failed opening is gone
        assert len(store) == 3


def test_a_sample_is_not_stored_twice(folder):
    with SampleStore(folder, MANIFEST) as store, pytest.raises(ValueError, match="expected each"):
        store.append(SAMPLE)
    assert list(read_samples(folder)) == samples(3)


def test_a_different_manifest_names_its_fields(folder):
    other = {"task": "gsm8k", "sampling": {"temperature": 0.8, "top_p": 0.95}, "shots": 4}
    with pytest.raises(ValueError, match="use another folder") as caught:
        SampleStore(folder, other)
    assert str(caught.value).splitlines()[1:] == [
        "  model: expected 'tiny' as in the store, got None",
        "  sampling.temperature: expected 0.6 as in the store, got 0.8",
        "  shots: expected None as in the store, got 4",
    ]
    assert read_manifest(folder) == MANIFEST


def test_a_full_disk_leaves_whole_lines(folder):
    """A file size limit, as a full disk, takes part of a line and refuses the rest."""
    path = folder / "samples.jsonl"
    whole = path.read_bytes()
    with SampleStore(folder, MANIFEST) as store:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
        try:
            with pytest.raises(OSError, match="all lines before this one are safe") as caught:
                store.append(samples(4)[3])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.filename == str(path)
        assert path.read_bytes() == whole
        assert len(store) == 3 and store.elapsed_s == 4.25
        store.append(samples(4)[3])  # space again: the run could go on
    assert list(read_samples(folder)) == samples(4)


OPEN_IN_ANOTHER_PROCESS = """
import sys
from reasoners.scaling.store import SampleStore
try:
    store = SampleStore(sys.argv[1], {"task": "gsm8k"})
except BlockingIOError as error:
    raise SystemExit(f"locked: {error}")
print("open", flush=True)
sys.stdin.read()
"""


def open_in_another_process(folder):
    return subprocess.Popen(
        [sys.executable, "-c", OPEN_IN_ANOTHER_PROCESS, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_one_writer_at_a_time(tmp_path):
    folder = tmp_path / "run"
    with open_in_another_process(folder) as first:
        assert first.stdout.readline() == "open\n"
        with pytest.raises(BlockingIOError, match="got a store that another process writes to"):
            SampleStore(folder, {"task": "gsm8k"})
        assert list(read_samples(folder)) == []  # readers need no lock
        first.kill()  # no chance to unlock
        first.wait()
    with SampleStore(folder, {"task": "gsm8k"}), open_in_another_process(folder) as second:
        _, message = second.communicate()
        assert message.startswith("locked: ") and str(folder) in message


def test_reading_what_is_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a run, got none"):
        read_manifest(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json: expected JSON, got malformed text"):
        read_manifest(tmp_path)


def test_write_json_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]

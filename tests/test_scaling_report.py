import io
import json
import struct
import zlib

import pytest
from rich.console import Console

from reasoners.scaling.report import build_report, print_table, save_json, save_plot
from reasoners.scaling.store import Sample, SampleStore, Span

# Of three problems "c" has no sample yet. Votes, right ones with "+", at their ends in seconds:
#   a   1+ at 2,  2 at 1,  1+ at 4,  - at 3 (no answer)
#   b   5 at 6,  5 at 5,  7+ at 7 (8 and more samples are asked for, but the run ended)
SAMPLES = [
    ("a", 1, 1.0, "2", False),
    ("a", 0, 2.0, "1", True),
    ("a", 3, 3.0, None, False),
    ("a", 2, 4.0, "1", True),
    ("b", 1, 5.0, "5", False),
    ("b", 0, 6.0, "5", False),
    ("b", 2, 7.0, "7", True),
]


def write_run(folder, samples=SAMPLES, num_problems=3, ended_s=8.0):
    manifest = {"task": "gsm8k", "model": "tiny", "num_problems": num_problems}
    with SampleStore(folder, manifest) as store:
        for problem_id, number, end_s, vote, correct in samples:
            store.append(
                Sample(
                    problem_id=problem_id,
                    sample=number,
                    text="...",
                    num_tokens=100,
                    start_s=end_s - 1,
                    end_s=end_s,
                    finish_reason="length" if vote is None else "stop",
                    answer=vote,
                    vote=vote,
                    correct=None if vote == "2" else correct,
                    error="timeout" if vote == "2" else None,
                )
            )
        store.append_span(Span(0.0, ended_s, num_dropped=2, ended_by="budget"))
    return folder


def means(points, axis):
    return {p[axis]: (p["coverage"]["mean"], p["accuracy"]["mean"]) for p in points}


def test_literal_numbers(tmp_path):
    (run,) = build_report([write_run(tmp_path / "tiny")])["runs"]
    totals = {
        "name": "tiny",
        "num_problems": 3,
        "num_sampled_problems": 2,
        "num_samples": 7,
        "min_samples": 3,
        "max_samples": 4,
        "num_dropped": 2,
        "num_unanswered": 1,
        "finish_reasons": {"stop": 6, "length": 1},
        "errors": {"timeout": 1},
        "num_tokens": 700,
        "elapsed_s": 8.0,
        "tokens_per_s": 87.5,
    }
    assert {key: run[key] for key in totals} == totals
    # Against k over a and b, to the three samples that b has.
    # a: 2 of 4 right: pass@1 1/2, pass@2 1 - 1/6, pass@3 1. Votes in order of number: 1 2 1 -,
    #    majorities of two: 12 11 1- 21 2- 1- of which 1 1 1 2 2 1; of three: 121 12- 11- 21-,
    #    of which 1 1 1 2.
    # b: 1 of 3 right: pass@1 1/3, pass@2 2/3, pass@3 1. Votes 5 5 7: majorities of two 5 5 5.
    assert means(run["by_k"], "k") == {
        1: pytest.approx((5 / 12, (1 / 2 + 1 / 3) / 2)),
        2: pytest.approx(((5 / 6 + 2 / 3) / 2, (4 / 6 + 0) / 2)),
        3: pytest.approx((1.0, (3 / 4 + 0) / 2)),
    }
    # Against seconds over a, b and c, in steps of 8 / 64 s. The majority of a: 2 at 1 s, tie of
    # 2 and 1 at 2 s, for 2 that came first, and 1 from 4 s on; of b: always 5.
    curve = means(run["by_seconds"], "seconds")
    assert len(curve) == 64 and list(curve)[:2] == [0.125, 0.25]
    assert curve[0.875] == (0, 0)
    assert curve[1.0] == (0, 0)
    assert curve[1.875] == (0, 0)
    assert curve[2.0] == pytest.approx((1 / 3, 0))
    assert curve[3.875] == pytest.approx((1 / 3, 0))
    assert curve[4.0] == pytest.approx((1 / 3, 1 / 3))
    assert curve[6.875] == pytest.approx((1 / 3, 1 / 3))
    assert curve[7.0] == pytest.approx((2 / 3, 1 / 3))
    assert curve[8.0] == pytest.approx((2 / 3, 1 / 3))


def test_intervals(tmp_path):
    """Four problems, one solved: resampled means have the binomial distribution B(4, 1/4) / 4."""
    samples = [(name, 0, 1.0, name, name == "a") for name in "abcd"]
    (run,) = build_report([write_run(tmp_path / "run", samples, num_problems=4)])["runs"]
    (point,) = run["by_k"]
    # P(0) = 0.316 > 2.5 %, P(4) = 0.4 %, P(3 or 4) = 5.1 %.
    assert point["coverage"] == point["accuracy"] == {"mean": 0.25, "low": 0.0, "high": 0.75}


def test_runs_share_their_seconds(tmp_path):
    long = write_run(tmp_path / "long")
    short = write_run(tmp_path / "short", SAMPLES[:4], num_problems=1, ended_s=4.9)
    report = build_report([long, short])
    by_name = {run["name"]: [p["seconds"] for p in run["by_seconds"]] for run in report["runs"]}
    assert by_name["short"] == by_name["long"][:40]  # up to 5.0, the first that sees it ended
    assert report["runs"][1]["by_seconds"][-1]["coverage"]["mean"] == 1.0


def test_a_live_run_can_be_reported(tmp_path):
    folder = write_run(tmp_path / "run")
    before = build_report([folder])
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"problem_id": "b", "sam')
    manifest = {"task": "gsm8k", "model": "tiny", "num_problems": 3}
    whole = (folder / "samples.jsonl").read_text()
    assert build_report([folder]) == before
    assert (folder / "samples.jsonl").read_text() == whole
    with SampleStore(folder, manifest):  # locked by its run
        assert build_report([folder]) == before


def test_table(tmp_path):
    report = build_report(
        [write_run(tmp_path / "one"), write_run(tmp_path / "two", SAMPLES[:4], 1, 4)]
    )
    out = io.StringIO()
    print_table(report, Console(file=out, width=120))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in out.getvalue().splitlines()
        if line.startswith("│")
    ]
    assert ["tokens/s", "87.5", "100.0"] in rows
    assert ["problems (with samples)", "3 (2)", "1 (1)"] in rows
    assert ["dropped unfinished", "2", "2"] in rows
    assert ["verifier errors", "timeout 1", "timeout 1"] in rows
    assert ["finish reasons", "stop 6, length 1", "stop 3, length 1"] in rows
    assert ["2", "75.0 [67, 83]", "33.3 [0, 67]", "83.3 [83, 83]", "66.7 [67, 67]"] in rows
    assert ["4", "-", "-", "100.0 [100, 100]", "100.0 [100, 100]"] in rows
    assert ["8.00", "66.7 [0, 100]", "33.3 [0, 100]", "-", "-"] in rows


def test_json(tmp_path):
    report = build_report([write_run(tmp_path / "run")])
    save_json(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[:1]], ids=["curves", "nothing right"])
def test_plot(tmp_path, samples):
    report = build_report([write_run(tmp_path / "one", samples), write_run(tmp_path / "two")])
    save_plot(report, tmp_path / "report.png")
    png = (tmp_path / "report.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and png.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) == (1500, 1050)
    pixels = zlib.decompress(b"".join(chunks(png, b"IDAT")))
    assert len(set(pixels)) > 50  # not a blank page


def chunks(png, wanted):
    position = 8
    while position < len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        if kind == wanted:
            yield png[position + 8 : position + 8 + length]
        position += length + 12


def test_folders_without_a_report(tmp_path):
    with pytest.raises(ValueError, match="expected at least one folder, got none"):
        build_report([])
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        build_report([tmp_path])
    with pytest.raises(ValueError, match="expected a run with samples, got none yet"):
        build_report([write_run(tmp_path / "empty", [])])
    with pytest.raises(ValueError, match=r"expected samples of 1 problems .* got samples of 2"):
        build_report([write_run(tmp_path / "more", num_problems=1)])
    with SampleStore(tmp_path / "other", {"task": "x"}) as store:
        store.append(Sample("a", 0, "", 1, 0.0, 1.0, "stop", None, None, False, None))
    with pytest.raises(ValueError, match=r"task, model and num_problems .* got \['task'\]"):
        build_report([tmp_path / "other"])

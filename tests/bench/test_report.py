"""Tables, marks, the change against an earlier result, and files."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from bench import report
from bench.contest import Contest, Outcome
from bench.contestants import OURS
from evsam_kernels.cli.errors import CommandError


def outcomes(ours: float | None, peer: float | None) -> dict[str, Outcome]:
    return {
        OURS: Outcome("c", 1e-6, [ours]) if ours else Outcome(failure="error 2 exceeds 1"),
        "peer": Outcome("d", 2e-6, [peer]) if peer else Outcome(failure="does not run"),
    }


def block(name: str, count: int, ours: float | None, peer: float | None) -> dict[str, Any]:
    contest = Contest(outcomes(ours, peer), 1e-5)
    return {"name": name, "count": count, "share": 0.25, **contest.as_json()}


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "schema": report.SCHEMA,
        "machine": {"processor": "fast"},
        "versions": {OURS: "1", "peer": "2"},
        "settings": {"dtype": "float32"},
        **Contest(outcomes(10.0, 25.0), 1e-5).as_json(),
        "blocks": [block("first", 2, 1.0, 0.96), block("second", 3, 1.0, 0.95)],
    }


def lines(table: Table) -> list[str]:
    """What is printed, blanks collapsed."""
    console = report.console()
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


def test_contestants(result: dict[str, Any]) -> None:
    result["contestants"][OURS]["samples_ms"] = [14.0, 11.0, 9.0, 10.0, 8.0]
    result["contestants"][OURS]["peak_bytes"] = 123_456_789
    result["contestants"]["peer"]["preempted"] = 0.25
    result["contestants"]["absent"] = Outcome(failure="does not run").as_json()
    head, _, ours, peer, absent = lines(report.contestants_table(result))
    assert head == "contestant median ms quartiles ms / ours preempted peak MB error configuration"
    assert ours == "ours 10.00 9.00 - 11.00 1.00 0 % 123 1.00e-06 c"
    assert peer == "peer 25.00 25.00 - 25.00 2.50 25 % 2.00e-06 d"
    assert absent == "absent does not run"


def test_verdict(result: dict[str, Any]) -> None:
    assert report.verdict(result) == "best peer peer: ours is 2.50 times as fast"
    result |= Contest(outcomes(10.0, None), 1e-5).as_json()
    assert report.verdict(result) == "No peer was timed."
    result |= Contest({OURS: outcomes(None, None)[OURS]}, 1e-5).as_json()
    assert report.verdict(result).endswith("as ours failed: error 2 exceeds 1")


def test_blocks_more_than_five_per_cent_slower_are_marked(result: dict[str, Any]) -> None:
    _, _, first, second, total = lines(report.blocks_table(result))
    assert first == "first 2 1.00 0.960 0.960 25.0 % peer"
    assert second == "second 3 1.00 0.950 0.950 25.0 % peer OURS IS SLOWER"
    assert total == "all, one by one 5 5.00 4.77 0.954"


def test_blocks_without_times_say_why_and_are_not_summed(result: dict[str, Any]) -> None:
    result["blocks"] = [block("wrong", 1, None, None), block("alone", 1, 2.0, None)]
    result["blocks"][0]["share"] = None
    _, _, wrong, alone, total = lines(report.blocks_table(result))
    assert wrong == "wrong 1 error 2 exceeds 1"
    assert alone == "alone 1 2.00 25.0 %"
    assert total == "all, one by one 2"


@pytest.mark.parametrize("whose", [OURS, "peer"])
def test_blocks_that_were_mostly_preempted_are_marked(result: dict[str, Any], whose: str) -> None:
    result["blocks"][0]["contestants"][whose]["preempted"] = 0.5
    result["blocks"][1]["contestants"][whose]["preempted"] = 0.6
    _, _, first, second, _ = lines(report.blocks_table(result))
    assert first.endswith(" peer")
    assert second.endswith(" peer OURS IS SLOWER disturbed")


def test_change_of_what_both_have(result: dict[str, Any]) -> None:
    new = copy.deepcopy(result)
    new |= Contest(outcomes(5.0, 30.0), 1e-5).as_json()
    new["blocks"] = [block("first", 2, 1.5, 1.0), block("new", 1, 1.0, 1.0)]
    assert lines(report.change_table(result, new)) == [
        "before ms now ms change",
        "─" * len(lines(report.change_table(result, new))[1]),
        "ours 10.00 5.00 -50.0 %",
        "peer 25.00 30.00 +20.0 %",
        "first 1.00 1.50 +50.0 %",
    ]


def test_differences(result: dict[str, Any]) -> None:
    new = copy.deepcopy(result)
    assert report.differences(result, new) == []
    new["settings"]["dtype"] = "bfloat16"
    new["versions"] = {OURS: "1", "other": "3"}
    assert report.differences(result, new) == [
        "settings, dtype: float32 before, bfloat16 now",
    ]


def test_a_saved_result_is_the_one_loaded(result: dict[str, Any], tmp_path: Path) -> None:
    report.save(result, tmp_path / "result.json")
    assert report.load(tmp_path / "result.json") == result


def test_a_result_that_cannot_be_written(result: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=r"^--json: .*no/result\.json cannot be written"):
        report.save(result, tmp_path / "no" / "result.json")


def test_csv_has_a_line_per_contestant_and_part(result: dict[str, Any]) -> None:
    result["blocks"] = [block("first", 2, 1.0, None)]
    result["contestants"][OURS]["peak_bytes"] = 7
    rows = list(csv.DictReader(io.StringIO(report.as_csv(result))))
    assert [(row["part"], row["count"], row["contestant"], row["median_ms"]) for row in rows] == [
        ("", "1", OURS, "10.0"),
        ("", "1", "peer", "25.0"),
        ("first", "2", OURS, "1.0"),
        ("first", "2", "peer", ""),
    ]
    assert [row["peak_bytes"] for row in rows] == ["7", "", "", ""]
    assert rows[3]["failure"] == "does not run"


@pytest.fixture
def of_layers() -> dict[str, Any]:
    """A result of `ops`: a layer that computes, one that only moves, and one that is wrong."""
    calls = {"efficientvit-sam-l0": 4, "efficientvit-sam-l1": 6}
    work = [("conv_act a", 4e9, 2e8), ("layer_norm_2d b", 0, 5e8), ("conv_act c", 4e9, 2e8)]
    ours = [10.0, 10.0, None]
    return {
        "peaks": {"flops_per_second": 8e11, "bytes_per_second": 1e11},
        "layers": [
            {
                **{"op": name.split()[0], "name": name, "count": calls},
                **{"flops": flops, "bytes": moved},
                **Contest(outcomes(time, 5.0), 1e-5).as_json(),
            }
            for (name, flops, moved), time in zip(work, ours, strict=True)
        ],
    }


def test_layers_and_what_they_reach_of_the_peaks(of_layers: dict[str, Any]) -> None:
    _, _, computes, moves, wrong = lines(report.layers_table(of_layers))
    assert computes == ("conv_act a l0 4, l1 6 10.00 5.00 0.500 400 20 50 % c peer OURS IS SLOWER")
    assert moves == "layer_norm_2d b l0 4, l1 6 10.00 5.00 0.500 0 50 50 % c peer OURS IS SLOWER"
    assert wrong == "conv_act c l0 4, l1 6 5.00 error 2 exceeds 1"
    reached = report.roofline(of_layers["layers"][0], of_layers["peaks"], "peer")
    assert reached == report.Reached(intensity=20, flops=8e11, bytes=4e10, share=1.0)


def test_layers_are_compared_and_written_as_blocks_are(of_layers: dict[str, Any]) -> None:
    changes = lines(report.change_table(of_layers, of_layers))[2:]
    assert changes == ["conv_act a 10.00 10.00 +0.0 %", "layer_norm_2d b 10.00 10.00 +0.0 %"]
    (row, *_) = csv.DictReader(io.StringIO(report.as_csv(of_layers)))
    assert (row["part"], row["count"]) == ("conv_act a", "l0 4, l1 6")


def test_images_per_second(result: dict[str, Any]) -> None:
    result["settings"]["batch"] = 16
    result["contestants"][OURS]["peak_bytes"] = 2_000_000
    _, _, ours, peer = lines(report.images_table(result))
    assert ours == "ours 1600 10.00 10.00 - 10.00 1.00 2 1.00e-06 c"
    assert peer == "peer 640 25.00 25.00 - 25.00 2.50 2.00e-06 d"


def test_summary_of_models(result: dict[str, Any]) -> None:
    result["settings"] |= {"model": "efficientvit-sam-l0", "batch": 16}
    result["published_images_per_second"] = 762
    fewer = {**result, "contestants": {OURS: result["contestants"][OURS]}}
    head, _, first, second = lines(report.summary_table([result, fewer]))
    assert head == f"model batch {OURS} peer published"
    assert first == "efficientvit-sam-l0 16 1600 640 762"
    assert second == "efficientvit-sam-l0 16 1600 762"


def test_failures_are_those_of_ours_alone() -> None:
    contestants = {
        OURS: {"failure": ""},
        f"{OURS}, cuda": {"failure": "wrong"},
        "peer": {"failure": "does not run"},
    }
    assert report.failures({"contestants": contestants}) == ["wrong"]


def test_markdown(result: dict[str, Any]) -> None:
    head, rule, ours, _ = report.as_markdown(report.contestants_table(result)).splitlines()
    assert head.startswith("| contestant | median ms |")
    assert rule == "|---|---:|---:|---:|---:|---:|---:|---|"
    assert ours == "| ours | 10.00 | 10.00 - 10.00 | 1.00 | 0 % |  | 1.00e-06 | c |"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "no result of this benchmark"),
        (json.dumps({"schema": 0}), "no result of this benchmark"),
    ],
)
def test_what_is_no_result_is_refused(content: str | None, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CommandError, match=rf"^--compare: .*old\.json .*{problem}"):
        report.load(path)

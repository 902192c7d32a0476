"""What benchmarks write: figures against targets, as JSON for programs and Markdown for people."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agent_call, report, summary
from benchmarks.report import Result, Target

RESULT = Result(
    name="some_question",
    question="How long does it take?",
    rows=[
        {"trace": "10 KB", "median ms": 0.123456, "requests": 1200},
        {"trace": "1 MB", "median ms": 1234.5, "lost": None},
    ],
    targets=[Target("median", 0.5, 0.4, "ms"), Target("requests/s", 80.0, 45.5, "%", at_most=False)],
    notes=["Measured in turns."],
)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that results are written to."""
    folder = tmp_path / "results"
    monkeypatch.setenv("BENCH_RESULTS", str(folder))
    monkeypatch.delenv("BENCH_QUICK", raising=False)
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_a_target_is_met_up_to_and_at_its_limit() -> None:
    assert Target("latency", 0.5, 0.5, "ms").met
    assert not Target("latency", 0.5, 0.51, "ms").met
    assert Target("throughput", 80.0, 80.0, "%", at_most=False).met
    assert not Target("throughput", 80.0, 79.9, "%", at_most=False).met


def test_what_was_not_measured_meets_no_target() -> None:
    assert not Target("latency", 0.5, math.nan, "ms").met
    assert not Target("throughput", 80.0, math.nan, "%", at_most=False).met


def test_a_result_is_written_as_json_with_machine_and_versions(results: Path) -> None:
    report.write(RESULT)
    found = read(results, "some_question")
    assert found["rows"] == RESULT.rows
    assert [target["met"] for target in found["targets"]] == [True, False]
    assert found["machine"]["cores"] >= 1
    assert "mlflow-tracing" in found["machine"]
    assert not found["quick"]


def test_a_result_is_written_and_printed_as_markdown(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.write(RESULT)
    text = (results / "some_question.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| trace | median ms | requests | lost |" in text
    assert "| 10 KB | 0.123 | 1,200 |  |" in text
    assert "| 1 MB | 1,234 |  | \N{EN DASH} |" in text
    assert "| median | ≤ 0.5 ms | 0.4 ms | met |" in text
    assert "| requests/s | ≥ 80 % | 45.5 % | **not met** |" in text
    assert "- Measured in turns." in text


def test_a_figure_that_is_missing_is_null_in_json(results: Path) -> None:
    report.write(Result("gap", "?", [], [Target("latency", 1.0, math.nan, "ms")]))
    assert read(results, "gap")["targets"][0]["measured"] is None
    assert "| latency | ≤ 1 ms | \N{EN DASH} ms | **not met** |" in summary.summary(results)


def test_a_plot_is_drawn_where_matplotlib_is_installed(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.write(RESULT, lambda axes: axes.plot([1, 2], [3, 4]))
    picture = results / "some_question.png"
    shown = "![some_question](some_question.png)" in (results / "some_question.md").read_text("utf-8")
    if picture.exists():
        assert shown
    else:
        assert not shown
        assert "no plot some_question.png: matplotlib is missing" in capsys.readouterr().out


def test_a_quick_run_does_a_tenth_and_says_so(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.scaled(50) == 50
    monkeypatch.setenv("BENCH_QUICK", "1")
    assert (report.scaled(50), report.scaled(3)) == (5, 1)
    report.write(RESULT)
    assert read(results, "some_question")["quick"]
    assert "A quick run" in (results / "some_question.md").read_text(encoding="utf-8")


def test_the_summary_lists_all_targets_in_the_order_of_the_questions(results: Path) -> None:
    report.write(RESULT)
    report.write(Result("growth", "Does it slow down?", [], [Target("ratio", 2.0, 1.0, "x")]))
    report.write(Result("agent_call", "What does it add?", [], [Target("added", 0.5, 0.4, "ms")]))
    text = summary.summary(results)
    assert "3 of 4 targets are met." in text
    assert text.index("[agent call](agent_call.md)") < text.index("[growth](growth.md)")
    assert text.index("[growth](growth.md)") < text.index("[some question](some_question.md)")
    assert text.count("cores") == 1  # all on one machine


def test_a_summary_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run a benchmark first"):
        summary.summary(tmp_path)


def test_agent_call_measures_every_recorder_at_every_size(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole benchmark, with a call or two of each kind: each recorder has to record what it says."""
    monkeypatch.setattr(agent_call, "BLOCKS", dict.fromkeys(agent_call.SIZES, (1, 2)))
    agent_call.run()
    found = read(results, "agent_call")
    assert {(row["trace"], row["recorder"]) for row in found["rows"]} == {
        (size, recorder) for size in agent_call.SIZES for recorder in agent_call.RECORDERS
    }
    assert all(row["calls"] == 2 and row["median ms"] > 0 for row in found["rows"])
    assert all(target["measured"] is not None for target in found["targets"])

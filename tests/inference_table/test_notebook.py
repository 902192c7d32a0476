"""Rows and results as HTML: all that strangers wrote is text, and a notebook does not grow without bound."""

import json
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from inference_table.ids import uuid7
from inference_table.notebook import MAX_SPANS, result_html, row_html, row_text, trace_html
from inference_table.schema import PARTITION_COLUMN, SCHEMA
from inference_table.table import InferenceRow, InferenceTable
from tests.deploy.agents import QUESTION, failing, record, support
from tests.inference_table.rows import batch
from tests.support import ROOT

HOSTILE = "</details><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;"
VOID = frozenset({"br", "img", "hr", "meta"})


class Checked(HTMLParser):
    """Raises for an element that doesn't nest; keeps elements and text."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.deepest = 0
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in VOID and not any(name.startswith("on") for name, _ in attrs)
        self.tags.append(tag)
        self.open.append(tag)
        self.deepest = max(self.deepest, len(self.open))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def row_of(*traces: Any, **values: Any) -> InferenceRow:
    main, *others = [trace.to_dict() for trace in traces] or [None]
    output = {"trace": main, "other_traces": others} if traces else {}
    return InferenceRow(
        {
            **dict.fromkeys(SCHEMA.names),
            "databricks_request_id": "0199-id",
            "request_time": datetime(2025, 3, 1, 12, tzinfo=UTC),
            "status_code": 200,
            "execution_duration_ms": 1234,
            "request": '{"question": "why?"}',
            "response": json.dumps({"answer": "so", "databricks_output": output}),
            "request_metadata": {"method": "POST", "path": "/ask"},
            **values,
        }
    )


def test_a_row_shows_its_request_and_its_traces() -> None:
    """Status, duration, facts, bodies; each span with type, inputs, outputs and why it failed."""
    traces = [*record(lambda: support(QUESTION)), *record(lambda: failing(QUESTION))]
    row = row_of(*traces, status_code=500, input_tokens=7, output_tokens=8, served_entity_id="support/2")
    found = Checked(row_html(row))
    for text in ("POST /ask", "500", "1.23 s", "2025-03-01 12:00:00 UTC", "endpoint support/2", "why?"):
        assert text in found.text
    assert "7 tokens in, 8 out" in found.text
    assert found.text.count(QUESTION) == 5
    assert "CHAT_MODEL" in found.text and "RETRIEVER" in found.text
    assert "BusyError: stock service is busy: shoe-42" in found.text
    assert "databricks_output" not in found.text
    assert found.tags.count("script") == 0
    assert trace_html(traces[0]).count('class="span"') == 3


def test_spans_stand_within_their_parents() -> None:
    """A span's element holds those of its children, so that folding it folds them."""
    document = trace_html(record(lambda: support(QUESTION))[0])
    opened = [part.partition(">")[0] for part in document.split("<details")[1:]]
    assert sum("span" in one for one in opened) == 3
    inside = document.partition("<b>support</b>")[2].rpartition("</details>")[0]
    assert "<b>search</b>" in inside and "<b>gpt</b>" in inside
    beside = document.partition("<b>search</b>")[2].partition("<b>gpt</b>")[0]
    assert beside.count("</details>") == beside.count("<details")  # its own end, and the other's beginning


@pytest.mark.parametrize("column", ["request", "served_entity_id", "requester", "client_request_id"])
def test_what_strangers_wrote_is_text(column: str) -> None:
    """No element comes from a value, wherever it stands."""
    plain = Checked(row_html(row_of(**{column: "plain"})))
    found = Checked(row_html(row_of(**{column: HOSTILE})))
    assert found.tags == plain.tags and HOSTILE in found.text


def test_what_agents_wrote_is_text() -> None:
    """Names, types, inputs, outputs and errors of spans."""

    def agent(text: str) -> None:
        with mlflow.start_span(text, span_type=text) as span:
            span.set_inputs({text: text})
            span.set_outputs([text])
            span.set_status("ERROR")
            span.add_event(
                mlflow.entities.SpanEvent(
                    "exception", attributes={"exception.type": text, "exception.message": text}
                )
            )

    plain, found = (Checked(trace_html(record(lambda t=t: agent(t))[0])) for t in ("plain", HOSTILE))
    assert found.tags == plain.tags
    assert found.text.count("alert(1)") == plain.text.count("plain") >= 6


def test_a_large_trace_is_bounded() -> None:
    """Thousands of spans, each with a long value: the first are shown, the rest counted."""

    def agent() -> None:
        with mlflow.start_span("root"):
            for number in range(MAX_SPANS + 200):
                with mlflow.start_span(f"span {number}") as span:
                    span.set_inputs({"text": "x" * 50_000})

    document = trace_html(record(agent)[0])
    assert len(document) < 2_000_000
    assert document.count('class="span"') == MAX_SPANS
    assert "… and 201 more spans" in Checked(document).text
    assert "characters more" in document


def test_a_deep_trace_is_bounded() -> None:
    """A browser draws a few hundred levels: deeper spans stand beside each other, none is missing."""

    def agent(levels: int) -> None:
        with mlflow.start_span(f"level {levels}"):
            if levels:
                agent(levels - 1)

    found = Checked(trace_html(record(lambda: agent(150))[0]))
    assert found.deepest < 60
    assert all(f"level {level}" in found.text for level in range(151))


@pytest.mark.parametrize(
    ("request_", "response"),
    [
        ("no json", "no json either"),
        (None, None),
        ("[" * 5000 + "]" * 5000, '{"a": 1}'),
        ('"\\ud800"', '{"answer": "\\ud800"}'),
        ("x" * 5_000_000, json.dumps({"answer": "y" * 5_000_000})),
        ('{"a": 1}', '{"databricks_output": {"trace": {"info": 3}}}'),
    ],
)
def test_any_payload_is_shown(request_: str | None, response: str | None) -> None:
    """Also what is no JSON, what no notebook could save, and a trace that MLflow does not take."""
    document = row_html(row_of(request=request_, response=response))
    Checked(document)
    document.encode()
    assert len(document) < 60_000


def test_a_notebook_keeps_the_html_and_one_line() -> None:
    """Beside the HTML there is no second copy of megabytes."""
    line = row_text(row_of(response=json.dumps({"answer": "y" * 5_000_000})))
    assert len(line) < 300 and "0199-id" in line
    assert row_text(row_of(request_metadata=None)).startswith("<request 0199-id: request → 200")


def test_a_result_shows_its_first_rows(tmp_path: Path) -> None:
    """Twenty rows, long values cut, numbers apart from text, and how many there are."""
    values = batch([uuid7() for _ in range(30)], text=HOSTILE.replace('"', "") + "z" * 5000).to_pylist()
    table = pa.Table.from_pylist(values, schema=SCHEMA)
    write_deltalake(str(tmp_path / "t"), table, partition_by=[PARTITION_COLUMN])
    result = InferenceTable(tmp_path / "t").query(
        "select status_code, response, request_metadata, null as n, '<b>' as \"<i>\" from payload"
    )
    document = result._repr_html_()
    found = Checked(document)
    assert found.tags.count("tr") == 21
    assert found.tags.count("b") == found.tags.count("i") == 0
    assert "30 rows, the first 20 shown, table version 0" in found.text
    assert "characters)" in found.text and len(document) < 40_000
    assert '<td class="number">200</td>' in document
    assert '{"path": "/"}' in found.text


def test_odd_results_are_shown(tmp_path: Path) -> None:
    """No rows, no columns, hundreds of columns, and values that Python has no word for."""
    write_deltalake(str(tmp_path / "t"), pa.Table.from_batches([batch([uuid7()])], schema=SCHEMA))
    table = InferenceTable(tmp_path / "t")
    assert "0 rows" in table.query("from payload where false")._repr_html_()
    assert "0 rows" in table.query("set threads = 1")._repr_html_()
    many = table.query("select " + ", ".join(f"{number} as c{number}" for number in range(300)))._repr_html_()
    assert "50 of 300 columns shown" in many and "c49" in many and "c50" not in many
    odd = table.query("select date '99999-01-01' as far, 1.5::decimal(3, 1) as d, true as b, [1, null] as l")
    found = Checked(odd._repr_html_())
    assert "no value of Python" in found.text and "1.5" in found.text and "[1, null]" in found.text


def test_rows_have_no_end() -> None:
    """A table of megabytes per value is cut before it becomes Python's."""
    table = pa.table({"response": pa.array(["é" * 3_000_000] * 3)})
    assert len(result_html(table, "a test")) < 5_000


def test_the_python_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block, one after the other, and what its last line is shows itself."""
    monkeypatch.chdir(tmp_path)
    values = batch([uuid7()]).to_pylist()
    values[0]["trace_state"] = "ERROR"
    rows = pa.Table.from_pylist(values, schema=SCHEMA)
    write_deltalake("tracelake-data/payload", rows, partition_by=[PARTITION_COLUMN])
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "notebook.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        *before, last = block.strip().splitlines()
        exec("\n".join(before), names)
        assert "tracelake" in eval(last, names)._repr_html_()
    assert len(blocks) == 2

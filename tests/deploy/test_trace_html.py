"""``tracelake trace --html``: one file with MLflow's viewer that opens offline, whatever the trace holds."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from deploy.trace_html import escaped, json_in_html, trace_page
from inference_table.errors import TracelakeError
from inference_table.ids import uuid7
from inference_table.schema import PARTITION_COLUMN, SCHEMA
from tests.deploy.agents import QUESTION, failing, record, support
from tests.inference_table.rows import batch
from tests.support import ROOT

CHROMIUM = Path("/usr/bin/chromium")
HAS_VIEWER = find_spec("mlflow.server") is not None
HOSTILE = (
    "</script><script>window.HACKED=1</script><!--<script>",
    "<img src=x onerror='window.HACKED=2'>",
    "![x](https://example.com/leak.png) [click](javascript:window.HACKED=3)",
    "]]> \u2028 \u0000 ' \" & &lt; \\u003c/script>",
)


def hostile() -> None:
    with mlflow.start_span(HOSTILE[0], span_type="AGENT") as span:
        span.set_inputs({"messages": [{"role": "user", "content": text} for text in HOSTILE]})
        span.set_outputs({"choices": [{"message": {"role": "assistant", "content": HOSTILE[0]}}]})


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One request with three traces, the last of them hostile, and one without."""
    uri = str(tmp_path_factory.mktemp("html") / "payload")
    traces = [record(agent)[0] for agent in (lambda: support(QUESTION), lambda: failing(QUESTION), hostile)]
    values = batch([uuid7(), uuid7()]).to_pylist()
    main, *others = [trace.to_dict() for trace in traces]
    output = {"trace": main, "other_traces": others}
    values[0]["response"] = json.dumps({"answer": "30 days", "databricks_output": output})
    values[0]["client_request_id"], values[0]["trace_id"] = "traced", traces[0].info.trace_id
    rows = pa.Table.from_pylist(values, schema=SCHEMA)
    write_deltalake(uri, rows, partition_by=[PARTITION_COLUMN])
    return uri


def trace_command(table: str, file: Path, where: str) -> subprocess.CompletedProcess[str]:
    arguments = ["trace", "last", "--where", where, "--table", table, "--html", str(file)]
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


class Elements(HTMLParser):
    """What a parser of HTML finds: elements, and the text of each script."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[int, str] = {}
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        index = len(self.tags) - 1
        self.texts[index] = self.texts.get(index, "") + data


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_trace_holds_ends_no_script(text: str) -> None:
    """A parser finds one script, and in it what was put there."""
    value = {text: [text, float("nan"), {"x": text}]}
    elements = Elements(f'<script type="application/json">{json_in_html(value)}</script><p>')
    assert [tag for tag, _ in elements.tags] == ["script", "p"]
    assert json.loads(elements.texts[0]) == {text: [text, "NaN", {"x": text}]}


@pytest.mark.parametrize(
    ("tag", "source"), [("script", 'x="</SCRIPT><!--"'), ("style", "x{content:'</style>'}")]
)
def test_a_source_does_not_end_its_own_tag(tag: str, source: str) -> None:
    """Also where a bundle has a string that would."""
    elements = Elements(f"<{tag}>{escaped(source, tag)}</{tag}><p>")
    assert [name for name, _ in elements.tags] == [tag, "p"]


@pytest.mark.skipif(HAS_VIEWER, reason="the whole of MLflow is installed")
def test_without_the_viewer_the_message_says_what_to_install(table: str, tmp_path: Path) -> None:
    """With the light SDK alone there is no file, and one line that names the extra."""
    done = trace_command(table, tmp_path / "t.html", "client_request_id = 'traced'")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install 'tracelake[ui]'" in done.stderr
    assert not (tmp_path / "t.html").exists()


def test_a_request_without_a_trace_makes_no_file(table: str, tmp_path: Path) -> None:
    """The message says so."""
    done = trace_command(table, tmp_path / "t.html", "client_request_id is null")
    assert done.returncode == 1 and "none was recorded" in done.stderr
    assert not (tmp_path / "t.html").exists()


def test_a_viewer_of_another_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A MLflow whose viewer loads what isn't there gets a message, not a page that stays empty."""
    home = tmp_path / "mlflow"
    loader = home / "server" / "js" / "build" / "lib" / "notebook-trace-renderer" / "js"
    loader.mkdir(parents=True)
    (home / "__init__.py").write_text("")
    (loader / "ml-model-trace-renderer.0123.js").write_text('load("static/js/1.0123.chunk.js")')
    trace = record(lambda: support(QUESTION))[0]
    with monkeypatch.context() as patched:
        patched.syspath_prepend(str(tmp_path))
        patched.delitem(sys.modules, "mlflow")
        with pytest.raises(TracelakeError, match="not laid out as that of MLflow"):
            trace_page([trace], "title")


@pytest.mark.heavy
@pytest.mark.skipif(not HAS_VIEWER, reason="needs the whole of MLflow")
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs a browser: make setup-browser")
def test_the_file_opens_offline_and_nothing_in_it_runs(table: str, tmp_path: Path) -> None:
    """In a browser without network each trace is drawn, nothing is asked for, and no text is a script."""
    playwright = pytest.importorskip("playwright.sync_api")
    file = tmp_path / "trace.html"
    done = trace_command(table, file, "client_request_id = 'traced'")
    assert done.returncode == 0, done.stderr
    assert file.stat().st_size < 6_000_000
    requests: list[str] = []
    problems: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1300, "height": 800}).new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(file.as_uri())
        page.get_by_text("gpt").first.wait_for()
        page.get_by_text("Attributes", exact=True).click()
        page.get_by_text("Summary", exact=True).click()
        page.get_by_text("was called").first.wait_for()
        go_to(page, 2, "call_stock_service")
        assert (requests, problems) == ([file.as_uri()], [])
        page.screenshot(path=str(tmp_path / "trace.png"))
        go_to(page, 3, "click")
        page.get_by_text("click", exact=True).first.click()
        page.wait_for_timeout(500)
        assert page.evaluate("window.HACKED") is None
        # The image of a chat is asked for by nobody: the policy says no, which is all that there is to say.
        assert all("violates the following Content Security Policy" in one for one in problems)
        browser.close()


def go_to(page: Any, number: int, text: str) -> None:
    page.locator(f'li[title="{number}"]').click()
    page.get_by_text(text).first.wait_for()

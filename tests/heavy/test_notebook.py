"""A real notebook, executed: rows and results show themselves, and a browser draws what is kept."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import ROOT, rows, served, wait_for

pytestmark = pytest.mark.heavy
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

AGENT = """
import mlflow
from fastapi import FastAPI

app = FastAPI()


@mlflow.trace(span_type="TOOL")
def look_up(question):
    return "x" * 500


@app.post("/ask")
@mlflow.trace(span_type="AGENT")
def ask(body: dict) -> dict:
    return {"answer": look_up(body["question"])}
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the cells of a notebook left: a row, a result."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "noted_agent.py").write_text(AGENT)
    table = folder / "payload"
    place = ["--table", str(table), "--spool-dir", str(folder / "spool"), "--app-dir", str(folder)]
    with served("noted_agent:app", *place, env={}, log=folder / "log") as (url, _):
        httpx.post(f"{url}/ask", json={"question": "<b>why?</b>"}, timeout=30).raise_for_status()
        wait_for(lambda: rows(table), "the row")
    cells = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from inference_table.table import InferenceTable\n"
        f"table = InferenceTable({str(table)!r})",
        "table.newest()[0]",
        "table.query('select request, span_count, response from payload')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    nbformat.validate(notebook)
    results = [one for cell in notebook.cells for one in cell.outputs if one.output_type == "execute_result"]
    return [one["data"] for one in results]


def test_cells_show_html(outputs: list[dict[str, Any]]) -> None:
    """Both have HTML beside their text, without a server and without a script."""
    row, result = outputs
    assert row["text/plain"].startswith("<request ") and len(row["text/plain"]) < 300
    assert "POST /ask" in row["text/html"] and "look_up" in row["text/html"]
    assert "1 row, table version" in result["text/html"]
    assert "<script" not in row["text/html"] + result["text/html"]


@pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="needs a browser: make setup-browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_it(outputs: list[dict[str, Any]], scheme: str, tmp_path: Path) -> None:
    """Spans fold with those below them, long values unfold, on a light and on a dark page."""
    playwright = pytest.importorskip("playwright.sync_api")
    colors = "background: #111; color: #ddd" if scheme == "dark" else "background: white; color: black"
    page_file = tmp_path / "page.html"
    body = "".join(one["text/html"] for one in outputs)
    page_file.write_text(f'<meta charset="utf-8"><body style="{colors}">{body}', encoding="utf-8")
    problems: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_context(offline=True, viewport={"width": 1000, "height": 700}).new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.goto(page_file.as_uri())
        inner = page.get_by_text("look_up")
        assert inner.is_visible()
        value = page.locator("details.value", has_text="out").first
        assert not value.locator("pre").is_visible()
        value.locator("summary").click()
        assert "x" * 500 in value.locator("pre").inner_text()
        page.screenshot(path=str(tmp_path / f"{scheme}.png"))
        page.get_by_text("ask", exact=True).click()
        assert not inner.is_visible()
        browser.close()
    assert problems == []

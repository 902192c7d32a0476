"""``tracelake ui``: MLflow's own UI on a table, in a real browser, and what happens when it can't be had.

Screenshots go to ``test-artifacts/ui``.
"""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inference_table.table import InferenceTable
from tests.heavy.ui_server import COMMAND, QUESTIONS, ROWS, SESSIONS, fill, listens, object_store, running_ui
from tests.support import ROOT, free_port, wait_for

pytest.importorskip("mlflow.server", reason="needs the extra `heavy`: make test-all")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `heavy`: make test-all")

CHROMIUM = Path("/usr/bin/chromium")
ARTIFACTS = ROOT / "test-artifacts" / "ui"
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STEP_MS = 45_000
"""What the browser may take for a step on a busy machine."""

# One worker does them all: a table and a server for each test would take minutes.
pytestmark = [pytest.mark.heavy, pytest.mark.xdist_group("ui"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ui")
    fill(found)
    return found


@pytest.fixture(scope="module")
def page_url(folder: Path) -> Iterator[str]:
    with running_ui(folder / "payload", "--port", "0", env={}, log=folder / "ui.log") as (url, _):
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, page_url: str) -> Iterator["playwright.BrowserContext"]:
    """A browser that has seen what MLflow shows at the first visit."""
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}: make setup-browser")
    profile = tmp_path_factory.mktemp("profile")
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with playwright.sync_playwright() as engine:
        context = engine.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, args=OPTIONS, viewport={"width": 1600, "height": 950}
        )
        context.set_default_timeout(STEP_MS)
        playwright.expect.set_options(timeout=STEP_MS)
        first = context.new_page()
        first.goto(page_url)
        for name in ("Got it", "Close"):
            first.get_by_role("button", name=name, exact=True).click()
        first.close()
        yield context
        context.close()


@pytest.fixture
def page(browser: "playwright.BrowserContext", page_url: str) -> Iterator["playwright.Page"]:
    """The list of traces; nothing it asks for may fail."""
    found = browser.new_page()
    failures: list[str] = []
    found.on("response", lambda reply: failures.append(reply.url) if reply.status >= 500 else None)
    found.goto(page_url)
    playwright.expect(rows_of(found).nth(1)).to_be_visible()
    yield found
    found.close()
    assert failures == []


def rows_of(page: "playwright.Page") -> "playwright.Locator":
    """Those of the list; the first is its head."""
    return page.get_by_role("row")


def shot(page: "playwright.Page", name: str) -> None:
    page.screenshot(path=ARTIFACTS / f"{name}.png")


def open_trace(page: "playwright.Page", question: str) -> "playwright.Locator":
    page.get_by_text(question).first.click()
    dialog = page.get_by_role("dialog").filter(has=page.get_by_role("button", name="Close trace panel"))
    playwright.expect(dialog.get_by_text("search_help")).to_be_visible()
    return dialog


def test_the_list_shows_the_rows_of_the_table(page: "playwright.Page") -> None:
    """Newest first, with question, answer, session, state and tokens; there are as many as rows."""
    playwright.expect(page.get_by_text(f"25 of {ROWS}")).to_be_visible()
    first = rows_of(page).nth(1)
    playwright.expect(first).to_contain_text(f"session-{SESSIONS - 1}")
    playwright.expect(first).to_contain_text("OK")
    playwright.expect(first).to_contain_text(QUESTIONS[(SESSIONS - 1 + 2) % len(QUESTIONS)])
    shot(page, "list")
    page.get_by_role("button", name="Next page").click()
    playwright.expect(rows_of(page).nth(1)).to_contain_text("session-12")


def test_a_filter_leaves_the_failed_request(page: "playwright.Page") -> None:
    """State = Error is one row of 63."""
    page.get_by_role("button", name="Filters").click()
    page.get_by_role("combobox", name="Filter value").click()
    page.get_by_role("option", name="Error", exact=True).click()
    page.get_by_role("button", name="Apply filters").click()
    playwright.expect(rows_of(page)).to_have_count(2)
    playwright.expect(rows_of(page).nth(1)).to_contain_text("session-07")
    shot(page, "filter")


def test_the_search_box_finds_text_with_quotes(page: "playwright.Page") -> None:
    """What stands in inputs is found as it was typed, though it is kept as JSON within JSON."""
    box = page.get_by_placeholder("Search traces by id, input, or output")
    box.fill('Is "express" delivery')
    box.press("Enter")
    shown = rows_of(page).filter(has_text="session-")
    # The newest session has three other questions.
    playwright.expect(shown.filter(has_text="session-20")).to_have_count(0)
    playwright.expect(shown.first).to_contain_text("session-19")
    shot(page, "search")
    box.fill("nobody asked this")
    box.press("Enter")
    playwright.expect(shown).to_have_count(0)


def test_a_span_opens_with_its_inputs_and_outputs(page: "playwright.Page") -> None:
    """The viewer shows the tree; a retriever's span its query and documents."""
    dialog = open_trace(page, "I need an invoice, please")
    for name in ("support", "search_help", "order_status", "complete"):
        playwright.expect(dialog.get_by_text(name, exact=True).first).to_be_visible()
    dialog.get_by_text("search_help").click()
    playwright.expect(dialog.get_by_text("help/invoice").first).to_be_visible()
    shot(page, "span")


def test_sessions_are_grouped(page: "playwright.Page") -> None:
    """A session is a row; opened, it shows its turns."""
    page.get_by_role("button", name="Group traces by session").click()
    playwright.expect(rows_of(page).filter(has_text="session-")).to_have_count(SESSIONS)
    shot(page, "sessions")


def test_feedback_is_added_changed_and_read_in_sql(page: "playwright.Page", folder: Path) -> None:
    """What a person says in the UI is a row of the annotations at once, and so is a change of it."""
    dialog = open_trace(page, "How long does delivery take?")
    dialog.get_by_role("button", name="Assess trace").click()
    dialog.get_by_role("button", name="Add feedback").click()
    page.get_by_role("menuitem", name="Human feedback").click()
    name = dialog.get_by_role("textbox", name="Enter a feedback name")
    name.fill("is_helpful")
    name.press("Enter")
    dialog.get_by_role("textbox").nth(1).fill("It says when.")
    dialog.get_by_role("button", name="Create").click()
    dialog.locator("[data-component-id$=toggle-assessment-expanded]").click()
    playwright.expect(dialog.get_by_text("It says when.")).to_be_visible()
    # The UI leaves it to the store to say when that was.
    playwright.expect(dialog.get_by_text(re.compile(r"(second|minute)s? ago|now"))).to_be_visible()
    shot(page, "feedback-added")
    assert feedback(folder) == [("is_helpful", "true", "It says when.")]
    dialog.locator("[data-component-id$=assessment-more-button]").click()
    page.get_by_role("menuitem", name="Edit").click()
    dialog.get_by_text("False", exact=True).click()
    dialog.get_by_role("button", name="Save").first.click()
    playwright.expect(dialog.get_by_role("status").filter(has_text="False").first).to_be_visible()
    shot(page, "feedback-edited")
    assert feedback(folder) == [("is_helpful", "false", "It says when.")]


def feedback(folder: Path) -> list[tuple[str, str, str]]:
    """Name, value and rationale of all feedback, as SQL sees it."""
    found = InferenceTable(folder / "payload").query("select name, value, rationale from feedback")
    return [(row["name"], row["value"], row["rationale"]) for row in found]


def test_the_overview_has_charts(page: "playwright.Page") -> None:
    """Requests, errors, tokens and cost, and the calls of tools, are summed up."""
    page.get_by_role("link", name="Overview").click()
    playwright.expect(page.get_by_text("Overall error rate: 1.6%")).to_be_visible()
    playwright.expect(page.get_by_text(str(ROWS), exact=True).first).to_be_visible()
    drawn(page)
    shot(page, "overview")
    page.get_by_role("tab", name="Tool calls").click()
    playwright.expect(page.get_by_text("98.41%").first).to_be_visible()
    drawn(page)
    shot(page, "overview-tools")


def drawn(page: "playwright.Page") -> None:
    """Return once a chart's highest bar has grown to what it stands for, most of the chart's height."""
    bars = "[...document.querySelectorAll('.recharts-bar-rectangle path')]"
    heights = f"{bars}.map(bar => bar.getBoundingClientRect().height)"
    page.wait_for_function(f"() => Math.max(0, ...{heights}) > 80")


def test_the_api_is_answered_over_http(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client searches, reads and judges at the server's address; a taken port is passed over."""
    import mlflow

    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 5000))
        taken.listen()
        with running_ui(folder / "payload", env={}, log=folder / "http.log") as (url, process):
            address, _, rest = url.partition("/#/experiments/")
            assert not address.endswith(":5000")
            mlflow.set_tracking_uri(address)
            try:
                experiment = mlflow.get_experiment(rest.partition("/")[0])
                assert experiment.name == "payload"
                found = mlflow.search_traces(
                    locations=[experiment.experiment_id],
                    filter_string="span.status = 'ERROR'",
                    return_type="list",
                )
                assert [span.name for span in found[0].data.spans][:3] == [
                    "support",
                    "search_help",
                    "order_status",
                ]
                trace_id = found[0].info.trace_id
                said = mlflow.log_feedback(
                    trace_id=trace_id, name="severity", value=3, rationale="one of many"
                )
                mlflow.log_expectation(trace_id=trace_id, name="answer", value="no such order")
                mlflow.set_trace_tag(trace_id, "ticket", "77")
                again = mlflow.get_trace(trace_id).info
                assert [(one.name, one.value) for one in again.assessments] == [
                    ("severity", 3),
                    ("answer", "no such order"),
                ]
                assert again.tags["ticket"] == "77"
                mlflow.delete_assessment(trace_id, said.assessment_id)
            finally:
                mlflow.set_tracking_uri(None)
            process.popen.send_signal(signal.SIGINT)
            assert process.popen.wait(60) == 0
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) != 0
    assert ("answer", '"no such order"', None) in feedback(folder)
    assert not [one for one in feedback(folder) if one[0] == "severity"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed")
def test_a_kill_leaves_no_server_behind(folder: Path) -> None:
    """Where ``tracelake ui`` is killed outright, MLflow's server and its workers end too."""
    with running_ui(folder / "payload", "--port", "0", env={}, log=folder / "kill.log") as (url, process):
        port = int(url.partition("/#/")[0].rpartition(":")[2])
        assert listens(port)
        process.popen.kill()
        wait_for(lambda: not listens(port), "the server to end")


def ended(*arguments: str) -> str:
    """What ``tracelake ui`` says that can't start."""
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    return done.stderr


def test_a_table_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Nothing is started or made, and the message says how to name another."""
    said = ended("--table", str(tmp_path / "none"))
    assert said.startswith("Error: ") and "there is no Delta table" in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_an_error(folder: Path) -> None:
    """Asked for by number, another one would not do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = ended("--table", str(folder / "payload"), "--port", str(taken.getsockname()[1]))
    assert "in use" in said and "--port" in said


def test_a_host_that_is_none_is_an_error(folder: Path) -> None:
    """Not only one that is not found: this is no name at all."""
    said = ended("--table", str(folder / "payload"), "--host", "a..b")
    assert said.startswith("Error: cannot listen on a..b") and said.count("\n") == 1


def test_a_state_that_cannot_be_made_is_an_error(folder: Path, tmp_path: Path) -> None:
    """It is said at once, by us, and how to choose another place."""
    (tmp_path / "file").write_text("")
    said = ended("--table", str(folder / "payload"), "--state-dir", str(tmp_path / "file" / "below"))
    assert said.startswith("Error: ") and "--state-dir" in said and said.count("\n") == 1


def test_a_table_in_an_object_store(tmp_path: Path) -> None:
    """Listed, searched, opened and judged as one on disk; the state lies where it was told to."""
    import httpx

    with object_store(tmp_path) as env:
        fill(tmp_path, **env, INFERENCE_TABLE_URI="s3://bucket/agents/payload")
        state = tmp_path / "state"
        options = ("--port", str(free_port()), "--state-dir", str(state))
        with running_ui("s3://bucket/agents/payload", *options, env=env, log=tmp_path / "log") as (url, _):
            address, _, rest = url.partition("/#/experiments/")
            api, experiment = f"{address}/api/3.0/mlflow/traces", rest.partition("/")[0]
            asked = {
                "locations": [
                    {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}
                ],
                "filter": "trace.text ILIKE '%express%' AND status = 'OK'",
                "max_results": 5,
            }
            with httpx.Client(timeout=120) as client:
                found = client.post(f"{api}/search", json=asked).raise_for_status().json()
                assert len(found["traces"]) == 5 and found["next_page_token"]
                trace_id = found["traces"][0]["trace_id"]
                trace = (
                    client.get(f"{api}/get", params={"trace_id": trace_id}).raise_for_status().json()["trace"]
                )
                assert trace["spans"][0]["name"] == "support"
                opinion = {
                    "assessment": {
                        "assessment_name": "good",
                        "trace_id": trace_id,
                        "source": {"source_type": "HUMAN", "source_id": "ann"},
                        "feedback": {"value": True},
                    }
                }
                client.post(f"{api}/{trace_id}/assessments", json=opinion).raise_for_status()
                asked["filter"] = "feedback.good = 'true'"
                found = client.post(f"{api}/search", json=asked).raise_for_status().json()
                assert [one["trace_id"] for one in found["traces"]] == [trace_id]
        assert [one.suffix for one in state.iterdir() if "payload" in one.name]


def test_who_is_not_known_sees_nothing_with_basic_auth(folder: Path, tmp_path: Path) -> None:
    """MLflow's own users and passwords guard the table's traces."""
    pytest.importorskip("flask_wtf", reason="needs mlflow[auth]")
    import httpx

    config = tmp_path / "auth.ini"
    config.write_text(
        "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
        f"database_uri = sqlite:///{tmp_path}/users.db\n"
    )
    env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_PASSWORD": "correct horse battery",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "any text that is kept secret",
    }
    options = ("--port", "0", "--app-name", "basic-auth")
    with running_ui(folder / "payload", *options, env=env, log=tmp_path / "log") as (url, _):
        address, _, rest = url.partition("/#/experiments/")
        experiment = rest.partition("/")[0]
        asked = {
            "locations": [{"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": {"experiment_id": experiment}}]
        }
        search = f"{address}/api/3.0/mlflow/traces/search"
        assert httpx.post(search, json=asked, timeout=60).status_code == 401
        known = httpx.post(search, json=asked, timeout=60, auth=("admin", "correct horse battery"))
        assert known.status_code == 200 and known.json()["traces"]

"""``POST /feedback``: from the moment the reply is there, durable once it is answered, and valid."""

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from deltalake import DeltaTable, QueryBuilder
from mlflow.entities import Assessment, Expectation, Feedback
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from inference_table.annotations import AnnotationLog
from inference_table.settings import StorageSettings
from inference_table.steps import Step
from serving import InferenceTableMiddleware, feedback
from serving.exchange import REQUESTER_KEY
from serving.feedback import FeedbackApp, FeedbackRoute
from serving.serve import ServedApp
from serving.server_settings import ServerSettings
from tests.serving.recorded import NO_TLS
from tests.support import ROOT, rows, running, served, wait_for

REQUEST_ID = "0199a037-b9d8-73ba-8051-92838ad58c2d"
AGENT = "tests.serving.feedback_agents:app"
CLIENT = """
import sys, httpx
from concurrent.futures import ThreadPoolExecutor

url, name, request_id = sys.argv[1:]
with httpx.Client(timeout=60, verify=False) as client, ThreadPoolExecutor(8) as pool:
    def post(number):
        value = f"{name}-{number}"
        reply = client.post(url, json={"databricks_request_id": request_id, "value": value})
        assert reply.status_code == 200, reply.text
        return value + " " + reply.json()["feedback_id"]
    print("\\n".join(pool.map(post, range(24))))
"""


@pytest.fixture
def settings(tmp_path: Path) -> StorageSettings:
    return StorageSettings(uri=str(tmp_path / "payload"), spool_dir=tmp_path / "spool")


@pytest.fixture
def endpoint(settings: StorageSettings) -> Iterator[str]:
    with running(FeedbackRoute(agent, FeedbackApp(settings))) as url:
        yield url + "/feedback"


async def agent(scope: Any, receive: Any, send: Any) -> None:
    async def answer(_: Request) -> JSONResponse:
        return JSONResponse({"answer": "yes"})

    await Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])(scope, receive, send)


def send(url: str, **fields: Any) -> httpx.Response:
    body = {"databricks_request_id": REQUEST_ID, **fields}
    body = {name: value for name, value in body.items() if value != "absent"}
    return httpx.post(url, json=body, timeout=60, verify=NO_TLS)


def known(settings: StorageSettings, **wanted: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = AnnotationLog(settings).read(**wanted).to_pylist()
    return found


def test_before_the_row_is_committed(
    tmp_path: Path, settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A front end posts feedback with the id of the reply that it has just got; the row comes later."""
    monkeypatch.setenv("ENABLE_MLFLOW_TRACING", "true")
    app = FeedbackRoute(
        InferenceTableMiddleware(agent, uri=settings.uri, spool_dir=settings.spool_dir, flush_seconds=600),
        FeedbackApp(settings),
    )
    with running(app) as url, httpx.Client(base_url=url, verify=NO_TLS, timeout=60) as browser:
        reply = browser.post("/invocations", json={"question": "why?"})
        request_id = reply.headers["x-databricks-request-id"]
        said = browser.post("/feedback", json={"databricks_request_id": request_id, "value": True})
        assert said.status_code == 200
        assert rows(settings.uri) == []
        [row] = known(settings, request_ids=[request_id])
        assert (row["key"], row["value"]) == (said.json()["feedback_id"], "true")
    assert [row["databricks_request_id"] for row in rows(settings.uri)] == [request_id]


@pytest.mark.parametrize(
    "value", [True, False, 0, 4.5, "gut, “danke”", "", [1, "two", None], {"a": {"b": [True]}}]
)
@pytest.mark.parametrize("kind", ["feedback", "expectation"])
def test_any_value(endpoint: str, settings: StorageSettings, value: Any, kind: str) -> None:
    """It is there as JSON, and as the assessment that MLflow makes of it."""
    reply = send(endpoint, value=value, type=kind, name="quality", rationale="because", source_id="ann")
    [row] = known(settings)
    assert json.loads(row["value"]) == value
    assert (row["name"], row["type"], row["rationale"]) == ("quality", kind, "because")
    assert (row["source_type"], row["source_id"]) == ("HUMAN", "ann")
    assessment = Assessment.from_dictionary(json.loads(row["document"]))
    assert isinstance(assessment, Feedback if kind == "feedback" else Expectation)
    assert json.dumps(assessment.value) == json.dumps(value)  # 0 is not 0.0
    assert assessment.name == "quality"
    assert assessment.assessment_id == row["key"] == reply.json()["feedback_id"]
    assert (assessment.source.source_type, assessment.source.source_id) == ("HUMAN", "ann")


def test_what_may_be_left_out(endpoint: str, settings: StorageSettings) -> None:
    """An id and a value do."""
    assert send(endpoint, value=1).status_code == 200
    [row] = known(settings)
    assert (row["name"], row["type"]) == ("user_feedback", "feedback")
    assert (row["source_id"], row["rationale"], row["trace_id"]) == ("default", None, None)


def test_a_trace_id_does_as_well(endpoint: str, settings: StorageSettings) -> None:
    """In place of the request's id."""
    assert send(endpoint, databricks_request_id="absent", trace_id="tr-12ab", value=1).status_code == 200
    [row] = known(settings, trace_ids=["tr-12ab"])
    assert (row["trace_id"], row["databricks_request_id"]) == ("tr-12ab", None)


def test_changed_and_withdrawn(endpoint: str, settings: StorageSettings) -> None:
    """With the id of the first reply: the last value counts, null takes it back."""
    first = send(endpoint, value=True).json()["feedback_id"]
    other = send(endpoint, value="other").json()["feedback_id"]
    assert send(endpoint, value=False, feedback_id=first).json() == {"feedback_id": first}
    assert {row["key"]: row["value"] for row in known(settings)} == {first: "false", other: '"other"'}
    assert send(endpoint, value=None, feedback_id=first).status_code == 200
    assert [row["key"] for row in known(settings)] == [other]


def test_the_name_of_the_key_wins(settings: StorageSettings) -> None:
    """Who says so is who has the API key; whom the request names stays beside it."""

    async def with_key(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            raise RuntimeError("knows none")
        await app({**scope, REQUESTER_KEY: "webshop"}, receive, send)

    app = FeedbackApp(settings)
    with running(with_key) as url:
        send(url, value=1, source_id="ann")
    [row] = known(settings)
    assert row["source_id"] == "webshop"
    assert Assessment.from_dictionary(json.loads(row["document"])).metadata == {"source_id": "ann"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"value": 1, "databricks_request_id": "absent"}, "databricks_request_id"),
        ({"value": 1, "databricks_request_id": "12"}, "databricks_request_id"),
        ({"value": 1, "databricks_request_id": 12}, "databricks_request_id"),
        ({"value": 1, "trace_id": "12"}, "trace_id"),
        ({"value": 1, "trace_id": "tr-' or 1"}, "trace_id"),
        ({}, "value"),
        ({"value": None}, "value"),
        ({"feedback_id": "a-1"}, "value"),
        ({"value": 1, "feedback_id": "a 1"}, "feedback_id"),
        ({"value": 1, "type": "tag"}, "type"),
        ({"value": 1, "name": " "}, "name"),
        ({"value": 1, "name": "x" * 251}, "name"),
        ({"value": 1, "rationale": ["x"]}, "rationale"),
        ({"value": 1, "rationale": "x" * 65_537}, "rationale"),
        ({"value": "x" * 65_537}, "value"),
        ({"value": 10**400}, "value"),
        ({"value": 1, "rating": 5}, "rating"),
    ],
)
def test_what_is_not_valid(
    endpoint: str, settings: StorageSettings, fields: dict[str, Any], named: str
) -> None:
    """It is a 400 that names the field, and nothing is written."""
    reply = send(endpoint, **fields)
    assert reply.status_code == 400
    assert reply.json()["error_code"] == "BAD_REQUEST"
    assert named in reply.json()["message"]
    assert known(settings) == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"no",
        b"\xff",
        b"[" * 100_000,
        b'{"trace_id": "tr-1", "value": NaN}',
        b'{"trace_id": "tr-1", "value": "\\ud800"}',
        b'{"trace_id": "tr-1", "value": ' + b"[" * 21 + b"]" * 21 + b"}",
    ],
)
def test_what_is_no_json(endpoint: str, body: bytes) -> None:
    """It is a 400 too."""
    reply = httpx.post(endpoint, content=body, verify=NO_TLS)
    assert (reply.status_code, reply.json()["error_code"]) == (400, "BAD_REQUEST")


def test_a_body_that_is_too_long(endpoint: str) -> None:
    """It is refused without being read to its end."""
    reply = httpx.post(endpoint, content=b"x" * (feedback.MAX_BODY_BYTES + 1), verify=NO_TLS)
    assert (reply.status_code, reply.json()["error_code"]) == (413, "REQUEST_ENTITY_TOO_LARGE")


def test_other_requests_are_the_agents(endpoint: str) -> None:
    """The route is one path and one method."""
    assert httpx.get(endpoint, verify=NO_TLS).json() == {"answer": "yes"}
    assert httpx.post(f"{endpoint}/x", verify=NO_TLS).json() == {"answer": "yes"}


def test_a_route_of_the_users_app(settings: StorageSettings) -> None:
    """In an app of one's own it answers POST alone."""
    app = Starlette(routes=[Route("/said", FeedbackApp(settings))])
    with running(app) as url:
        assert send(f"{url}/said", value=1).status_code == 200
        reply = httpx.get(f"{url}/said", verify=NO_TLS)
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert len(known(settings)) == 1


def test_a_table_that_can_not_be_written(settings: StorageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a 503, whose id makes it safe to send it again."""
    monkeypatch.setattr("inference_table.annotation_commit.ATTEMPTS", 1)
    in_the_way = Path(AnnotationLog(settings).uri)
    in_the_way.touch()
    with running(FeedbackApp(settings)) as url:
        failed = send(url, value=1)
        assert failed.status_code == 503
        assert failed.headers["retry-after"] == "1"
        in_the_way.unlink()
        again = send(url, value=1, feedback_id=failed.json()["feedback_id"])
        assert again.json() == {"feedback_id": failed.json()["feedback_id"]}
    assert len(known(settings)) == 1


def test_the_agent_goes_on_while_feedback_waits(
    settings: StorageSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that hangs holds up nobody else; beyond a limit there is a 503; then all are committed."""
    monkeypatch.setattr(feedback, "MAX_WAITING", 3)
    hanging, go_on = threading.Event(), threading.Event()

    def hang(step: Step) -> None:
        if step is Step.DATA_WRITTEN:
            hanging.set()
            go_on.wait(60)

    app = FeedbackApp(settings)
    app._log = AnnotationLog(settings, hang)
    with running(FeedbackRoute(agent, app)) as url, ThreadPoolExecutor(3) as pool:
        said = [pool.submit(send, f"{url}/feedback", value=number) for number in range(3)]
        wait_for(lambda: hanging.is_set() and app._waiting == 3, "all to wait")
        assert httpx.post(url, verify=NO_TLS).json() == {"answer": "yes"}
        refused = send(f"{url}/feedback", value="too many")
        go_on.set()
        assert [reply.result().status_code for reply in said] == [200, 200, 200]
    assert refused.status_code == 503
    assert sorted(row["value"] for row in known(settings)) == ["0", "1", "2"]


def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "INFERENCE_TABLE_URI": str(tmp_path / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(tmp_path / "spool"),
        "INFERENCE_TABLE_PATHS": "POST /invocations",
    }


def test_many_clients_of_many_workers(tmp_path: Path, settings: StorageSettings) -> None:
    """Four processes of eight threads post at once to two workers: none is lost, and none is there twice."""
    with served(AGENT, "--workers", "2", env=environment(tmp_path), log=tmp_path / "log") as (url, _):
        command = [sys.executable, "-c", CLIENT, f"{url}/feedback"]
        clients = [
            subprocess.Popen([*command, name, REQUEST_ID], stdout=subprocess.PIPE, cwd=ROOT, text=True)
            for name in "wxyz"
        ]
        try:
            lines = [line for one in clients for line in one.communicate(timeout=120)[0].splitlines()]
        finally:
            for one in clients:
                one.kill()
                one.wait()
    said = {tuple(line.split()) for line in lines}
    assert len(said) == 4 * 24
    table = QueryBuilder().register("t", DeltaTable(AnnotationLog(settings).uri))
    written = Counter(pa.table(table.execute("select key from t"))["key"].to_pylist())
    assert written == {key: 1 for _, key in said}
    assert {(json.loads(row["value"]), row["key"]) for row in known(settings)} == said


def test_a_server_that_is_killed_after_its_answer(tmp_path: Path, settings: StorageSettings) -> None:
    """What was answered with 200 survives SIGKILL of the server, right then."""
    with served(AGENT, env=environment(tmp_path), log=tmp_path / "log") as (url, server):
        answer = httpx.post(f"{url}/invocations", json={"question": "why?"}, timeout=60, verify=NO_TLS)
        request_id = answer.headers["x-databricks-request-id"]
        replies = [send(f"{url}/feedback", databricks_request_id=request_id, value=n) for n in range(3)]
        server.kill_group()
    keys = [reply.json()["feedback_id"] for reply in replies]
    assert [row["key"] for row in known(settings, request_ids=[request_id])] == keys


@pytest.mark.parametrize(
    ("switch", "has_keys", "takes"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_where_it_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: bool | None, has_keys: bool, takes: bool
) -> None:
    """A server takes feedback where it has API keys, or by a setting; else the path is the agent's."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    keys = tmp_path / "keys"
    keys.write_text("webshop 0123456789abcdef", encoding="utf-8")
    keys.chmod(0o600)
    server = ServerSettings(feedback=switch, api_key_file=keys if has_keys else None)
    with running(ServedApp(agent, server)) as url:
        said = {"databricks_request_id": REQUEST_ID, "value": 1}
        refused = httpx.post(f"{url}/feedback", json=said, verify=NO_TLS, timeout=60)
        headers = {"x-api-key": "0123456789abcdef"}
        reply = httpx.post(f"{url}/feedback", json=said, headers=headers, verify=NO_TLS, timeout=60)
    assert refused.status_code == (401 if has_keys else 200)
    assert ("feedback_id" in reply.json()) is takes
    found = known(StorageSettings(uri=str(tmp_path / "payload")))
    assert {row["source_id"] for row in found} == ({"webshop" if has_keys else "default"} if takes else set())

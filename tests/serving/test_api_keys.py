"""Who may call an agent, and what is seen of the keys: their names alone."""

import asyncio
import hashlib
import http.client
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_table import metrics
from inference_table.errors import SettingsError
from serving.api_keys import MAX_FILE_BYTES, ApiKeyCheck, KeyFile, read_keys
from serving.serve import ServedApp
from serving.server_settings import ServerSettings
from tests.serving.recorded import NO_TLS, Recorded
from tests.support import rows, running, wait_for

ALICE = "alice-0123456789abcdef"
ALICE_TOO = "alice-fedcba9876543210"
BOB = "bob-0123456789abcdef"
WRONG = "nobody-0123456789abcdef"
KEY_LINES = f"""# who may call

alice {ALICE}
alice  {ALICE_TOO}
bob@example.org sha256:{hashlib.sha256(BOB.encode()).hexdigest().upper()}
"""


async def agent(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the headers that it got, and the key's name."""
    if scope["type"] == "lifespan":
        raise RuntimeError("knows none")
    while (await receive()).get("more_body"):
        pass
    headers = [(name.decode(), value.decode()) for name, value in scope["headers"]]
    body = json.dumps({"headers": headers, "requester": scope["tracelake.requester"]}).encode()
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", b"application/json")],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})


@contextmanager
def served_app(folder: Path, keys: Path, **environment: str) -> Iterator[Recorded]:
    """The agent with all that ``tracelake serve`` puts around it."""
    environment = {
        "ENABLE_MLFLOW_TRACING": "true",
        "INFERENCE_TABLE_URI": str(folder / "payload"),
        "INFERENCE_TABLE_SPOOL_DIR": str(folder / "spool"),
        "INFERENCE_TABLE_FLUSH_SECONDS": "0.05",
        "INFERENCE_TABLE_REQUESTER_HEADER": "x-user",
        **environment,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        app = ServedApp(agent, ServerSettings(api_key_file=keys))
    with running(app) as url:
        yield Recorded(url, folder / "payload")


def key_file(folder: Path, text: str = KEY_LINES) -> Path:
    path = folder / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("keys")
    with served_app(folder, key_file(folder)) as found:
        yield found


def count(reason: str) -> float:
    value: float = metrics.UNAUTHENTICATED.labels(reason)._value.get()
    return value


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ({"authorization": f"Bearer {ALICE}"}, "alice"),
        ({"authorization": f"bearer   {ALICE_TOO}"}, "alice"),
        ({"X-API-Key": ALICE_TOO}, "alice"),
        ({"x-api-key": BOB}, "bob@example.org"),
    ],
)
def test_the_name_of_a_key_is_the_requester(endpoint: Recorded, header: dict[str, str], name: str) -> None:
    """Of any key of the file, in either header; what the client says about itself does not count."""
    exchanged = endpoint.post("/", headers={**header, "x-user": "mallory", "tracelake.requester": "mallory"})
    assert exchanged.reply.json()["requester"] == name
    assert exchanged.row["requester"] == name


def test_keys_reach_neither_the_agent_nor_the_row(endpoint: Recorded) -> None:
    """Whichever header it came in, and in both at once; an authorization of the agent's own goes through."""
    for sent, seen in (
        ({"x-api-key": ALICE}, None),
        ({"authorization": f"Bearer {ALICE}"}, None),
        ({"x-api-key": ALICE, "authorization": f"Bearer {ALICE_TOO}"}, None),
        ({"x-api-key": ALICE, "authorization": "Bearer of-the-agent"}, "Bearer of-the-agent"),
        ({"x-api-key": ALICE, "authorization": "Basic dTpw"}, "Basic dTpw"),
    ):
        exchanged = endpoint.post("/", headers=sent)
        headers = dict(exchanged.reply.json()["headers"])
        assert headers.get("authorization") == seen
        assert "x-api-key" not in headers
        assert ALICE not in str(exchanged.row)
        assert ALICE_TOO not in str(exchanged.row)


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "missing"),
        ([("authorization", "Basic dTpw")], "missing"),
        ([("authorization", ALICE)], "missing"),
        ([("authorization", "Bearer")], "wrong"),
        ([("authorization", f"Bearer {WRONG}")], "wrong"),
        ([("authorization", f"Bearer {ALICE[:-1]}")], "wrong"),
        ([("x-api-key", "")], "wrong"),
        ([("x-api-key", "sha256:" + hashlib.sha256(ALICE.encode()).hexdigest())], "wrong"),
        ([("x-api-key", ALICE), ("x-api-key", WRONG)], "wrong"),
        ([("x-api-key", WRONG), ("authorization", f"Bearer {ALICE}")], "wrong"),
        ([("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {BOB}")], "wrong"),
    ],
)
def test_without_an_accepted_key_the_answer_is_401(
    endpoint: Recorded, headers: list[tuple[str, str]], reason: str
) -> None:
    """By any method and on any path; it says what is needed, and is counted by reason."""
    before = count(reason)
    for method, path in (("POST", "/"), ("OPTIONS", "/"), ("GET", "/metrics")):
        reply = httpx.request(method, endpoint.url + path, headers=headers, verify=NO_TLS)
        assert reply.status_code == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error_code"] == "UNAUTHENTICATED"
        assert "x-databricks-request-id" not in reply.headers
    assert count(reason) == before + 3


@pytest.mark.parametrize("chunked", [False, True])
def test_who_is_still_sending_gets_the_401(endpoint: Recorded, chunked: bool) -> None:
    """A client that sends 10 MB before it reads, on a connection to be closed, gets no reset instead."""
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=60)
    body = (b"q" * 100_000 for _ in range(100)) if chunked else b"q" * 10_000_000
    connection.request("POST", "/", body, {"connection": "close"}, encode_chunked=chunked)
    reply = connection.getresponse()
    assert reply.status == 401
    assert json.loads(reply.read())["error_code"] == "UNAUTHENTICATED"
    connection.close()


def test_a_refused_request_leaves_its_connection_usable(endpoint: Recorded) -> None:
    """A client that then sends its key needs no new connection."""
    connection = http.client.HTTPConnection(endpoint.url.removeprefix("http://"), timeout=60)
    statuses, sockets = [], set()
    for headers in ({}, {"x-api-key": ALICE}):
        connection.request("POST", "/", b"q" * 1_000_000, headers)
        reply = connection.getresponse()
        reply.read()
        statuses.append(reply.status)
        sockets.add(connection.sock)
    connection.close()
    assert statuses == [401, 200]
    assert len(sockets - {None}) == 1


def test_websockets_without_a_key_are_closed_before_they_open(tmp_path: Path) -> None:
    """With the code of a policy's violation; with a key the agent gets them, without the key."""
    seen: list[Any] = []

    async def socket_agent(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    async def send(message: Any) -> None:
        seen.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    check = ApiKeyCheck(socket_agent, KeyFile(key_file(tmp_path)))
    for headers in ([], [(b"x-api-key", ALICE.encode()), (b"host", b"here")]):
        asyncio.run(check({"type": "websocket", "path": "/", "headers": headers}, receive, send))
    refusal, scope = seen
    assert (refusal["type"], refusal["code"]) == ("websocket.close", 1008)
    assert (scope["tracelake.requester"], scope["headers"]) == ("alice", [(b"host", b"here")])


@pytest.mark.heavy
def test_a_websocket_handshake_needs_a_key(tmp_path: Path) -> None:
    """Over a real connection: 403 without a key, open with one."""
    client = pytest.importorskip("websockets.sync.client")
    exceptions = pytest.importorskip("websockets.exceptions")

    async def socket_agent(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "websocket":
            raise RuntimeError("knows websockets only")
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": scope["tracelake.requester"]})
        await send({"type": "websocket.close"})

    with running(ApiKeyCheck(socket_agent, KeyFile(key_file(tmp_path)))) as url:
        address = url.replace("http", "ws")
        with pytest.raises(exceptions.InvalidStatus, match="403"):
            client.connect(address)
        with client.connect(address, additional_headers={"x-api-key": ALICE}) as connection:
            assert connection.recv() == "alice"


def test_with_keys_clients_may_ask_for_their_trace_and_durability(tmp_path: Path, endpoint: Recorded) -> None:
    """Unless a setting says otherwise."""
    request: Any = {
        "json": {"databricks_options": {"return_trace": True}},
        "headers": {"x-api-key": ALICE, "x-inference-table-durability": "strict"},
    }
    reply = endpoint.send("/", **request)
    assert reply.headers["x-inference-table-durability"] == "spooled"
    assert "databricks_output" in reply.json()
    switched_off = {
        "INFERENCE_TABLE_ALLOW_RETURN_TRACE": "false",
        "INFERENCE_TABLE_ALLOW_DURABILITY_HEADER": "0",
    }
    with served_app(tmp_path, key_file(tmp_path), **switched_off) as strict:
        reply = strict.send("/", **request)
    assert reply.headers["x-inference-table-durability"] == "queued"
    assert "databricks_output" not in reply.json()


# --- the file ---


def test_a_file_holds_keys_and_digests_of_keys(tmp_path: Path) -> None:
    """Blank lines, comments and a byte order mark mean nothing."""
    keys = read_keys(key_file(tmp_path, "\ufeff" + KEY_LINES))
    assert [key.name for key in keys] == ["alice", "alice", "bob@example.org"]
    assert keys[2].digest == hashlib.sha256(BOB.encode()).digest()
    assert keys[2].digest.hex() not in repr(keys)


def test_each_mistake_is_named_by_its_line_and_without_its_key(tmp_path: Path) -> None:
    """All of them at once."""
    mistakes = {
        "only-a-secret-word": "give NAME KEY",
        "eve a-secret-word-that-is-long # hers": "give NAME KEY",
        "e/ve a-secret-word-that-is-long": "a name has letters",
        "eve secret-word-that-is-long": None,
        "eve secret-word": "at least 16 characters",
        "eve secret-with-an-ümlaut-in-it": "printable ASCII",
        "eve sha256:secret": "64 hexadecimal digits",
        "adam secret-word-that-is-long": "that of line 4",
    }
    path = key_file(tmp_path, "\n".join(mistakes) + "\n")
    with pytest.raises(SettingsError) as raised:
        read_keys(path)
    message = str(raised.value)
    assert str(path) in message
    assert "secret" not in message
    told = dict(
        part.split(": ", 1)
        for part in message.removeprefix(f"cannot use the API key file '{path}': ").split("; line ")
    )
    expected = {number: what for number, what in enumerate(mistakes.values(), 1) if what is not None}
    assert [int(number.removeprefix("line ")) for number in told] == list(expected)
    for part, what in zip(told.values(), expected.values(), strict=True):
        assert what in part


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no key"), ("# none yet\n\n", "holds no key"), ("#" * (MAX_FILE_BYTES + 1), "has more than")],
)
def test_a_file_without_keys_is_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    """It would lock everybody out, or was meant to be another file."""
    with pytest.raises(SettingsError, match=message):
        read_keys(key_file(tmp_path, text))


def test_a_path_that_leads_to_no_file_is_a_mistake(tmp_path: Path) -> None:
    """A folder, a pipe and nothing at all: the error says which."""
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "none", "there is none"),
    ):
        with pytest.raises(SettingsError, match=message):
            read_keys(path)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_can_read_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    """Not an error: what Kubernetes mounts can be read by a group."""
    path = key_file(tmp_path)
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        assert KeyFile(path).name_of(ALICE.encode()) == "alice"
    assert (str(path) in caplog.text) == warned


def test_keys_can_be_rotated_while_they_are_in_use(tmp_path: Path) -> None:
    """A line that is added, written over or taken away counts soon after."""
    path = key_file(tmp_path, f"alice {ALICE}\n")
    with served_app(tmp_path, path) as endpoint:

        def statuses() -> list[int]:
            return [endpoint.send("/", headers={"x-api-key": key}).status_code for key in (ALICE, ALICE_TOO)]

        assert statuses() == [200, 401]
        path.write_text(f"alice {ALICE}\nalice {ALICE_TOO}\n")
        wait_for(lambda: statuses() == [200, 200], "both keys to be accepted")
        path.write_text(f"alice {ALICE_TOO}\n")
        wait_for(lambda: statuses() == [401, 200], "the old key to be refused")
    recorded = rows(endpoint.table)
    assert {(row["status_code"], row["requester"]) for row in recorded} == {(200, "alice")}  # a 401 is no row


def test_a_folder_that_is_swapped_by_its_link_is_noticed(tmp_path: Path) -> None:
    """As Kubernetes changes a mounted secret: the file's own path stays a link to the same name."""
    for name, key in (("..1", ALICE), ("..2", BOB)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys").write_text(f"user {key:<32}\n")
        os.utime(tmp_path / name / "keys", ns=(1, 1))  # same size, same time
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = KeyFile(tmp_path / "keys")
    assert keys.name_of(ALICE.encode()) == "user"
    (tmp_path / "..new").symlink_to("..2")
    (tmp_path / "..new").rename(tmp_path / "..data")
    wait_for(lambda: keys.name_of(BOB.encode()) == "user", "the new key")
    assert keys.name_of(ALICE.encode()) is None


@pytest.mark.parametrize("change", ["mistake", "gone"])
def test_a_file_that_turned_bad_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    """The keys of before are used, a counter and the log say so; the next good file counts."""
    path = key_file(tmp_path)
    keys = KeyFile(path)
    before = metrics.API_KEY_FILE_ERRORS._value.get()
    if change == "gone":
        path.unlink()
    else:
        path.write_text(f"alice {ALICE}\nbob {BOB[:8]}\n")

    def noticed() -> bool:
        assert keys.name_of(BOB.encode()) == "bob@example.org"
        return bool(metrics.API_KEY_FILE_ERRORS._value.get() > before)

    wait_for(noticed, "the change to be noticed")
    assert BOB[:8] not in caplog.text
    key_file(tmp_path, f"carol {BOB}\n")
    wait_for(lambda: keys.name_of(BOB.encode()) == "carol", "the good file")

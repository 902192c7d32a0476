"""An agent that answers questions about Python's standard library, from its docstrings.

It reads the docstrings at start-up, finds the relevant ones with BM25, looks up signatures with a tool, and
quotes the sentences that fit the question best. **There is no language model in it**: the answer is
extractive, its tokens are counted words and punctuation marks, and it costs nothing to run. All else is as in
any agent: MLflow spans, retrieved documents, tool calls, token counts, streaming, failures.

Run it, and ask:

    ENABLE_MLFLOW_TRACING=true uvicorn examples.docs_agent:app
    curl localhost:8000/invocations -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "How do I merge sorted inputs with heapq.merge?"}]}'
"""

import inspect
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Final, Literal
from uuid import uuid4

import mlflow
import orjson
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from mlflow.entities import Document, SpanType
from mlflow.tracing.constant import SpanAttributeKey
from pydantic import BaseModel, ConfigDict, Field
from rank_bm25 import BM25Okapi  # type: ignore[import-untyped]  # ships no types
from starlette.responses import Response

from serving import InferenceTableMiddleware

MODEL: Final = "stdlib-docs-extractive"
MODULES: Final = """
    argparse array ast base64 bisect calendar codecs collections concurrent.futures configparser contextlib
    copy csv dataclasses datetime decimal difflib email.message enum fnmatch fractions functools glob graphlib
    gzip hashlib heapq hmac html http.client inspect io ipaddress itertools json logging lzma math mimetypes
    operator os os.path pathlib pickle pprint queue random re sched secrets shelve shlex shutil sqlite3
    statistics string struct subprocess tarfile tempfile textwrap threading time timeit tokenize traceback
    types urllib.parse uuid weakref xml.etree.ElementTree zipfile zlib zoneinfo
""".split()  # noqa: SIM905 - seventy names read better as text
"""What the agent knows. None of them does anything when it is imported."""

RETRIEVED: Final = 5
QUOTED: Final = 3
PAUSE_SECONDS: Final = 0.005
"""Between two pieces of a streamed answer, as a model takes them: a client can leave a stream that lasts."""
STOP_WORDS: Final = frozenset(
    """
    a an and are as at be by can do does for from how i if in into is it its me my of on or python should
    than that the this to use used using was what when where which why with you
    """.split()  # noqa: SIM905 - as above
)


@dataclass(frozen=True)
class Entry:
    """One documented function, class or method."""

    name: str
    module: str
    kind: str
    text: str
    obj: Any

    def document(self) -> dict[str, Any]:
        """As MLflow's retriever spans take it."""
        metadata = {"doc_uri": f"python:{self.name}", "module": self.module, "kind": self.kind}
        return Document(page_content=self.text, metadata=metadata, id=self.name).to_dict()


def documented(obj: Any) -> bool:
    return isinstance(obj.__doc__, str) and bool(obj.__doc__.strip())  # some C types have a descriptor there


def entries(module_name: str) -> Iterator[Entry]:
    """What a module documents: itself, its public functions and classes, and the methods of these."""
    module = import_module(module_name)
    if documented(module):
        yield Entry(module_name, module_name, "module", inspect.cleandoc(module.__doc__ or ""), module)
    for name, obj in public(module).items():
        if not (inspect.isroutine(obj) or inspect.isclass(obj)) or not documented(obj):
            continue
        kind = "class" if inspect.isclass(obj) else "function"
        yield Entry(f"{module_name}.{name}", module_name, kind, inspect.cleandoc(obj.__doc__ or ""), obj)
        for method, member in vars(obj).items() if inspect.isclass(obj) else ():
            if not method.startswith("_") and inspect.isroutine(member) and documented(member):
                full = f"{module_name}.{name}.{method}"
                yield Entry(full, module_name, "method", inspect.cleandoc(member.__doc__ or ""), member)


def public(module: ModuleType) -> dict[str, Any]:
    """Names of ``__all__``; without one, all that are defined here and begin with a letter."""
    if names := getattr(module, "__all__", None):
        return {name: vars(module)[name] for name in names if name in vars(module)}
    return {
        name: obj
        for name, obj in vars(module).items()
        if not name.startswith("_") and getattr(obj, "__module__", None) == module.__name__
    }


def terms(text: str) -> list[str]:
    """Words to search by: lower case, snake_case and dotted names taken apart, a plural ``s`` left out."""
    words = re.findall(r"[a-z]+|\d+", text.lower())
    return [word.removesuffix("s") if len(word) > 3 else word for word in words if word not in STOP_WORDS]


def tokens(text: str) -> int:
    """Words and punctuation marks. A real model's tokenizer counts some 30 % more."""
    return len(re.findall(r"\w+|[^\w\s]", text))


class Library:
    """All entries, and a BM25 index over them."""

    def __init__(self) -> None:
        found = {entry.name: entry for name in MODULES for entry in entries(name)}
        self.by_name = found
        self._entries = list(found.values())
        # The name counts twice: a question that names a function is about that function.
        self._index = BM25Okapi([terms(f"{entry.name} {entry.name} {entry.text}") for entry in self._entries])

    def search(self, question: str, count: int) -> list[Entry]:
        """The entries that fit best; those that share no word with the question do not fit at all."""
        scores = self._index.get_scores(terms(question))
        best = sorted(range(len(scores)), key=lambda number: -scores[number])[:count]
        return [self._entries[number] for number in best if scores[number] > 0]

    def weight(self, term: str) -> float:
        """How rare a word is."""
        return float(self._index.idf.get(term, 0.0))


@cache
def library() -> Library:
    return Library()


@mlflow.trace(span_type=SpanType.RETRIEVER)
def retrieve(question: str) -> list[dict[str, Any]]:
    """The documents that fit the question best."""
    return [entry.document() for entry in library().search(question, RETRIEVED)]


@mlflow.trace(span_type=SpanType.TOOL)
def signature(name: str) -> str:
    """The signature of a function, class or method.

    Raises:
        LookupError: the standard library, as far as this agent knows it, documents no such name.
    """
    if (entry := library().by_name.get(name)) is None:
        raise LookupError(f"no documentation for {name!r}")
    try:
        return f"{name}{inspect.signature(entry.obj)}"
    except (TypeError, ValueError):  # written in C without one, or a module
        return name


def named(question: str) -> list[str]:
    """Dotted names in the question that begin with a module the agent knows."""
    names = re.findall(r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+", question)
    return [
        name for name in dict.fromkeys(names) if name.startswith(tuple(f"{module}." for module in MODULES))
    ]


def sentences(text: str) -> list[str]:
    paragraphs = (
        " ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text) if ">>>" not in paragraph
    )
    return [
        sentence for one in paragraphs for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z])", one) if sentence
    ]


def quotes(question: str, documents: list[dict[str, Any]]) -> list[str]:
    """The sentences that share the rarest words with the question, each with its source."""
    asked = set(terms(question))
    ranked = []
    for rank, document in enumerate(documents):
        for position, sentence in enumerate(sentences(document["page_content"])):
            shared = asked & set(terms(f"{document['id']} {sentence}"))
            # An entry's first sentence says what it is; a document found first fits better.
            score = (
                sum(library().weight(term) for term in shared) * (1.5 if position == 0 else 1.0) / (1 + rank)
            )
            ranked.append((score, f"“{sentence}” ({document['id']})"))
    ranked.sort(key=lambda scored: -scored[0])
    return [quote for _, quote in ranked[:QUOTED]]


def write_answer(question: str, documents: list[dict[str, Any]], signatures: list[str]) -> Iterator[str]:
    """The answer, word by word, in a span like that of a model's call."""
    prompt = {"question": question, "documents": documents, "signatures": signatures}
    with mlflow.start_span("write_answer", span_type=SpanType.LLM) as span:
        span.set_inputs(prompt)
        span.set_attribute(SpanAttributeKey.MODEL, MODEL)
        lines = [f"Signature: {text}" for text in signatures] + quotes(question, documents)
        answer = (
            "\n".join(lines) if lines else "The standard library's documentation says nothing about that."
        )
        span.set_outputs(answer)
        used = tokens(question) + sum(tokens(document["page_content"]) for document in documents)
        written = tokens(answer)
        usage = {"input_tokens": used, "output_tokens": written, "total_tokens": used + written}
        span.set_attribute(SpanAttributeKey.CHAT_USAGE, usage)
    yield from re.findall(r"\S+\s*", answer)


@mlflow.trace(name="docs_agent", span_type=SpanType.AGENT, output_reducer="".join)
def answer(messages: list[dict[str, str]]) -> Iterator[str]:
    """Answer the last message, piece by piece."""
    question = messages[-1]["content"]
    documents = retrieve(question)
    signatures = [signature(name) for name in named(question)]
    yield from write_answer(question, documents, signatures)


class ChatMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class ChatRequest(BaseModel):
    """A chat completion request; whatever else a client sends is left alone."""

    model_config = ConfigDict(extra="allow")

    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False


def completion(kind: str, choice: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {
        "object": kind,
        "created": int(time.time()),
        "model": MODEL,
        "choices": [{"index": 0, **choice, "finish_reason": finish_reason}],
    }


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def stream(messages: list[dict[str, str]]) -> Iterator[bytes]:
    """The answer as server-sent events. A failure comes as an event too: the status is long sent."""
    chunk_id = f"chatcmpl-{uuid4().hex}"
    role = {"role": "assistant"}
    try:
        for piece in answer(messages):
            delta = {"delta": role | {"content": piece}}
            yield event({"id": chunk_id} | completion("chat.completion.chunk", delta, None))
            role = {}
            time.sleep(PAUSE_SECONDS)
    except LookupError as error:
        yield event({"error": {"type": "LookupError", "message": str(error.args[0])}})
        return
    yield event({"id": chunk_id} | completion("chat.completion.chunk", {"delta": {}}, "stop"))
    yield b"data: [DONE]\n\n"


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    library()
    yield


app = FastAPI(title="Python documentation agent", lifespan=lifespan)
app.add_middleware(InferenceTableMiddleware)


@app.post("/invocations", response_model=None)
def invocations(request: ChatRequest) -> Response | dict[str, Any]:
    """Answer a question, as OpenAI's chat completions do."""
    messages = [message.model_dump() for message in request.messages]
    if messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise HTTPException(400, "the last message must be a question of the user")
    if request.stream:
        return StreamingResponse(stream(messages), media_type="text/event-stream")
    message = {"message": {"role": "assistant", "content": "".join(answer(messages))}}
    return {"id": f"chatcmpl-{uuid4().hex}"} | completion("chat.completion", message, "stop")


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}

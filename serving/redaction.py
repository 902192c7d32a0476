"""What a ``redact`` callable sees: request, response and traces, before anything is written.

::

    def redact(payload: Payload) -> Payload:
        payload.request["messages"] = "[redacted]"
        return payload

    app.add_middleware(InferenceTableMiddleware, redact=redact)

It runs in the writer's thread. If it raises, or returns something else, the whole payload is withheld from
the row, which says ``REDACTION_FAILED``: a failure never leaks. What passes it is written as JSON anew, no
longer as the client's bytes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from inference_table.record import EncodedTrace
from inference_table.splice import NOT_JSON, parse

__all__ = ["Payload", "Redact", "redacted"]


@dataclass(slots=True)
class Payload:
    """One exchange's content. Change it, or return another.

    ``request`` and ``response`` are the JSON value where the body is JSON (a stream's: what it adds up to),
    else text, else bytes; ``traces`` are dictionaries as of ``mlflow.entities.Trace.to_dict``, in which span
    attributes are JSON texts; ``error`` is what ended a stream midway.
    """

    request: Any
    response: Any
    traces: list[dict[str, Any]]
    error: str | None = None


Redact = Callable[[Payload], Payload]


def redacted(
    redact: Redact, request: bytes, response: bytes, traces: Sequence[EncodedTrace], error: str | None
) -> tuple[bytes, bytes, list[EncodedTrace], str | None]:
    """Request, response, traces and a stream's error as ``redact`` leaves them.

    Raises:
        TypeError: it returned no ``Payload``, or something that is no JSON.
        Exception: what it raises.
    """
    loaded = [orjson.loads(trace.json) for trace in traces]
    payload = redact(Payload(value_of(request), value_of(response), loaded, error))
    if not isinstance(payload, Payload):
        raise TypeError(f"redact returned a {type(payload).__name__}, not the Payload")
    # A trace that was taken out takes its columns with it: what is left says which it is.
    by_id = {trace.trace_id: trace for trace in traces}
    return (
        bytes_of(payload.request),
        bytes_of(payload.response),
        [encoded(trace, by_id) for trace in payload.traces],
        payload.error,
    )


def value_of(body: bytes) -> Any:
    value = parse(body)
    if value is not NOT_JSON:
        return value
    try:
        return body.decode()
    except UnicodeDecodeError:
        return body


def bytes_of(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) else orjson.dumps(value)


def encoded(trace: dict[str, Any], originals: dict[str, EncodedTrace]) -> EncodedTrace:
    original = originals[trace["info"]["trace_id"]]
    return EncodedTrace(
        parts=[orjson.dumps(trace)],
        info=orjson.dumps(trace["info"]),
        trace_id=original.trace_id,
        state=original.state,
        span_count=len(trace["data"]["spans"]),
        input_tokens=original.input_tokens,
        output_tokens=original.output_tokens,
        total_cost_usd=original.total_cost_usd,
    )

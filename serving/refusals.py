"""Refusing a request whose body nobody reads.

The reply goes out at once, and with a length, so that a client has all of it. Then what the client still
sends is read and dropped for a while: closing a connection with bytes unread resets it, and a client that is
still sending would see that instead of the reply (RFC 9112, section 9.6).
"""

import asyncio
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

__all__ = ["refuse"]

LINGER_SECONDS: Final = 10.0
"""How long a client may go on sending. nginx waits for 30 s; ours also delays the stop of a server."""
CLOSE: Final = (b"connection", b"close")


async def refuse(scope: Scope, receive: Receive, send: Send, reply: Response) -> None:
    """Answer a request whose body was not read, or not to its end."""
    headers = [*reply.raw_headers, CLOSE] if is_open_ended(scope) else reply.raw_headers
    await send({"type": "http.response.start", "status": reply.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            await drop_body(receive)
    except TimeoutError:
        pass  # it is still sending, and has had the time to see the reply
    finally:
        await send({"type": "http.response.body", "body": b""})


def is_open_ended(scope: Scope) -> bool:
    """Whether nobody knows yet where this request's body ends, or whether it comes at all."""
    return any(name in (b"transfer-encoding", b"expect") for name, _ in scope["headers"])


async def drop_body(receive: Receive) -> None:
    while True:
        message = await receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            return

"""Sockets to listen on."""

import errno
import socket
import time
from typing import Final

from inference_table.errors import DeploymentError

__all__ = ["listen", "listen_anywhere", "netloc", "port_of"]

BACKLOG: Final = 2048
"""As uvicorn's: connections that wait while no worker takes any."""
USUAL_PORT: Final = 8000
LINGER_SECONDS: Final = 2.0
"""Workers whose supervisor was killed let go of its port within moments; one that has it longer keeps it."""
POLL_SECONDS: Final = 0.05
WILDCARDS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def listen(host: str, port: int, what: str = "port") -> socket.socket:
    """A socket that listens; connections to it wait until somebody takes them.

    Args:
        port: 0 for any free one.
        what: the argument that chose the port, for the error.

    Raises:
        DeploymentError: that address can't be had.
    """
    deadline = time.monotonic() + LINGER_SECONDS
    while True:
        try:
            return bound(host, port)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                continue
            raise DeploymentError(
                f"cannot listen on {host} port {port}: {problem(error, host, port, what)}"
            ) from error


def listen_anywhere(host: str, usual_port: int = USUAL_PORT) -> socket.socket:
    """Like :func:`listen`, on the usual port where that is free."""
    try:
        return bound(host, usual_port)
    except OSError:
        return listen(host, 0)


def bound(host: str, port: int) -> socket.socket:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except UnicodeError as error:  # such as "a..b", which is never asked for
        raise socket.gaierror(socket.EAI_NONAME, f"no name of a machine: {error}") from error
    # A name may have addresses of both families; most clients try the older one too.
    family, kind, protocol, _, address = min(addresses, key=lambda found: found[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def problem(error: OSError, host: str, port: int, what: str) -> str:
    if isinstance(error, socket.gaierror):
        return f"{host!r} is no address of this machine; give another host"
    if error.errno == errno.EADDRINUSE:
        return (
            "the address is in use; stop what listens there "
            f"(`ss -ltnp 'sport = :{port}'` shows it), or give another {what}"
        )
    if error.errno == errno.EACCES:
        return f"that port needs privileges; give a {what} above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host!r} is no address of this machine; give another host"
    return str(error)


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def netloc(host: str, port: int | None) -> str:
    """What a URL calls an address that is listened on."""
    host = WILDCARDS.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return shown if port is None else f"{shown}:{port}"

"""One small ASGI app per peer, each of which runs in that peer's environment."""

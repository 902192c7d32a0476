"""Serving: the ASGI middleware and trace capture."""

from serving.middleware import InferenceTableMiddleware

__all__ = ["InferenceTableMiddleware"]

"""Fails while it is imported."""

raise LookupError("the vector index is not there")

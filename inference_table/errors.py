"""Errors raised by tracelake.

::

    TracelakeError
    ├── SettingsError       a setting has a value that is not accepted (also a ValueError)
    ├── SpoolError          the local spool can't be used
    │   ├── SpoolFullError      its limit, or the disk's, is reached
    │   └── SegmentError        one segment can't be read, for good
    ├── TableError          the Delta table can't be used
    │   ├── TableNotFoundError  there is no table at that URI
    │   ├── TableReplacedError  another table is at that URI than before
    │   └── TableSchemaError    the table is not an inference table we may write to
    ├── DeploymentError     an agent can't be deployed, or a deployment can't be changed
    ├── DurabilityError     a reply could not be recorded as durably as was asked for
    └── QueryError          a query is not valid SQL, or failed while it ran

Every message says what was tried, on what, and what to do about it.
"""

__all__ = [
    "DeploymentError",
    "DurabilityError",
    "QueryError",
    "SegmentError",
    "SettingsError",
    "SpoolError",
    "SpoolFullError",
    "TableError",
    "TableNotFoundError",
    "TableReplacedError",
    "TableSchemaError",
    "TracelakeError",
]


class TracelakeError(Exception):
    """Base of all errors raised by tracelake."""


class SettingsError(TracelakeError, ValueError):
    """A setting has a value that is not accepted."""


class SpoolError(TracelakeError):
    """The local spool can't be used."""


class SpoolFullError(SpoolError):
    """The spool reached its own limit or the disk's."""


class SegmentError(SpoolError):
    """One segment can't be read, for good."""


class TableError(TracelakeError):
    """The Delta table can't be used."""


class TableNotFoundError(TableError):
    """There is no Delta table at the URI."""


class TableReplacedError(TableError):
    """Another table is at the URI than before."""


class TableSchemaError(TableError):
    """The table is not an inference table that we may write to."""


class DeploymentError(TracelakeError):
    """An agent can't be deployed, or a deployment can't be changed."""


class DurabilityError(TracelakeError):
    """A reply could not be recorded as durably as was asked for."""


class QueryError(TracelakeError):
    """A query is not valid SQL, or failed while it ran."""

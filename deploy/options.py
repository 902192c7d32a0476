"""Options that several commands have."""

import re
from typing import Final

import click

__all__ = ["headers_of", "spool_option", "table_option"]

HEADER_NAME: Final = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
FRAMING: Final = frozenset({"content-length", "transfer-encoding"})
"""Headers that say where a body ends."""

table_option: Final = click.option(
    "--table",
    metavar="URI",
    help="Delta table: a path, s3://, az:// or gs://.  "
    "[default: INFERENCE_TABLE_URI, else ./tracelake-data/payload]",
)
spool_option: Final = click.option(
    "--spool-dir",
    metavar="DIR",
    help="Where rows wait on this machine.  "
    "[default: INFERENCE_TABLE_SPOOL_DIR, else ./tracelake-data/spool]",
)


def headers_of(_: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, separator, value = text.partition(":")
        name = name.strip().lower()
        if not (HEADER_NAME.fullmatch(name) and separator and text.isprintable() and text.isascii()):
            raise click.BadParameter(f"{text!r} is not of the form {parameter.metavar}")
        if name in FRAMING:
            raise click.BadParameter(f"{name} follows from the body of each request; leave it out")
        found[name] = value.strip()
    return found

"""Text of a user's in files of other programs: quoted so that it comes out there as it went in."""

import json
import re
from collections.abc import Mapping
from typing import Final

__all__ = [
    "compose_text",
    "exec_form",
    "fill",
    "kubernetes_text",
    "one_line",
    "systemd_argument",
    "systemd_text",
    "yaml_text",
]

PLACEHOLDER: Final = re.compile(r"^(?P<indent> *)@\{(?P<block>\w+)\}\n|@\{(?P<inline>\w+)\}", re.MULTILINE)
CHARACTER_ESCAPES: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


def fill(template: str, values: Mapping[str, str]) -> str:
    """A template with its ``@{name}`` replaced.

    One alone on its line stands for any number of lines, which are indented as it is.
    """

    def replaced(found: re.Match[str]) -> str:
        if found["inline"]:
            return values[found["inline"]]
        value = values[found["block"]]
        return "".join(f"{found['indent']}{line}\n" for line in value.split("\n")) if value else ""

    return PLACEHOLDER.sub(replaced, template)


def one_line(text: str) -> str:
    """For comments and titles, where a line break would end them, and a backslash at the end would not."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else "�" for char in line).rstrip("\\")


def yaml_text(text: str) -> str:
    """A YAML scalar that is this text and nothing else: no number, no boolean, no date."""
    return '"' + "".join(map(yaml_character, text)) + '"'


def yaml_character(char: str) -> str:
    if char in CHARACTER_ESCAPES:
        return CHARACTER_ESCAPES[char]
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def kubernetes_text(text: str) -> str:
    """The same where Kubernetes replaces ``$(NAME)``: values of variables, commands and arguments."""
    return yaml_text(text.replace("$", "$$"))


def compose_text(text: str) -> str:
    """The same in a file of Compose, which replaces ``$NAME`` everywhere."""
    return yaml_text(text.replace("$", "$$"))


def systemd_text(text: str) -> str:
    """A quoted string of a unit, where ``%`` begins a specifier."""
    escaped = "".join(
        CHARACTER_ESCAPES.get(char)
        or (char if ord(char) >= 0x20 and char != "\x7f" else f"\\x{ord(char):02x}")
        for char in text
    )
    return '"' + escaped.replace("%", "%%") + '"'


def systemd_argument(text: str) -> str:
    """An argument of ``Exec...=``, where ``$`` begins a variable, too."""
    if re.fullmatch(r"[\w./:=@-]+", text, re.ASCII):
        return text
    return systemd_text(text.replace("$", "$$"))


def exec_form(arguments: list[str]) -> str:
    """A command of a Dockerfile that no shell sees: a JSON array."""
    return json.dumps(arguments)

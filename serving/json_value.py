"""What agents return, as JSON."""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python
from pydantic_core import to_json as pydantic_json

__all__ = ["to_json", "to_jsonable"]


def to_json(value: Any) -> bytes:
    """A value as JSON: pydantic models, dataclasses, numpy, pandas and what Python itself has.

    NaN and infinities become ``null``, bytes base64.

    Raises:
        TypeError: there is a value in it that is no JSON.
    """
    try:
        return pydantic_json(value, bytes_mode="base64", inf_nan_mode="null", fallback=plain)
    except PydanticSerializationError:
        # It refuses half a surrogate pair, which is what a token limit makes of an emoji, and deep nesting.
        return json.dumps(value, default=to_jsonable).encode()


def to_jsonable(value: Any) -> Any:
    """The plain Python value that :func:`to_json` writes.

    Raises:
        TypeError: there is a value in it that is no JSON.
    """
    try:
        return to_jsonable_python(value, bytes_mode="base64", inf_nan_mode="null", fallback=plain)
    except ValueError as error:
        raise TypeError(str(error)) from error


def plain(value: Any) -> Any:
    """What numpy and pandas have for JSON; MLflow's scoring server makes records of a data frame, too."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if type(value).__module__.partition(".")[0] == "pandas":
        return value.to_dict(orient="records")
    raise TypeError(
        f"a {type(value).__qualname__} is no JSON; return dicts, lists, texts, numbers, or a pydantic model"
    )

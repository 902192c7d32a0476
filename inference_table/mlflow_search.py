"""MLflow's filters and orders as conditions of DuckDB's SQL over the rows of an inference table.

MLflow's own parser takes a filter apart into conditions that must all hold; each becomes SQL over the columns
that :mod:`inference_table.mlflow_rows` gives. What is not known raises MLflow's INVALID_PARAMETER_VALUE: no
condition is left out. They mean what they mean for MLflow's SQL store on PostgreSQL (``LIKE`` minds case),
except that a value is compared as its user sees it: text of an attribute or a feedback without JSON's quotes.

Conditions on spans need the ``response``. Its raw text is searched first, which rules most rows out.

Private names of MLflow: ``SearchTraceUtils`` and its ``parse_search_filter_for_search_traces``,
``parse_order_by_for_search_traces`` and ``is_...``. Tested with 3.17.2.
"""

# mypy: disable-error-code="no-untyped-call"
# MLflow is typed in part only.

import base64
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from mlflow.exceptions import MlflowException
from mlflow.tracing.constant import TraceMetadataKey, TraceTagKey
from mlflow.utils.search_utils import SearchTraceUtils

from inference_table.mlflow_files import EARLIEST, EPOCH, LATEST
from inference_table.scan import literal

__all__ = [
    "AT",
    "DURATION",
    "SESSION",
    "SPANS",
    "Filter",
    "Order",
    "assessment_holds",
    "metadata",
    "page_start",
    "page_token",
    "pointer",
    "span_attribute",
    "tag",
    "trace_filter",
    "trace_order",
]

AT: Final = "epoch_us(request_time) // 1000"
"""In ms; ``epoch_ms`` of DuckDB rounds up what MLflow cuts off."""
SPANS: Final = "json_extract(response, '$.databricks_output.trace.data.spans[*]')"
"""The spans of a row, a list of JSON."""
DURATION: Final = "try_cast(trace_info->>'/execution_duration_ms' as bigint)"
"""Of the trace, in ms, as MLflow's list shows it: a request may take longer."""
ATTRIBUTES: Final = {
    "status": "trace_state",
    "request_id": "trace_id",
    "client_request_id": "databricks_request_id",
    "execution_time_ms": DURATION,
    "end_time_ms": f"({AT}) + coalesce({DURATION}, 0)",
}
NUMBERS: Final = frozenset({"timestamp_ms", "execution_time_ms", "end_time_ms"})
"""Attributes that are compared with numbers."""
FAR: Final = 10**15
"""A time in ms beyond all that Python knows."""
PLAIN: Final = re.compile(r"[ -~]*")
SPECIAL: Final = frozenset('"\\/')
"""What JSON may write in more than one way, of ASCII's printable characters."""
OPERATORS: Final = {"=": "=", "!=": "!=", "<": "<", "<=": "<=", ">": ">", ">=": ">=", "LIKE": "like"}


@dataclass
class Filter:
    """What rows must meet.

    Attributes:
        conditions: SQL, all of which must hold.
        spans: SQL over ``span``, of which one span of a row must meet all.
        candidates: SQL over ``response`` that holds wherever ``spans`` may.
        low, high: rows outside these times meet the conditions in no case.
    """

    conditions: list[str] = field(default_factory=list)
    spans: list[str] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)
    low: datetime = EARLIEST
    high: datetime = LATEST

    @property
    def sql(self) -> str:
        """One condition; a payload is read for rows that meet all the others."""
        found = " and ".join(f"({one})" for one in self.conditions) or "true"
        if not self.spans:
            return found
        exact = f"len(list_filter({SPANS}, lambda span: {' and '.join(self.spans)})) > 0"
        for candidate in self.candidates:
            exact = f"case when {candidate} then {exact} else false end"
        return f"case when {found} then {exact} else false end"


def invalid(message: str) -> MlflowException:
    error: MlflowException = MlflowException.invalid_parameter_value(message)
    return error


def pointer(*keys: str) -> str:
    """An SQL string: where in a JSON document, whatever the keys hold."""
    return literal("".join("/" + key.replace("~", "~0").replace("/", "~1") for key in keys))


def tag(key: str) -> str:
    """A tag of a trace: as it was set later, else as it was recorded."""
    name = literal(key)
    recorded = f"trace_info->>{pointer('tags', key)}"
    return f"case when list_contains(map_keys(set_tags), {name}) then set_tags[{name}] else {recorded} end"


def metadata(key: str) -> str:
    return f"(trace_info->>{pointer('trace_metadata', key)})"


SESSION: Final = metadata(TraceMetadataKey.TRACE_SESSION)


def trace_filter(filter_string: str | None) -> Filter:
    """The filter that a string of MLflow's filter language stands for.

    Raises:
        MlflowException: it is not valid, or asks for what is not known.
    """
    found = Filter()
    for clause in parsed(filter_string):
        add_clause(found, clause)
    return found


def parsed(filter_string: str | None) -> list[dict[str, Any]]:
    if not filter_string:
        return []
    try:
        filter_string.encode()
    except UnicodeEncodeError:
        raise invalid(f"Invalid filter {filter_string!r}: it is not valid Unicode") from None
    if "\0" in filter_string:
        raise invalid("Invalid filter: it holds a null character")
    clauses: list[dict[str, Any]] = SearchTraceUtils.parse_search_filter_for_search_traces(filter_string)
    return clauses


def add_clause(found: Filter, clause: dict[str, Any]) -> None:
    kind, key, value = clause["type"], clause["key"], clause["value"]
    operator = clause["comparator"].upper()
    if SearchTraceUtils.is_issue(kind, key, operator):
        found.conditions.append(assessment_holds("issue", value, []))
    elif SearchTraceUtils.is_span(kind, key, operator):
        add_span(found, key, operator, value)
    elif SearchTraceUtils.is_assessment(kind, key, operator):
        found.conditions.append(assessment_sql(kind, key, operator, value))
    elif SearchTraceUtils.is_tag(kind, operator):
        found.conditions.append(
            prompt_sql(operator, value) if is_prompt(key) else compared(tag(key), operator, value)
        )
    elif SearchTraceUtils.is_request_metadata(kind, operator):
        found.conditions.append(metadata_sql(key, operator, value))
    elif key in NUMBERS and isinstance(value, str):
        raise invalid(f"Invalid value {value!r} for '{key}': give a number, without quotes")
    elif key == "timestamp_ms":
        SearchTraceUtils.is_attribute(kind, key, operator)
        add_time(found, operator, value)
    elif SearchTraceUtils.is_attribute(kind, key, operator) and key in ATTRIBUTES:
        found.conditions.append(compared(ATTRIBUTES[key], operator, value))
    else:
        raise invalid(f"Invalid search expression '{kind}.{key}': an inference table has no such field")


def compared(sql: str, operator: str, value: Any) -> str:
    """A condition on one value; false where there is none, as in SQL."""
    if operator in ("IS NULL", "IS NOT NULL"):
        return f"({sql}) {operator.lower()}"
    if operator in ("IN", "NOT IN"):
        values = ", ".join(map(constant, value if isinstance(value, list | tuple) else [value]))
        return f"({sql}) {operator.lower()} ({values})"
    if operator == "ILIKE":
        return f"regexp_full_match({sql}, {literal(like_pattern(value))})"
    if operator == "RLIKE":
        checked_regex(value)
        return f"regexp_matches({sql}, {literal(value)})"
    if operator not in OPERATORS:
        raise invalid(f"Invalid comparator '{operator}': an inference table does not know it")
    return f"({sql}) {OPERATORS[operator]} {constant(value)}"


def constant(value: Any) -> str:
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return str(value)
    return number(value) if isinstance(value, int | float) else literal(str(value))


def number(value: float) -> str:
    """A number as SQL; one that is too large for a double is infinite."""
    try:
        found = float(value)
    except OverflowError:
        found = math.inf if value > 0 else -math.inf
    return f"'{found!r}'::double"


def like_pattern(value: str) -> str:
    """``ILIKE`` as a regular expression, which DuckDB finds four times as fast in long texts."""
    parts = (".*" if part == "%" else "." if part == "_" else re2(part) for part in re.split("([%_])", value))
    return f"(?is){''.join(parts)}"


def re2(text: str) -> str:
    return re.sub(r"([^A-Za-z0-9_\x80-\U0010ffff])", r"\\\1", text).replace("\\\n", r"\n")


def checked_regex(value: str) -> None:
    import duckdb

    try:
        with duckdb.connect() as connection:
            connection.execute("select regexp_matches('', ?)", [value])
    except duckdb.Error as error:
        raise invalid(f"Invalid regular expression {value!r}: {str(error).splitlines()[0]}") from None


def add_time(found: Filter, operator: str, value: float) -> None:
    """A condition on the time, as one that skips files and row groups."""
    if operator not in ("=", "!=", "<", "<=", ">", ">="):
        raise invalid(f"Invalid comparator '{operator}' for timestamp_ms")
    value = min(max(value, -FAR), FAR)
    first, after = moment(math.ceil(value)), moment(math.floor(value) + 1)
    bounds = {"=": (first, after), "!=": (first, after), ">": (after, LATEST), ">=": (first, LATEST)}
    low, high = bounds.get(operator, (EARLIEST, first if operator == "<" else after))
    within = f"request_time >= {timestamp(low)} and request_time < {timestamp(high)}"
    if operator == "!=":
        found.conditions.append(f"not ({within})")
        return
    found.conditions.append(within)
    found.low, found.high = max(found.low, low), min(found.high, high)


def moment(milliseconds: int) -> datetime:
    try:
        return min(max(EPOCH + timedelta(milliseconds=milliseconds), EARLIEST), LATEST)
    except OverflowError:
        return EARLIEST if milliseconds < 0 else LATEST


def timestamp(at: datetime) -> str:
    return f"timestamptz '{at.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}+00'"


def metadata_sql(key: str, operator: str, value: Any) -> str:
    recorded = compared(metadata(key), operator, value)
    if key == TraceMetadataKey.SOURCE_RUN and operator == "=":
        return f"coalesce({recorded}, false) or list_contains(run_ids, {literal(value)})"
    return recorded


def is_prompt(key: str) -> bool:
    return bool(key == TraceTagKey.LINKED_PROMPTS)


def prompt_sql(operator: str, value: str) -> str:
    if operator != "=" or value.count("/") != 1:
        raise invalid(f"Invalid prompt filter '{value}': give prompt = \"name/version\"")
    linked = (
        f"""try(from_json({tag(TraceTagKey.LINKED_PROMPTS)}, '[{{"name":"VARCHAR","version":"VARCHAR"}}]'))"""
    )
    names = f"list_transform({linked}, lambda prompt: prompt.name || '/' || prompt.version)"
    return f"list_contains({names}, {literal(value)})"


def assessment_sql(kind: str, name: str, operator: str, value: Any) -> str:
    if operator == "IS NULL":
        return f"not ({assessment_holds(kind, name, [])})"
    return assessment_holds(
        kind, name, [] if operator == "IS NOT NULL" else [value_sql(kind, operator, value)]
    )


def assessment_holds(kind: str, name: str, conditions: Sequence[str]) -> str:
    """Whether a row has a valid assessment of that kind and name, or its session as a whole has."""
    one = " and ".join(
        [
            f"json_exists(assessment, '/{kind}')",
            f"(assessment->>'/assessment_name') = {literal(name)}",
            "coalesce(assessment->>'/valid', 'true') = 'true'",
            *conditions,
        ]
    )
    of_session = f"assessment->>{pointer('metadata', TraceMetadataKey.TRACE_SESSION)}"
    return (
        f"len(list_filter(assessments, lambda assessment: {one})) > 0 or coalesce({SESSION} in "
        f"(select {of_session} from set_assessments where {one}), false)"
    )


def value_sql(kind: str, operator: str, value: Any) -> str:
    """A condition on the value of an ``assessment``; text counts with and without JSON's quotes."""
    path = f"coalesce(assessment->'/{kind}/value', try(json(assessment->>'/{kind}/serialized_value/value')))"
    text = f"json_extract_string({path}, '$')"
    if operator in SearchTraceUtils.NUMERIC_ASSESSMENT_COMPARATORS:
        is_numeric = f"json_type({path}) in ('DOUBLE', 'BIGINT', 'UBIGINT', 'HUGEINT')"
        return f"{is_numeric} and try_cast({text} as double) {operator} {number(value)}"
    if operator not in ("=", "!="):
        return f"({compared(text, operator, value)} or {compared(f'{path}::varchar', operator, value)})"
    same = f"{text} = {literal(value)} or {path}::varchar = {literal(value)}"
    if is_number(value):
        # Protocol buffers keep every number as a double: 5 comes back as 5.0.
        same += f" or try_cast({text} as double) = {float(value)!r}"
    return f"({same})" if operator == "=" else f"not coalesce({same}, false)"


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def add_span(found: Filter, key: str, operator: str, value: Any) -> None:
    if key == "content":
        # What a user types stands in inputs and outputs, which are JSON within JSON.
        forms = dict.fromkeys([value, escaped(value), escaped(escaped(value))])
        sql = " or ".join(compared("span::varchar", operator, form) for form in forms)
        candidates = [candidate(operator, form) for form in forms]
        if all(candidates):
            found.candidates.append("(" + " or ".join(map(str, candidates)) + ")")
        found.spans.append(f"({sql})")
        return
    if key.startswith("attributes."):
        attribute = SearchTraceUtils._trim_backticks(key.removeprefix("attributes."))
        found.spans.append(compared(span_attribute(attribute), operator, value))
        if is_plain(attribute):
            found.candidates.append(f"contains(response, {literal(attribute)})")
    else:
        found.spans.append(compared(SPAN_FIELDS[key], operator, value))
    if key != "status" and (one := candidate(operator, value)):
        found.candidates.append(one)


def span_attribute(key: str) -> str:
    """An attribute of ``span``: text as it is, anything else as JSON."""
    raw = f"(span->>{pointer('attributes', key)})"
    return f"case when json_valid({raw}) then json_extract_string({raw}, '$') else {raw} end"


SPAN_FIELDS: Final = {
    "name": "span->>'/name'",
    "type": f"coalesce({span_attribute('mlflow.spanType')}, 'UNKNOWN')",
    "status": "replace(coalesce(span->>'/status/code', 'UNSET'), 'STATUS_CODE_', '')",
}


def escaped(text: str) -> str:
    """Text as it stands within JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def candidate(operator: str, value: Any) -> str | None:
    """What holds of the text of every response that can meet the condition; None where nothing is sure."""
    if operator in ("IN", "="):
        values = value if isinstance(value, list | tuple) else [value]
        if not all(map(is_plain, values)) or "UNKNOWN" in values:
            return None
        return "(" + " or ".join(f"contains(response, {literal(one)})" for one in values) + ")"
    if operator not in ("LIKE", "ILIKE"):
        return None
    longest = max(re.split("[%_]", value), key=len)
    if not longest or not is_plain(longest) or longest.upper() in "UNKNOWN":
        return None
    if operator == "LIKE":
        return f"contains(response, {literal(longest)})"
    return f"regexp_matches(response, {literal(f'(?i){re2(longest)}')})"


def is_plain(text: str) -> bool:
    return PLAIN.fullmatch(text) is not None and SPECIAL.isdisjoint(text)


@dataclass(frozen=True)
class Order:
    """How rows are ordered: ``keys`` of SQL and whether they ascend; a null comes last either way.

    The last keys are the time, newest first, and the request's id, so that no two rows are equal: a page
    begins right after the last row of the one before, whatever was added meanwhile.
    """

    keys: list[tuple[str, bool]]

    @property
    def by_time(self) -> bool | None:
        """Whether the time alone decides, ascending (True) or descending (False); None where it doesn't."""
        return self.keys[0][1] if self.keys[0][0] == TIME else None

    @property
    def sql(self) -> str:
        return ", ".join(f"k{n} {'asc' if up else 'desc'} nulls last" for n, (_, up) in enumerate(self.keys))

    @property
    def columns(self) -> str:
        return ", ".join(f"{sql} as k{number}" for number, (sql, _) in enumerate(self.keys))

    def takes(self, values: Sequence[Any]) -> bool:
        """Whether these may be the keys of a row."""
        return len(values) == len(self.keys) and all(
            sql not in (TIME, ID) if value is None else type(value) is (int if sql in INTEGERS else str)
            for (sql, _), value in zip(self.keys, values, strict=True)
        )

    def after(self, values: Sequence[Any]) -> str:
        """The condition that a row comes after the one with these keys."""
        later, same = [], list[str]()
        for (sql, ascending), value in zip(self.keys, values, strict=True):
            if value is not None:
                beyond = f"({sql}) {'>' if ascending else '<'} {constant(value)} or ({sql}) is null"
                later.append(" and ".join([*same, f"({beyond})"]))
            same.append(f"({sql}) is not distinct from {'null' if value is None else constant(value)}")
        return " or ".join(f"({one})" for one in later)


TIME: Final = "epoch_us(request_time)"
ID: Final = "databricks_request_id"
NO_ORDER: Final = "0"
"""All traces of the table are in one experiment."""
INTEGERS: Final = frozenset({TIME, DURATION, ATTRIBUTES["end_time_ms"], NO_ORDER})
"""Order keys that are no texts."""


def trace_order(order_by: Sequence[str] | None) -> Order:
    """The order that MLflow's clauses ask for.

    Raises:
        MlflowException: one is not valid, or names a field twice.
    """
    keys, seen = [], set()
    for clause in order_by or ():
        kind, key, ascending = SearchTraceUtils.parse_order_by_for_search_traces(clause)
        if (kind, key) in seen:
            raise invalid(f"`order_by` contains duplicate fields: {list(order_by or ())}")
        seen.add((kind, key))
        keys.append((order_sql(kind, key), ascending))
    used = {sql for sql, _ in keys}
    return Order(keys + [one for one in ((TIME, False), (ID, False)) if one[0] not in used])


def order_sql(kind: str, key: str) -> str:
    if SearchTraceUtils.is_tag(kind, "="):
        return tag(key)
    if SearchTraceUtils.is_request_metadata(kind, "="):
        return metadata(key)
    if key == "timestamp_ms":
        return TIME
    if key == "experiment_id":
        return NO_ORDER
    if key in ATTRIBUTES:
        return ATTRIBUTES[key]
    raise invalid(f"Invalid order_by field '{kind}.{key}': an inference table has no such field")


def page_token(values: Sequence[Any]) -> str:
    """The token of the page that begins after the row with these order keys."""
    return base64.urlsafe_b64encode(json.dumps({"after": list(values)}).encode()).decode()


def page_start(token: str | None, order: Order) -> list[Any] | None:
    """The order keys of the last row before the page.

    Raises:
        MlflowException: the token is none of ours, or of another order.
    """
    if not token:
        return None
    try:
        values = json.loads(base64.urlsafe_b64decode(token))["after"]
    except (ValueError, TypeError, KeyError):
        values = None
    if not isinstance(values, list) or not order.takes(values):
        raise invalid(f"Invalid page token {token!r}: give the one that the page before came with")
    return values

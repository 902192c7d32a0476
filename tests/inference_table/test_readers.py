"""Other readers on a local table, by the snippets of their guide."""

import ast
from pathlib import Path

import pytest

from inference_table.settings import StorageSettings
from tests.inference_table.readers_guide import CLUSTER, EXPECTED, SNIPPETS, SQL_FRAME, fill, run

HERE = [
    (section, number)
    for section, snippets in SNIPPETS.items()
    for number in range(len(snippets))
    if section not in CLUSTER
]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("readers")
    settings = StorageSettings(uri=str(folder / "tracelake-data" / "payload"), spool_dir=folder / "spool")
    fill(settings)
    return settings.uri


@pytest.mark.parametrize(("section", "number"), HERE, ids=lambda part: str(part))
def test_a_reader_opens_the_table_by_the_guide(uri: str, section: str, number: int) -> None:
    """InferenceTable, Polars, QueryBuilder with pandas, and DuckDB count the same requests."""
    expected = SQL_FRAME if section.startswith("Python") else EXPECTED
    assert run(SNIPPETS[section][number], uri) == expected


def test_a_snippet_runs_where_the_table_is_by_default(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that the guide shows is the one that a server writes to unless it is told."""
    monkeypatch.chdir(Path(uri).parents[1])
    assert run(SNIPPETS["Polars"][0], "./tracelake-data/payload") == EXPECTED


def test_the_guide_names_what_it_imports() -> None:
    """Each section has snippets that compile, and those of clusters are there."""
    assert {section for section, _ in HERE} >= {"Polars", "DuckDB"} and {*CLUSTER} <= SNIPPETS.keys()
    for snippets in SNIPPETS.values():
        for snippet in snippets:
            ast.parse(snippet)

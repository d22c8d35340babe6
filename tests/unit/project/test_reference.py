"""docs/reference holds against the code: errors, metrics, request fields, routes, the token file."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from be_serve.core import errors
from be_serve.core.artifact import BaseModelRef, Manifest, PromptRef
from be_serve.core.names import FIELDS, PLACES
from be_serve.serving import metrics, middleware, routes

ROOT = Path(__file__).parents[3]
REFERENCE = ROOT / "docs" / "reference"


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


def rows_of(text: str) -> list[list[str]]:
    """The cells of all table rows, without their code marks."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not set(line) <= set("|-: ")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def all_errors() -> set[type[errors.BEError]]:
    found, queue = set(), [errors.BEError]
    while queue:
        error = queue.pop()
        found.add(error)
        queue += error.__subclasses__()
    return {error for error in found if error.__module__.startswith("be_serve.")}


def test_all_errors_of_the_package_stand_in_one_file():
    sources = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "be_serve").rglob("*.py")}
    with_codes = {name for name, text in sources.items() if re.search(r'^    code = "be_\w+"', text, re.MULTILINE)}
    assert with_codes == {"errors.py"}


def test_the_errors_page_has_each_error_once_with_its_status_and_code():
    told = [tuple(row[:3]) for row in rows_of(page("errors.md")) if len(row) == 5 and row[2].startswith("be_")]
    known = {(str(error.http_status), error.__name__, error.code) for error in all_errors()}
    assert sorted(told) == sorted(known)


def test_every_error_says_what_to_do():
    for row in rows_of(page("errors.md")):
        if len(row) == 5:
            assert all(row[3:]), row


def test_the_metrics_page_has_each_metric_with_its_type_and_labels(monkeypatch):
    made = {}
    for collector in vars(_collectors(monkeypatch)).values():
        kind = type(collector).__name__.lower()
        name = collector._name + ("_total" if kind == "counter" else "")
        made[name] = (kind, ", ".join(collector._labelnames))
    told = {row[0]: (row[1], row[2]) for row in rows_of(page("metrics.md")) if row[0].startswith("be_serve_")}
    assert told == made


def _collectors(monkeypatch) -> metrics.Metrics:
    """The plugin's collectors, in a registry of their own: the process's may hold them already."""
    registry = CollectorRegistry()
    for name in ("Counter", "Gauge", "Histogram"):
        kind = getattr(metrics, name)
        monkeypatch.setattr(metrics, name, partial(kind, registry=registry))
    return metrics.Metrics()


def test_the_metrics_page_has_each_way_to_name_a_token():
    told = {row[0] for row in rows_of(page("metrics.md").split("## Values of `how`", 1)[1]) if len(row) == 2}
    assert told >= {"be_id", "alias", "match", "plain", "fallback", "match_missed"}


@pytest.mark.parametrize("field", FIELDS)
def test_the_http_page_has_each_field_in_a_row(field):
    assert [row for row in rows_of(page("http.md")) if row[0] == field]


@pytest.mark.parametrize("name", [*PLACES, *middleware.SUPPORTED, *middleware.TOKENLESS])
def test_the_http_page_names_each_place_and_endpoint(name):
    assert f"`{name}`" in page("http.md")


@pytest.mark.parametrize("header", ["x-be-id", "x-be-digest", "x-be-match", "x-be-fallback"])
def test_the_http_page_has_each_header(header):
    assert [row for row in rows_of(page("http.md")) if row[0] == header]
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "be_serve" / "serving").glob("*.py")]
    assert {name for text in sources for name in re.findall(r'"(x-be-[a-z]+)"', text)} == {
        "x-be-id",
        "x-be-digest",
        "x-be-match",
        "x-be-fallback",
    }


def test_the_http_page_has_each_admin_route_with_its_parameters():
    text = page("http.md")
    for route in routes.router.routes:
        for method in route.methods:
            assert f"`{method} {route.path.replace('{be_id}', '{id}')}`" in text, route.path
        for parameter in route.dependant.query_params:
            assert f"`{parameter.alias}`" in text, parameter.alias


def test_the_token_file_page_has_each_field_of_the_manifest():
    told = {row[0] for row in rows_of(page("token-file.md"))}
    fields = {*Manifest.model_fields} - {"base_model", "prompt"}
    fields |= {f"base_model.{name}" for name in BaseModelRef.model_fields}
    fields |= {f"prompt.{name}" for name in PromptRef.model_fields}
    assert not fields - told

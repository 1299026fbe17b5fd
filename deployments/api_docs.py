"""The page `/docs`: every call of the API on one static page, made from its OpenAPI description.

FastAPI's own pages load their scripts from elsewhere; a control host need not reach the internet.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema

CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 90%; }
pre { background: #8881; padding: .8rem; overflow-x: auto; }
section { border-top: 1px solid #8886; margin-top: 2rem; }
td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0; }
"""


def describe(
    app: FastAPI,
    *,
    asked: Iterable[type[BaseModel]],
    answered: Iterable[type[BaseModel]],
    open_paths: Collection[str],
) -> dict[str, Any]:
    """The OpenAPI description of the application's routes, with the models of bodies and answers.

    The models' schemas are pydantic's own: FastAPI drops every null from the examples.
    """
    openapi = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas: dict[str, Any] = openapi["components"]["schemas"]
    schemas |= _schemas(asked, "validation") | _schemas(answered, "serialization")
    openapi["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path, calls in openapi["paths"].items():
        for call in calls.values():
            call["security"] = [] if path in open_paths else [{"bearer": []}]
            _drop_foreign_refusal(call)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return openapi


def _schemas(models: Iterable[type[BaseModel]], mode: JsonSchemaMode) -> dict[str, Any]:
    _, described = models_json_schema(
        [(model, mode) for model in models], ref_template="#/components/schemas/{model}"
    )
    return dict(described["$defs"])


def _drop_foreign_refusal(call: dict[str, Any]) -> None:
    """FastAPI announces its own form of 422, which this API never sends."""
    if "HTTPValidationError" in json.dumps(call["responses"].get("422", {})):
        del call["responses"]["422"]


def render(openapi: Mapping[str, Any]) -> str:
    """The page, as HTML."""
    info = openapi["info"]
    calls = "".join(
        _call(method, path, call, openapi)
        for path, methods in openapi["paths"].items()
        for method, call in methods.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        f"<style>{_STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"{_paragraphs(info['description'])}"
        '<p>As a file for tools: <a href="openapi.json">openapi.json</a>.</p>'
        f"{calls}</html>"
    )


def _call(method: str, path: str, call: Mapping[str, Any], openapi: Mapping[str, Any]) -> str:
    body = call.get("requestBody", {}).get("content", {}).get("application/json")
    asked = f"<h3>Body</h3>{_example_of(body, openapi)}" if body else ""
    answers = "".join(_answer(status, told, openapi) for status, told in call["responses"].items())
    return (
        f"<section><h2><code>{method.upper()} {escape(path)}</code></h2>"
        f"{_paragraphs(call['description'])}{_parameters(call.get('parameters', []))}{asked}"
        f"<h3>Answers</h3>{answers}</section>"
    )


def _parameters(parameters: list[Mapping[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(found['name'])}</code></td><td>{escape(found['in'])}</td>"
        f"<td>{escape(found.get('description') or '')}</td></tr>"
        for found in parameters
    )
    return f"<h3>Parameters</h3><table>{rows}</table>" if rows else ""


def _answer(status: str, told: Mapping[str, Any], openapi: Mapping[str, Any]) -> str:
    content = told.get("content", {}).get("application/json")
    return f"<p><b>{escape(status)}</b> {escape(told['description'])}</p>" + (
        _example_of(content, openapi) if content else ""
    )


def _example_of(content: Mapping[str, Any], openapi: Mapping[str, Any]) -> str:
    """The call's own example, else those of the model."""
    name = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
    of_the_model = openapi["components"]["schemas"].get(name, {}).get("examples", [])
    shown = [content["example"]] if "example" in content else of_the_model
    return "".join(f"<pre>{escape(json.dumps(found, indent=2))}</pre>" for found in shown)


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(part)}</p>" for part in text.split("\n\n"))

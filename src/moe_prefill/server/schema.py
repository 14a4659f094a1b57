"""The OpenAPI description: bodies are read by hand (one parse, off the event loop), so they are described by hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from .endpoints import Endpoint

_REF = "#/components/schemas/{model}"
_ERRORS = {
    400: "The request is not understood, or asks for what this server does not do.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    408: "The body did not arrive in time.",
    413: "The body or its work is larger than the server takes.",
    415: "The body is compressed.",
    422: "Too many entries in one request; TEI's endpoints: not valid.",
    429: "The queue is full; Retry-After says when to try again.",
    503: "The server starts, drains or has lost its engine; Retry-After says when to try again.",
}
_ERROR = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "error": {
                    "type": "object",
                    "properties": {
                        "message": {"type": "string"},
                        "type": {"type": "string"},
                        "param": {"type": ["string", "null"]},
                        "code": {"type": "string"},
                    },
                    "required": ["message", "type", "code"],
                }
            },
            "required": ["error"],
        },
        {
            "type": "object",
            "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
            "required": ["error", "error_type"],
        },
    ]
}


def describe(app: FastAPI, endpoints: Sequence[Endpoint]) -> None:
    """Make ``app.openapi`` tell the bodies, errors and examples of the endpoints."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version="1", routes=app.routes)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas["Error"] = _ERROR
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{}, {"key": []}]
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    _add_path_parameters(path, operation)
            for endpoint in endpoints:
                for path in endpoint.paths:
                    document["paths"][path] = {"post": _operation(path, endpoint, schemas)}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_path_parameters(path: str, operation: dict[str, Any]) -> None:
    """Those that a route reads from the path without naming them as arguments."""
    named = operation.setdefault("parameters", [])
    known = {parameter["name"] for parameter in named}
    schema = {"type": "string"}
    for name in re.findall(r"{(\w+)}", path):
        if name not in known:
            named.append({"name": name, "in": "path", "required": True, "schema": schema})


def _operation(path: str, endpoint: Endpoint, schemas: dict[str, Any]) -> dict[str, Any]:
    bodies = [_schema(form.body, schemas) for form in endpoint.forms]
    examples = {form.body.__name__: {"value": dict(form.example)} for form in endpoint.forms}
    schema = bodies[0] if len(bodies) == 1 else {"anyOf": bodies}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        "summary": endpoint.summary,
        "operationId": path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": examples}}},
        "responses": {
            "200": {"description": "The answer.", "content": {"application/json": {"schema": {}}}},
            **{str(status): {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }


def _schema(body: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    schema = body.model_json_schema(ref_template=_REF)
    schemas.update(schema.pop("$defs", {}))
    schemas[body.__name__] = schema
    return {"$ref": _REF.format(model=body.__name__)}

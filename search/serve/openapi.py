"""The JSON API in words that programs read: OpenAPI 3.1, made from the types themselves."""

from functools import cache
from typing import Any

import pydantic

import gradindex
from gradindex.results import SCHEMA, Comparison, Result
from search.serve.request import LONGEST_TEXT, SearchRequest

_REFERENCE = "#/components/schemas/{model}"


@cache
def openapi() -> dict[str, Any]:
    """The description of every route under /api, and of /healthz."""
    schemas = _schemas()
    job = {"$ref": "#/components/schemas/Job"}
    result_schema = {"oneOf": [{"$ref": "#/components/schemas/Result"},
                               {"$ref": "#/components/schemas/Comparison"}]}
    texts = {"type": "object", "additionalProperties": False, "properties": {
        name: {"type": "string", "maxLength": LONGEST_TEXT} for name in ("prompt", "completion")}}
    problem = {"400": "not JSON", "401": "the token is missing or wrong",
               "403": "another site, or another name of this server",
               "404": "no such result or sequence", "405": "another method",
               "408": "the body did not come in time", "413": "too large",
               "415": "not sent as JSON", "422": "a query or control that can't be used",
               "500": "a failure, with its number in the server's log",
               "503": "too many searches wait, this one was given up (nobody asked for a minute), "
                      "or the model can't be loaded; Retry-After says when to ask again"}
    # every route may answer with any of them: the guard stands before all
    problems = {code: _answer(why, {"$ref": "#/components/schemas/Problem"})
                for code, why in problem.items()}
    name = _parameter("job", {"type": "string"})

    def route(summary: str, code: str, answer: Any, body: Any = None, *parameters: Any) -> Any:
        about: dict[str, Any] = {"summary": summary, "parameters": list(parameters),
                                 "responses": {code: _answer(summary, answer), **problems}}
        if body is not None:
            about["requestBody"] = {"required": True,
                                    "content": {"application/json": {"schema": body}}}
        return about

    result = route("The result; 202 and how far it is while the search runs", "200",
                   result_schema, None, name)
    result["responses"]["202"] = _answer("The search runs", job)
    events = route("The stages as server-sent events", "200", {}, None, name)
    event = {"type": "object", "required": ["event", "data"], "properties": {
        "event": {"enum": ["stage", "end"]},
        "data": {"type": "string", "contentMediaType": "application/json"}}}
    # OpenAPI has no word for a stream: this describes one event of it
    events["responses"]["200"]["content"] = {"text/event-stream": {"schema": event}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gradindex", "version": gradindex.__version__,
                 "description": "Which training sequences made this model say that?"},
        "components": {"schemas": schemas},
        "paths": {
            "/api/search": {"post": route(
                "Start a search, or join the same one", "202", job,
                {"$ref": "#/components/schemas/Asked"})},
            "/api/tokens": {"post": route(
                "The tokens of a completion", "200", {
                    "type": "object", "required": ["tokens"],
                    "properties": {"tokens": {"type": "array", "items": {"type": "string"}}}},
                texts)},
            "/api/result/{job}": {"get": result},
            "/api/result/{job}/events": {"get": events},
            "/api/result/{job}/stop": {"post": route(
                "Conclude from what is exact by now", "202", job, {"type": "object"}, name)},
            "/api/sequence/{id}": {"get": route(
                "A sequence of the index", "200", {"$ref": "#/components/schemas/Sequence"}, None,
                _parameter("id", {"type": "integer", "minimum": 0}))},
            "/healthz": {"get": route("Whether searches are answered", "200", {
                "type": "object", "required": ["status", "ready", "queued"], "properties": {
                    "status": {"enum": ["ok", "failed"]}, "ready": {"type": "boolean"},
                    "error": {"type": "string"}, "queued": {"type": "integer"}}})},
        },
    }


def _schemas() -> dict[str, Any]:
    kinds: list[tuple[Any, Any, Any]] = [
        (kind, "serialization", pydantic.TypeAdapter(kind)) for kind in (Result, Comparison)]
    _, definitions = pydantic.TypeAdapter.json_schemas(kinds, ref_template=_REFERENCE)
    schemas: dict[str, Any] = definitions["$defs"]
    # what `to_dict` adds, which no dataclass has
    schemas["Result"]["properties"] |= {"schema": {"const": SCHEMA}, "units": {"type": "string"}}
    schemas["Comparison"]["properties"]["schema"] = {"const": SCHEMA}
    schemas["Query"]["properties"] |= {"scored": {"type": "integer"}, "log_p": {"type": "number"}}
    schemas["Asked"] = SearchRequest.model_json_schema(ref_template=_REFERENCE)
    schemas["Problem"] = {"type": "object", "required": ["error"],
                          "properties": {"error": {"type": "string"}}}
    schemas["Job"] = {"type": "object", "required": ["id", "state", "result", "events"],
                      "properties": {
        "id": {"type": "string"}, "stage": {"type": "string"}, "done": {"type": "integer"},
        "state": {"enum": ["waiting", "running", "done", "failed"]},
        "total": {"type": "integer"}, "url": {"type": "string"}, "result": {"type": "string"},
        "events": {"type": "string"}}}
    numbers = {"type": "array", "items": {"type": "integer"}}
    schemas["Sequence"] = {"type": "object", "required": ["id", "text", "tokens", "parts"],
                           "properties": {
        "id": {"type": "integer"}, "text": {"type": "string"}, "token_ids": numbers,
        "tokens": {"type": "array", "items": {"type": "string"}}, "duplicates": numbers,
        "scored": {"type": "array", "items": {"type": "boolean"}},
        "border": {"type": ["integer", "null"],
                   "description": "at which token the second of two texts begins"},
        "label": {"type": ["string", "null"]},
        "parts": {"type": "array", "items": {"type": "object"}}}}
    return schemas


def _answer(why: str, schema: Any) -> dict[str, Any]:
    return {"description": why, "content": {"application/json": {"schema": schema}}}


def _parameter(name: str, schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}

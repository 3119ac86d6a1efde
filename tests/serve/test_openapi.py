"""Any request at all: an answer of the published schema."""

import json
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi import checks

from search.serve import guard
from search.serve.openapi import openapi
from support.server import QUERY, Running
from support.waiting import HANG

HELD = [checks.status_code_conformance, checks.content_type_conformance,
        checks.response_schema_conformance, checks.response_headers_conformance,
        checks.negative_data_rejection]


@pytest.fixture(scope="module")
def schema() -> Any:
    return schemathesis.openapi.from_dict(openapi(), config=schemathesis.Config.from_dict({
        "checks": {"negative_data_rejection": {"expected-statuses": ["4XX"]}}}))


def test_answers_are_those_of_the_schema(running: Running, schema: Any) -> None:
    assert running.ask("GET", "/api/schema").json == json.loads(json.dumps(openapi()))
    address = f"http://127.0.0.1:{running.port}"
    for more in ({}, {"compare": " a river."}, {"rescore": False}, {"opponents": True, "k": 2,
                 "normalize": "relatif", "candidates": "both"}):
        job = running.ask("POST", "/api/search", body={**QUERY, **more}).json["id"]
        assert running.wait(job).status == 200
        for path in ("/api/result/{job}", "/api/result/{job}/events"):
            case = schema[path]["GET"].Case(path_parameters={"job": job})
            case.call_and_validate(base_url=address, checks=HELD)
    for path, method, sent in (
        ("/api/search", "POST", {"body": QUERY}), ("/api/tokens", "POST", {"body": QUERY}),
        ("/api/result/{job}/stop", "POST", {"path_parameters": {"job": job}, "body": {}}),
        ("/api/sequence/{id}", "GET", {"path_parameters": {"id": 9}}), ("/healthz", "GET", {}),
    ):
        if "body" in sent:
            sent["media_type"] = "application/json"
        case = schema[path][method].Case(**sent)
        assert case.call_and_validate(base_url=address, checks=HELD).status_code < 300


@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_any_request_gets_an_answer_of_the_schema(
    mode: str, running: Running, schema: Any,
) -> None:
    address, count = f"http://127.0.0.1:{running.port}", 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "NEGATIVE" and operation.path not in (
                "/api/search", "/api/tokens", "/api/sequence/{id}"):
            continue  # any text is a job's id, any object a body of stop

        @hypothesis.seed(0)
        @hypothesis.settings(max_examples=60, deadline=None, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(case=operation.as_strategy(
            generation_mode=schemathesis.GenerationMode[mode]))
        def answer(case: Any) -> None:
            nonlocal count
            count += 1
            response = case.call(base_url=address, timeout=HANG)
            assert response.status_code < 500 or (
                response.status_code == 503 and "wait already" in response.text), response.text
            case.validate_response(response, checks=HELD)
            for name, value in guard.HEADERS:
                assert response.headers[name.decode()] == [value.decode()]

        answer()
    assert count > 150
    assert running.ask("GET", "/healthz").status == 200

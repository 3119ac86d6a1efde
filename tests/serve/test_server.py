"""The pages and the API as strangers find them: every route, what is refused, what is answered."""

import io
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from gradindex.results import Result
from search.engine import Searcher
from search.serve import pages, server
from search.show import html
from support.server import OWN, PAGE, QUERY, Running, same


def test_forms_that_cant_be_used_are_told_on_the_page(running: Running) -> None:
    for more, said in (
        ("&k=999", "k: "), ("&k=150", "“hits” 150: expected 1 to"), ("&k=x", "k: "),
        ("&shortlist=" + "9" * 5000, ""),
        ("&shortlist=" + "9" * 18, "shortlist"), ("&shortlist=٣x", "shortlist"),
        ("&unknown=1", "unknown"), ("&damping=-1", "damping"), ("&damping=nan", "damping"),
        ("&score_on=9999", "the completion has"), ("&score_on=x", "“scored tokens” 'x': exp"),
        ("&scored_of=" + quote(QUERY["completion"]), "no token is chosen"),
        ("&modules=nonsense", "matches none"), ("&recall=2", "recall"),
        ("&versus=" + quote(QUERY["completion"]), "is the completion itself"),
        ("&compare=%20plum&rescore=false", "a comparison is of two completions"),
        ("&compare=%20plum&versus=%20fig", "a comparison is of two completions"),
        ("&%00=%1b", ""), ("&k=%ed%a0%80", "k: "),
    ):
        page = running.ask("GET", PAGE + quote(more, safe="&=%"), OWN)
        assert said in page.text.replace("&#39;", "'"), more
        assert page.status == 422, more
        assert 'role="alert"' in page.text


def test_static_files_are_those_of_a_table(running: Running) -> None:
    for name in pages.STATIC:
        found = running.ask("GET", f"/static/{name}")
        assert found.status == 200
        own = Path(html.__file__).with_name("page").joinpath(name).read_bytes()
        assert found.body.startswith(own)  # the page's style and that of its plots are sent as one
    secret = Path(server.__file__).read_bytes()[:80]
    for name in (
        "", ".", "..", "../server.py", "..%2fserver.py", "%2e%2e/server.py", "%2e%2e%2fserver.py",
        "..%5cserver.py", "..\\server.py", "....//server.py", "%252e%252e%252fserver.py",
        "..%c0%afserver.py", "%00", "style.css%00", "style.css%00.js", "style.css/", "style.css/..",
        "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "~root", "base.html", "search.html",
        "STYLE.CSS", "style.css%20", "style.css.", "style.css::$DATA", "CON", "__init__.py",
        "page.js%3fx", "%EF%BC%8E%EF%BC%8E/server.py", "../" * 30 + "etc/passwd", "a" * 5000,
    ):
        found = running.ask("GET", f"/static/{name}")
        assert found.status == 404, name
        assert secret not in found.body and b"root:" not in found.body


def test_unknown_ids(running: Running) -> None:
    for job in ("0", "x" * 3000, "%00", "..", "%2e%2e%2f", "-1", "ffffffffffffffff", "%ff", "a.b"):
        for route in ("/api/result/{}", "/api/result/{}/events", "/download/{}.json",
                      "/download/{}", "/map/{}/0"):
            assert running.ask("GET", route.format(job)).status == 404, (route, job)
        assert running.ask("POST", f"/api/result/{job}/stop", body={}).status == 404
    for one in ("-1", "1000000", "9" * 18, "9" * 5000, "x", "1.5", "%D9%A3", "0x1", "1e2", "%00",
                "+1", "%201"):
        assert running.ask("GET", f"/api/sequence/{one}").status == 404, one
    job = running.ask("POST", "/api/search", body=QUERY).json["id"]
    result = running.wait(job).json
    assert running.ask("GET", f"/map/{job}/{result['hits'][0]['id']}").status == 200
    for hit in ("-1", "9" * 5000, "1000000", "x", "%D9%A3", "1.5"):
        assert running.ask("GET", f"/map/{job}/{hit}").status == 404, hit
    for form in ("", ".", ".exe", ".json.json", ".JSON", ".jsonl"):
        assert running.ask("GET", f"/download/{job}{form}").status == 404, form


# ---- what is answered


def test_results_are_those_of_python(running: Running, searcher: Searcher) -> None:
    for more in ({}, {"k": 3, "opponents": True}, {"rescore": False}, {"damping": 0.01},
                 {"modules": "1", "normalize": "cosine"}, {"candidates": "both", "shortlist": 5,
                 "k": 4}, {"recall": 0.5}, {"versus": " a river."}, {"score_on": "0-1"},
                 {"shortlist": "all"}, {"modules": "dense_4h.*h$"}):
        asked: dict[str, Any] = {**QUERY, **more}
        same(running.search(asked), searcher.search(**asked))
    same(running.search({"prompt": "The fig"}), searcher.search(prompt="The fig"))
    both = running.search({**QUERY, "compare": " a river."})
    expected = searcher.compare(QUERY["prompt"], [QUERY["completion"], " a river."]).to_dict()
    for one in (*both["results"], *expected["results"]):
        del one["seconds"]
    assert both == json.loads(json.dumps(expected))


def test_the_same_search_by_page_and_api_is_one(running: Running) -> None:
    job = running.ask("POST", "/api/search", body={**QUERY, "k": 7}).json
    page = running.ask("GET", PAGE + "&k=7", OWN)
    assert f'data-job="{job["id"]}"' in page.text
    running.wait(job["id"])
    page = running.ask("GET", job["url"], OWN)
    assert 'data-state="done"' in page.text and page.text.count("<article") == 7


def test_downloads(running: Running, searcher: Searcher) -> None:
    job = running.ask("POST", "/api/search", body=QUERY).json["id"]
    found = running.wait(job).json
    ids = [hit["id"] for hit in found["hits"]]
    files = {}
    for form, kind in pages.TYPES.items():
        answer = running.ask("GET", f"/download/{job}.{form}")
        assert answer.status == 200 and answer.headers["content-type"] == kind
        assert answer.headers["content-disposition"] == \
            f'attachment; filename="gradindex-{job}.{form}"'
        files[form] = answer.body
    result = Result.from_json(files["json"].decode())
    same(found | {"seconds": found["seconds"]}, result)
    table = pyarrow.csv.read_csv(io.BytesIO(files["csv"]),
                                 parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    assert table["id"].to_pylist() == ids
    np.testing.assert_allclose(table["influence"].to_numpy(), [hit.influence for hit in result],
                               rtol=1e-12)
    rows = pyarrow.parquet.read_table(io.BytesIO(files["parquet"]))
    assert rows["id"].to_pylist() == ids
    assert rows["token_influence"].to_pylist() == [hit.token_influence for hit in result]
    document = files["html"].decode()
    assert document.startswith("<!doctype html>") and "Content-Security-Policy" in document
    assert not re.findall(r'(?:src|href)="(?!#|data:)', document)
    compared = running.ask("POST", "/api/search", body={**QUERY, "compare": " a river."}).json["id"]
    assert set(running.wait(compared).json) == {"schema", "results", "influence"}
    assert running.ask("GET", f"/download/{compared}.json").json["schema"]
    assert running.ask("GET", f"/download/{compared}.csv").status == 404


def test_sequences_and_tokens(running: Running, searcher: Searcher) -> None:
    for place in (0, 9, len(searcher) - 1):
        record, = searcher.snapshot.records([place])
        found = running.ask("GET", f"/api/sequence/{record.id}").json
        assert found["token_ids"] == record.tokens.tolist()
        assert found["scored"] == record.scored.tolist()
        assert "".join(found["tokens"]) == found["text"]
        assert found["duplicates"] == searcher.snapshot.copies(place)
    tokens = running.ask("POST", "/api/tokens", body=QUERY).json["tokens"]
    assert "".join(tokens) == QUERY["completion"]
    assert running.ask("POST", "/api/tokens", body={"prompt": "The fig"}).json == {"tokens": []}


def test_pages_while_searches_run(running: Running) -> None:
    """Thirty clients on every kind of route beside the worker: nothing fails, nothing is mixed."""
    def ask(number: int) -> None:
        query = {**QUERY, "k": 1 + number % 9}
        page = running.ask("GET", "/search?" + urlencode(query), OWN)
        assert page.status in (200, 503)
        tokens = running.ask("POST", "/api/tokens", body=QUERY).json["tokens"]
        assert "".join(tokens) == QUERY["completion"]
        assert running.ask("GET", f"/api/sequence/{number % 40}").json["id"] == number % 40
        job = running.ask("POST", "/api/search", body=query)
        if job.status == 202:
            assert len(running.wait(job.json["id"]).json["hits"]) == query["k"]

    with ThreadPoolExecutor(30) as pool:
        list(pool.map(ask, range(60)))

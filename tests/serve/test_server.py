"""The server as strangers find it: every route, what is refused and what is answered."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import hypothesis
import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import safetensors.torch
import schemathesis
from schemathesis.specs.openapi import checks

import gradindex
from gradindex.errors import InputError
from gradindex.results import Result
from search.engine import Searcher
from search.serve import connections, guard, jobs, listening, server
from search.serve.schema import openapi
from search.show import html
from support.server import JSON, Running, Unhurried
from support.waiting import HANG, heed_interrupts, until

QUERY = {"prompt": "The apple number 3 grows by", "completion": " the garden."}
OWN = {"Sec-Fetch-Site": "none"}  # typed into the address bar
PAGE = "/search?" + urlencode(QUERY)
ROUTES = ("/", PAGE, "/map/0/0", "/download/0.json", "/static/style.css", "/static/nothing",
          "/healthz", "/api/schema", "/api/result/0", "/api/result/0/events", "/api/sequence/0",
          "/nothing")
@pytest.fixture(scope="module")
def searcher(index_folder: Path) -> Searcher:
    return gradindex.open(index_folder)


@pytest.fixture(scope="module")
def running(searcher: Searcher) -> Iterator[Running]:
    """One for all tests that leave it as it was."""
    one = Running(searcher)
    yield one
    one.stop()


@pytest.fixture
def start(searcher: Searcher) -> Iterator[Callable[..., Running]]:
    """Starts further ones with other settings."""
    started: list[Running] = []

    def make(own: Searcher | None = None, **settings: Any) -> Running:
        started.append(Running(own or searcher, **settings))
        return started[-1]

    yield make
    for one in started:
        one.stop()


# ---- who may ask


def test_host_must_be_a_name_of_this_server_on_every_route(running: Running) -> None:
    port = running.port
    right = [f"127.0.0.1:{port}", f"localhost:{port}", f"LocalHost:{port}", f"[::1]:{port}"]
    wrong = [
        "127.0.0.1", "localhost", "[::1]", f"localhost.:{port}", f"127.0.0.1:{port + 1}",
        "localhost:80", f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}",
        f"localhost.evil.example:{port}", f"evil-localhost:{port}", f"127.0.0.2:{port}",
        f"0.0.0.0:{port}", f"[::]:{port}", f"::1:{port}", f"[0:0:0:0:0:0:0:1]:{port}",
        f"[::ffff:127.0.0.1]:{port}", f"2130706433:{port}", f"0x7f.1:{port}", f"127.1:{port}",
        f"user@localhost:{port}", f"localhost:{port}@evil.example", f"localhost:{port},evil",
        f"localhost:0{port}", f"localhost:{port}/", f"localhost:{port} x", f"{port}", ":", "null",
        "\xe9vil.example", f"http://localhost:{port}",
    ]
    for route in ROUTES:
        for host in right:
            assert running.ask("GET", route, host=host).status != 403, (route, host)
        for host in wrong:
            assert running.ask("GET", route, OWN, host=host).status == 403, (route, host)
    for host in wrong:
        for route in ("/api/search", "/api/tokens", "/api/result/0/stop"):
            assert running.ask("POST", route, body=QUERY, host=host).status == 403


def test_host_must_come_once(running: Running) -> None:
    own = f"Host: 127.0.0.1:{running.port}\r\n"
    for route in ROUTES:
        head = f"GET {route} HTTP/1.1\r\n"
        ends = "Connection: close\r\n\r\n"
        for hosts, status in (("", 400), (own + own, 400), (own + "Host: evil.example\r\n", 400),
                              ("Host:\r\n", 403)):
            assert running.raw((head + hosts + ends).encode()).status == status, (route, hosts)
        # HTTP/1.0 needs none, so we do
        assert running.raw(f"GET {route} HTTP/1.0\r\n\r\n".encode()).status == 403
    other = f"GET http://evil.example/healthz HTTP/1.1\r\n{own}Connection: close\r\n\r\n"
    assert running.raw(other.encode()).status == 404  # a path like any other, to no proxy


def test_origin_where_sent_must_be_this_server(running: Running) -> None:
    port = running.port
    right = [f"http://127.0.0.1:{port}", f"http://localhost:{port}", f"http://[::1]:{port}",
             f"https://localhost:{port}"]
    wrong = ["null", "", "http://localhost", f"http://localhost:{port + 1}", "http://evil.example",
             f"http://evil.example:{port}", f"http://localhost:{port}.evil.example",
             f"http://localhost:{port}/", f"file://localhost:{port}", f"localhost:{port}",
             f"http://localhost:{port} http://evil.example", "chrome-extension://abc"]
    for origin in right:
        assert running.ask("POST", "/api/tokens", {"Origin": origin}, QUERY).status == 200
        assert running.ask("GET", "/", {"Origin": origin}).status == 200
    for origin in wrong:
        for route in ROUTES:
            assert running.ask("GET", route, {"Origin": origin}).status == 403, (route, origin)
        for route in ("/api/search", "/api/tokens", "/api/result/0/stop"):
            assert running.ask("POST", route, {"Origin": origin}, QUERY).status == 403


def test_other_sites_cant_use_the_api(running: Running) -> None:
    for site, status in (("same-origin", 200), ("none", 200), ("same-site", 403),
                         ("cross-site", 403), ("anything", 403), ("", 403)):
        sent = {"Sec-Fetch-Site": site}
        assert running.ask("POST", "/api/tokens", sent, QUERY).status == status
        assert running.ask("GET", "/api/schema", sent).status == status
        assert running.ask("GET", "/api/sequence/0", sent).status == status
        assert running.ask("GET", "/", sent).status == 200  # a link may lead here
    twice = f"GET /api/schema HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\nConnection: close\r\n" \
            "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Site: cross-site\r\n\r\n"
    assert running.raw(twice.encode()).status == 403


def test_a_search_page_opened_from_elsewhere_waits_for_a_click(
    start: Callable[..., Running],
) -> None:
    running = start(work=False)

    def queued() -> int:
        return int(running.ask("GET", "/healthz").json["queued"])

    elsewhere: list[dict[str, str]] = [
        {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {},
        {"Referer": "http://evil.example/"},
        {"Referer": f"http://127.0.0.1:{running.port}.evil.example/"},
        {"Sec-Fetch-Site": "cross-site", "Referer": f"http://127.0.0.1:{running.port}/"},
    ]
    for headers in elsewhere:
        page = running.ask("GET", PAGE, headers)
        assert page.status == 200 and "Search now" in page.text and "data-job" not in page.text
        assert QUERY["prompt"] in page.text
        assert queued() == 0
    for number, headers in enumerate((OWN, {"Sec-Fetch-Site": "same-origin"},
                                      {"Referer": f"http://localhost:{running.port}/"}), 1):
        page = running.ask("GET", PAGE + f"&k={number}", headers)
        assert "data-job" in page.text and "Search now" not in page.text
        assert queued() == number


TOKEN = "3c0Vt2mQy8HkZrWn5pLxAe"


def test_a_token_is_asked_of_everybody(start: Callable[..., Running]) -> None:
    running = start(token=TOKEN, work=False)

    def basic(text: str) -> str:
        return "Basic " + b64encode(text.encode()).decode()

    right = [basic(f"me:{TOKEN}"), basic(f":{TOKEN}"), f"Bearer {TOKEN}", f"bearer {TOKEN}",
             "bAsIc " + b64encode(f"ü:{TOKEN}".encode()).decode()]
    wrong = [TOKEN, "", "Basic", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
             f"Bearer {TOKEN.lower()}", f"Bearer  {TOKEN}", f"Token {TOKEN}", basic(TOKEN),
             basic(f"me:{TOKEN}:"), basic("me:"), "Basic !!!", "Basic " + "A" * 5000,
             "Basic " + b64encode(b"\xff:\xfe").decode(), "Bearer \xe9"]
    for route in ROUTES:
        for given in right:
            assert running.ask("GET", route, {"Authorization": given}).status not in (401, 403)
        for given in [None, *wrong]:
            refused = running.ask("GET", route, {} if given is None else {"Authorization": given})
            assert refused.status == 401, (route, given)
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert TOKEN not in refused.text
    assert running.ask("POST", "/api/search", body=QUERY).status == 401
    assert running.ask("GET", "/?token=" + TOKEN).status == 401
    assert running.ask("GET", "/healthz", {"Authorization": right[0]}, host="evil").status == 403


def test_tokens_that_can_be_guessed_are_refused() -> None:
    for given in ("", "x", "short", "a" * 40, "passwordpasswordpassword", "0123" * 10,
                  TOKEN[:-1]):
        with pytest.raises(InputError, match=r"GRADINDEX_TOKEN has .* at least 22 random"):
            listening.token_for("127.0.0.1", given)
    assert listening.token_for("127.0.0.1", None) is None
    assert listening.token_for("0.0.0.0", TOKEN) == listening.token_for("localhost", TOKEN) == TOKEN
    made = {listening.token_for("0.0.0.0", None) for _ in range(50)}
    assert len(made) == 50
    for one in made:  # one of ours may be given as well
        assert one is not None and listening.token_for("::", one) == one


def test_names_of_the_server() -> None:
    assert listening.host_names("::1", 8765) == {"127.0.0.1:8765", "localhost:8765", "[::1]:8765"}
    # browsers leave the usual port out
    assert listening.host_names("127.0.0.1", 80) >= {"localhost", "localhost:80"}
    assert listening.host_names("10.0.0.7", 9000, ["lab.example", "a.example:1"]) == {
        "10.0.0.7:9000", "127.0.0.1:9000", "localhost:9000", f"{socket.gethostname()}:9000",
        f"{socket.getfqdn()}:9000",
        "lab.example", "lab.example:9000", "a.example:1"}


# ---- what may be asked


def test_methods(running: Running) -> None:
    posts = ("/api/search", "/api/tokens", "/api/result/0/stop")
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FOO"):
        for route in ROUTES[:-1]:
            refused = running.ask(method, route)
            assert refused.status == 405, (method, route)
            assert {one.strip() for one in refused.headers["allow"].split(",")} == {"GET", "HEAD"}
    for route in posts:
        refused = running.ask("GET", route)
        assert (refused.status, refused.headers["allow"]) == (405, "POST")
    for route in ROUTES[:-1]:
        assert running.ask("POST", route, body={}).status == 405
    for route in ("/", "/healthz", "/static/page.js"):
        head = running.ask("HEAD", route)
        assert head.status == 200 and head.body == b"" and int(head.headers["content-length"]) > 0


def test_a_body_must_be_a_json_object_sent_as_one(running: Running) -> None:
    good = json.dumps(QUERY).encode()
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        assert running.ask("POST", "/api/tokens", {"Content-Type": kind}, good).status == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "",
                 "application/jsonp", "text/json", "application/xml"):
        for route in ("/api/search", "/api/tokens", "/api/result/0/stop"):
            assert running.ask("POST", route, {"Content-Type": kind}, good).status == 415
    assert running.ask("POST", "/api/tokens", {}, good).status == 415
    deep = b"[" * 200_000
    for body in (b"", b"{", b"nonsense", b"\xff\xfe", b'{"k": 1}}', deep, b'{"a":' * 80_000,
                 b'{"k": ' + b"9" * 5000 + b"}"):
        assert running.ask("POST", "/api/search", JSON, body).status == 400, body[:20]
    for body in (b"[]", b"1", b'"x"', b"null", b"NaN", b'{"prompt": 1}', b'{"unknown": 1}',
                 b'{"prompt": null}', b'{"prompt": "\\ud800"}', b'{"\\ud800": 1}', b"{}",
                 b'{"prompt": "x", "damping": NaN}', b'{"prompt": "x", "damping": 1e999}',
                 b'{"prompt": "x", "k": 1e999}', b'{"prompt": "x", "k": 0}',
                 b'{"prompt": "x", "k": true}', b'{"prompt": "x", "shortlist": 100001}',
                 b'{"prompt": "x", "completion": "y", "modules": "(a+)+b"}',
                 b'{"prompt": "x", "completion": "y", "modules": ".*.*.*.*"}',
                 b'{"prompt": "x", "completion": "y", "modules": "["}',
                 b'{"prompt": "x", "completion": "y", "damping": 1e300}',
                 b'{"prompt": "x", "completion": "y", "modules": "0-999999"}',
                 b'{"prompt": "x", "completion": "y", "score_on": "0-999999,0-999999"}',
                 b'{"prompt": "\\u001b[2J", "completion": "y", "k": 2000}'):
        refused = running.ask("POST", "/api/search", JSON, body)
        assert refused.status == 422 and list(refused.json) == ["error"], (body, refused.text)
    long = {**QUERY, "prompt": "x" * 65_537}
    assert running.ask("POST", "/api/search", body=long).status == 422
    many = {**QUERY, "prompt": "apple " * 10_000}
    assert "context" in running.ask("POST", "/api/search", body=many).json["error"]


def test_forms_that_cant_be_used_are_told_on_the_page(running: Running) -> None:
    for more, said in (
        ("&k=999", "k: "), ("&k=150", "-k 150: expected 1 to"), ("&k=x", "k: "),
        ("&shortlist=" + "9" * 5000, ""),
        ("&shortlist=" + "9" * 18, "shortlist"), ("&shortlist=٣x", "shortlist"),
        ("&unknown=1", "unknown"), ("&damping=-1", "damping"), ("&damping=nan", "damping"),
        ("&score_on=9999", "the completion has"), ("&score_on=x", "--score-on"),
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


def test_bodies_are_cut_off_by_size_while_they_come(start: Callable[..., Running]) -> None:
    running = start(work=False)
    head = f"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n" \
           "Content-Type: application/json\r\n"
    full = guard.LARGEST_BODY
    for length in (full + 1, 10**12, 10**30):  # told at once, before any of it is sent
        with running.connect() as connection:
            connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert running.read(connection).status in (413, 400), length
    for wrong in ("-1", "+5", "0x10", "1e3", "5, 6", "²"):
        answer = running.raw(f"{head}Content-Length: {wrong}\r\n\r\nabcde".encode())
        assert answer.status == 400, wrong
    twice = f"{head}Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef"
    assert running.raw(twice.encode()).status == 400
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with running.connect() as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(full // 0x10000 + 1):
            connection.sendall(chunk)
        assert running.read(connection).status == 413
    for lie in (b"zz\r\nabc\r\n", b"-5\r\nabc\r\n", b"3\r\nabcdef\r\n", b"F" * 40 + b"\r\n"):
        with running.connect() as connection:
            connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + lie)
            found = b""
            while piece := connection.recv(1 << 16):
                found += piece
            assert b" 202 " not in found
    short = start(work=False, slowest_body=0.3)
    lie = head.replace(str(running.port), str(short.port))
    for sent in (f"{lie}Content-Length: 50\r\n\r\n{{", f"{lie}Transfer-Encoding: chunked\r\n\r\n5"):
        assert short.raw(sent.encode()).status == 408
    drip = short.connect()
    drip.sendall(f"{lie}Content-Length: 100000\r\n\r\n".encode())
    with drip, pytest.raises(OSError):  # every byte in time, the whole not
        for _ in range(int(HANG / 0.05)):
            drip.sendall(b" ")
            time.sleep(0.05)
    assert running.ask("GET", "/healthz").json["queued"] == 0


def test_connections_that_send_no_request_are_closed(start: Callable[..., Running]) -> None:
    class Watched(Unhurried):
        looks = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            latest.append(self)

        def _look(self, before: Any) -> None:
            super()._look(before)
            self.looks += 1

    latest: list[Watched] = []

    def hurry() -> None:
        """From now on the latest connection is looked at every 0.2 s."""
        latest[-1].patience = 0.2
        latest[-1].loop.call_soon_threadsafe(latest[-1]._look, None)

    running = start(work=False, connection=Watched)
    for sent in (b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\nX: ", b"\x16\x03\x01\x02"):
        latest.clear()
        with running.connect() as connection:
            connection.sendall(sent)
            until(lambda: latest)
            hurry()
            while connection_open(connection):
                pass
    # an answered request doesn't buy more time for a body that never comes
    with running.connect() as connection:
        connection.sendall(f"POST / HTTP/1.1\r\nHost: 127.0.0.1:{running.port}\r\n"
                           "Content-Length: 1000\r\n\r\n".encode())
        assert running.read(connection, "POST").status == 405
        hurry()
        while connection_open(connection):
            pass
    # a stream that is followed is not a connection without a request
    job = running.ask("POST", "/api/search", body=QUERY).json["id"]
    followed = running.events(job)
    assert next(followed)[1]["state"] == "waiting"
    hurry()
    until(lambda: latest[-1].looks > 5)
    running.jobs.start()
    assert [name for name, _ in followed][-1] == "end"


def test_only_so_many_connections_are_held(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 10)
    running = start(work=False)
    with contextlib.ExitStack() as held:
        for _ in range(10):
            held.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        with running.connect() as one_more:
            assert not connection_open(one_more)

    def answered() -> bool:
        try:
            return running.ask("GET", "/healthz").status == 200
        except (ConnectionError, http.client.BadStatusLine):  # the others aren't gone yet
            return False

    until(answered)


def connection_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1 << 16) != b""
    except ConnectionResetError:
        return False


def test_what_is_not_http_is_refused_with_our_headers(running: Running) -> None:
    host = f"Host: 127.0.0.1:{running.port}\r\n"
    for request in (
        "nonsense\r\n\r\n", "GET /\r\n\r\n", f"GET / HTTP/x\r\n{host}\r\n",
        f"GET / HTTP/1.1\r\n{host} folded\r\n: x\r\n\r\n", f"GET  / HTTP/1.1\r\n{host}\r\n",
        f"GET /\xe9 HTTP/1.1\r\n{host}\r\n", f"GET / HTTP/1.1\r\n{host}X: \x00\r\n\r\n",
        f"POST / HTTP/1.1\r\n{host}Transfer-Encoding: gzip\r\n\r\n",
    ):
        answer = running.raw(request.encode("latin-1"))
        assert answer.status in (400, 405) and list(answer.json) == ["error"], request[:50]
    for endless in (f"GET / HTTP/1.1\r\n{host}X: ", "GET /"):
        with contextlib.suppress(ConnectionError):  # the answer may be lost to what was still sent
            assert running.raw(endless.encode() + b"x" * 1_000_000).status == 400
    upgrade = f"GET /healthz HTTP/1.1\r\n{host}Connection: Upgrade, close\r\n" \
              "Upgrade: websocket\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" \
              "Sec-WebSocket-Version: 13\r\n\r\n"
    assert running.raw(upgrade.encode()).status == 200  # plain HTTP: there is no WebSocket


def test_static_files_are_those_of_a_table(running: Running) -> None:
    for name in server.STATIC:
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


def same(found: Any, expected: Result) -> None:
    """A result's JSON is that of another, but for the seconds it took."""
    other = json.loads(expected.to_json())
    for one in (found, other):
        assert set(one.pop("seconds")) >= {"gradient", "scan"}
    assert found == other


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
    for form, kind in server.TYPES.items():
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
        record, = searcher.index.records([place])
        found = running.ask("GET", f"/api/sequence/{record.id}").json
        assert found["token_ids"] == record.tokens.tolist()
        assert found["scored"] == record.scored.tolist()
        assert "".join(found["tokens"]) == found["text"]
        assert found["duplicates"] == searcher.index.copies(place)
    tokens = running.ask("POST", "/api/tokens", body=QUERY).json["tokens"]
    assert "".join(tokens) == QUERY["completion"]
    assert running.ask("POST", "/api/tokens", body={"prompt": "The fig"}).json == {"tokens": []}


def test_stages_come_in_order_with_the_exact_scores_of_the_result(
    start: Callable[..., Running], index_folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = start(gradindex.open(index_folder, batch_tokens=240), work=False)
    asked = running.ask("POST", "/api/search", body=QUERY).json
    job = running.jobs.get(asked["id"])
    assert job is not None
    followed = running.events(asked["id"])
    told = [next(followed)]

    def changed(job: jobs.Job) -> None:
        """As ever, but that the worker waits until the change is told, so that each is."""
        really_changed(job)
        now = {"state": job.state, "stage": job.stage, "done": job.done}
        until(lambda: any(now.items() <= content.items() for _, content in told))

    really_changed = running.jobs._changed
    monkeypatch.setattr(running.jobs, "_changed", changed)
    running.jobs.start()
    for one in followed:
        told.append(one)
    assert told[-1] == ("end", {}) and {name for name, _ in told[:-1]} == {"stage"}
    stages = [content for name, content in told if name == "stage"]
    order = ["", "gradient", "approximate", "exact", "result"]
    places = [order.index(stage["stage"]) for stage in stages]
    assert places == sorted(places) and places[0] == 0 and {2, 3} <= set(places)
    states = ["waiting", "running", "done"]
    assert [states.index(stage["state"]) for stage in stages] == \
        sorted(states.index(stage["state"]) for stage in stages)
    done = [stage["done"] for stage in stages]
    assert done == sorted(done)
    result = running.wait(asked["id"]).json
    found: dict[str, float] = {}
    for stage in stages:
        assert not found.keys() & stage["found"].keys()  # each is told once
        found |= stage["found"]
    assert len(found) >= len(result["hits"])
    copies = {str(one) for hit in result["hits"] for one in hit["duplicates"]}
    assert {value for one, value in found.items() if one not in copies} \
        <= set(result["exact_influence"])
    for hit in result["hits"]:
        assert found[str(hit["id"])] == pytest.approx(hit["influence"], rel=1e-4)
    again = list(running.events(asked["id"]))  # who comes late is told the end
    assert [name for name, _ in again] == ["stage", "end"] and again[0][1]["state"] == "done"


@pytest.mark.parametrize("more", [{}, {"compare": " a river."}])
def test_stop_concludes_from_what_is_exact(
    more: dict[str, str], start: Callable[..., Running], index_folder: Path,
) -> None:
    running = start(gradindex.open(index_folder, batch_tokens=96), work=False)
    asked = running.ask("POST", "/api/search", body={**QUERY, "k": 2, **more}).json
    job = running.jobs.get(asked["id"])
    assert job is not None
    reached, go = threading.Event(), threading.Event()

    def hold() -> None:
        if job.stage == "exact" and job.done > 12 and not go.is_set():  # some of the best are there
            reached.set()
            go.wait(HANG)

    job.wake.add(hold)
    running.jobs.start()
    assert reached.wait(HANG)
    assert running.ask("POST", f"/api/result/{asked['id']}/stop", body={}).status == 202
    go.set()
    found = running.wait(asked["id"]).json
    for result in found.get("results", [found]):
        assert result["interrupted"] and result["rescored"] < result["sequences"]
        assert result["hits"] and 0 < result["recall"]["estimate"] < 1
        assert any(warning.startswith("interrupted: ") for warning in result["warnings"])
        assert all(hit["exact"] for hit in result["hits"])
    # who stopped it may look again; who asks anew gets all of it
    shown = running.ask("GET", f"{job.asked.url()}&job={job.id}", OWN).text
    assert "interrupted: " in shown
    running.ask("POST", "/api/search", body={**QUERY, "k": 2, **more})
    again = running.wait(asked["id"]).json
    for result in again.get("results", [again]):
        assert not result["interrupted"] and result["recall"]["estimate"] == 1


# ---- what goes wrong


def test_a_search_that_fails_is_told_by_number_and_the_next_goes_on(
    start: Callable[..., Running], index_folder: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = tmp_path / "own.index"
    shutil.copytree(index_folder, own)
    searcher = gradindex.open(own)
    running = start(searcher)
    running.search({**QUERY, "rescore": False, "k": 1})  # everything that all searches read
    name = max(own.glob("segments/*/tokens.npz"))
    content = name.read_bytes()
    name.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    asked = {**QUERY, "candidates": "both"}
    job = running.ask("POST", "/api/search", body=asked).json["id"]
    failed = running.wait(job)
    assert failed.status == 500
    number = re.search(r"under ([0-9a-f]{8})\.", failed.json["error"])
    assert number is not None and f"error {number[1]} in a search" in caplog.text
    assert str(own) in caplog.text and str(tmp_path) not in failed.text
    page = running.ask("GET", "/search?" + urlencode({**QUERY, "k": 1, "rescore": "false"}), OWN)
    assert 'data-state="done"' in page.text
    assert running.ask("GET", "/healthz").json["status"] == "ok"
    name.write_bytes(content)
    same(running.search(asked), searcher.search(**asked))  # a failure is tried again


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_that_ends_leaves_nobody_waiting(start: Callable[..., Running]) -> None:
    running = start(work=False)
    first = running.ask("POST", "/api/search", body=QUERY).json["id"]
    second = running.ask("POST", "/api/search", body={**QUERY, "k": 2}).json["id"]
    job = running.jobs.get(first)
    assert job is not None
    followed = running.events(second)
    assert next(followed)[1]["state"] == "waiting"
    assert running.ask("GET", "/healthz").status == 200

    def end() -> None:
        if job.state == "running":
            raise SystemExit

    job.wake.add(end)
    running.jobs.start()
    for one in (first, second):
        failed = running.wait(one)
        assert failed.status == 503 and "started again" in failed.json["error"]
    assert [name for name, _ in followed][-1] == "end"
    health = running.ask("GET", "/healthz")
    assert health.status == 503 and not health.json["ready"]
    assert (health.json["status"], health.json["error"]) == ("failed", jobs.ENDED)
    refused = running.ask("POST", "/api/search", body={**QUERY, "k": 3})
    assert refused.status == 503 and refused.headers["retry-after"]
    page = running.ask("GET", PAGE, OWN)
    assert page.status == 503 and "started again" in page.text and page.headers["retry-after"]
    assert running.ask("GET", "/").status == 200


def test_a_model_that_cant_be_loaded_is_told(
    start: Callable[..., Running], index_folder: Path, model_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server, "QUICK", HANG)  # a page waits until its search has failed
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights = {name: 1.5 * value for name, value in weights.items()}
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    running = start(gradindex.open(index_folder, model=str(other)), work=False, retry=0.1)
    early = running.ask("POST", "/api/search", body=QUERY).json["id"]
    health = running.ask("GET", "/healthz")
    assert health.status == 200 and not health.json["ready"]  # it may still load
    running.jobs.start()
    failed = running.wait(early)
    assert failed.status == 503 and "can't be loaded: " in failed.json["error"]
    assert "weights" in failed.json["error"]
    health = running.ask("GET", "/healthz")
    assert health.status == 503 and not health.json["ready"]
    assert health.json["status"] == "failed" and "weights" in health.json["error"]
    page = running.ask("GET", PAGE, OWN)
    assert 'data-state="failed"' in page.text and "can&#39;t be loaded" in page.text
    assert str(tmp_path) not in page.text.partition("<details")[0]
    shutil.copy(model_folder / "model.safetensors", other / "model.safetensors")
    until(lambda: running.ask("GET", "/healthz").status == 200)
    assert running.search(QUERY)["hits"]
    assert running.ask("GET", "/healthz").json == {
        "status": "ok", "ready": True, "queued": 0, "error": ""}


# ---- how much is done at once


def test_the_same_search_is_done_once(start: Callable[..., Running]) -> None:
    running = start(work=False)

    def ask(number: int) -> str:
        if number % 2:
            return str(running.ask("POST", "/api/search", body=QUERY).json["id"])
        page = running.ask("GET", PAGE, OWN).text
        return page.partition('data-job="')[2].partition('"')[0]

    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(ask, range(200)))) == 1
    assert running.ask("GET", "/healthz").json["queued"] == 1


def test_only_so_many_searches_wait(start: Callable[..., Running]) -> None:
    running = start(work=False)
    for k in range(1, jobs.QUEUE + 1):
        assert running.ask("POST", "/api/search", body={**QUERY, "k": k}).status == 202
    for _ in range(2):
        refused = running.ask("POST", "/api/search", body={**QUERY, "k": 17})
        assert refused.status == 503 and int(refused.headers["retry-after"]) > 0
    page = running.ask("GET", PAGE + "&k=17", OWN)
    assert page.status == 503 and "16 searches wait already" in page.text
    assert int(page.headers["retry-after"]) > 0
    assert running.ask("POST", "/api/search", body={**QUERY, "k": 3}).status == 202  # is there
    assert running.ask("GET", "/healthz").json["queued"] == jobs.QUEUE


def test_searches_that_nobody_waits_for_are_given_up(
    start: Callable[..., Running], index_folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = start(gradindex.open(index_folder, batch_tokens=96), work=False, forgotten=0.3)
    waiting = running.ask("POST", "/api/search", body={**QUERY, "k": 1}).json["id"]
    left = running.jobs.get(waiting)
    time.sleep(0.4)  # at least: so long nobody asks for the first
    asked = running.ask("POST", "/api/search", body=QUERY).json["id"]
    job = running.jobs.get(asked)
    assert job is not None and left is not None
    go, really_changed = threading.Event(), running.jobs._changed

    def changed(job: jobs.Job) -> None:
        really_changed(job)
        if job.stage == "exact":
            go.wait(HANG)

    monkeypatch.setattr(running.jobs, "_changed", changed)
    followed = running.events(asked)
    assert next(followed)[1]["state"] == "waiting"
    time.sleep(0.4)  # watched, however long
    running.jobs.start()
    while next(followed)[1]["stage"] != "exact":
        pass
    assert left.state == "failed" and "given up" in left.error
    assert not job.ended
    followed.close()  # the client is gone
    until(lambda: not job.watchers)
    time.sleep(0.4)
    go.set()
    until(lambda: job.ended)
    assert job.state == "failed" and job.error_status == 503 and job.watchers == 0
    for one in (waiting, asked):
        assert running.wait(one).status in (404, 503)  # 503 until it is forgotten
    running.jobs._forgotten = HANG
    assert running.search({**QUERY, "k": 1})["hits"]


def test_only_so_many_results_are_kept(
    start: Callable[..., Running], monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = start()
    asked = [{**QUERY, "rescore": False, "k": k, "opponents": opponents}
             for k in range(1, 31) for opponents in (False, True)]
    ids = []
    for one in asked:
        ids.append(running.ask("POST", "/api/search", body=one).json["id"])
        assert running.wait(ids[-1]).status == 200
    there = [running.ask("GET", f"/api/result/{one}").status == 200 for one in ids]
    assert there == [False] * (len(ids) - jobs.KEPT) + [True] * jobs.KEPT
    result = running.search({**QUERY, "k": 2})
    size = sum(len(hit["tokens"]) * (1 + len(hit["layer_influence"])) for hit in result["hits"])
    monkeypatch.setattr(jobs, "KEPT_VALUES", 3 * size)
    monkeypatch.setattr(jobs, "KEPT", 10**9)
    last = [running.ask("POST", "/api/search", body={**QUERY, "k": 2, "damping": damping}).json
            for damping in (0.2, 0.3, 0.4)]
    for one in last:
        running.wait(one["id"])
    held = [one for one in running.jobs._jobs.values() if one.ended]
    assert sum(one.values for one in held) <= 3 * size
    assert last[-1]["id"] in {one.id for one in held} and ids[-1] not in {one.id for one in held}


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


# ---- any request at all


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


# ---- the command


def test_view_serves_until_interrupted(index_folder: Path) -> None:
    """On 127.0.0.2, which is nobody's loopback for us: a token is made, told and asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "GRADINDEX_TOKEN"}
    command = [sys.executable, "-m", "gradindex.cli", "view", str(index_folder), "--no-open",
               "--host", "127.0.0.2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=environment, preexec_fn=heed_interrupts)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "the page: " in line:
            break
    token = re.search(r"token, the password of any user: (\S+)", said)
    address = re.search(r"the page: http://(127\.0\.0\.2:(\d+))/", said)
    assert token is not None and address is not None, said
    connection = http.client.HTTPConnection("127.0.0.2", int(address[2]), timeout=HANG)
    connection.request("GET", "/healthz")
    refused = connection.getresponse()
    assert refused.status == 401
    refused.read()
    connection.request("GET", "/healthz", headers={"Authorization": f"Bearer {token[1]}"})
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=HANG)
    assert out == "" and "Traceback" not in rest and token[1] not in rest
    assert process.returncode in (0, 130)

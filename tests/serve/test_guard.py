"""What every request has to pass: host, origin, token, method, body and its size."""

import json
import socket
import time
from base64 import b64encode
from collections.abc import Callable

import pytest

from gradindex.errors import InputError
from search.serve import guard
from search.serve.guard import host_names, token_for
from support.server import JSON, OWN, PAGE, QUERY, ROUTES, TOKEN, Running
from support.waiting import HANG

# ---- who may ask


def test_tokens_that_can_be_guessed_are_refused() -> None:
    for given in ("", "x", "short", "a" * 40, "passwordpasswordpassword", "0123" * 10,
                  TOKEN[:-1]):
        with pytest.raises(InputError, match=r"GRADINDEX_TOKEN has .* at least 22 random"):
            token_for("127.0.0.1", given)
    assert token_for("127.0.0.1", None) is None
    assert token_for("0.0.0.0", TOKEN) == token_for("localhost", TOKEN) == TOKEN
    made = {token_for("0.0.0.0", None) for _ in range(50)}
    assert len(made) == 50
    for one in made:  # one of ours may be given as well
        assert one is not None and token_for("::", one) == one


def test_names_of_the_server() -> None:
    assert host_names("::1", 8765) == {"127.0.0.1:8765", "localhost:8765", "[::1]:8765"}
    # browsers leave the usual port out
    assert host_names("127.0.0.1", 80) >= {"localhost", "localhost:80"}
    assert host_names("10.0.0.7", 9000, ["lab.example", "a.example:1"]) == {
        "10.0.0.7:9000", "127.0.0.1:9000", "localhost:9000", f"{socket.gethostname()}:9000",
        f"{socket.getfqdn()}:9000",
        "lab.example", "lab.example:9000", "a.example:1"}


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

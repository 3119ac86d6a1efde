"""Searches waiting, under way and done: their stages, what ends them, and how many there may be."""

import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
import safetensors.torch

import gradindex
from search.serve import jobs, pages
from support.server import OWN, PAGE, QUERY, Running, same
from support.waiting import HANG, until


def test_stages_come_in_order_with_the_exact_scores_of_the_result(
    start: Callable[..., Running], index_folder: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = start(gradindex.open(index_folder, batch_tokens=240), work=False)
    asked = running.ask("POST", "/api/search", body=QUERY).json
    job = running.jobs.get(asked["id"])
    assert job is not None
    followed = running.events(asked["id"])
    told = [next(followed)]

    def changed(job: jobs.SearchJob) -> None:
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
    # of equal sequences one, from which the others differ by rounding
    exact = np.array(result["exact_influence"])
    assert all(np.isclose(exact, value, rtol=1e-4, atol=1e-3).any() for value in found.values())
    for hit in result["hits"]:
        assert found[str(hit["id"])] == pytest.approx(hit["influence"], rel=1e-4)
    again = list(running.events(asked["id"]))  # who comes late is told the end
    assert [name for name, _ in again] == ["stage", "end"] and again[0][1]["state"] == "done"


@pytest.mark.parametrize("more", [{}, {"compare": " a river."}])
def test_stop_concludes_from_what_is_exact(
    more: dict[str, str], start: Callable[..., Running], index_folder: Path,
) -> None:
    running = start(gradindex.open(index_folder, batch_tokens=96), work=False)
    body = {**QUERY, "k": 20, "shortlist": "all", **more}
    asked = running.ask("POST", "/api/search", body=body).json
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
    shown = running.ask("GET", f"{job.request.url()}&job={job.id}", OWN).text
    assert "interrupted: " in shown
    running.ask("POST", "/api/search", body=body)
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
    monkeypatch.setattr(pages, "QUICK", HANG)  # a page waits until its search has failed
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

    def changed(job: jobs.SearchJob) -> None:
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

"""How heavy the page is, how fast its first hits are there, and how fast `--help` answers.

    python -m benchmarks.page INDEX

The page is that of 50 hits of 512 tokens, of the index's own text with made-up influences:
heavy-tailed and of both signs, so that most shades occur.
"""

import argparse
import gzip
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import gradindex
from gradindex.model import tokenise
from gradindex.results import Hit, Recall, Result
from search.ask.controls import Controls
from search.ask.settings import settle
from search.engine import Searcher
from search.serve.jobs import Jobs, SearchJob
from search.serve.pages import Pages
from search.serve.reception import Reception
from search.serve.request import SearchRequest
from search.show import html

HITS, TOKENS, LAYERS = 50, 512, 12
TIMES = 7


def main() -> None:
    """Measure and print each beside what is asked of it."""
    flags = argparse.ArgumentParser()
    flags.add_argument("index", type=Path)
    index = flags.parse_args().index
    command = [str(Path(sys.executable).with_name("gradindex")), "--help"]
    times = [seconds(lambda: subprocess.run(command, check=True, capture_output=True))
             for _ in range(TIMES)]
    said("gradindex --help", times, 150)
    searcher = gradindex.open(index)
    said("gradient to approximate hits", first_hits(searcher), 1000)
    pages = Pages(Reception(searcher, Jobs(searcher)), shared=False)
    asked = SearchRequest(prompt="Write a message with severity",
                          completion=" 'ERROR' on the root logger", k=HITS)
    job = SearchJob("0" * 16, asked, settle(asked.controls(), searcher.manifest), "done", "result",
                    result=heavy(searcher, asked))
    page = ""
    times = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        page = pages.fill(asked, job, "", False)
        times.append(time.perf_counter() - begun)
    said(f"filling a page of {HITS} hits of {TOKENS} tokens", times[1:], 100)
    parts = {"page": page, "style.css": html.style(), "page.js": html.asset("page.js")}
    sizes = {name: len(gzip.compress(one.encode(), 6)) for name, one in parts.items()}
    print(f"bytes of it, gzipped: {sum(sizes.values()):,} (asked: under 120,000) = "
          + " + ".join(f"{size:,} {name}" for name, size in sizes.items())
          + f"; as it is sent: {sum(len(one.encode()) for one in parts.values()):,}")


def said(what: str, times: list[float], most: int) -> None:
    """Print the median and the worst beside the most that is asked for, in milliseconds."""
    print(f"{what}: {1e3 * sorted(times)[len(times) // 2]:.0f} ms (asked: under {most}; worst of "
          f"{len(times)}: {1e3 * max(times):.0f})")


def seconds(function) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def first_hits(searcher: Searcher) -> list[float]:
    """Seconds from a query's gradient to its hits by code, for queries of the index's own text."""
    times = []
    searcher.snapshot.load()
    for record in searcher.snapshot.records(range(0, len(searcher), len(searcher) // TIMES)):
        pieces = tokenise.pieces(searcher.snapshot.tokenizer, record.tokens.tolist())
        middle = len(pieces) // 2
        query = searcher.make_query("".join(pieces[:middle]), "".join(pieces[middle:]) or " a")
        stages = searcher.stages([query], settle(Controls(), searcher.manifest))
        assert next(stages).name == "gradient"
        times.append(seconds(lambda stages=stages: next(stages)))
        stages.close()
    return times


def heavy(searcher: Searcher, asked: SearchRequest) -> Result:
    """A result of HITS hits of TOKENS tokens and LAYERS layers."""
    random = np.random.default_rng(0)
    query = searcher.make_query(asked.prompt, asked.completion)
    query.token_log_p = [0.0] * len(query.tokens)
    ids = np.concatenate([record.tokens for record in
                          searcher.snapshot.records(range(min(len(searcher), 4096)))])
    ids = np.resize(ids, (HITS, TOKENS))
    hits = []
    for rank, own in enumerate(ids.tolist(), 1):
        by_layer = random.standard_t(2, (TOKENS, 1)) * random.random((TOKENS, LAYERS)) * 100 / rank
        pieces = tokenise.pieces(searcher.snapshot.tokenizer, own)
        hits.append(Hit(
            id=rank, influence=float(by_layer.sum()), nats=float(by_layer.sum()) / len(searcher),
            exact=True, code_score=0.0, code_rank=rank, text="".join(pieces), source="train.jsonl",
            row=rank, document=rank, start=0, end=2000, percentile=99.0, lexical=0.2,
            user_id=f"document {rank}", fields={"kind": "made"}, tokens=pieces, token_ids=own,
            token_influence=by_layer.sum(1).tolist(), layer_influence=by_layer.sum(0).tolist(),
            token_layer_influence=by_layer.tolist()))
    numbers = sorted(random.standard_t(2, 1000).tolist(), reverse=True)
    return Result(
        query, hits, Recall(HITS, 0.99, 1.0, 1.28), len(searcher), 1000, 1000, len(searcher), False,
        list(range(LAYERS)), {"rescore": True, "normalize": "none", "opponents": False,
                              "damping": 0.1, "modules": [], "shortlist": 1000,
                              "candidates": "code", "k": HITS, "recall": None, "rank": None},
        {"gradient": 0.1, "scan": 0.1, "rescore": 1.0}, exact_influence=numbers,
        sample_influence=numbers[::16])


if __name__ == "__main__":
    main()

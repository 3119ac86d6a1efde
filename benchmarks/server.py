"""The server under load: two hundred clients on every kind of route while searches run.

    python -m benchmarks.server INDEX [--seconds 20] [--clients 200]

Starts `gradindex view INDEX`, fills its store of results, then lets the clients ask as fast as they
are answered. /healthz is timed from a process of its own, so that it isn't the clients' delay that
is measured. All on 127.0.0.1.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

KINDS = {"page": 0.4, "tokens": 0.15, "events": 0.2, "search": 0.2, "sequence": 0.05}
SHORTLIST = 100
FILLED = 50  # searches before the measurement, more than are kept
PAUSE = 0.02  # seconds between two health checks


def main() -> None:
    """Run it and print the table."""
    flags = argparse.ArgumentParser()
    flags.add_argument("index", type=Path)
    flags.add_argument("--seconds", type=float, default=20)
    flags.add_argument("--clients", type=int, default=200)
    asked = flags.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "gradindex.cli", "view", str(asked.index), "--no-open"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    try:
        assert server.stderr is not None
        port = next(int(found[1]) for line in server.stderr
                    if (found := re.search(r"the page: http://127\.0\.0\.1:(\d+)/", line)))
        measure(port, server.pid, asked.seconds, asked.clients)
    finally:
        server.terminate()
        server.communicate(timeout=30)


def measure(port: int, pid: int, seconds: float, clients: int) -> None:
    """Fill the store, ask for `seconds`, print."""
    crowd = Crowd(port)
    asyncio.run(crowd.fill())
    idle = probe(port, 3.0)
    start = resident(pid)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        prober = pool.apply_async(probe, (port, seconds))
        memory = asyncio.run(crowd.ask(seconds, clients, pid))
        health, queued = prober.get()
    time.sleep(1)
    print(f"{clients} clients, {seconds:g} s, {os.cpu_count()} cores, load average "
          f"{os.getloadavg()[0]:.1f} at the end; {sum(crowd.statuses.values()):,} answers: "
          + ", ".join(f"{count:,} of {status}"
                      for status, count in sorted(crowd.statuses.items())))
    print(f"/healthz beside it: {milliseconds(health)} of {len(health):,}; idle: "
          f"{milliseconds(idle[0])} of {len(idle[0]):,}")
    for kind, times in sorted(crowd.times.items()):
        print(f"{kind}: {milliseconds(times)} of {len(times):,}")
    print(f"largest queue {queued}; {crowd.finished} searches followed to their end")
    print(f"resident memory {start:,.0f} MB before, {max(memory):,.0f} at most, "
          f"{resident(pid):,.0f} after")


def milliseconds(times: list[float]) -> str:
    """The median and the 99th percentile."""
    ordered = sorted(times)
    return f"p50 {1e3 * ordered[len(ordered) // 2]:.1f} ms, " \
           f"p99 {1e3 * ordered[int(0.99 * (len(ordered) - 1))]:.1f} ms"


def resident(pid: int) -> float:
    """MB of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def probe(port: int, seconds: float) -> tuple[list[float], int]:
    """Seconds of each health check, each on a new connection, and the longest queue seen."""
    request = f"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    times, queued, until = [], 0, time.monotonic() + seconds
    while time.monotonic() < until:
        begun = time.perf_counter()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(request.encode())
            answer = b""
            while piece := connection.recv(1 << 16):
                answer += piece
        times.append(time.perf_counter() - begun)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 200 " in head, answer
        queued = max(queued, json.loads(body)["queued"])
        time.sleep(PAUSE)
    return times, queued


class Crowd:
    """Clients of one server, each a coroutine with a connection per request."""

    def __init__(self, port: int):
        self.port = port
        self.random = random.Random(0)
        self.queries: list[dict[str, Any]] = []
        self.times: dict[str, list[float]] = defaultdict(list)
        self.statuses: Counter[int] = Counter()
        self.finished = 0

    async def fill(self) -> None:
        """Make queries of the index's own texts, and answer more of them than are kept."""
        for number in range(FILLED):
            _, answer = await self.request("GET", f"/api/sequence/{number}")
            tokens = json.loads(answer)["tokens"]
            middle = len(tokens) // 2
            self.queries.append({"prompt": "".join(tokens[:middle][-24:]),
                                 "completion": "".join(tokens[middle:][:8]),
                                 "shortlist": SHORTLIST})
        for query in self.queries:
            status, answer = await self.request("POST", "/api/search", query)
            if status != 202:
                continue  # a sequence too short to be halved
            while status == 202:
                status, _ = await self.request("GET", json.loads(answer)["result"])
                await asyncio.sleep(0.02)

    async def ask(self, seconds: float, clients: int, pid: int) -> list[float]:
        """All at once, until the time is over; the server's memory every half second."""
        until = time.monotonic() + seconds
        kinds = [kind for kind, share in KINDS.items() for _ in range(round(share * clients))]
        calls = [asyncio.create_task(self.repeat(getattr(self, kind), kind, until))
                 for kind in kinds]
        memory = []
        while time.monotonic() < until:
            memory.append(resident(pid))
            await asyncio.sleep(0.5)
        await asyncio.wait(calls, timeout=10)
        for call in calls:
            call.cancel()
        return memory

    async def repeat(self, call: Callable[[], Awaitable[int]], kind: str, until: float) -> None:
        while time.monotonic() < until:
            begun = time.perf_counter()
            self.statuses[await call()] += 1
            self.times[kind].append(time.perf_counter() - begun)

    def any_query(self) -> dict[str, Any]:
        """Half of them known, half new."""
        query = self.random.choice(self.queries)
        new = {"damping": round(self.random.uniform(0.01, 1), 4)}
        return query | (new if self.random.random() < 0.5 else {})

    async def page(self) -> int:
        status, _ = await self.request("GET", "/search?" + urlencode(self.any_query()))
        return status

    async def tokens(self) -> int:
        query = self.any_query()
        asked = {name: query[name] for name in ("prompt", "completion")}
        return (await self.request("POST", "/api/tokens", asked))[0]

    async def search(self) -> int:
        return (await self.request("POST", "/api/search", self.any_query()))[0]

    async def sequence(self) -> int:
        return (await self.request("GET", f"/api/sequence/{self.random.randrange(FILLED)}"))[0]

    async def events(self) -> int:
        """Follow a search to its end."""
        status, answer = await self.request("POST", "/api/search", self.any_query())
        if status != 202:
            return status
        status, told = await self.request("GET", json.loads(answer)["events"])
        self.finished += b"event: end" in told
        return status

    async def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """(status, body) of one request on a connection of its own."""
        content = b"" if body is None else json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n" \
               f"Connection: close\r\nSec-Fetch-Site: same-origin\r\n" \
               f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        try:
            writer.write(head.encode() + content)
            answer = await reader.read()
        finally:
            writer.close()
        first, _, found = answer.partition(b"\r\n\r\n")
        return int(first.split(b" ", 2)[1]), found


if __name__ == "__main__":
    main()

"""The pages: the form and its answer, maps of hits, files to download, what pages are made of.

Server-rendered: they work without JavaScript, which only follows a search under way and filters its
hits.
"""

import asyncio
import copy
from collections.abc import Sequence
from urllib.parse import parse_qsl, quote

from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from gradindex.errors import BadRowError, InputError
from gradindex.model.class_labels import label_number
from gradindex.modules import LAST
from gradindex.results import Comparison, Result
from gradindex.storage.manifest import model_name
from search.ask.controls import CONTROLS
from search.ask.naming import LABELS, as_labels
from search.ask.settings import groupings
from search.serve.examples import examples
from search.serve.jobs import BusyError, SearchJob
from search.serve.reception import Reception, changes_of, retry_after
from search.serve.request import ASKING, TOKEN_FIELDS, SearchRequest, from_form, whole_number
from search.show import html, plots, wording
from search.show.output_forms import render_form
from search.study.tail import Tail, upper_tail

QUICK = 0.4  # seconds that a page waits, for a search that is over at once
TYPES = {"json": "application/json", "csv": "text/csv; charset=utf-8",
         "parquet": "application/vnd.apache.parquet", "html": "text/html; charset=utf-8"}
STATIC = {"style.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8",
          "icon.svg": "image/svg+xml"}


class Pages:
    """What browsers are shown. What is said of the index is read once.

    `shared` with others than its user, the server doesn't tell where the index lies.
    """

    def __init__(self, reception: Reception, shared: bool):
        self.reception = reception
        searcher = reception.searcher
        snapshot, manifest = searcher.snapshot, searcher.manifest
        # two parts tell indexes apart without telling where they lie
        name = "/".join(snapshot.path.resolve().parts[-2:])
        self.about = {
            "name": name, "path": name if shared else str(snapshot.path),
            "sequences": len(searcher),
            "model": model_name(manifest), "train_sequences": reception.jobs.train_sequences,
            "damping": f"{manifest.damping:g}",
            "fields": groupings(manifest),
            "warning": "" if snapshot.coverage.whole else str(snapshot.coverage),
            "task": manifest.task.name, "labels": manifest.plan.labels,
            "members": [LAST, *manifest.also],
        }
        self.about["two_texts"] = snapshot.tables.two_texts > 0
        self.examples = examples(searcher)
        self.static = {name: html.asset(name).encode() for name in STATIC} | {
            "style.css": html.style().encode()}

    def routes(self) -> list[Route]:
        """The paths of the pages and their files, with what answers them."""
        return [
            Route("/", self.page), Route("/search", self.page),
            Route("/map/{job}/{hit}", self.map),
            Route("/download/{name}", self.download), Route("/static/{name}", self.asset),
        ]

    # ---- a search

    async def page(self, request: Request) -> Response:
        """The form; with a query, its search as far as it is."""
        search, error, status, job, on_hold = SearchRequest(), "", 200, None, False
        try:
            fields = parse_qsl(request.url.query, keep_blank_values=True)
            search = from_form(fields)
            # without JavaScript the ticked tokens come one by one: they are made one field
            if any(name in TOKEN_FIELDS for name, _ in fields):
                return RedirectResponse(search.url(), 303)  # an address fit to be shared
            if search.asks:
                on_hold = not request.state.trusted
                if not on_hold:
                    job = self._shown(search, fields) or await self.reception.submit(search)
                    await _first_hits(job, QUICK)
        except InputError as problem:
            error, status = str(problem), 422
        except BusyError as problem:
            error, status = str(problem), 503
        if job is not None and job.state == "failed":
            status = job.error_status
        # a copy, for the worker goes on while the page is filled
        content = await self.reception.aside(self.fill, search, copy.copy(job), error, on_hold)
        return HTMLResponse(content, status, retry_after(status))

    def _shown(self, search: SearchRequest, fields: list[tuple[str, str]]) -> SearchJob | None:
        """The job that a page shows already and names, though others wouldn't get it: stopped."""
        name = next((value for name, value in fields if name == "job"), "")
        job = self.reception.jobs.get(name)
        return job if job is not None and job.request == search else None

    def fill(self, search: SearchRequest, job: SearchJob | None, error: str, on_hold: bool) -> str:
        """The page of a search. `on_hold`, it waits for a click: it was opened from elsewhere."""
        failed = "" if job is None else job.error
        return html.fill("search.html", **self._content(search, job), request=search,
                         error=as_labels(error), failed=as_labels(failed), job=job,
                         on_hold=on_hold, tokens=self.reception.tokens_of(search),
                         controls=CONTROLS, labels=LABELS)

    def _content(self, search: SearchRequest, job: SearchJob | None) -> dict[str, object]:
        """What a search page shows of a job."""
        result = None if job is None else \
            job.provisional if job.result is None else job.result
        content: dict[str, object] = {
            "about": self.about, "examples": self.examples, "result": None, "comparison": None,
            "advanced": bool(search.given().keys()
                             - {*(ASKING - {"versus", "compare"}), "opponents", "k"}),
            "scale": 1.0, "tail": None, "scatter": None, "pairs": [],
            "classes": {
                name: _class(getattr(search, name), self.reception.searcher.manifest.plan.labels)
                for name in ("label", "versus_label")},
        }
        if isinstance(result, Comparison):
            content["comparison"] = result
            # one scale for both sides, or their tints couldn't be compared
            content["scale"] = wording.strongest([hit for side in result.results for hit in side])
            content["pairs"] = pairs = result.pairs()
            content["scatter"] = Markup(plots.scatter(
                [a for _, a, _ in pairs], [b for _, _, b in pairs],
                "Influence on A and on B", "on A", "on B"))
        elif isinstance(result, Result):
            content["result"], content["scale"] = result, wording.strongest(result.hits)
            content["tail"] = None if job is None else _tail_figure(result, job.tail)
        return content

    # ---- the rest

    async def map(self, request: Request) -> Response:
        """A hit's token × layer map."""
        job = self.reception.job(request.path_params["job"])
        result, number = job.result, whole_number(request.path_params["hit"])
        hit = None if not isinstance(result, Result) else next(
            (hit for hit in result if hit.id == number), None)
        if hit is None or not hit.token_layer_influence:
            raise HTTPException(404, "There is no such map. Search again, and open it from there.")
        return HTMLResponse(await self.reception.aside(
            html.fill, "sequence.html", hit=hit, result=result, about=self.about,
            back=job.request.url() + f"#hit={hit.id}"))

    async def asset(self, request: Request) -> Response:
        """A file that pages are made of: one of a table, whatever path is asked for."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, "There is no such file.")
        return Response(self.static[name], media_type=STATIC[name])

    async def download(self, request: Request) -> Response:
        """A finished result as a file."""
        name, _, form = request.path_params["name"].partition(".")
        job = self.reception.jobs.get(name)
        if form not in TYPES or job is None or job.result is None:
            raise HTTPException(404, "There is no such result any more. Search again.")
        result = job.result
        # two lists side by side have no row a hit
        if isinstance(result, Comparison):
            if form != "json":
                raise HTTPException(404, "A comparison can be downloaded as JSON only.")
            content = (await self.reception.aside(result.to_json)).encode()
        else:
            content = await self.reception.aside(render_form, result, form)
        return Response(content, media_type=TYPES[form], headers={
            "Content-Disposition": f'attachment; filename="gradindex-{quote(name)}.{form}"'})


async def _first_hits(job: SearchJob, seconds: float) -> None:
    """Wait until the job ended or has hits to show, or so long."""
    changed, forget = changes_of(job)
    try:
        async with asyncio.timeout(seconds):
            while not (job.ended or job.provisional is not None):
                await changed.wait()
                changed.clear()
    except TimeoutError:
        pass
    finally:
        forget()


def _class(asked: str | int, labels: Sequence[str]) -> int | None:
    """The number of the class that a form asks about; None for none, or none that there is."""
    try:
        return label_number(asked, labels)
    except BadRowError:
        return None


def _tail_figure(result: Result, tail: Tail | None) -> dict[str, object] | None:
    """The plot of a result's exact scores, and what it shows."""
    values = upper_tail(result)
    # an axis needs two ends
    if len(values) < 2:
        return None
    law = None if tail is None else plots.Law(tail.x_min, tail.alpha, tail.points / tail.total)
    side, label = ("negative", "−influence") if result.opponents else ("positive", "influence")
    caption = (f"The {len(values):,} exact scores that are {side}, of the {result.rescored:,} "
               "sequences that were rescored; no approximate score is in it.")
    if tail is not None:
        verdict = "is ruled out" if tail.rejected else "is not ruled out"
        caption += (f" The line is a power law fitted by maximum likelihood to the largest "
                    f"{tail.points:,}: density exponent α = {tail.alpha:.2f} ± {tail.error:.2f} "
                    f"from {plots.short(tail.x_min)} on; it {verdict} (p = {tail.p:.2f}).")
    return {"svg": Markup(plots.tail(values, law, f"Tail of the exact {side} scores", label)),
            "caption": caption}

"""What is in an index, as numbers: its texts, the sizes of its gradients, influence over queries.

Without queries of the user's, some of the index's own sequences are asked about (their later half
given the first); such a sequence and its equals are left out of what is said of its query.
"""

from dataclasses import dataclass

import numpy as np

from gradindex.errors import InputError
from gradindex.influence.exact import Rescorer
from gradindex.progress import Progress
from gradindex.results import Query
from gradindex.storage.manifest import Manifest
from search.ask.settings import Settings
from search.engine import Searcher, group_size
from search.rank.coverage import Coverage
from search.rank.query_gradient import form_gradients
from search.study.exact_sample import ExactSample, QuerySurvey, own_queries
from search.study.gradient_sizes import SizeSurvey, measure_sizes, most_generic
from search.study.report_defaults import OWN_QUERIES
from search.study.texts import ShownSequence, TextSurvey, read_texts


@dataclass
class Survey:
    """Everything a report says. `sample` sequences were drawn and scored exactly, N is `total`.

    `groups` are (layer, kind) of modules. `generic` are shown with their generic rate (None
    where the index keeps no background queries); `rank` is that which the queries' gradients were
    reduced to, if they were.
    """

    name: str
    digest: str
    manifest: Manifest
    coverage: Coverage
    settings: Settings
    texts: TextSurvey
    sizes: SizeSurvey
    total: int
    sample: int
    scored: int
    rank: int | None
    groups: list[tuple[int, str]]
    queries: list[QuerySurvey]
    generic: list[tuple[ShownSequence, float]] | None = None

    def shares(self, what: str) -> np.ndarray:
        """Mean share of each group over queries, [groups]: of "absolute" or "proponents"."""
        sums = np.array([getattr(query, what) for query in self.queries])
        whole = sums.sum(axis=1)
        # a query without any proponent has no shares, and would make the mean NaN
        return np.asarray((sums[whole > 0] / whole[whole > 0, None]).mean(axis=0)
                          if (whole > 0).any() else np.zeros(len(self.groups)))


def survey(
    searcher: Searcher, queries: list[Query] | None, sample: int | None, settings: Settings,
    progress: Progress,
) -> Survey:
    """Survey an index over these queries, or over some of its own sequences.

    `sample` sequences are scored exactly (None: all). `settings` are those without any control but
    train_sequences: everything is said of all modules, at the damping of the codes.
    Raises InputError where there is nothing to ask about, or more queries than are answered
    together, otherwise as `Searcher.search`.
    """
    snapshot = searcher.snapshot
    if sample is not None and sample < 1:
        raise InputError(f"--sample {sample}: expected a number above 0, or all.")
    most = group_size(len(searcher))
    if queries is not None and not 0 < len(queries) <= most:
        raise InputError(f"--queries: {len(queries)} queries can be scored; a report takes 1 to "
                         f"{most}.")

    # 1) what the sequences are: every record is read once
    texts = read_texts(snapshot, progress)

    # 2) queries, and what the code says of every sequence
    snapshot.load()
    origins: list[int | None] = [None] * len(queries or [])
    if queries is None:
        queries, places = own_queries(snapshot, min(OWN_QUERIES, most))
        origins = [*places]
    gradients, preconditioned = form_gradients(snapshot, queries, settings, searcher.batch_tokens)
    code_scores = snapshot.code_scores(np.stack([gradient.vector for gradient in gradients]))
    by = Rescorer(snapshot.model, settings.modules, snapshot.ekfac, settings.damping,
                  searcher.batch_tokens)

    # 3) sizes of gradients
    sizes = measure_sizes(snapshot, by, preconditioned)

    # 4) exact influence of a random sample, and of the top by code
    scores = ExactSample(snapshot, origins, code_scores, sample)
    scores.fill(by, preconditioned, progress)

    # 5) what follows of each query
    progress.start("tails", len(queries), "queries")
    surveys = []
    for number, gradient in enumerate(gradients):
        surveys.append(scores.survey_of(number, gradient))
        progress.update(1)
    progress.finish()
    return Survey(
        name=snapshot.path.resolve().name, digest=snapshot.digest, manifest=searcher.manifest,
        coverage=snapshot.coverage, settings=settings, texts=texts, sizes=sizes,
        total=len(snapshot), sample=len(scores.sample), scored=len(scores.places),
        rank=preconditioned.rank,
        groups=scores.groups, queries=surveys, generic=most_generic(snapshot),
    )

"""What a build will take, before it is begun: `gradindex build --dry-run`.

It checks what a build checks, reads the data, loads the model, runs two batches and each stage's
work on them. Nothing is written, and no folder made.

Documents, sequences and tokens are exact where reading takes no more than 30 s; else that much is
read, the rest is counted in rows, and everything is scaled. Every stage is reckoned as
`indexer/pace` does it; added are loading and digesting the model, reading and tokenising (as
measured) and writing records. Importing the libraries, a few seconds, is not counted.

On the disk: records, codes and curvature to within a few bytes, the token matrices from a sample.
While the build runs, the fit's float64 sums lie beside the records.
"""

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gradindex import draws
from gradindex.draws import Stream
from gradindex.influence import curvature
from gradindex.memory import available, resident, return_freed
from gradindex.model.adapters import without_adapters
from gradindex.model.config import vocabulary_size
from gradindex.model.identity import check_identity, identify
from gradindex.model.members import load_members, tracked_of_all
from gradindex.model.network import LanguageModel
from gradindex.model.tracked import examine, untracked
from gradindex.modules import Module
from gradindex.progress import duration, size
from gradindex.storage import (
    code_index,
    layout,
    records,
    row_file,
    sealed_json,
    token_file,
)
from gradindex.storage.build_plan import Plan
from gradindex.storage.files import bytes_in
from gradindex.storage.integrity import refuse_links
from gradindex.storage.manifest import exists as index_exists
from gradindex.storage.records import Record
from indexer.ask_reference import load_reference, make_way
from indexer.background_queries import BACKGROUND_QUERIES
from indexer.build_request import BuildRequest, make_request, takes_arguments_of
from indexer.code_length import check_bits, choose_bits, shares_of, spreads
from indexer.dry_run.most_memory import Held, Memory, most_memory
from indexer.dry_run.reference_price import price
from indexer.fit.batch_memory import available_on, used
from indexer.fit.budget import budget, gpu_width
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import BLOCK_SEQUENCES
from indexer.pace.ahead import Ahead
from indexer.pace.batch_size import choose_batch_tokens
from indexer.pace.pace import measure_pace
from indexer.pace.rough_cosines import RoughCosines
from indexer.pace.speed import in_groups
from indexer.pace.stages import WRITING, stage_seconds
from indexer.prepare import allow, describe_modules
from indexer.read import ingest
from indexer.read.corpus import Corpus, CorpusFacts
from indexer.read.sources import count_rows
from indexer.state import BuildState

READING = 30.0  # seconds; data that take longer are read in part
UNCERTAIN = 0.3
ROUGH_QUERIES = 16  # sequences whose cosines with others tell how many bits codes need
WRITE_RECORD = 8e-5  # seconds, as LMDB took elsewhere: it needs a file
TOKEN_SAMPLE = 512  # sequences whose token matrix is made, to measure its size


@dataclass(frozen=True)
class Estimate:
    """What a build will take. Bytes, seconds; `read` is the share of the data that was read.

    `disk` says by part what the finished index holds, `disk_most` what the build holds at once.
    `memory` is the most on the host and on the GPU (0 without one), `memory_parts` what it goes to
    at one time or another, `stages` has every stage's seconds and its sequences (0 where that says
    nothing). `codes` says how long they may become where that is left open, `note` what else is to
    be known.
    """

    model: str
    data: str
    documents: int
    sequences: int
    tokens: int
    read: float
    stages: dict[str, tuple[float, int]]
    disk: dict[str, int]
    disk_most: int
    disk_free: int
    place: str
    memory: Memory
    memory_free: Memory
    memory_parts: dict[str, int]
    threads: int
    device: str
    codes: str
    note: str

    @property
    def seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(seconds for seconds, _ in self.stages.values())

    @property
    def lacking(self) -> list[str]:
        """What will not suffice and what to do, a line each; empty where all does."""
        lines = []
        if self.disk_most > self.disk_free:
            fits = self.disk_most > sum(self.disk.values())  # it is the fit that takes most
            largest = "curvature" if fits else max(self.disk, key=lambda part: self.disk[part])
            remedy = {"codes": "fewer --bits", "curvature": "fewer --modules"}.get(
                largest, "fewer documents (--limit)")
            lines.append(f"not enough disk: the build needs {size(self.disk_most)}, {self.place} "
                         f"has {size(self.disk_free)} free. Free some space, use {remedy}, or "
                         "another folder.")
        for what, needed, free in (("memory", self.memory.host, self.memory_free.host),
                                   ("GPU memory", self.memory.device, self.memory_free.device)):
            if needed > free:
                lines.append(f"not enough {what}: the build needs {size(needed)}, {size(free)} can "
                             "be had. Use smaller --batch-tokens, fewer --modules, smaller "
                             "--segment-size, or --dtype bfloat16.")
        return lines

    def lines(self) -> list[str]:
        """The estimate as a short table."""
        stages = [f"{name} {duration(seconds)}" + (f" ({count:,} sequences)" if count else "")
                  for name, (seconds, count) in self.stages.items()]
        parts = " + ".join(f"{name} {size(count)}" for name, count in self.disk.items())
        memory = [f"{size(self.memory.host)} of {size(self.memory_free.host)} to be had"]
        if self.memory.device:
            memory.append(f"GPU {size(self.memory.device)} of {size(self.memory_free.device)}")
        part = "" if self.read == 1 else f", scaled from {self.read:.1%} of the rows"
        table = [
            ("model", self.model), ("data", self.data + part), ("stages", ", ".join(stages)),
            ("disk", f"{parts} = {size(sum(self.disk.values()))}; at most {size(self.disk_most)} "
                     f"during the build, {size(self.disk_free)} free"),
            ("memory", "at most " + ", ".join(memory)),
            ("of it", ", ".join(f"{name} {size(count)}"
                                for name, count in self.memory_parts.items())),
            ("estimate", f"about {duration(self.seconds)} ± {UNCERTAIN:.0%} on this machine "
                         f"({self.device}, {self.threads} "
                         f"thread{'s' * (self.threads > 1)}; two batches measured)"),
        ]
        more = [(name, text) for name, text in (("codes", self.codes), ("note", self.note))
                if text]
        return [f"{name:<10}{text}" for name, text in table + more] + self.lacking


@takes_arguments_of(make_request)
def estimate(request: BuildRequest) -> Estimate:
    """What `build` of the same arguments will take in time, disk and memory; writes nothing.

    Raises what a build raises before anything expensive: InputError, IndexMismatchError;
    ResourceError where memory doesn't suffice for a batch. A disk or memory that is too small for
    the whole is not raised: see `Estimate.lacking`.
    """
    plan, progress = request.plan, request.progress

    # 1) what is there already
    refuse_links(request.index)
    state = BuildState.find(request.index, plan, progress)
    note = _note_on(request.index, state)

    # 2) text → lengths first where a reference is run over them, and gone before the model comes
    reference = request.reference
    data, asked = None, None
    if reference is not None and reference.source is not None:
        data = _read_data(request)
        asked = price(load_reference(reference.source, plan, progress), plan, data.sample,
                      data.lengths, request.source.max_memory)
        make_way()

    # 3) the model and its tracked modules
    start = time.perf_counter()
    model = load_members(request.source, request.dtype)
    if state is not None and state.model is not None and state.corpus is not None:
        check_identity(model, asdict(state.model))
    identify(model)  # digests the weights, as a build does
    loading = time.perf_counter() - start
    anatomy = examine(model.network, model.source.task)
    tracked = tracked_of_all(model, plan.modules, anatomy)
    check_bits(plan.bits, tracked)

    # 4) text → lengths
    data = data or _read_data(request)
    if reference is not None and asked is None:
        with without_adapters(model.network):
            asked = price(model, plan, data.sample, data.lengths, request.source.max_memory)
    ingest.report_read(data.facts, plan, progress)
    ingest.warn_few(data.facts.sequences, progress)
    if data.share == 1:  # of data that are sorted a part may have one class
        ingest.check_classes(data.facts, plan, progress)
    width = model.accumulate.itemsize

    # 5) batches and the stages' work on them
    batch_tokens = plan.batch_tokens or choose_batch_tokens(
        model, tracked, data.sample, request.source.max_memory, progress)
    settings = FitSettings([], plan.fit_labels, min(plan.segment_size, BLOCK_SEQUENCES),
                           batch_tokens, plan.seed, covariance_blocks=plan.covariance_blocks)
    allowance = allow(model, tracked, settings, lambda: data.sample[: settings.block])
    ahead = Ahead.of(model, tracked, plan, allowance, data.lengths, len(data.lengths), batch_tokens,
                     plan.bits)
    gpu = gpu_width(model.device, plan.eigen_dtype)
    needs = budget(model.bytes, ahead.partitions, plan.covariance_blocks, width, ahead.code, gpu)
    return_freed()  # by what ran before
    host = resident()
    device = used(model.devices) if model.device.type == "cuda" else None
    rough = RoughCosines(plan.damping)
    pace = measure_pace(model, tracked, data.sample, ahead, plan, progress, rough.keep)
    disk = _disk(data, model, tracked, plan, ahead.code.length)
    fitted = min(plan.fit_sequences, ahead.count)
    passed = {"covariance": fitted, "eigenvalues": fitted, "encode": ahead.count}
    stages = {
        "start": (loading, 0),
        "read": (data.seconds + ahead.count * WRITE_RECORD
                 + disk["records"] * (1 / WRITING + 2 / pace.hashing), 0),
        **({"reference": (asked.seconds, ahead.count)} if asked else {}),
        **{name: (seconds, passed.get(name, 0))
           for name, seconds in stage_seconds(pace, ahead, plan).items()},
    }
    memory = most_memory(Held(
        ahead.partitions, plan.covariance_blocks, width, allowance.curvature,
        min(plan.segment_size, ahead.count), max(data.lengths), ahead.code, ahead.together,
        pace.batch + pace.kept, gpu), host, device)
    if asked is not None:
        memory = Memory(max(memory.host, asked.memory.host), max(memory.device,
                                                                 asked.memory.device))

    # 6) what there is of it; what an unfinished build has written is a part of what it needs
    existing = bytes_in(request.index)
    folder = next(path for path in (request.index, *request.index.absolute().parents)
                  if path.is_dir())
    facts = data.facts
    modules = describe_modules(model, tracked, untracked(model.network, tracked, anatomy))
    return Estimate(
        model=f"{request.source.name}: {model.network.num_parameters() / 1e6:,.1f} M parameters in "
              f"{plan.dtype}; {modules}",
        data=ingest.amount(facts, plan) + "".join(
            f"; {said}" for said in request.corpus.said_of_rows()),
        documents=facts.documents, sequences=facts.sequences, tokens=facts.tokens,
        read=data.share, stages=stages, disk=disk,
        # the fit's sums are gone before the first code is written
        disk_most=max(sum(disk.values()), disk["records"] + needs.fit_disk),
        disk_free=shutil.disk_usage(folder).free + existing, place=str(folder),
        memory=memory,
        memory_free=Memory(available(), 0 if device is None else available_on(model.devices)),
        memory_parts=needs.parts | {f"a batch of {batch_tokens:,} tokens": pace.batch} | (
            {"reference": asked.weights} if asked and reference and reference.source else {}),
        threads=torch.get_num_threads(), device=str(model.device),
        codes=_codes(rough.cosines(), plan.bits, ahead, tracked), note=note,
    )


def _codes(cosines: np.ndarray, asked: int | None, ahead: Ahead, modules: list[Module]) -> str:
    """What codes of K bits will find by rough cosines [s, s]; which K, where none is asked for."""
    found = spreads(cosines[:ROUGH_QUERIES])
    if not found:
        return "" if asked else f"as the data need; {ahead.code.length:,} bits are reckoned here"
    bits = asked or choose_bits(found, ahead.count, ahead.fit.curvature, modules)
    line = shares_of(found, ahead.count, bits)
    chosen = "" if asked else f". The build chooses; {ahead.code.length:,} bits are reckoned here"
    return f"{line}; rough, by {len(cosines)} sequences before a fit{chosen}"


def _note_on(index: Path, state: BuildState | None) -> str:
    """What there is already of a build, in words; empty for nothing."""
    if index_exists(index):
        return f"{index} is complete: the same command has nothing to do"
    if state is not None:
        return f"{index} holds a part of this build: less than estimated is left to do"
    return ""


# ---- reading


@dataclass
class _ReadData:
    """The data: counted, and where they were read in part (`share`), scaled.

    `lengths` are the tokens of every sequence, `sizes` the bytes of its record, in order; `seconds`
    those of reading all. `sample` are sequences drawn from all that were read, at most a segment.
    """

    facts: CorpusFacts
    lengths: list[int]
    sizes: list[int]
    sample: list[Record]
    share: float
    seconds: float


def _read_data(request: BuildRequest) -> _ReadData:
    """Read the data, or what can be read in READING seconds. Raises InputError as a build would."""
    corpus, most = request.corpus, request.plan.segment_size
    lengths: list[int] = []
    sizes: list[int] = []
    sample: list[Record] = []
    random = draws.generator(Stream.DRY_RUN_SAMPLE, request.plan.seed)
    request.progress.start("read", 0, "sequences")
    start, share = time.perf_counter(), 1.0
    for record in corpus.sequences():
        lengths.append(corpus.objective.length(record))
        sizes.append(records.value_bytes(record))
        if len(sample) < most:
            sample.append(record)
        elif (number := int(random.integers(len(lengths)))) < most:  # each with equal chance
            sample[number] = record
        request.progress.update(1)
        if time.perf_counter() - start > READING:
            share = _share_read(corpus, record)  # all else is scaled by it
            break
    seconds = time.perf_counter() - start
    request.progress.finish()
    if share == 1:
        ingest.check_read(corpus)
    facts = corpus.facts
    # the first of a sample are measured, and must not be the first of the data
    sample = [sample[number] for number in random.permutation(len(sample))]
    if share < 1:
        count = round(len(lengths) / share)
        facts = replace(facts, **{name: round(getattr(facts, name) / share) for name in (
            "sequences", "tokens", "scored_tokens", "documents")})
        lengths, sizes = (np.resize(np.array(read), count).tolist() for read in (lengths, sizes))
    return _ReadData(facts, lengths, sizes, sample, share, seconds / share)


def _share_read(corpus: Corpus, last: Record) -> float:
    """How much of the data, in rows, was read up to a sequence."""
    part = last.parts[-1]
    done = total = 0
    for source in corpus.sources:
        if source.name == part.source:
            done = total + part.row
        total += count_rows(source, corpus.settings.sequence_length)
    # with a limit, the rows that come after it are never read
    limit = corpus.settings.limit
    return min(1.0, max(done / total, corpus.facts.documents / limit if limit else 0.0))


# ---- disk


def _disk(
    data: _ReadData, model: LanguageModel, tracked: list[Module], plan: Plan, bits: int
) -> dict[str, int]:
    """Bytes of the finished index by part."""
    cut = list(in_groups(data.sizes, plan.segment_size))  # of each segment
    vocabulary = vocabulary_size(model.network.config)
    sequences = [record.tokens for record in data.sample[:TOKEN_SAMPLE]]
    # what a matrix of one sequence takes, and each further one on top
    single = len(token_file.pack(sequences[:1], vocabulary))
    further = (len(token_file.pack(sequences, vocabulary)) - single) / max(1, len(sequences) - 1)
    queries = min(BACKGROUND_QUERIES, len(data.sizes))
    return {
        "records": sum(records.file_bytes(sizes) for sizes in cut),
        "codes": sum(code_index.file_bytes(bits, len(sizes))
                     + len(row_file.array_bytes(np.zeros(len(sizes), row_file.ROW)))
                     for sizes in cut),
        "token matrices": round(sum(single + further * (len(sizes) - 1) for sizes in cut)),
        "curvature": sum(curvature.file_bytes(module, model.accumulate, plan.covariance_blocks)
                         for module in tracked),
        "background": layout.background_bytes(queries, bits),
        # manifest.json, fit.json and segment.json: a few hundred bytes a file that they name
        "notes": 4000 + len(sealed_json.with_digest(plan.to_dict())) + 1400 * len(cut)
                 + 500 * len(tracked),
    }

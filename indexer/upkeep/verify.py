"""Is an index what it was when it was written, and does it still give the right answers?

Every file is digested, every record, row and code is looked at, and with the model a sample of
codes is encoded again and the scores measured at the build are measured again. What is damaged
is named with what to do about it.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradindex.draws import Stream, choose
from gradindex.errors import DamagedIndexError
from gradindex.influence.batches import Splits, in_batches
from gradindex.influence.curvature import FiledEkfac
from gradindex.influence.fitted import FittedModel
from gradindex.model.identity import tensors_digest
from gradindex.model.source import ModelSource
from gradindex.progress import Progress
from gradindex.storage import background_file, layout, locks, manifest, records, row_file, segments
from gradindex.storage.background_file import BackgroundQueries
from gradindex.storage.code_file import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.files import FileFacts, make_folder
from gradindex.storage.layout import PARTIAL, curvature_file, segment_folder
from gradindex.storage.manifest import Manifest, Segment
from gradindex.storage.records import Record
from gradindex.storage.segments import SegmentFacts
from indexer.background import unit
from indexer.calibrate import exact_influence, prepare_query
from indexer.encode import encode_batch, encode_segment
from indexer.read.ingest import sealed_files
from indexer.upkeep.commit import commit, refuse_unfinished, writing

SAMPLE = 64  # sequences encoded again
AGAIN = 8  # background queries made again
SAME_BITS = 0.99  # share of a code's bits that must come out again on another machine
SAME_SCORE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


@dataclass(frozen=True)
class Finding:
    """Something damaged: the file or segment, what is wrong, and what to do."""

    what: str
    wrong: str
    do: str


@dataclass
class Verified:
    """What `gradindex verify` looked at, and what it found.

    `same_bits` is the share of bits of the codes encoded again that are the same, `score_error` the
    largest difference of a score measured again, relative to the largest of them. None: not done.
    """

    files: int = 0
    bytes: int = 0
    records: int = 0
    encoded: int = 0
    same_bits: float | None = None
    scores: int = 0
    score_error: float | None = None
    findings: list[Finding] = field(default_factory=list)
    rebuilt: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        return {"schema": 1, "sound": self.sound, **asdict(self)}


def verify(
    index: str | Path, model: Any = None, tokenizer: Any = None, *, device: str = "auto",
    no_model: bool = False, rebuild: bool = False, trust_remote_code: bool = False,
    allow_pickle: bool = False, progress: Progress | None = None,
) -> Verified:
    """Check an index thoroughly.

    `no_model` leaves out what needs the model. `rebuild` encodes damaged segments again from their
    records, where those are sound. Raises InputError where there is no index or no model,
    IndexMismatchError for another model. A damaged index is no error here but a finding.
    """
    say = progress or Progress()
    root = Path(index)
    found = Verified()
    reader = locks.Reader(root)
    try:
        facts = manifest.load(root)
    except DamagedIndexError as error:
        found.findings.append(Finding("manifest.json", error.wrong, _WHOLE))
        return found
    given = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle)
    bad = _check_files(root, facts, found, say)
    if not _core_damaged(bad):
        _check_rows(root, facts, bad, found, say)
    if rebuild and bad and not _core_damaged(bad):
        del reader
        found.rebuilt = _rebuild(root, given, say)
        if found.rebuilt:
            again = verify(root, model, tokenizer, device=device, no_model=no_model,
                           trust_remote_code=trust_remote_code, allow_pickle=allow_pickle,
                           progress=progress)
            again.rebuilt = found.rebuilt
            return again
    for name, wrong in sorted(bad.items()):
        found.findings.append(_finding(Contents(root, facts), name, wrong))
    if not no_model and not _core_damaged(bad):
        _check_model(root, facts, bad, given, found, say)
    return found


# ---- files, rows, records

# name of a segment (or of a file outside them) → (file, what is wrong with it)
_Bad = dict[str, list[tuple[str, str]]]
_WHOLE = "Every search needs it: take it from a copy of the index, or build again."


def _core_damaged(bad: _Bad) -> bool:
    """Whether something is damaged that isn't in a segment."""
    return any(not name.isdecimal() for name in bad)


def _check_files(root: Path, facts: Manifest, found: Verified, say: Progress) -> _Bad:
    """Digest every file, and read the curvature and the background queries."""
    contents = Contents(root, facts)
    bad: _Bad = {}
    say.start("digest", len(facts.files), "files")
    for name in sorted(facts.files):
        try:
            contents.files.check(name, digest=True)
        except DamagedIndexError as error:
            key = layout.segment_of(name) or name
            bad.setdefault(key, []).append((name.rpartition("/")[2], error.wrong))
        found.files += 1
        found.bytes += facts.files[name].size
        say.update(1)
    say.finish()
    for module in facts.modules:
        name = curvature_file(module)
        if name not in bad:
            try:
                _ = FiledEkfac(lambda one: root / curvature_file(one), [module],
                               torch.device("cpu"), torch.float32,
                               facts.plan.covariance_blocks)[module.name]
            except DamagedIndexError as error:
                bad.setdefault(name, []).append((name, error.wrong))
    if facts.background is not None and layout.BACKGROUND not in bad:
        try:
            _background(root / layout.BACKGROUND, facts)
        except DamagedIndexError as error:
            bad.setdefault(layout.BACKGROUND, []).append((layout.BACKGROUND, error.wrong))
    return bad


def _background(path: Path, facts: Manifest) -> BackgroundQueries:
    assert facts.background is not None
    return background_file.load(path, facts.background["queries"], facts.code["length"])


def _check_rows(root: Path, facts: Manifest, bad: _Bad, found: Verified, say: Progress) -> None:
    """Compare each segment's files with each other: records, rows, codes, tokens."""
    try:
        _ = Contents(root, facts).deleted
    except DamagedIndexError as error:
        bad.setdefault(str(facts.deleted_file), []).append(("", error.wrong))
    say.start("records", facts.rows, "sequences")
    last = -1
    for segment in facts.segments:
        if segment.name not in bad:
            try:
                last = _check_segment(Contents(root, facts, [segment]), segment, last)
                found.records += segment.rows
            except DamagedIndexError as error:
                file = next((one.name for one in layout.SEGMENT_FILES
                             if f"/{one.name}" in str(error)), "")
                bad.setdefault(segment.name, []).append((file, error.wrong))
        say.update(segment.rows)
    say.finish()
    if not bad:
        try:
            _ = Contents(root, facts).places
        except DamagedIndexError as error:
            bad["manifest.json"] = [("manifest.json", error.wrong)]


def _check_segment(contents: Contents, segment: Segment, last: int) -> int:
    """Raise DamagedIndexError where a segment's files contradict each other; its last id."""
    def wrong(file: str, what: str) -> DamagedIndexError:
        return contents.files.damaged(f"segments/{segment.name}/{file}", what)

    rows, facts = contents.rows, contents.reader(segment).facts()
    if rows["id"][0] <= last:
        raise wrong("rows.npy", "has ids that don't follow those of the segment before")
    held = contents.records(range(segment.rows))  # checks each checksum, id and digest
    broken = set(rows["id"][np.isnan(rows["norm"])].tolist())
    if facts.rows != segment.rows or set(facts.quarantined) != broken:
        raise wrong("segment.json", "doesn't say why each row without a code has none")
    codes = contents.reader(segment).codes(contents.manifest.code["length"])
    if not np.isfinite(codes.scales()).all():
        raise wrong("vectors.faiss", "has a scale that is not finite")
    tokens = contents.reader(segment).tokens(
        contents.manifest.sequence_length, contents.manifest.vocabulary)
    for row, record in enumerate(held):
        own = tokens.indices[tokens.indptr[row] : tokens.indptr[row + 1]]
        if not np.array_equal(np.sort(own), np.unique(record.tokens)):
            raise wrong("tokens.npz", f"has other tokens than record {row}")
    return int(rows["id"][-1])


def _records_sound(contents: Contents, name: str) -> bool:
    """Whether a damaged segment can be encoded again from its records."""
    return bool(_sound_records(contents, name))


def _sound_records(contents: Contents, name: str) -> list[Record]:
    """A segment's records by themselves, [] where they are damaged or the segment is gone."""
    rows = next((one.rows for one in contents.manifest.segments if one.name == name), 0)
    try:
        path = contents.files.path(f"segments/{name}/records.lmdb", records.audit)
        return records.read(path, range(rows))
    except DamagedIndexError:
        return []


def _finding(contents: Contents, name: str, wrong: list[tuple[str, str]]) -> Finding:
    root = contents.root
    reasons = "; ".join(reason for _, reason in wrong)
    if not name.isdecimal():
        return Finding(name, reasons, _WHOLE)
    if _records_sound(contents, name):
        do = f"Its records are sound: `gradindex verify {root} --rebuild` encodes it again."
    else:
        do = (f"Its records are lost: take segments/{name} from a copy of the index, or give it "
              f"up with `gradindex delete {root} --segment {name}` and append its documents again.")
    return Finding(f"segment {name}", reasons, do)


# ---- with the model


def _check_model(
    root: Path, facts: Manifest, bad: _Bad, given: ModelSource, found: Verified, say: Progress
) -> None:
    """Encode a sample again, and measure the anchors again."""
    left = [segment for segment in facts.segments if segment.name not in bad]
    contents = Contents(root, facts, left)
    fitted = FittedModel(facts, contents.files, given)
    model = fitted.model
    if tensors_digest(model.network) != facts.model["tensors"]:
        found.findings.append(Finding(
            "the model", f"the tensors of {fitted.source.name} are not those of the build, though "
            "its files were taken for them", "Pass the right one with --model."))
        return
    codes = fitted.codes
    chosen = contents.places[
        choose(Stream.VERIFIED_SEQUENCES, facts.code["seed"], len(contents.places), SAMPLE)]
    members = contents.records(chosen)
    say.start("encode", len(members), "sequences")
    again = np.zeros((len(members), facts.code["length"]), dtype=np.float32)

    def run(rows: list[int]) -> np.ndarray:
        return encode_batch(model, codes, [members[row] for row in rows]).float().cpu().numpy()

    lengths = [len(one.tokens) for one in members]
    for rows, vectors in in_batches(lengths, facts.batch_tokens, Splits(), run):
        again[rows] = vectors
        say.update(len(rows))
    say.finish()
    found.encoded = len(members)
    if members:
        _compare_codes(contents, chosen, members, again, found)
    _compare_anchors(contents, fitted, found, say)
    _compare_background(contents, fitted, found)


def _compare_codes(
    contents: Contents, rows: np.ndarray, members: list[Record], again: np.ndarray, found: Verified
) -> None:
    signs = contents.manifest.code["length"] // 8  # bytes
    encoded = CodeIndex(8 * signs).encode(again)
    changed = contents.codes_of(rows)[:, :signs] ^ encoded[:, :signs]
    differ = np.unpackbits(changed, axis=1).mean(axis=1)
    differ[contents.rows["norm"][rows] == 0] = 0  # the signs of a gradient of zero are rounding
    found.same_bits = float(1 - differ.mean())
    norms = np.linalg.norm(again.astype(np.float64), axis=1)
    off = np.abs(norms - contents.rows["norm"][rows]) > 0.01 * norms + 1e-6
    for row, record in enumerate(members):
        if 1 - differ[row] < SAME_BITS or off[row]:
            found.findings.append(Finding(
                f"sequence {record.id}", f"its code has only {1 - differ[row]:.1%} of the bits "
                "that encoding it again gives, or another length",
                "The model or the curvature is another than the build's, or the index was written "
                "wrongly: build again."))
            return


def _compare_anchors(
    contents: Contents, fitted: FittedModel, found: Verified, say: Progress
) -> None:
    """Measure the anchors again whose sequences are still there."""
    facts = contents.manifest
    rows = {int(one): place for place, one in enumerate(contents.rows["id"])}
    anchors = [one for one in facts.calibration["anchors"] if one[0] in rows and one[1] in rows]
    queries = list(dict.fromkeys(query for query, _, _ in anchors))
    sample = list(dict.fromkeys(other for _, other, _ in anchors))
    if not anchors:
        return
    measured: dict[tuple[int, int], float] = {}
    say.start("score", len(anchors), "pairs")
    for _, exact, records_ in exact_influence(
            fitted.model, fitted.codes, fitted.ekfac,
            contents.records([rows[one] for one in queries]),
            contents.records([rows[one] for one in sample]), facts.batch_tokens,
            fitted.allowance):
        for record, scores in zip(records_, exact, strict=True):
            measured |= {(record.id, other): float(score)
                         for other, score in zip(sample, scores, strict=True)}
    say.update(len(anchors))
    say.finish()
    scale = max(abs(score) for _, _, score in anchors) or 1.0
    errors = [abs(measured[query, other] - score) / scale for query, other, score in anchors]
    found.scores, found.score_error = len(anchors), float(max(errors))
    if not max(errors) <= SAME_SCORE[facts.dtype]:
        query, other, score = anchors[int(np.argmax(errors))]
        found.findings.append(Finding(
            f"sequence {other}", f"its influence on sequence {query} was {score:.6g} at the build "
            f"and is {measured[query, other]:.6g} now",
            "The model or the curvature is another than the build's: build again."))


def _compare_background(contents: Contents, fitted: FittedModel, found: Verified) -> None:
    """Make some background queries again whose sequences are still there."""
    facts = contents.manifest
    if facts.background is None:
        return
    queries = _background(contents.files.path(layout.BACKGROUND), facts)
    there = np.flatnonzero(np.isin(queries.ids, contents.rows["id"]))[:AGAIN]
    rows = np.searchsorted(contents.rows["id"], queries.ids[there])
    for number, record in zip(there, contents.records(rows), strict=True):
        vector = prepare_query(fitted.model, fitted.codes, fitted.ekfac, record)[0]
        stored = queries.vectors[number].astype(np.float64)
        if (queries.digests[number] != row_file.digest_of(record)).any() or \
                not np.linalg.norm(unit(vector) - stored) <= 10 * SAME_SCORE[facts.dtype] + 1e-3:
            found.findings.append(Finding(
                layout.BACKGROUND, f"the query made of sequence {record.id} comes out otherwise",
                "The model or the curvature is another than the build's: build again."))
            return


# ---- mending


def _rebuild(root: Path, given: ModelSource, say: Progress) -> list[str]:
    """Encode damaged segments again from their records, in one commit; the names of those.

    What is damaged is found again, now that nobody else writes.
    """
    with writing(root, "gradindex verify --rebuild", say, damaged=True) as contents:
        facts = contents.manifest
        refuse_unfinished(root, facts)  # whose segments have the numbers that are next
        unseen = Verified()
        bad = _check_files(root, facts, unseen, Progress())
        if _core_damaged(bad):
            return []
        _check_rows(root, facts, bad, unseen, Progress())
        can = [name for name in sorted(bad) if _records_sound(contents, name)]
        if not can:
            return []
        for name in sorted(set(bad) - set(can)):  # which stay as they are, if they can be counted
            _check_countable(contents, name)
        fitted = FittedModel(facts, contents.files, given)
        torch.set_num_threads(facts.threads)
        chosen: list[Segment] = []
        files: dict[str, FileFacts] = {}
        number = facts.next_segment
        say.start("rebuild", sum(one.rows for one in facts.segments if one.name in can),
                  "sequences")
        for segment in facts.segments:
            if segment.name in can:
                new = Segment(f"{number:06d}", segment.rows)
                own = _encode_again(contents, fitted, segment, new, say)
                files |= sealed_files(root, new, own)
                segment, number = new, number + 1
            chosen.append(segment)
        say.finish()
        commit(contents, chosen, set(contents.deleted.tolist()), files, next_segment=number)
    return can


def _check_countable(contents: Contents, name: str) -> None:
    """Raise DamagedIndexError where not even a segment's rows can be read."""
    kept = [segment for segment in contents.manifest.segments if segment.name == name]
    try:
        _ = Contents(contents.root, contents.manifest, kept).rows
    except DamagedIndexError as error:
        raise DamagedIndexError(
            f"{error.wrong}, and its records are lost too, so nothing can be rebuilt beside it. "
            f"Take segments/{name} from a copy of the index, or give it up first: `gradindex "
            f"delete {contents.root} --segment {name}`."
        ) from None


def _encode_again(
    contents: Contents, fitted: FittedModel, segment: Segment, new: Segment, say: Progress
) -> SegmentFacts:
    held = _sound_records(contents, segment.name)
    folder = segment_folder(contents.root, new.name + PARTIAL)
    make_folder(folder)
    written = records.write(folder / "records.lmdb", held)
    segments.write_facts(folder, SegmentFacts(len(held), files={"records.lmdb": written}))
    return encode_segment(fitted.model, fitted.codes, held, folder, fitted.manifest.batch_tokens,
                          say)

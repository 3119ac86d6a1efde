"""Is an index what it was when it was written, and does it still give the right answers?

Every file is digested, every record, row and code is looked at (`damage.py`), and with the model a
sample of codes is encoded again and the scores measured at the build are measured again. What is
damaged is named with what to do about it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradindex.draws import Stream, choose
from gradindex.errors import DamagedIndexError
from gradindex.influence.fitted_model import FittedModel
from gradindex.influence.split_batches import Splits
from gradindex.model.identity import tensors_digest
from gradindex.model.model_source import ModelSource
from gradindex.progress import Progress, size
from gradindex.storage import layout, locks, row_file
from gradindex.storage.code_index import CodeIndex
from gradindex.storage.contents import Contents
from gradindex.storage.manifest import load as load_manifest
from gradindex.storage.records import Record
from gradindex.terminal import shell_word
from indexer.background_queries import unit_vector
from indexer.calibrate import exact_influence, own_query_vectors
from indexer.encode import encode_batches
from indexer.upkeep.damage import find_damage, read_background_queries, sound_records
from indexer.upkeep.rebuild import rebuild as rebuild_segments

VERIFIED_SAMPLE = 64  # sequences encoded again
AGAIN = 8  # background queries made again
# Share of a code's bits that must come out again on another machine, or on a GPU in another batch.
SAME_BITS = {"float64": 0.99, "float32": 0.99, "bfloat16": 0.95, "float16": 0.97}
SAME_SCORE = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
_WHOLE = "Every search needs it: take it from a copy of the index, or build again."


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
        """Whether nothing is damaged."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON types."""
        return {"schema": 1, "sound": self.sound, **asdict(self)}

    def lines(self) -> list[str]:
        """What is said of it to people."""
        lines = [f"rebuilt: {', '.join(self.rebuilt)}"] if self.rebuilt else []
        lines.append(f"{self.files:,} files ({size(self.bytes)}) digested, {self.records:,} "
                     "records checked")
        if self.same_bits is not None:
            lines.append(f"{self.encoded} sequences encoded again: {self.same_bits:.4%} of their "
                         "bits are the same")
        if self.score_error is not None:
            lines.append(f"{self.scores} scores measured again: within {self.score_error:.1e} of "
                         "the largest")
        lines += [f"damaged: {finding.what}\n  {finding.wrong}\n  {finding.do}"
                  for finding in self.findings]
        return [*lines, "sound" if self.sound else f"{len(self.findings)} damaged"]


def verify(
    index: str | Path, model: Any = None, tokenizer: Any = None, *, device: str = "auto",
    no_model: bool = False, rebuild: bool = False, trust_remote_code: bool = False,
    allow_pickle: bool = False, adapter: str | None = None, device_map: str | None = None,
    progress: Progress | None = None,
) -> Verified:
    """Check an index thoroughly.

    `no_model` leaves out what needs the model. `rebuild` encodes damaged segments again from their
    records, where those are sound. Raises InputError where there is no index or no model,
    IndexMismatchError for another model. A damaged index is no error here but a finding.
    """
    source = ModelSource(model, tokenizer, device, trust_remote_code, allow_pickle,
                         adapter_name=adapter, device_map=device_map)
    progress, folder = progress or Progress(), Path(index)
    verified = _verified(folder, source, no_model, rebuild, progress)
    if not verified.rebuilt:
        return verified
    again = _verified(folder, source, no_model, False, progress)
    again.rebuilt = verified.rebuilt
    return again


def _verified(
    index: Path, source: ModelSource, no_model: bool, rebuild: bool, progress: Progress
) -> Verified:
    """Look at everything once. Where segments were rebuilt, it ends there: look again."""
    verified = Verified()
    reader = locks.Reader(index)  # so that nobody removes a file of this state meanwhile

    # 1) the manifest
    try:
        manifest = load_manifest(index)
    except DamagedIndexError as error:
        verified.findings.append(Finding(layout.MANIFEST, error.wrong, _WHOLE))
        return verified

    # 2) files, rows, records
    damage = find_damage(index, manifest, progress)
    verified.files, verified.bytes = damage.files, damage.bytes
    verified.records = damage.records

    # 3) what can be mended is; the writer waits for no reader, this one least of all
    if rebuild and damage.reasons and not damage.outside_segments:
        del reader
        verified.rebuilt = rebuild_segments(index, source, progress)
        if verified.rebuilt:
            return verified
    for name, reasons in sorted(damage.reasons.items()):
        verified.findings.append(_finding(Contents(index, manifest), name, reasons))

    # 4) with the model, what segments are left
    if not no_model and not damage.outside_segments:
        sound = [one for one in manifest.segments if one.name not in damage.reasons]
        _check_model(Contents(index, manifest, sound), source, verified, progress)
    return verified


def _finding(contents: Contents, name: str, reasons: list[str]) -> Finding:
    """What is said of a damaged segment, or of a file outside all segments."""
    index = shell_word(contents.root)
    if not name.isdecimal():
        return Finding(name, "; ".join(reasons), _WHOLE)
    if sound_records(contents, name):
        do = f"Its records are sound: `gradindex verify {index} --rebuild` encodes it again."
    else:
        do = (f"Its records are lost: take {layout.SEGMENTS}/{name} from a copy of the index, or "
              f"give it up with `gradindex delete {index} --segment {name}` and append its "
              "documents again.")
    return Finding(f"segment {name}", "; ".join(reasons), do)


# ---- with the model


def _check_model(
    contents: Contents, source: ModelSource, verified: Verified, progress: Progress
) -> None:
    """Encode a sample again, and measure the anchors again."""
    manifest = contents.manifest
    fitted = FittedModel(manifest, contents.files, source)
    if wrong := list(_wrong_models(fitted)):
        verified.findings += wrong
        return
    rows = contents.places[choose(
        Stream.VERIFIED_SEQUENCES, manifest.code["seed"], len(contents.places), VERIFIED_SAMPLE)]
    records = contents.records(rows)
    progress.start("encode", len(records), "sequences")
    again = np.zeros((len(records), manifest.code["length"]), dtype=np.float32)
    for batch, vectors in encode_batches(fitted.model, fitted.codes, records,
                                         manifest.batch_tokens, Splits()):
        again[batch] = vectors
        progress.update(len(batch))
    progress.finish()
    verified.encoded = len(records)
    if records:
        _compare_codes(contents, rows, records, again, verified)
    _compare_anchors(contents, fitted, verified, progress)
    _compare_background_queries(contents, fitted, verified)


def _wrong_models(fitted: FittedModel) -> Iterator[Finding]:
    """The models of an index that aren't there, or are others."""
    # its files have the build's digest, or it was given as an object; the weights decide
    model, manifest = fitted.model, fitted.manifest
    if tensors_digest(model.network) != manifest.model["tensors"]:
        yield Finding("the model", f"the tensors of {fitted.source.name} are not those of the "
                      "build, though its files were taken for them", "Pass the right one with "
                      "--model.")
    for name, facts in manifest.also.items():
        what, do = f"the model {name}", f"Say where it is with --model {name}=PATH."
        if name in fitted.absent:
            yield Finding(what, f"can't be loaded: {fitted.absent[name]}", do)
        elif tensors_digest(model.member(name).network) != facts["tensors"]:
            yield Finding(what, "has other tensors than at the build, though its files were taken "
                          "for them", do)


def _compare_codes(
    contents: Contents, rows: np.ndarray, records: list[Record], again: np.ndarray,
    verified: Verified,
) -> None:
    """Compare the codes and norms of some rows with vectors `again` [n, K] made anew."""
    signs = contents.manifest.code["length"] // 8  # bytes
    # signs alone; the length of a vector is compared below
    encoded = CodeIndex(8 * signs).encode(again)
    changed = contents.codes_of(rows)[:, :signs] ^ encoded[:, :signs]
    differ = np.unpackbits(changed, axis=1).mean(axis=1)
    differ[contents.rows["norm"][rows] == 0] = 0  # the signs of a gradient of zero are rounding
    verified.same_bits = float(1 - differ.mean())
    norms = np.linalg.norm(again.astype(np.float64), axis=1)
    off = np.abs(norms - contents.rows["norm"][rows]) > 0.01 * norms + 1e-6
    for row, record in enumerate(records):
        if 1 - differ[row] < SAME_BITS[contents.manifest.dtype] or off[row]:
            verified.findings.append(Finding(
                f"sequence {record.id}", f"its code has only {1 - differ[row]:.1%} of the bits "
                "that encoding it again gives, or another length",
                "The model or the curvature is another than the build's, or the index was written "
                "wrongly: build again."))
            return


def _compare_anchors(
    contents: Contents, fitted: FittedModel, verified: Verified, progress: Progress
) -> None:
    """Measure the anchors again whose sequences are still there."""
    manifest = contents.manifest
    rows = {sequence: row for row, sequence in enumerate(contents.rows["id"].tolist())}
    anchors = [(query, sequence, score)
               for query, sequence, score in manifest.calibration["anchors"]
               if query in rows and sequence in rows]
    # each query and each sequence once, in order; measured is every pair of them
    queries = list(dict.fromkeys(query for query, _, _ in anchors))
    sample = list(dict.fromkeys(sequence for _, sequence, _ in anchors))
    if not anchors:
        return
    measured: dict[tuple[int, int], float] = {}
    progress.start("score", len(anchors), "pairs")
    for scored in exact_influence(
            fitted.model, fitted.codes, fitted.ekfac,
            contents.records([rows[query] for query in queries]),
            contents.records([rows[sequence] for sequence in sample]), manifest.batch_tokens,
            fitted.allowance):
        for record, scores in zip(scored.queries, scored.influence, strict=True):
            measured |= {(record.id, sequence): float(score)
                         for sequence, score in zip(sample, scores, strict=True)}
    progress.update(len(anchors))
    progress.finish()
    scale = max(abs(score) for _, _, score in anchors) or 1.0
    errors = [abs(measured[query, sequence] - score) / scale for query, sequence, score in anchors]
    verified.scores, verified.score_error = len(anchors), float(max(errors))
    if not max(errors) <= SAME_SCORE[manifest.dtype]:  # so that NaN is found, too
        query, sequence, score = anchors[int(np.argmax(errors))]
        verified.findings.append(Finding(
            f"sequence {sequence}", f"its influence on sequence {query} was {score:.6g} at the "
            f"build and is {measured[query, sequence]:.6g} now",
            "The model or the curvature is another than the build's: build again."))


def _compare_background_queries(
    contents: Contents, fitted: FittedModel, verified: Verified
) -> None:
    """Make some background queries again whose sequences are still there."""
    manifest = contents.manifest
    if manifest.background is None:
        return
    queries = read_background_queries(contents.files.path(layout.BACKGROUND), manifest)
    # a query outlives its sequence: what was deleted and compacted away can't be asked again
    numbers = np.flatnonzero(np.isin(queries.ids, contents.rows["id"]))[:AGAIN]
    rows = np.searchsorted(contents.rows["id"], queries.ids[numbers])
    within = 10 * SAME_SCORE[manifest.dtype] + 1e-3  # stored in float16
    records = contents.records(rows)
    vectors = own_query_vectors(
        fitted.model, fitted.codes, fitted.ekfac, records, manifest.batch_tokens)
    for number, record, vector in zip(numbers, records, vectors, strict=True):
        stored = queries.vectors[number].astype(np.float64)
        if (queries.digests[number] != row_file.digest_of(record)).any() or \
                not np.linalg.norm(unit_vector(vector) - stored) <= within:
            verified.findings.append(Finding(
                layout.BACKGROUND, f"the query made of sequence {record.id} comes out otherwise",
                "The model or the curvature is another than the build's: build again."))
            return

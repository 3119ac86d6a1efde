"""What an index is, as facts and in people's words."""

from collections import Counter
from pathlib import Path
from typing import Any

import pydantic

from gradindex.progress import shares, size
from gradindex.results import GENERIC
from gradindex.storage import layout, locks, manifest, sealed_json
from gradindex.storage.contents import Contents
from gradindex.storage.layout import code_bytes
from gradindex.terminal import visible

SHOWN = 10  # quarantined sequences


def describe(index: Path) -> dict[str, Any]:
    """Everything `gradindex info` says, as plain JSON types; sizes in bytes.

    Raises InputError where there is no index, DamagedIndexError for missing or changed files.
    """
    reader = locks.Reader(index)  # or a compaction could take the files away meanwhile
    facts = manifest.load(index)
    contents = Contents(index, facts)
    for problem in manifest.problems(contents.files, facts):
        raise problem.error
    quarantined = _quarantined(contents)
    untracked = _untracked(contents)
    del reader
    sizes = Counter(dict.fromkeys(layout.PARTS, 0))
    for name, about in facts.files.items():
        sizes[layout.part_of(name)] += about.size
    return {
        "index": str(index), "format": facts.format, "generation": facts.generation,
        "digest": manifest.digest_of(facts),
        "model": facts.model, "dtype": facts.dtype,
        "task": facts.task, "documents": facts.documents, "sequences": facts.sequences,
        "sequence_length": facts.sequence_length, "tokens": facts.tokens,
        "scored_tokens": facts.scored_tokens, "skipped": facts.skipped,
        "duplicates": facts.duplicates, "deleted": facts.deleted,
        "quarantined": quarantined, "appended": facts.appended,
        "train_sequences": facts.train_sequences, "next_id": facts.next_id,
        "modules": [module.name for module in facts.modules],
        "layers": facts.layers, "parameter_share": facts.parameter_share,
        "untracked": untracked, "fit": facts.fit,
        "effective_dimension": sum(facts.effective_dimension.values()),
        "damping": facts.damping,
        "code": {**facts.code, "bytes": code_bytes(facts.code["length"])},
        "calibration": facts.calibration, "background": facts.background,
        "segments": len(facts.segments), "bytes": dict(sizes),
        "data": facts.plan.data, "versions": facts.versions,
    }


def _untracked(contents: Contents) -> dict[str, float]:
    """Shares of the model's parameters without curvature, largest first; {} of earlier versions."""
    try:
        found = sealed_json.parse(contents.files.read(layout.FIT)).get("untracked", {})
        known = pydantic.TypeAdapter(dict[str, float]).validate_python(found, strict=True)
    except ValueError:
        raise contents.files.damaged(layout.FIT, "can't be read") from None
    return dict(sorted(known.items(), key=lambda one: (-one[1], one[0])))


def _quarantined(contents: Contents) -> dict[int, str]:
    """Why sequences have no code, by id; the deleted aren't counted."""
    if not contents.manifest.quarantined:
        return {}
    deleted = set(contents.deleted.tolist())
    return {one: why for segment in contents.segments
            for one, why in contents.reader(segment).facts().quarantined.items()
            if one not in deleted}


def summary(facts: dict[str, Any]) -> str:
    """The same in a dozen lines for people."""
    model, code, bytes_ = facts["model"], facts["code"], facts["bytes"]
    revision = f" @ {model['revision']}" if model["revision"] else ""
    skipped = ", ".join(f"{count:,} × {why}" for why, count in sorted(facts["skipped"].items()))
    sources = ", ".join(source["name"] for source in facts["data"][:3])
    more = f" and {len(facts['data']) - 3} more" if len(facts["data"]) > 3 else ""
    n_train = f"{facts['train_sequences']:,}" if facts["train_sequences"] else \
        f"{facts['next_id']:,} (taken as the number ever indexed)"
    rows = [
        ("index", f"{facts['index']}, format {facts['format']}, commit {facts['generation']}"),
        ("model", f"{model['name']}{revision}, weights {str(model['tensors'])[:12]}, "
                  f"{facts['dtype']}"),
        ("data", f"{facts['documents']:,} documents from {sources}{more}"),
        ("sequences", f"{facts['sequences']:,} of at most {facts['sequence_length']} tokens in "
                      f"{facts['segments']} segment{'s' * (facts['segments'] != 1)}, "
                      f"{facts['tokens']:,} tokens, "
                      f"{facts['scored_tokens']:,} scored"),
        *([("skipped", skipped)] if skipped else []),
        *([("duplicates", f"{facts['duplicates']:,} sequences equal an earlier one")]
          if facts["duplicates"] else []),
        *([("deleted", f"{facts['deleted']:,} sequences are in no answer; `gradindex compact` "
                       "removes their text")] if facts["deleted"] else []),
        *([("quarantined", _few(facts["quarantined"]))] if facts["quarantined"] else []),
        *([("appended", _appended(facts["appended"]))] if facts["appended"] else []),
        ("N_train", n_train),
        ("modules", f"{len(facts['modules'])} linear maps in {len(facts['layers'])} layers, "
                    f"{facts['parameter_share']:.1%} of the parameters"),
        *([("not tracked", shares(facts["untracked"]))] if facts["untracked"] else []),
        ("curvature", f"EK-FAC on {facts['fit']['sequences']:,} sequences, labels of the "
                      f"{facts['fit']['labels']}, damping {facts['damping']} × mean eigenvalue, "
                      f"effective dimension {facts['effective_dimension']:,.0f}"),
        ("codes", f"{code['length']:,} bits, {code['bytes']:,} bytes a sequence, "
                  f"error constant c = {facts['calibration']['c']}, "
                  f"slope {facts['calibration']['slope']}"),
        ("generic", _background(facts["background"], bytes_["background"])),
        ("size", f"{size(bytes_['codes'])} of codes, {size(bytes_['curvature'])} of curvature, "
                 f"{size(bytes_['words'])} of TF-IDF, {size(bytes_['text'])} of training text (the "
                 "index holds the text itself)"),
    ]
    return "\n".join(f"{name:<11} {visible(text)}" for name, text in rows)


def _few(quarantined: dict[int, str]) -> str:
    shown = "; ".join(f"{one} ({why})" for one, why in list(quarantined.items())[:SHOWN])
    more = f"; and {len(quarantined) - SHOWN} more" if len(quarantined) > SHOWN else ""
    return f"{len(quarantined):,} sequences have no code: {shown}{more}"


def _background(facts: dict[str, int] | None, bytes_: int) -> str:
    if facts is None:
        return "background queries: none (built by an earlier version)"
    return (f"background queries: {facts['queries']} of the index's own sequences, thresholds of "
            f"{facts['sample']:,} ({size(bytes_)}); what comes up for {GENERIC:.0%} is generic")


def _appended(appends: list[dict[str, Any]]) -> str:
    total = sum(one["sequences"] for one in appends)
    last = appends[-1]
    times = "once" if len(appends) == 1 else f"{len(appends)} times"
    return (f"{total:,} sequences, {times}; Λ of the last was {last['drift']:.2f} ± "
            f"{last['drift_error']:.2f} times that of the data before")

"""What an index is, as data and in words."""

import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pydantic

from gradindex.progress import shares, size
from gradindex.results import GENERIC
from gradindex.storage import layout, locks, sealed_json
from gradindex.storage.contents import Contents
from gradindex.storage.layout import code_bytes
from gradindex.storage.manifest import MemberFacts, digest_of, problems
from gradindex.storage.manifest import load as load_manifest
from gradindex.terminal import visible

QUARANTINED_SHOWN = 10  # quarantined sequences


def describe(path: Path) -> dict[str, Any]:
    """Everything `gradindex info` says, as plain JSON types; sizes in bytes.

    Raises InputError where there is no index, DamagedIndexError for missing or changed files.
    """
    reader = locks.Reader(path)  # or a compaction could take the files away meanwhile
    manifest = load_manifest(path)
    contents = Contents(path, manifest)
    for problem in problems(contents.files, manifest):
        raise problem.error
    quarantined = _quarantined(contents)
    untracked = _untracked(contents)
    del reader  # what follows is in the manifest, which is read
    # every part is named, also where nothing is of it: readers of JSON look for keys
    sizes = Counter(dict.fromkeys(layout.PARTS, 0))
    for name, file in manifest.files.items():
        sizes[layout.part_of(name)] += file.size
    return {
        "index": str(path), "format": manifest.format, "generation": manifest.generation,
        "digest": digest_of(manifest),
        "model": manifest.model, "also": manifest.also, "dtype": manifest.dtype,
        "task": manifest.task.name, "kind": manifest.kind,
        "labels": list(manifest.plan.labels), "adapter": manifest.plan.adapter,
        "beta": manifest.task.beta if manifest.task.name == "preference" else None,
        "reference": manifest.plan.reference, "derived": list(manifest.plan.derive),
        "documents": manifest.documents, "sequences": manifest.sequences,
        "sequence_length": manifest.sequence_length, "tokens": manifest.tokens,
        "scored_tokens": manifest.scored_tokens, "skipped": manifest.skipped,
        "duplicates": manifest.duplicates, "deleted": manifest.deleted,
        "quarantined": quarantined, "appended": manifest.appended,
        "train_sequences": manifest.train_sequences, "next_id": manifest.next_id,
        "modules": [module.name for module in manifest.modules],
        "kinds": dict(Counter(module.kind for module in manifest.modules)),
        "layers": manifest.layers, "parameter_share": manifest.parameter_share,
        "untracked": untracked, "fit": manifest.fit,
        "effective_dimension": sum(manifest.effective_dimension.values()),
        "damping": manifest.damping,
        "code": {**manifest.code, "bytes": code_bytes(manifest.code["length"])},
        "calibration": manifest.calibration, "background": manifest.background,
        "segments": len(manifest.segments), "bytes": dict(sizes),
        "data": manifest.plan.data, "versions": manifest.versions,
    }


def _untracked(contents: Contents) -> dict[str, float]:
    """Shares of the model's parameters without curvature, largest first; {} of earlier versions."""
    try:
        fit = sealed_json.parse(contents.files.read(layout.FIT))
        shares = pydantic.TypeAdapter(dict[str, float]).validate_python(
            fit.get("untracked", {}), strict=True)
    except ValueError:
        raise contents.files.damaged(layout.FIT, "can't be read") from None
    return dict(sorted(shares.items(), key=lambda entry: (-entry[1], entry[0])))


def _quarantined(contents: Contents) -> dict[int, str]:
    """Why sequences have no code, by id; the deleted aren't counted."""
    if not contents.manifest.quarantined:
        return {}
    # a sequence may be quarantined first and deleted later
    deleted = set(contents.deleted.tolist())
    return {id_: why for segment in contents.segments
            for id_, why in contents.reader(segment).facts().quarantined.items()
            if id_ not in deleted}


def summary(about: dict[str, Any], width: int | None = None) -> str:
    """What `describe` gives, in a dozen lines for people, broken at a `width` [not at all]."""
    model, code, sizes = about["model"], about["code"], about["bytes"]
    revision = f" @ {model['revision']}" if model["revision"] else ""
    skipped = ", ".join(f"{count:,} × {why}" for why, count in sorted(about["skipped"].items()))
    data = [source["name"] for read in (about, *about["appended"]) for source in read["data"]]
    sources = ", ".join(data[:3])
    more = f" and {len(data) - 3} more" if len(data) > 3 else ""
    n_train = f"{about['train_sequences']:,}" if about["train_sequences"] else \
        f"unknown, so no nats are told: --train-sequences says it ({about['next_id']:,} " \
        "sequences were ever indexed)"
    # a line only where there is something to say: most indexes were never appended to
    rows = [
        ("index", f"{about['index']}, format {about['format']}, commit {about['generation']}"),
        ("model", f"{model['name']}{revision}" + f", adapter {about['adapter']}" * bool(
            about["adapter"]) + f", weights {str(model['tensors'])[:12]}, {about['dtype']}"),
        *([("also", ", ".join(f"{name} ({_short(facts)})" for name, facts in
                              about["also"].items()))] if about["also"] else []),
        ("task", _task(about)),
        ("data", f"{about['documents']:,} documents from {sources}{more}"),
        ("sequences", f"{about['sequences']:,} of at most {about['sequence_length']} tokens in "
                      f"{about['segments']} segment{'s' * (about['segments'] != 1)}, "
                      f"{about['tokens']:,} tokens" + (
                          f", {about['scored_tokens']:,} scored" * (about["task"] == "causal"))),
        *([("skipped", skipped)] if skipped else []),
        *([("duplicates", f"{about['duplicates']:,} sequences equal an earlier one")]
          if about["duplicates"] else []),
        *([("deleted", f"{about['deleted']:,} sequences are in no answer; `gradindex compact` "
                       "removes their text")] if about["deleted"] else []),
        *([("quarantined", _few(about["quarantined"]))] if about["quarantined"] else []),
        *([("appended", _appended(about["appended"]))] if about["appended"] else []),
        ("N_train", n_train),
        ("modules", f"{_modules(about)}, {about['parameter_share']:.1%} of the parameters"),
        *([("not tracked", shares(about["untracked"]))] if about["untracked"] else []),
        ("curvature", f"EK-FAC on {about['fit']['sequences']:,} sequences, {_fitted_on(about)}, "
                      f"damping {about['damping']} × mean eigenvalue, "
                      f"effective dimension {about['effective_dimension']:,.0f}"),
        ("codes", f"{code['length']:,} bits, {code['bytes']:,} bytes a sequence, "
                  f"error constant c = {about['calibration']['c']}, "
                  f"slope {about['calibration']['slope']}"),
        ("generic", _background_queries(about["background"], sizes["background"])),
        ("size", f"{size(sizes['codes'])} of codes, {size(sizes['curvature'])} of curvature, "
                 f"{size(sizes['words'])} of TF-IDF, {size(sizes['text'])} of training text (the "
                 "index holds the text itself)"),
    ]
    lines = [f"{name:<11} {visible(text)}" for name, text in rows]
    return "\n".join(lines if width is None else [
        textwrap.fill(line, max(40, width), subsequent_indent=" " * 12, break_on_hyphens=False)
        for line in lines])


def _short(facts: MemberFacts) -> str:
    """Where another model of an index was, and which weights it has."""
    revision = f" @ {facts['revision']}" if facts["revision"] else ""
    return f"{facts['name']}{revision}, weights {facts['tensors'][:12]}"


def _modules(about: dict[str, Any]) -> str:
    """How many maps are tracked, of which kinds where there are several, and in how many layers."""
    kinds = about["kinds"]
    blocks = len(about["layers"]) - ("head" in kinds) - ("embeddings" in kinds)
    of_kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    places = [*[f"{blocks} layer{'s' * (blocks != 1)}"] * (blocks > 0),
              *["the embeddings"] * ("embeddings" in kinds), *["the head"] * ("head" in kinds)]
    return f"{len(about['modules'])} linear maps" + f" ({of_kinds})" * (len(kinds) > 1) + \
        f" in {', '.join(places[:-1])}{' and ' * (len(places) > 1)}{places[-1]}"


def _task(about: dict[str, Any]) -> str:
    """What the model was trained for, with what belongs to that."""
    parts = [about["task"]]
    if about["labels"]:
        parts.append(f"classes {', '.join(about['labels'])}")
    if about["task"] == "preference":
        of = about["reference"]["name"] if about["reference"] else "what the data say"
        parts.append(f"β {about['beta']:g}, reference {of}")
    if about["derived"]:
        parts.append(f"derived {', '.join(about['derived'])}")
    return "; ".join(parts)


def _fitted_on(about: dict[str, Any]) -> str:
    """What stood in the place of labels where the curvature was fitted."""
    two = about["task"] in ("reward", "preference") or len(about["labels"]) == 2
    if two and about["fit"]["labels"] == "model":
        return "both outcomes by their chances"
    return f"labels of the {about['fit']['labels']}"


def _few(quarantined: dict[int, str]) -> str:
    """The first of the sequences without a code, and why they have none."""
    few = list(quarantined.items())[:QUARANTINED_SHOWN]
    more = len(quarantined) - len(few)
    return f"{len(quarantined):,} sequences have no code: " + \
        "; ".join(f"{id_} ({why})" for id_, why in few) + f"; and {more} more" * (more > 0)


def _background_queries(background: dict[str, int] | None, size_in_bytes: int) -> str:
    """What the index's background queries are, and what they are for."""
    if background is None:
        return "background queries: none (built by an earlier version)"
    return (f"background queries: {background['queries']} of the index's own sequences, "
            f"thresholds of {background['sample']:,} ({size(size_in_bytes)}); what comes up for "
            f"{GENERIC:.0%} is generic")


def _appended(appends: list[dict[str, Any]]) -> str:
    """How much was appended, and how far the last of it lies from the data before."""
    total = sum(append["sequences"] for append in appends)
    last = appends[-1]
    times = "once" if len(appends) == 1 else f"{len(appends)} times"
    return (f"{total:,} sequences, {times}; Λ of the last was {last['drift']:.2f} ± "
            f"{last['drift_error']:.2f} times that of the data before")

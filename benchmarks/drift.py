"""How far Λ of appended data drifts from the build's: like data, and data ever less like them.

    make demo; python -m benchmarks.drift [.demo]

Builds an index on a random part of the demo's documents and appends others: documents of the same
kind (several times, to see what is accident), only code, only docstrings, the same documents with
their words shuffled, with their letters reversed, and random tokens of the vocabulary.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import gradindex
from gradindex.storage import manifest
from indexer.upkeep.append import Drift

BASE, EACH, REPEATS = 1500, 256, 4


def main() -> None:
    """Print a table of drifts."""
    flags = argparse.ArgumentParser()
    flags.add_argument("demo", nargs="?", type=Path, default=Path(".demo"))
    demo = flags.parse_args().demo
    documents = [json.loads(line) for line in (demo / "documents.jsonl").open()]
    random.Random(0).shuffle(documents)
    base, rest = documents[:BASE], documents[BASE:]
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        built = gradindex.build(str(demo / "model"), base, index, fit_sequences=BASE)
        tokenizer = built.snapshot.tokenizer
        print(f"{BASE:,} sequences fitted; of each kind {EACH} appended and {EACH} old compared")
        print(f"{'appended':<28}{'Λ new / old':>12}   warned")
        for name, some in kinds(rest, tokenizer):
            gradindex.append(index, some)
            last = manifest.load(index).appended[-1]
            ratio, error = last["drift"], last["drift_error"]
            gradindex.delete(index, range(last["first"], last["first"] + last["sequences"]))
            warned = "yes" if Drift(ratio, error, EACH).warns else "no"
            print(f"{name:<28}{f'{ratio:.2f} ± {error:.2f}':>12}   {warned}")


def kinds(rest, tokenizer):
    """What is appended, by name."""
    dice = random.Random(1)
    for number in range(REPEATS):
        yield f"the same kind, part {number + 1}", rest[number * EACH : (number + 1) * EACH]
    for kind in sorted({document["kind"] for document in rest}):
        only = [document for document in rest if document["kind"] == kind][:EACH]
        if len(only) == EACH:
            yield f"only {kind}", only
    some = rest[:EACH]
    yield "words shuffled", [{"text": " ".join(dice.sample(words := one["text"].split(),
                                                           len(words)))} for one in some]
    yield "letters reversed", [{"text": one["text"][::-1]} for one in some]
    yield "random tokens", [{"text": tokenizer.decode(
        [dice.randrange(len(tokenizer)) for _ in range(48)])} for _ in some]


if __name__ == "__main__":
    main()

"""Does the model lose a completion without the sequences that a search found?

    make demo                                 # once
    python examples/retrain_check.py          # trains the demo's model three times: some minutes

The demo's model is trained again, from the same start: on all documents, without the `--remove`
most influential ones, and without as many random ones. The scores are of one fit to the model as it
is, so this is what they claim to predict, and an honest look at whether they do. One retraining of
each is an anecdote: benchmarks/lds.py makes a study of it, with its noise.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import transformers

import gradindex
from gradindex.demo import small_model
from gradindex.demo.questions import QUERIES
from gradindex.progress import stderr_progress


def main() -> None:
    """Retrain the demo's model with and without what was found."""
    parser = argparse.ArgumentParser(description="Retrain without what a search found.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(".demo"))
    parser.add_argument("--remove", type=int, default=20)
    parser.add_argument("--prompt", default=QUERIES[0][0])
    parser.add_argument("--completion", default=QUERIES[0][1])
    given = parser.parse_args()

    facts = json.loads((given.folder / "demo.json").read_text())
    settings = small_model.DemoSettings(**facts["settings"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.folder / "model")
    lines = (given.folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line) for line in lines]

    index = gradindex.open(given.folder / "index")
    found = index.search(prompt=given.prompt, completion=given.completion, k=given.remove)
    top = {hit.user_id for hit in found}
    predicted = sum(hit.influence for hit in found) / len(documents)
    drawn = random.Random(0).sample([one["id"] for one in documents], given.remove)

    def log_p_without(left_out: set[Any]) -> float:
        kept = [one for one in documents if one["id"] not in left_out]
        model = small_model.new_model(settings)  # from the same start each time
        sequences = small_model.windows(kept, tokenizer, settings.length)
        small_model.train(model, sequences, settings, stderr_progress())
        each = small_model.log_probability(model, tokenizer, given.prompt, given.completion)
        return each * found.query.scored

    whole = log_p_without(set())
    for what, left_out in ((f"without the top {len(top)}", top),
                           (f"without {len(drawn)} at random", set(drawn))):
        log_p = log_p_without(left_out)
        print(f"{what}: log p {log_p:.2f} nats, {log_p - whole:+.2f} against all documents")
    print(f"the scores of the top {len(top)}, to first order: {-predicted:+.2f} nats without them")


if __name__ == "__main__":
    main()

"""Index records that are in memory, with a model that is loaded already; then ask.

    make demo                                 # once: a small model, and the documents it read
    python examples/own_model.py              # an index of 200 of them
    python examples/own_model.py --model YOUR_MODEL --data YOUR.jsonl --out your.index \\
        --prompt "Water is composed of" --completion " hydrogen and oxygen."
"""

import argparse
import json
from pathlib import Path

import transformers

import gradindex


def main() -> None:
    """Build an index from objects, and search it."""
    parser = argparse.ArgumentParser(description="Index records in memory, then ask.")
    parser.add_argument("--model", default=".demo/model")
    parser.add_argument("--data", type=Path, default=Path(".demo/documents.jsonl"))
    parser.add_argument("--out", default="own.index")
    parser.add_argument("--records", type=int, default=200, help="how many of the data's records")
    parser.add_argument("--prompt", default="Write a message with severity")
    parser.add_argument("--completion", default=" 'ERROR' on the root logger")
    given = parser.parse_args()

    # Any model that transformers can load will do. It is put in evaluation mode and frozen.
    model = transformers.AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)

    # Records are dictionaries, in anything that can be read more than once: a list, a Dataset.
    lines = given.data.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines[: given.records]]

    # Fits the curvature and encodes every sequence. The same call goes on where a killed one was,
    # and does nothing where the index is complete.
    own_id = next((name for name in ("id", "url") if name in records[0]), None)
    index = gradindex.build(model, records, given.out, tokenizer=tokenizer, id_field=own_id,
                            fit_sequences=512)

    # The most positive influence on log p(completion | prompt), scored exactly.
    result = index.search(prompt=given.prompt, completion=given.completion, k=min(5, len(index)))
    for rank, hit in enumerate(result, 1):
        print(f"{rank}  {hit.influence:+12,.1f}  {hit.user_id}  "
              f"{hit.text[:60]!r}")
    print(f"of the true top {result.recall.k}, an estimated {result.recall.estimate:.1%} are here")

    # What the strongest hit's tokens add; a token's share belongs to predicting what follows it.
    best = result[0]
    strongest = sorted(zip(best.token_influence, best.tokens, strict=True), reverse=True)[:5]
    print("its strongest tokens:", ", ".join(f"{piece!r} {share:+,.1f}"
                                             for share, piece in strongest))


if __name__ == "__main__":
    main()

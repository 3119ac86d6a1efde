"""Answer a file of questions together, and put every hit into one table.

    make demo                                 # once
    python examples/many_queries.py           # examples/questions.jsonl → hits.parquet
    python examples/many_queries.py your.index --queries your.jsonl --out your.parquet

All questions share one scan of the codes and one pass of rescoring, so a hundred take little more
than one. Needs pandas. The same on the command line, a result a line:

    gradindex search .demo/index --queries examples/questions.jsonl -o results.jsonl
"""

import argparse
import json
from pathlib import Path

import pandas

import gradindex

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Search for every question of a file, and write a table."""
    parser = argparse.ArgumentParser(description="A file of questions → one table of hits.")
    parser.add_argument("index", nargs="?", default=".demo/index")
    parser.add_argument("--queries", type=Path, default=HERE / "questions.jsonl")
    parser.add_argument("--out", type=Path, default=Path("hits.parquet"))
    parser.add_argument("-k", type=int, default=10)
    given = parser.parse_args()

    index = gradindex.open(given.index)
    lines = given.queries.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines if line.strip()]

    # A result comes as soon as it is exact, in the order of the questions. `recall` lets rescoring
    # of each go on until the answer is as complete as asked, or ten times the usual length.
    rows = []
    for result in index.search_many(questions, k=min(given.k, len(index)), recall=0.95):
        for rank, hit in enumerate(result, 1):
            rows.append({
                "question": result.query.id, "log_p": result.query.log_p,
                "recall": result.recall.estimate, "rank": rank, "influence": hit.influence,
                "nats": hit.nats, "cosine": hit.cosine, "generic_rate": hit.generic_rate,
                "sequence": hit.id, "own_id": hit.user_id, "source": hit.source, "row": hit.row,
                "text": hit.text, **{f"field_{name}": value for name, value in hit.fields.items()},
            })

    table = pandas.DataFrame(rows)
    table.to_parquet(given.out)
    print(table.groupby("question", sort=False)[["log_p", "recall"]].first())
    print(table.loc[table["rank"] == 1, ["question", "influence", "own_id"]].to_string(index=False))
    print(f"{len(table):,} hits of {len(questions)} questions are in {given.out}")


if __name__ == "__main__":
    main()

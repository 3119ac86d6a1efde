"""Readers beside a writer that appends, deletes and compacts: a committed answer, always."""

import json
import threading

import gradindex
from faults.harness import Zygote, fresh
from support.waiting import until


def commit(faults, index, more, rounds):
    """Append, delete and compact so often; what a reader is to answer before and after each."""
    committed = [faults.zygote.run("committed", {"index": index}).report["answer"]]
    for number in range(rounds):
        more.write_text("".join(json.dumps({"text": f"Round {number} brings a fig {n} by the hill.",
                                            "url": f"{number}/{n}", "place": "hill"}) + "\n"
                                for n in range(7)))
        for job, arguments in (("append", {"data": more, "model": faults.model}),
                               ("delete", {"ids": [2 * number, 53 + 7 * number]}), ("compact", {})):
            ended = faults.zygote.run(job, {"index": index, **arguments})
            assert ended.done, str(ended)
            now = faults.zygote.run("committed", {"index": index}).report["answer"]
            if now != committed[-1]:
                committed.append(now)
            else:
                assert job == "compact"
    return committed


def test_readers_beside_a_writer(faults, index_of_faults, tmp_path):
    """Who opens sees a commit, never an earlier one after a later one; who has it open, its own."""
    index = fresh(index_of_faults, tmp_path / "index")
    rounds, readers = faults.size(1, 8), faults.size(1, 3)
    zygotes = [Zygote(faults.model) for _ in range(readers)]
    over, reports = tmp_path / "over", [None] * readers

    def read(number):
        reports[number] = zygotes[number].run("read_until", {
            "index": index, "begun": tmp_path / f"begun-{number}", "over": over})

    threads = [threading.Thread(target=read, args=(number,)) for number in range(readers)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(list(tmp_path.glob("begun-*"))) == readers or any(reports))
        committed = commit(faults, index, tmp_path / "more.jsonl", rounds)
    finally:
        over.touch()
        for thread in threads:
            thread.join()
    for zygote in zygotes:
        zygote.close()
    assert len(set(committed)) == len(committed) == 1 + 2 * rounds
    for ended in reports:
        assert ended.done, str(ended)
        seen, held = ended.report["seen"], ended.report["held"]
        wrong = sum(answer not in committed for answer in [*seen, *held])
        order = [committed.index(answer) for answer in seen if answer in committed]
        faults.count("readers beside a writer", queries=ended.report["queries"],
                     states_seen=len(order), wrong_answers=wrong)
        assert wrong == 0 and order == sorted(order) and len(held) == 1
    faults.count("readers beside a writer", commits=3 * rounds)
    gradindex.compact(index)
    listed = {segment.name for segment in gradindex.open(index).manifest.segments}
    assert {path.name for path in (index / "segments").iterdir()} == listed

"""Random mutations of what the readers read: errors of ours, never another exception or a crash."""

import pytest

from gradindex.storage import layout, records

TARGETS = ["manifest", "record", "jsonl", "segment.json", "rows.npy", "tokens.npz", "vectors.faiss",
           "background.safetensors"]


@pytest.mark.parametrize("target", TARGETS)
def test_readers_take_anything(faults, index_of_faults, tmp_path, target):
    first = index_of_faults / "segments" / "000000"
    seed = first / target
    if target in ("manifest", layout.BACKGROUND):
        seed = index_of_faults / (layout.MANIFEST if target == "manifest" else target)
    if target == "jsonl":
        seed = tmp_path / "few.jsonl"
        seed.write_text("".join(faults.data.read_text().splitlines(keepends=True)[:3]))
    if target == "record":
        seed = tmp_path / "record"
        record, = records.read(first / "records.lmdb", [0])
        seed.write_bytes(records._pack(record))
    for number in range(faults.size(1, 8)):
        ended = faults.zygote.run("fuzz", {
            "target": target, "seed": seed, "number": number,
            "count": faults.size(1000, 5000) // (20 if target == "jsonl" else 1)}, processor=300)
        faults.count(f"mutations fed to the reader of {target}", crashed=int(not ended.done))
        assert ended.done, f"{target}, part {number}: {ended}"
        assert target == "jsonl" or ended.report["refused"] > 0  # bad rows are skipped
        faults.count(f"mutations fed to the reader of {target}", **ended.report)

"""Sums of blocks: added in order, whoever took them."""

import torch

from indexer.fit.running_sums import Block, BlockNotes, Sums


def test_sums_are_added_in_order_whoever_took_them(tmp_path):
    """In float64, block by block: equal to the last bit, in any order of arrival."""
    torch.manual_seed(0)
    parts = [{"x": torch.randn(3, 4)} for _ in range(4)]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for part in parts:
        expected = expected + part["x"].double()

    def block(number):
        notes = BlockNotes([(0, number)], {number: "odd"}) if number == 2 else BlockNotes()
        return Block(parts[number], 10 + number, notes)

    adding, other = (Sums(tmp_path, "a-0", {"x": (3, 4)}, 4) for _ in range(2))
    for number in (2, 1):
        other.keep(number, block(number))
    assert [other.has(number) for number in range(4)] == [False, True, True, False]
    assert list(adding.waiting()) == []
    adding.add(0, block(0))
    noted = []
    for number, found in adding.waiting():
        noted.append((number, found.notes))
        adding.add(number, found)
    assert noted == [(1, BlockNotes()), (2, BlockNotes([(0, 2)], {2: "odd"}))]
    assert other.added() == 3 and [path.name for path in tmp_path.iterdir()] == ["a-0.safetensors"]
    again = Sums(tmp_path, "a-0", {"x": (3, 4)}, 4)
    again.add(3, block(3))
    totals, positions = again.totals()
    assert torch.equal(totals["x"], expected) and positions == 10 + 11 + 12 + 13
    again.remove()
    assert not list(tmp_path.iterdir())

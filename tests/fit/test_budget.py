"""What a fit holds in memory at once."""

from gradindex.modules import Module
from indexer.fit.budget import SOLVER, held_bytes, partitions


def test_partitions_hold_no_more_than_they_may():
    modules = [Module(f"m{n}", n, "mlp", 3 + n, 5, n % 2 == 0) for n in range(6)]
    sizes = [held_bytes([module], 1, 4) for module in modules]
    assert sizes[0] == max(
        12 * (9 + 36), 8 * (9 + 36) + SOLVER * 36 + 8 * (9 + 36), 12 * 18 + 4 * (9 + 36),
        12 * 18 + 12 * (9 + 36))
    assert held_bytes(modules[:2], 2, 8) == max(
        16 * (6 + 18 + 8 + 15), 8 * (6 + 18 + 8 + 15) + SOLVER * 9 + 8 * (6 + 18),
        16 * (18 + 20) + 8 * (6 + 18 + 8 + 15), 8 * (18 + 20) + 16 * (6 + 18) + 8 * 18)
    assert partitions(modules, 1, 4, None) == [modules]
    assert partitions(modules, 1, 4, 1) == [[module] for module in modules]
    for held in (sizes[0] + sizes[1], held_bytes(modules[:4], 1, 4), held_bytes(modules, 1, 4)):
        found = partitions(modules, 1, 4, held)
        assert [one for part in found for one in part] == modules
        for part, after in zip(found, [*found[1:], None], strict=True):
            assert held_bytes(part, 1, 4) <= held or len(part) == 1
            assert after is None or held_bytes([*part, after[0]], 1, 4) > held
    assert partitions(modules, 1, 4, held_bytes(modules[:4], 1, 4))[0] == modules[:4]

"""How many bits a code gets: what is expected of them, and the choice."""

import numpy as np
import pytest

from gradindex.errors import InputError
from gradindex.modules import Module
from indexer import code_length
from indexer.code_length import (
    Spread,
    check_bits,
    choose_bits,
    describe,
    expected_share,
    settle_bits,
    spreads,
)

MAPS = [Module(f"{n}", 0, "mlp", 512, 512, False) for n in range(90)]


@pytest.mark.parametrize("scale, freedom, bits, count", [
    (0.004, 5.0, 1 << 16, 5000), (0.002, 3.0, 1 << 16, 5000), (0.015, 4.0, 1 << 14, 2000),
    (0.002, 50.0, 1 << 18, 1000), (0.001, 4.0, 1 << 14, 300)])
def test_the_expected_share_is_what_a_simulation_finds(scale, freedom, bits, count):
    random, shares = np.random.default_rng(1), []
    for _ in range(300):
        exact = 0.01 + scale * random.standard_t(freedom, count)
        code = exact + code_length.TYPICAL_C / bits**0.5 * random.standard_normal(count)
        first = np.argpartition(-code, 100)[:100]
        shares.append(np.isin(np.argsort(-exact)[:10], first).mean())
    found = expected_share(Spread(0.01, scale, freedom), count, bits)
    assert found == pytest.approx(np.mean(shares), abs=0.03)


def test_everything_is_found_where_everything_is_scored():
    assert expected_share(Spread(0.0, 1e-9, 4.0), 100, 1 << 14) == 1.0


def test_spreads_are_those_that_made_the_cosines():
    random = np.random.default_rng(0)
    scales = (0.02, 0.005, 0.01)
    cosines = np.stack([scale * random.standard_t(4.0, 4000) - 0.001 for scale in scales])
    cosines[1, :50] = np.nan  # gradients that aren't finite
    found = spreads(cosines)
    assert [one.freedom for one in found] == [4.0] * 3
    assert [one.scale for one in found] == pytest.approx(scales, rel=0.1)
    assert [one.center for one in found] == pytest.approx([-0.001] * 3, abs=1e-3)
    assert spreads(np.zeros((2, 9))) == []


def test_bits_are_chosen_by_what_they_find():
    wide, narrow = Spread(0.0, 0.02, 5.0), Spread(0.0, 0.002, 5.0)
    assert choose_bits([wide], 10_000, 0, MAPS) == 1 << 14
    weak = choose_bits([narrow], 10_000, 0, MAPS)
    assert 1 << 14 < weak <= 1 << 19
    assert expected_share(narrow, 10_000, weak) >= code_length.WANTED > \
        expected_share(narrow, 10_000, weak // 2)
    # where nothing helps, none are spent; where curvature takes more anyway, they may be many
    hopeless = Spread(0.0, 2e-5, 5.0)
    assert choose_bits([hopeless], 10_000, 0, MAPS) == 1 << 14
    faint = Spread(0.0, 0.0008, 5.0)
    assert choose_bits([faint], 1000, 0, MAPS) == 1 << 19 < \
        choose_bits([faint], 1000, 10**9, MAPS)
    assert choose_bits([], 1000, 0, MAPS) == 1 << 14


def test_no_more_bits_are_chosen_than_are_filled():
    """LoRA of rank 8 on four maps of 64 dimensions has 512 numbers a map."""
    lora = [Module(f"{n}", 0, "adapter", 8, 64, False) for n in range(8)]
    assert choose_bits([Spread(0.0, 0.002, 5.0)], 10_000, 0, lora) == 4096
    assert choose_bits([], 10, 0, lora[:1]) == 512
    check_bits(None, lora)
    check_bits(4096, lora)
    with pytest.raises(InputError, match=r"--bits 16,384: .* 4,096 numbers.* Use --bits 4096 or"):
        check_bits(1 << 14, lora)


def test_what_is_chosen_is_said():
    said = []
    cosines = 2e-5 * np.random.default_rng(0).standard_t(5.0, (4, 96))
    assert settle_bits(None, cosines, 10_000, 0, MAPS, "causal", said.append) == 1 << 14
    assert "10 scored" not in said[0] and said[0].startswith(
        "codes: of the true top 10, expected among the 100 scored exactly first: "
        "16,384 bits (20.6 MB) 1%, 32,768 bits (41 MB) 1%, 65,536 bits (82 MB) 1%")
    assert "have little in common" in said[1]
    said.clear()
    assert settle_bits(512, cosines, 50, 0, MAPS, "causal", said.append) == 512
    assert said == [describe(spreads(cosines), 50, 512, "causal")] and "512 bits" in said[0]
    assert said[0].endswith("(by queries of half a sequence; of short ones fewer)")
    of_pairs = describe(spreads(cosines), 50, 512, "reward")
    assert of_pairs.endswith("(by queries of the data's own rows)")


def test_maps_that_turn_out_to_have_no_gradient_shorten_the_code():
    lora, said = [Module("0", 0, "adapter", 8, 64, False)], []
    assert settle_bits(1024, np.zeros((2, 9)), 10, 0, lora, "causal", said.append) == 512
    assert said[0].startswith("warning: codes get 512 bits")
    assert settle_bits(64, np.zeros((2, 9)), 10, 0, lora, "causal", said.append) == 64
    assert len(said) == 3

"""The scan of codes on a GPU: its numbers against float64, FAISS's order, and Triton's kernel."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradindex.influence import device_codes
from gradindex.influence.device_codes import DeviceCodes, RoundedQueries
from gradindex.storage.code_index import QUERY_BITS, CodeIndex
from support.needed import library

ROOT = Path(__file__).parent.parent.parent


def coded(rows: int, length: int, seed: int = 0) -> tuple[CodeIndex, np.ndarray]:
    random = np.random.default_rng(seed)
    index = CodeIndex(length)
    vectors = random.standard_normal((rows, length)).astype(np.float32)
    vectors *= random.lognormal(0, 1, (rows, 1)).astype(np.float32)
    index.add(index.encode(vectors))
    return index, vectors


def queries_of(count: int, length: int) -> np.ndarray:
    """Entries of very unlike sizes."""
    random = np.random.default_rng(7)
    return (random.standard_normal((count, length)) *
            random.lognormal(0, 1.5, length)).astype(np.float32)


def truth(index: CodeIndex, queries: np.ndarray) -> np.ndarray:
    """signs · query in float64, times the scale."""
    signs, scales = index.signs(slice(None))
    plus_minus = 2.0 * np.unpackbits(signs, axis=1, bitorder="little") - 1
    return queries.astype(np.float64) @ plus_minus.T * scales


@pytest.mark.parametrize("count", [1, 5, 16, 21])
@pytest.mark.parametrize("room", [1 << 30, 0])
def test_scores_are_signs_times_the_query(count, room, monkeypatch):
    monkeypatch.setattr(device_codes, "TILE", 10 * 512 // 8)
    monkeypatch.setattr(device_codes, "UNPACKED", 7 * 512)
    (one, _), (two, _) = coded(33, 512), coded(8, 512, seed=1)
    queries = queries_of(count, 512)
    codes = DeviceCodes([one, two], 512, torch.device("cpu"), room)
    expected = np.concatenate([truth(one, queries), truth(two, queries)], axis=1)
    found = codes.scores(queries)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert (np.abs(found - expected).max(1) <= 1e-6 * np.abs(expected).max(1)).all()


def test_scores_of_long_codes_are_signs_times_the_query():
    index, _ = coded(40, 131_072)
    queries = queries_of(2, 131_072)
    found, expected = DeviceCodes([index], 131_072, torch.device("cpu"), 0).scores(queries), \
        truth(index, queries)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_tiles_go_on_over_the_ends_of_segments(monkeypatch):
    """Few rows a launch would leave most of a GPU idle; each row is moved once for all queries."""
    monkeypatch.setattr(device_codes, "TILE", 16 * 512 // 8)
    segments = [coded(rows, 512, seed)[0] for seed, rows in enumerate((5, 30, 3))]
    codes = DeviceCodes(segments, 512, torch.device("cpu"), 0)
    assert [len(scales) for _, scales in codes._tiles()] == [16, 16, 6]
    queries, moved = queries_of(21, 512), []
    monkeypatch.setattr(device_codes, "to_device", lambda array, device: (
        moved.append(array.shape), torch.from_numpy(array))[1])
    codes.scores(queries)
    assert moved == [(21, 512), (16, 64), (16,), (16, 64), (16,), (6, 64), (6,)]


def test_the_order_is_that_of_faiss_but_for_its_rounding():
    index, vectors = coded(2000, 1024)
    query = vectors[3] + 0.5 * vectors[5]
    own = DeviceCodes([index], 1024, torch.device("cpu"), 0).scores(query[None])[0]
    theirs = index.scores(query)
    # FAISS quantises a query to 2^QUERY_BITS steps: so far off is a score of its, at five sigma
    step = np.ptp(query) / (2**QUERY_BITS - 1)
    tolerance = 5 * step / 12**0.5 * 1024**0.5 * index.signs(slice(None))[1]
    assert (np.abs(own - theirs) < tolerance).all()
    for a, b in zip(*np.triu_indices(200, 1), strict=True):
        if abs(theirs[a] - theirs[b]) > tolerance[a] + tolerance[b]:
            assert (own[a] > own[b]) == (theirs[a] > theirs[b])


def test_a_query_of_zeros_and_one_that_is_not_finite():
    index, _ = coded(3, 64)
    queries = np.zeros((2, 64), np.float32)
    queries[1, 0] = np.nan
    found = DeviceCodes([index], 64, torch.device("cpu"), 0).scores(queries)
    assert (found[0] == 0).all() and np.isnan(found[1]).all()


KERNEL = """
import numpy as np, torch
from gradindex.influence import device_codes, sign_kernel
random = torch.Generator().manual_seed(0)
for rows, octets, columns in ((70, 64, 16), (5, 72, 32), (130, 8, 64)):
    codes = torch.randint(0, 256, (rows, octets), generator=random, dtype=torch.uint8)
    limbs = torch.randint(-128, 128, (8, octets, columns), generator=random, dtype=torch.int8)
    found = sign_kernel.bits_times_limbs(codes, limbs)
    bits = np.unpackbits(codes.numpy(), axis=1, bitorder="little").astype(np.int64)
    entries = limbs.permute(1, 0, 2).flatten(0, 1).numpy().astype(np.int64)
    assert (found.numpy() == bits @ entries).all()
    assert torch.equal(found, device_codes.plain_bits_times_limbs(codes, limbs))
index = device_codes.CodeIndex(512)
index.add(index.encode(np.random.default_rng(0).standard_normal((20, 512)).astype(np.float32)))
queries = np.random.default_rng(1).standard_normal((3, 512)).astype(np.float32)
found = [device_codes.DeviceCodes([index], 512, torch.device("cpu"), 0).scores(queries)]
device_codes.has_kernel, launch = lambda device: True, sign_kernel.bits_times_limbs
sign_kernel.bits_times_limbs = lambda *given: (print("launched", end=", "), launch(*given))[1]
found.append(device_codes.DeviceCodes([index], 512, torch.device("cpu"), 0).scores(queries))
assert np.array_equal(*found)
print("equal")
"""

# for cards of compute capability 8.0 and above, of which none need be here
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from gradindex.influence import sign_kernel
for capability in (80, 90, 120):
    for columns in (16, 64):
        source = triton.compiler.ASTSource(
            fn=sign_kernel._bits_times_limbs,
            signature={"codes": "*u8", "limbs": "*i8", "sums": "*i32", "rows": "i32",
                       "octets": "i32", "columns": "constexpr", "rows_at_once": "constexpr",
                       "octets_at_once": "constexpr"},
            constexprs={"columns": columns, "rows_at_once": sign_kernel.ROWS,
                        "octets_at_once": sign_kernel.OCTETS})
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert "mma" in made.asm["ptx"], "no tensor cores"
print("compiled")
"""


@pytest.mark.slow
def test_the_kernel_compiles_for_the_cards_that_are_said_to_run_it(tmp_path):
    library("triton")
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, check=False)
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.parametrize("capability, compiler, lacking", [
    ((7, 5), "gcc", "8.0 .it has 7.5."), ((9, 0), None, "C compiler"), ((9, 0), "gcc", None)])
def test_what_the_kernel_lacks_is_said_once(capability, compiler, lacking, monkeypatch):
    library("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(device_codes.shutil, "which", lambda name: compiler)
    device_codes.has_kernel.cache_clear()
    device = torch.device("cuda", 0)
    if lacking is None:
        assert device_codes.has_kernel(device)
    else:
        with pytest.warns(RuntimeWarning, match=lacking):
            assert not device_codes.has_kernel(device)
        assert not device_codes.has_kernel(device)  # which says nothing more
    device_codes.has_kernel.cache_clear()


def test_the_kernel_gives_the_same_sums_in_tritons_interpreter():
    library("triton")
    done = subprocess.run([sys.executable, "-c", KERNEL], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, check=False)
    assert done.stdout == "launched, equal\n", done.stderr


def test_limbs_are_the_rounded_query():
    vectors = torch.from_numpy(queries_of(3, 64))
    queries = RoundedQueries(vectors)
    all_set = torch.full((1, 8), 255, dtype=torch.uint8)
    torch.testing.assert_close(queries.inner(all_set)[:, 0], vectors.sum(1), rtol=1e-5, atol=1e-4)

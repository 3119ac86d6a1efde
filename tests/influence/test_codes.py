"""Codes: unbiased over seeds, their error as stated, the same in every batch."""

import faiss
import numpy as np
import pytest
import torch

from gradindex.draws import signs
from gradindex.errors import DamagedIndexError
from gradindex.influence.codes import (
    Codes,
    CodeSettings,
    default_length,
    default_width,
    score_error,
    whitening,
)
from gradindex.influence.curvature import Curvature
from gradindex.influence.gradients import backward, gradient
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.storage.code_index import CodeIndex, scan
from gradindex.storage.files import facts_of
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.layout import code_bytes
from support.fits import fitted


@pytest.fixture
def fitted_model(make_model, sequences, tmp_path):
    """A Llama, whose q_proj and o_proj are square: both sides mix differently all the same."""
    model = make_model("llama")
    modules = tracked_modules(model.network, r"layers\.0\.(self_attn\.[qo]|mlp)")
    assert any(m.shape[0] == m.shape[1] for m in modules)
    return model, modules, fitted(model, modules, sequences, tmp_path)


def captured(model, modules, sequence):
    found = {}
    backward(model, modules, model.batch([sequence]),
             lambda module, a, d: found.__setitem__(module.name, (module, a, d)))
    return found


@pytest.mark.parametrize("damping, only", [(0.1, ""), (0.001, ""), (10.0, ""), (0.1, "self_attn")])
def test_mean_over_seeds_is_the_exact_influence(fitted_model, sequences, damping, only):
    """E⟨v_m, v_q⟩ = I for the query's own damping and modules, whatever the code's were."""
    model, modules, ekfac = fitted_model
    found = captured(model, modules, sequences[0])
    coordinates, exact = {}, 0.0
    for name, (module, a, d) in found.items():
        if only in name:
            g = gradient(module, a, d)
            coordinates[name] = ekfac[name].coordinates(g, damping)
            exact += float((ekfac[name].leave_eigenbasis(coordinates[name]) * g).sum())
    estimates = []
    while True:
        codes = Codes(modules, ekfac, CodeSettings(1024, 32, len(estimates), 0.1))
        v = codes.empty(1)
        for module, a, d in found.values():
            codes.add(v, module, a, d)
        estimates.append(float(v[0] @ codes.query_vectors(coordinates)[0]))
        if len(estimates) >= 400 and len(estimates) % 100 == 0:
            error = np.std(estimates) / len(estimates) ** 0.5
            if error <= 0.01 * exact:
                break
    assert abs(np.mean(estimates) - exact) < 4 * error


def test_a_subset_of_modules_leaves_the_others_out(fitted_model, sequences):
    """A query without a module is the query whose coordinates are zero there."""
    _, modules, ekfac = fitted_model
    codes = Codes(modules, ekfac, CodeSettings(512, 32, 1, 0.1))
    coordinates = {m.name: torch.randn(1, *m.shape, dtype=torch.float64) for m in modules}
    some = dict(list(coordinates.items())[:2])
    zeroed = {name: c if name in some else torch.zeros_like(c) for name, c in coordinates.items()}
    torch.testing.assert_close(codes.query_vectors(some), codes.query_vectors(zeroed))


def test_vectors_do_not_depend_on_batch_or_padding(fitted_model, sequences):
    model, modules, ekfac = fitted_model
    codes = Codes(modules, ekfac, CodeSettings(512, 32, 1, 0.1))

    def encode(chosen):
        v = codes.empty(len(chosen))
        backward(model, modules, model.batch(chosen),
                 lambda module, a, d: codes.add(v, module, a, d))
        return v

    together = encode(sequences)
    for row, sequence in enumerate(sequences):
        torch.testing.assert_close(encode([sequence])[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_sketch_keeps_every_entry_once(fitted_model):
    """Signed, summed into K buckets, all modules spread evenly: norms add up when K is large."""
    _, modules, ekfac = fitted_model
    wide = Codes(modules, ekfac, CodeSettings(1 << 14, 32, 3, 0.1))
    coordinates = {m.name: torch.randn(1, *m.shape, dtype=torch.float64) for m in modules}
    one_by_one = [wide.query_vectors({name: c}) for name, c in coordinates.items()]
    together = wide.query_vectors(coordinates)
    torch.testing.assert_close(sum(one_by_one), together)
    touched = sum((v != 0).long() for v in one_by_one)
    assert touched.max() == 1  # far fewer entries than buckets: none shared
    assert touched.sum() == sum(np.prod(wide.settings.sides(m)) for m in modules)


def test_whitening_of_what_is_separable_is_exact():
    rows, columns = torch.rand(4, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    curvature = Curvature(torch.eye(6), torch.eye(4), torch.outer(rows, columns))
    whitened = whitening(curvature, 0.0)
    torch.testing.assert_close(torch.outer(whitened.w_s, whitened.w_a),
                               torch.outer(rows, columns) ** -0.5)
    assert whitened.directions == pytest.approx((4, 6))


def test_whitening_makes_both_sizes_small_where_the_energy_is():
    """Σ Λ/(Λ+λ) (r + 1/r), written out; the input side's weights are the best beside the others."""
    torch.manual_seed(0)
    eigenvalues = torch.rand(5, 7, dtype=torch.float64) ** 6
    eigenvalues[2], eigenvalues[:, 3] = 0, 0  # directions without any energy
    curvature = Curvature(torch.eye(7), torch.eye(5), eigenvalues)
    whitened = whitening(curvature, 0.1)
    energy, damped = eigenvalues.numpy(), curvature.damped(0.1).numpy()

    def size(w_s, w_a):
        r = damped * np.outer(w_s**2, w_a**2)
        return (energy / damped * (r + 1 / r)).sum()

    w_s, w_a = whitened.w_s.numpy(), whitened.w_a.numpy()
    least = size(w_s, w_a)
    for place in (0, 1, 2, 4, 5, 6):
        for factor in (0.9, 1.1):
            other = w_a.copy()
            other[place] *= factor
            assert size(w_s, other) > least
    logarithm = -0.5 * np.log(damped)
    alike = size(np.exp(logarithm.mean(1) - logarithm.mean()), np.exp(logarithm.mean(0)))
    assert 2 * (energy / damped).sum() < least < 0.9 * alike
    # a direction without energy has weights of the others' size, whatever the gradients' unit is
    assert 0.1 < w_s[2] / np.median(w_s) < 10 and 0.1 < w_a[3] / np.median(w_a) < 10
    tiny = whitening(Curvature(torch.eye(7), torch.eye(5), 1e-30 * eigenvalues), 0.1)
    assert torch.outer(tiny.w_s, tiny.w_a).numpy() == pytest.approx(1e15 * np.outer(w_s, w_a))


def test_random_signs_are_fixed_for_ever():
    """Raw Philox bits: a change here would make every stored code meaningless."""
    assert signs(0, "layer/input", 12).tolist() == [1, 1, 1, -1, 1, 1, -1, -1, 1, -1, 1, 1]
    assert np.array_equal(signs(0, "x", 100)[:70], signs(0, "x", 70))
    assert not np.array_equal(signs(0, "x", 64), signs(0, "y", 64))
    assert not np.array_equal(signs(0, "x", 64), signs(1, "x", 64))
    assert abs(signs(4, "x", 1 << 16).mean()) < 0.02


def test_defaults():
    assert [default_length(n) for n in (16, 64, 65, 128, 512)] == [16384, 16384, 32768, 32768,
                                                                   131072]
    assert [default_width(32768, n) for n in (8, 16, 24, 100, 1000)] == [256, 176, 144, 80, 32]


def test_code_scores_are_unbiased_with_the_stated_error():
    """FAISS's one-bit score of Gaussian vectors: slope 1, sd c ‖v_q‖ ‖v_m‖ / √K, c ≈ √(π/2)."""
    random = np.random.default_rng(0)
    length, n = 2048, 3000
    vectors = random.standard_normal((n, length)) * random.pareto(3, (n, 1))
    query = 0.2 * vectors[:1].mean(0) + random.standard_normal(length)
    index = CodeIndex(length)
    codes = index.encode(vectors)
    assert codes.shape == (n, code_bytes(length)) and codes.dtype == np.uint8
    index.add(codes)
    truth = vectors @ query
    sigma = score_error(1.0, float(np.linalg.norm(query)), np.linalg.norm(vectors, axis=1), length)
    z = (index.scores(query.astype(np.float32)) - truth) / sigma
    assert abs(z.mean()) < 0.08
    assert 0.6 < z.std() < 0.9  # √(π/2 − 1) = .76 without the two sketches' own noise


def test_codes_survive_the_disk_and_joining(tmp_path):
    random = np.random.default_rng(1)
    vectors = random.standard_normal((7, 256)).astype(np.float32)
    query = random.standard_normal(256).astype(np.float32)
    index = CodeIndex(256)
    index.add(index.encode(vectors))
    path = tmp_path / "vectors.faiss"
    limits = (faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit())
    assert index.write(path) == facts_of(path)
    again = CodeIndex.parse(path.read_bytes(), 256, 7, path)
    np.testing.assert_array_equal(again.scores(query), index.scores(query))
    joined = CodeIndex(256)
    joined.add(again.codes([4, 2]))
    np.testing.assert_array_equal(joined.scores(query), index.scores(query)[[4, 2]])
    for length, rows in ((512, 7), (256, 8)):
        with pytest.raises(DamagedIndexError, match=f"hold {rows} codes of {length} bits"):
            CodeIndex.parse(path.read_bytes(), length, rows, path)
    with pytest.raises(DamagedIndexError, match="can't be read"):
        CodeIndex.parse(b"not an index", 256, 7, path)
    assert limits == (faiss.get_deserialization_vector_byte_limit(),
                      faiss.get_deserialization_loop_limit())


def test_a_scan_shares_out_rows_and_changes_nothing(tmp_path, monkeypatch):
    """Segments of any size, one query or many, read or mapped: the scores of each code alone."""
    monkeypatch.setattr("gradindex.storage.code_index.SCANNED_ROWS", 5)
    random = np.random.default_rng(2)
    segments, alone = [], []
    queries = random.standard_normal((3, 256)).astype(np.float32)
    for rows in (1, 5, 23, 64):
        codes = CodeIndex(256).encode(random.standard_normal((rows, 256)))
        path = tmp_path / f"{rows}.faiss"
        whole = CodeIndex(256)
        whole.add(codes)
        facts = {path.name: whole.write(path)}
        segments.append(CodeIndex.parse(CheckedFiles(tmp_path, facts).map(path.name), 256, rows,
                                        path) if rows % 2 else whole)
        for code in codes:
            single = CodeIndex(256)
            single.add(code[None])
            alone.append([single.scores(query)[0] for query in queries])
    for threads in (1, 3):
        np.testing.assert_array_equal(scan(segments, queries, threads), np.array(alone).T)
        np.testing.assert_array_equal(scan(segments, queries[1:2], threads)[0],
                                      np.array(alone)[:, 1])
    exact = np.concatenate([segment.many_scores(queries) for segment in segments], axis=1)
    octets = np.arange(32)
    signs, steps = (np.concatenate(part) for part in zip(
        *(segment.some_signs(octets) for segment in segments), strict=True))
    truth = queries.astype(np.float64) @ (
        2.0 * np.unpackbits(signs, axis=1, bitorder="little") - 1).T * steps
    np.testing.assert_allclose(exact, truth, rtol=1e-4, atol=1e-4 * np.abs(truth).max())
    # a query is kept in 16 levels: a uniform error of sd a level / √12 for each of 256 coordinates
    error = np.ptp(queries, axis=1)[:, None] / 15 / 12**0.5 * 16 * steps
    assert 0.5 < ((scan(segments, queries, 2) - truth) / error).std() < 1.5


def test_digest_names_the_random_numbers(fitted_model):
    _, modules, ekfac = fitted_model
    digests = {
        Codes(modules, ekfac, CodeSettings(512, width, seed, 0.1)).digest
        for width, seed in ((8, 0), (8, 1), (4, 0))
    }
    assert len(digests) == 3
    assert Codes(modules, ekfac, CodeSettings(512, 8, 0, 10.0)).digest in digests


def lora(maps, rank, width):
    """Modules as LoRA adds them, from and to `rank` dimensions, and a curvature of each."""
    torch.manual_seed(0)
    modules = [Module(f"{n}", n, "adapter", *((rank, width), (width, rank))[n % 2], False)
               for n in range(maps)]

    def spread(d):
        orthogonal = torch.linalg.qr(torch.randn(d, d)).Q
        return orthogonal, torch.rand(d) + 0.05

    ekfac = {}
    for module in modules:
        (q_s, s), (q_a, a) = map(spread, module.shape)
        ekfac[module.name] = Curvature(q_a, q_s, torch.outer(s, a))
    return modules, ekfac


def test_sides_of_narrow_maps():
    """No fewer coordinates than the gradient has numbers, as long as k² allows."""
    settings = CodeSettings(512, 32, 0, 0.1)
    shapes = {(3, 50): (4, 64), (50, 3): (64, 4), (8, 4096): (8, 128), (32, 33): (32, 32),
              (33, 33): (32, 32), (1, 9): (1, 16), (20, 20): (32, 32)}
    for (o, i), sides in shapes.items():
        module = Module("m", 0, "mlp", o, i, False)
        assert settings.sides(module) == sides
        assert settings.filled([module]) == min(o, sides[0]) * min(i, sides[1])
        before = CodeSettings(512, 32, 0, 0.1, recipe=1)
        assert before.sides(module) == (min(o, i, 32),) * 2


def test_a_side_of_few_directions_leaves_its_coordinates_to_the_other():
    settings = CodeSettings(1 << 14, 64, 0, 0.1)
    pooler = Module("m", 0, "head", 100, 200, False)
    assert settings.sides(pooler) == settings.sides(pooler, (8.0, 9.0)) == (64, 64)
    assert settings.sides(pooler, (7.9, 50.0)) == (16, 256)  # of 200, exactly
    assert settings.sides(pooler, (50.0, 7.9)) == (128, 32)  # the other way round
    assert settings.sides(Module("m", 0, "head", 100, 2000, False), (2.0, 90.0)) == (16, 256)
    narrow = Module("m", 0, "head", 2, 200, False)
    assert settings.sides(narrow, (1.0, 90.0)) == settings.sides(narrow) == (2, 256)


@pytest.mark.parametrize("bits, sides", [(4096, (128, 512)), (16384, (512, 512))])
def test_codes_of_outer_products_of_one_direction_err_little(bits, sides):
    """A classifier's head: one outer product a text, whose output side is nearly one direction.

    The curvature isn't separable: a text's two sides have their sizes in common.
    """
    torch.manual_seed(0)
    n, o, i = 800, 300, 320
    module = Module("pooler", 0, "head", o, i, bias=False)
    leading, others = torch.randn(o), torch.randn(3, o)
    a = torch.randn(n, i) * torch.linspace(2, 0.1, i) + torch.randn(i)
    d = (torch.randn(n, 1) * leading + 0.2 * torch.randn(n, 3) @ others) * (
        0.05 + torch.rand(n, 1) ** 3)
    q_a, q_s = (torch.linalg.eigh(x.T @ x / n).eigenvectors for x in (a, d))
    squares = ((d @ q_s).square().T @ (a @ q_a).square()) / n
    ekfac = {"pooler": Curvature(q_a, q_s, squares)}
    coordinates = torch.einsum("bo,bi->boi", d[:8] @ q_s, a[:8] @ q_a) / (
        ekfac["pooler"].damped(0.1))
    truth = torch.einsum("qoi,bo,bi->qb", coordinates, d[8:] @ q_s, a[8:] @ q_a).numpy()
    errors = {}
    for recipe in (2, 3):
        codes = Codes([module], ekfac, CodeSettings(
            bits, 256 if recipe == 2 else default_width(bits, 1), 3, 0.1, recipe))
        vectors = codes.empty(n - 8)
        codes.add(vectors, module, a[8:, None], d[8:, None])
        index = CodeIndex(bits)
        index.add(index.encode(vectors.numpy()))
        queries = codes.query_vectors({"pooler": coordinates}).numpy()
        scores = np.stack([index.scores(query) for query in queries])
        sizes = np.outer(np.linalg.norm(queries, axis=1), vectors.norm(dim=1).numpy())
        errors[recipe] = np.sqrt(np.mean(((scores - truth) / sizes) ** 2) * bits)
        if recipe == 3:
            assert len(codes._projections["pooler"].mix_s) == sides[0]
            assert len(codes._projections["pooler"].mix_a) == sides[1]
            assert np.mean([np.corrcoef(one, other)[0, 1]
                            for one, other in zip(scores, truth, strict=True)]) > 0.6
    assert errors[3] < 2.2 and errors[3] < errors[2] / 2, errors


def test_a_narrow_map_is_mixed_without_error():
    """Where nothing shares a bucket, the vectors' inner product is the influence itself."""
    modules, ekfac = lora(1, 3, 50)
    codes = Codes(modules, ekfac, CodeSettings(512, 32, 5, 0.1))
    a, d, c = torch.randn(2, 4, 50), torch.randn(2, 4, 3), torch.randn(3, 3, 50)
    vectors = codes.empty(2)
    codes.add(vectors, modules[0], a, d)
    own = ekfac["0"]
    exact = torch.einsum("bto,bti,qoi->bq", d @ own.eigenvectors_s, a @ own.eigenvectors_a, c)
    torch.testing.assert_close(vectors @ codes.query_vectors({"0": c}).T, exact)


@pytest.mark.parametrize("maps, rank, bits", [(24, 8, 16384), (24, 1, 6144), (4, 6, 2048)])
def test_codes_of_an_adapter_alone_err_as_stated(maps, rank, bits):
    """No bucket is empty: an empty one would shift all scores of a query alike."""
    modules, ekfac = lora(maps, rank, 256)
    codes = Codes(modules, ekfac, CodeSettings.of(bits, modules, 7, 0.1))
    assert codes.settings.filled(modules) >= bits
    n, vectors, exact = 600, codes.empty(600), torch.zeros(600, 4)
    coordinates = {}
    for module in modules:
        own = ekfac[module.name]
        o, i = module.shape
        # gradients as the curvature has them
        s, e = own.eigenvalues[:, :1] ** 0.5, own.eigenvalues[:1] ** 0.5
        a, d = torch.randn(n, 3, i) * e, torch.randn(n, 3, o) * s.T
        query = (torch.randn(4, 3, o) * s.T).mT @ (torch.randn(4, 3, i) * e)
        coordinates[module.name] = query / own.damped(0.1)
        exact += torch.einsum("bto,bti,qoi->bq", d, a, coordinates[module.name])
        codes.add(vectors, module, a @ own.eigenvectors_a.T, d @ own.eigenvectors_s.T)
    assert not (vectors == 0).all(0).any()
    index = CodeIndex(bits)
    index.add(index.encode(vectors.numpy()))
    norms = vectors.norm(dim=1).numpy()
    for truth, query in zip(exact.T.numpy(), codes.query_vectors(coordinates).numpy(), strict=True):
        z = (index.scores(query) - truth) / score_error(1.0, float(np.linalg.norm(query)), norms,
                                                        bits)
        assert abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.9


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 8, 16, 24, 64])
def test_sides_can_be_mixed_whatever_the_shapes(rank):
    """A side has fewer coordinates than dimensions, or a power of two at or above them."""
    for width in range(32, 257, 16):
        for n in (5, 12, 100, 320, 576, 768, 1000, 4096):
            for o, i in ((rank, n), (n, rank)):
                module = Module("m", 0, "adapter", o, i, False)
                settings = CodeSettings(1 << 14, width, 0, 0.1)
                for k, dimensions in zip(settings.sides(module), (o, i), strict=True):
                    assert k < dimensions or (k & (k - 1) == 0 and k < 2 * dimensions)


def test_codes_of_common_adapters_are_drawn():
    """768 dimensions at rank 8, which k² would give 800 coordinates."""
    modules, ekfac = lora(2, 8, 96)
    codes = Codes(modules, ekfac, CodeSettings(2048, 32, 7, 0.1))
    assert codes.settings.sides(modules[0]) == (8, 128)
    assert CodeSettings.of(16384, (wide := lora(48, 8, 768)[0]), 0, 0.1).sides(wide[0]) == (8, 1024)

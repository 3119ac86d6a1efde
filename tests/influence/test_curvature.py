"""Λ, the preconditioner and the exact score against dense algebra in float64."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from gradindex.draws import Stream, choose, uniforms
from gradindex.errors import DamagedIndexError, GradindexError
from gradindex.influence import curvature
from gradindex.influence.curvature import Curvature, FiledEkfac
from gradindex.influence.exact import GradientSizes, collect, exact_scores
from gradindex.influence.gradients import backward
from gradindex.influence.preconditioned import (
    Preconditioned,
    _product_is_cheaper,
    precondition,
    query_coordinates,
    query_square,
)
from gradindex.memory import Allowance
from gradindex.model.tracked import tracked_modules
from gradindex.modules import Module
from gradindex.objective.batch import Text
from gradindex.progress import Progress, stderr_progress
from gradindex.storage.files import facts_of
from gradindex.storage.layout import module_file
from gradindex.storage.tensors import DTYPES, read_tensors, write_tensors, write_vouched
from indexer.fit.budget import held_bytes
from indexer.fit.eigen import eigenvectors
from indexer.fit.notes import FitSettings
from indexer.fit.schedule import fit
from support.fits import fitted, records_of
from support.models import labels_of
from support.reference import covariances, ekfac_matrix, sequence_gradient
from support.scores import score


def test_partitions_of_modules_give_the_same_bytes(make_model, sequences, tmp_path):
    model = make_model("gpt2")
    modules = tracked_modules(model.network, "all")
    every = (None, 1, 3 * held_bytes(modules[:1], 1, 8))
    folders = [tmp_path / str(allowed) for allowed in every]
    for folder, allowed in zip(folders, every, strict=True):
        folder.mkdir()
        fitted(model, modules, sequences, folder, "model", allowance=Allowance(allowed))
    whole, *others = ({path.name: path.read_bytes() for path in (folder / "curvature").iterdir()}
                      for folder in folders)
    assert len(whole) == len(modules) + 1
    assert all(other == whole for other in others)


@pytest.mark.parametrize("blocks", [1, 2, 4, 5])
def test_a_fit_goes_on_in_less_memory(make_model, sequences, tmp_path, blocks):
    """Interrupted after so many blocks of three, with all modules together or in two partitions."""
    model = make_model("gpt2")
    modules = tracked_modules(model.network, "all")
    half = held_bytes(modules[: len(modules) // 2], 1, 8)
    found = []
    for before, after in ((None, None), (None, half), (2 * half, 1), (1, None)):
        folder = tmp_path / f"{before} {after}"
        folder.mkdir()
        if (before, after) != (None, None):
            with pytest.raises(KeyboardInterrupt):
                fitted(model, modules, sequences, folder, "model", allowance=Allowance(before),
                       most=blocks)
        fitted(model, modules, sequences, folder, "model", allowance=Allowance(after))
        found.append({path.name: path.read_bytes() for path in (folder / "curvature").iterdir()})
    assert all(one == found[0] for one in found)


def test_fit_equals_dense_averages(make_model, sequences, tmp_path):
    model = make_model("gpt2")
    modules = tracked_modules(model.network, "mlp,attention")
    ekfac = fitted(model, modules, sequences, tmp_path)
    inputs = {module.name: [] for module in modules}
    outputs = {module.name: [] for module in modules}

    def each(module, a, d):
        ones = torch.ones(*a.shape[:2], 1, dtype=a.dtype)
        inputs[module.name].append(torch.cat([a, ones], -1)[0])
        outputs[module.name].append(d[0])

    for sequence in sequences:
        backward(model, modules, model.batch([sequence]), each)
    gradients = [
        sequence_gradient(model.network, [m.name for m in modules],
                          torch.from_numpy(ids).long(), labels_of(ids, scored))
        for ids, scored, *_ in sequences
    ]
    for module in modules:
        found = ekfac[module.name]
        a, s = covariances(inputs[module.name], outputs[module.name])
        for matrix, q in ((a, found.eigenvectors_a), (s, found.eigenvectors_s)):
            diagonal = q.T @ matrix @ q
            scale = matrix.abs().max()
            torch.testing.assert_close(diagonal, torch.diag(diagonal.diag()), rtol=0,
                                       atol=float(1e-9 * scale))
            torch.testing.assert_close(q.T @ q, torch.eye(len(q), dtype=q.dtype), rtol=0,
                                       atol=1e-10)
        truth = torch.stack([
            (found.eigenvectors_s.T @ g[module.name] @ found.eigenvectors_a) ** 2
            for g in gradients
        ]).mean(0)
        torch.testing.assert_close(found.eigenvalues, truth, rtol=1e-8,
                                   atol=float(1e-12 * truth.max()))


@pytest.mark.parametrize("damping", [0.1, 0.001, 10.0])
def test_preconditioner_equals_the_dense_inverse(damping):
    torch.manual_seed(0)
    o, i = 5, 7
    q_s = torch.linalg.qr(torch.randn(o, o, dtype=torch.float64))[0]
    q_a = torch.linalg.qr(torch.randn(i, i, dtype=torch.float64))[0]
    eigenvalues = torch.rand(o, i, dtype=torch.float64) ** 4
    g = torch.randn(o, i, dtype=torch.float64)
    dense = ekfac_matrix(q_s, q_a, eigenvalues, float(damping * eigenvalues.mean()))
    expected = torch.linalg.solve(dense, g.flatten()).view(o, i)
    curvature = Curvature(q_a, q_s, eigenvalues)
    found = curvature.leave_eigenbasis(curvature.coordinates(g, damping))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    again = curvature.leave_eigenbasis(curvature.coordinates(g, damping))  # not added twice
    assert torch.equal(found, again)
    effective = Curvature(q_a, q_s, eigenvalues).effective_dimension(damping)
    bare = ekfac_matrix(q_s, q_a, eigenvalues, 0.0)
    assert effective == pytest.approx(float(torch.trace(torch.linalg.solve(dense, bare))))


def test_exact_influence_and_its_terms(family, make_model, sequences, tmp_path, monkeypatch):
    model = make_model(family)
    modules = tracked_modules(model.network, "all")
    ekfac = fitted(model, modules, sequences, tmp_path)
    names = [module.name for module in modules]
    query_ids, query_scored, *_ = sequences[4]
    batch = model.batch([sequences[4]])
    coordinates, log_p = query_coordinates(model, modules, ekfac, batch, 0.1)
    p = precondition(ekfac, coordinates)
    terms = score(model, modules, Preconditioned(p), model.batch(sequences))

    q = sequence_gradient(model.network, names, torch.from_numpy(query_ids).long(),
                          labels_of(query_ids, query_scored))
    totals = []
    for row, (ids, scored, *_) in enumerate(sequences):
        m = sequence_gradient(model.network, names, torch.from_numpy(ids).long(),
                              labels_of(ids, scored))
        for place, name in enumerate(names):
            c = ekfac[name]
            dense = ekfac_matrix(c.eigenvectors_s, c.eigenvectors_a, c.eigenvalues,
                                 float(0.1 * c.eigenvalues.mean()))
            expected = q[name].flatten() @ torch.linalg.solve(dense, m[name].flatten())
            torch.testing.assert_close(terms[row, :, place].sum(), expected, rtol=1e-4,
                                       atol=1e-9)
        totals.append(terms[row].sum())
        assert (terms[row, len(ids):] == 0).all()
    twice = Preconditioned.join([Preconditioned(p), Preconditioned(p)])
    many = exact_scores(model, modules, twice, records_of(sequences), 24)
    np.testing.assert_allclose(many[0], torch.stack(totals).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(many[0], many[1])
    # a gradient at a time
    monkeypatch.setattr("gradindex.influence.preconditioned.LARGEST_BLOCK", 1)
    np.testing.assert_allclose(exact_scores(model, modules, twice, records_of(sequences), 24), many,
                               rtol=1e-9, atol=1e-9)
    assert (log_p[0, :5] == 0).all() and (log_p[0, 5:-1] < 0).all()


@pytest.mark.parametrize("block", [1, 1 << 26])
def test_sizes_and_query_norms(family, make_model, sequences, tmp_path, block, monkeypatch):
    """‖(G+λ)^−½ ∇m‖², ‖(G+λ)⁻¹ ∇m‖², ‖∇m‖² and ‖q̃‖ against dense algebra, summed over modules."""
    monkeypatch.setattr("gradindex.influence.preconditioned.LARGEST_BLOCK", block)
    model = make_model(family)
    modules = tracked_modules(model.network, "all")
    ekfac = fitted(model, modules, sequences, tmp_path)
    collector = GradientSizes(ekfac, 0.03)
    collect(model, modules, model.batch(sequences), collector)
    for row, (ids, scored, *_) in enumerate(sequences):
        m = sequence_gradient(model.network, [module.name for module in modules],
                              torch.from_numpy(ids).long(), labels_of(ids, scored))
        squared, step, norm = 0.0, 0.0, 0.0
        for name, g in m.items():
            c = ekfac[name]
            dense = ekfac_matrix(c.eigenvectors_s, c.eigenvectors_a, c.eigenvalues,
                                 float(0.03 * c.eigenvalues.mean()))
            solved = torch.linalg.solve(dense, g.flatten())
            squared += float(g.flatten() @ solved)
            step += float(solved @ solved)
            norm += float(g.square().sum())
        assert collector.found()[:, row] == pytest.approx([squared, step, norm], rel=1e-4)
        coordinates, _ = query_coordinates(model, modules, ekfac,
                                           model.batch([Text(ids, scored)]), 0.03)
        own = sum(float(query_square(ekfac[name], c, 0.03, 1.0)) for name, c in coordinates.items())
        assert own == pytest.approx(squared, rel=1e-4)


def whole(preconditioned):
    """P of module m [q, o, i]."""
    part = preconditioned.arrays()["m"]
    return torch.from_numpy(part if isinstance(part, np.ndarray) else part[0] @ part[1])


def test_low_rank_gradients_are_the_truncated_svd():
    torch.manual_seed(4)
    p = {"m": torch.randn(3, 9, 12, dtype=torch.float64)}
    for rank, exact in ((2, False), (9, True), (None, True)):
        low = Preconditioned(p, rank)
        found = whole(low)
        assert len(low) == 3
        u, s, v = torch.linalg.svd(p["m"], full_matrices=False)
        kept = s.clone()
        kept[:, rank or 9 :] = 0
        expected = u @ torch.diag_embed(kept) @ v
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if exact else 1e-3)
    state = torch.random.get_rng_state()
    first, again = (whole(Preconditioned(p, 2)) for _ in range(2))
    assert torch.equal(again, first)
    assert torch.equal(torch.random.get_rng_state(), state)  # the user's own numbers are untouched
    parts = [Preconditioned({"m": one[None]}, 2) for one in p["m"]]
    torch.testing.assert_close(whole(Preconditioned.join(parts)), first, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("most", [1, 1 << 26])
@pytest.mark.parametrize("joined", [0, 1 << 26])
def test_scores_of_low_rank_are_those_of_the_product(bias, most, joined, monkeypatch):
    """By the factors or by L R, whatever is taken at once."""
    monkeypatch.setattr("gradindex.influence.preconditioned.LARGEST_BLOCK", most)
    monkeypatch.setattr("gradindex.influence.preconditioned.LARGEST_PRODUCT", joined)
    torch.manual_seed(6)
    module = Module("m", 0, "mlp", 5, 7, bias)
    a, d = torch.randn(4, 6, 7, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    ones = torch.ones(4, 6, int(bias), dtype=torch.float64)
    g = torch.einsum("bto,bti->boi", d, torch.cat([a, ones], -1))
    for queries in (1, 3):  # the last is whole
        p = {"m": torch.randn(queries, *module.shape, dtype=torch.float64)}
        for rank in (2, None):
            low = Preconditioned(p, rank)
            expected = torch.einsum("qoi,boi->qb", whole(low), g)
            torch.testing.assert_close(low.of(module).scores(module, a, d), expected)
            repeated = low.of(module).scores(module, *(one.repeat(1, 20, 1) for one in (a, d)))
            torch.testing.assert_close(repeated, 20 * expected)
            if rank and queries > 1:
                left = torch.from_numpy(low.arrays()["m"][0])
                assert _product_is_cheaper(module, left, a.repeat(1, 20, 1)) == bool(joined)
            if queries == 1:
                torch.testing.assert_close(low.of(module).terms(module, a, d).sum(-1), expected[0])
    empty = low.of(module).scores(module, a[:, :0], d[:, :0])  # an expert that no token reached
    assert torch.equal(empty, torch.zeros(3, 4, dtype=torch.float64))


def test_sampled_labels_depend_on_the_sequence_alone(make_model, sequences, tmp_path):
    """The same curvature to rounding, however sequences are batched."""
    model = make_model("gpt2")
    modules = tracked_modules(model.network)
    found = []
    for name, batch_tokens in (("one", 1), ("many", 1000)):
        (tmp_path / name).mkdir()
        records = records_of(sequences)
        settings = FitSettings(list(range(6)), "model", 4, batch_tokens, 5)
        ekfac = fit(model, modules, lambda ids: [records[n] for n in ids], settings,  # noqa: B023
                    tmp_path / name, Progress())[0]
        found.append(ekfac[modules[0].name])
    torch.testing.assert_close(found[0].eigenvalues, found[1].eigenvalues, rtol=1e-6, atol=1e-12)

    def drawn(stream, sequence=3, count=4):
        return uniforms(stream, 5, sequence, count).tolist()

    first, second = Stream.COVARIANCE_LABELS, Stream.EIGENVALUE_LABELS
    assert drawn(first) == drawn(first) == drawn(first, count=9)[:4]
    assert drawn(first) != drawn(second) and drawn(first) != drawn(first, sequence=4)


def test_model_labels_differ_from_data_labels(make_model, sequences, tmp_path):
    model = make_model("gpt2")
    modules = tracked_modules(model.network)
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    data = fitted(model, modules, sequences, tmp_path / "data", "data")
    sampled = fitted(model, modules, sequences, tmp_path / "model", "model")
    name = modules[0].name
    assert not torch.allclose(data[name].eigenvalues, sampled[name].eigenvalues, rtol=0.01)


def test_eigenvectors_have_a_fixed_sign():
    torch.manual_seed(2)
    x = torch.randn(20, 6, dtype=torch.float64)
    q = eigenvectors(x.T @ x, "x")
    assert (q.gather(0, q.abs().argmax(0, keepdim=True)) > 0).all()
    rotated = q.T @ (x.T @ x) @ q
    torch.testing.assert_close(rotated, torch.diag(rotated.diag()), rtol=0, atol=1e-10)
    assert (rotated.diag().diff() >= 0).all()


def test_a_module_without_gradient_is_left_out_and_named(make_model, sequences, tmp_path, capfd):
    model = make_model("gpt2")
    modules = tracked_modules(model.network)
    with torch.no_grad():
        model.network.transformer.h[1].mlp.c_proj.weight.zero_()
    settings = FitSettings(list(range(len(sequences))), "model", 4, 24, 5)
    records = records_of(sequences)
    ekfac, notes = fit(model, modules, lambda ids: [records[n] for n in ids], settings, tmp_path,
                       stderr_progress())
    name = "transformer.h.1.mlp.c_fc"
    assert list(notes.left_out) == [name]
    assert sorted(ekfac) == sorted(module.name for module in modules if module.name != name)
    shown = capfd.readouterr().err
    assert f"module {name} is left out: it has no gradient on any of the 6" in shown
    alone = [module for module in modules if module.name == name]
    (tmp_path / "alone").mkdir()
    with pytest.raises(GradindexError, match="no tracked module has a gradient"):
        fitted(model, alone, sequences, tmp_path / "alone")


def test_gradients_that_are_not_finite_end_a_fit_where_they_are_many(
    make_model, sequences, tmp_path
):
    model = make_model("gpt2")
    with torch.no_grad():
        model.network.transformer.h[1].mlp.c_fc.bias[0] = float("nan")
    with pytest.raises(GradindexError, match=r"6 of 6 sequences of the fit have .* not finite"):
        fitted(model, tracked_modules(model.network), sequences, tmp_path, block=9)


def test_choose_sequences_is_a_sample_without_replacement():
    assert choose(Stream.FIT_SEQUENCES, 0, 5, 9) == [0, 1, 2, 3, 4]
    chosen = choose(Stream.FIT_SEQUENCES, 1, 1000, 100)
    assert chosen == sorted(set(chosen)) and len(chosen) == 100 and max(chosen) < 1000
    again, other = (choose(Stream.FIT_SEQUENCES, seed, 1000, 100) for seed in (1, 2))
    assert chosen == again != other
    assert 350 < np.mean(chosen) < 650


def test_no_more_curvature_is_kept_than_may_be(tmp_path):
    """Whatever is kept, the numbers are the same, and a file is checked the first time."""
    modules = [Module(f"block.{n}.mlp", n, "mlp", 2, 3, True) for n in range(3)]
    whole = {}
    for n, module in enumerate(modules):
        whole[module.name] = Curvature(torch.randn(4, 4), torch.randn(2, 2), torch.rand(2, 4) + n)
        curvature.save(tmp_path, module, whole[module.name])
    read = []

    def from_file(module, device):
        read.append(module.name)
        return read_tensors(tmp_path / module_file(module), check=False)[0]

    size = 4 * curvature.file_entries(modules[0], 1)
    assert size == 4 * (16 + 4 + 8)
    for held, times in ((None, 1), (2 * size, 4), (0, 9)):
        read.clear()
        ekfac = FiledEkfac(
            from_file, modules, lambda _: torch.device("cpu"), torch.float32, 1, held)
        assert not read and list(ekfac) == list(whole) and len(ekfac) == 3
        for _ in range(3):
            for name, found in ekfac.items():
                for part in ("eigenvectors_a", "eigenvectors_s", "eigenvalues"):
                    assert torch.equal(getattr(found, part), getattr(whole[name], part))
        assert len(read) == {1: 3, 4: 2 + 3, 9: 9}[times]
    with pytest.raises(KeyError):
        _ = ekfac["block.3.mlp"]


def test_curvature_files_are_checked(tmp_path):
    module = Module("block.0.mlp", 0, "mlp", 2, 3, True)
    whole = Curvature(torch.eye(4), torch.eye(2), torch.ones(2, 4))
    curvature.save(tmp_path, module, whole)

    def load(module):
        return FiledEkfac(lambda one, _: read_tensors(tmp_path / module_file(one), False)[0],
                          [module],
                          lambda _: torch.device("cpu"), torch.float32, 1)["block.0.mlp"]

    found = load(module)
    assert torch.equal(found.eigenvalues, whole.eigenvalues)
    other = Module("block.0.mlp", 0, "mlp", 2, 4, True)
    with pytest.raises(DamagedIndexError, match=r"expected .*\(5, 5\)"):
        load(other)
    path = tmp_path / module_file(module)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DamagedIndexError, match="can't be read"):
        load(module)
    for spoiled in (torch.full((2, 4), float("nan")), torch.full((2, 4), -1.0)):
        curvature.save(tmp_path, module, Curvature(torch.eye(4), torch.eye(2), spoiled))
        with pytest.raises(DamagedIndexError, match="expected finite"):
            load(module)


def test_the_library_reads_what_is_written_piece_by_piece(tmp_path):
    """Every dtype, empty tensors and scalars, each aligned to its own size."""
    torch.manual_seed(1)
    tensors = {str(dtype): (100 * torch.randn(3, n + 1)).to(dtype)
               for n, dtype in enumerate(DTYPES)}
    tensors |= {"empty": torch.zeros(0, 4), "one": torch.tensor(2.5), "turned": torch.eye(3)[:, :2]}
    assert write_vouched(tmp_path / "y", tensors) == facts_of(tmp_path / "y")
    write_tensors(tmp_path / "x", tensors, {"about": "ü"})
    found, vouched = load_file(tmp_path / "x"), load_file(tmp_path / "y")
    assert set(found) == set(tensors) == set(vouched)
    assert all(torch.equal(found[name], vouched[name]) for name in found)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert set(file.metadata()) == {"about", "digest"}
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % tensors[name].itemsize == 0
    again, about = read_tensors(tmp_path / "x")
    assert about == {"about": "ü"} and torch.equal(again["turned"], tensors["turned"])

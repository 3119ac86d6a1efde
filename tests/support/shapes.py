"""The shapes of arrays that public functions take and give, as their docstrings state them.

`install` makes every test check every call. A shape is written as its letters: "b t o" has three
dimensions, and a letter stands for one number within a call. Letters are those of the docstrings
(b sequence, t token, i d_in, o d_out, k inner sketch, K code length, q query, u module, N place); a
number stands for itself, "_" for any, "..." for any dimensions before the others.
Of a whole number it says what it counts, and of anything else with a length how long it is. Of a
list or dictionary of arrays it holds for every entry; a tuple of shapes holds for a tuple's parts.
"""

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from gradindex.influence.vocabulary import OverVocabulary

ARRAYS = (np.ndarray, torch.Tensor, OverVocabulary)
PACKAGES = ("gradindex", "indexer", "search")
OWN = set("imnopr")  # sizes that each entry of a list or dictionary has for itself

AD = {"a": "b t i", "d": "b t o"}  # a module's inputs and output gradients
SHAPES: dict[str, dict[str, Any]] = {
    "gradindex.influence.blockwise.square_blocks": {"matrix": "n m", "return": "p p"},
    "gradindex.influence.blockwise.identity": {"n": "n", "m": "m", "return": "n m"},
    "gradindex.influence.blockwise.add_outer": {"sums": "n m", "rows": "t _"},
    "gradindex.influence.blockwise.symmetric": {"block": "n n", "return": "n n"},
    "gradindex.influence.blockwise.right": {"x": "... _", "q": "n m", "return": "... n"},
    "gradindex.influence.blockwise.right_transposed": {"x": "... n", "q": "n m", "return": "... n"},
    "gradindex.influence.blockwise.enter":
        {"g": "... o i", "q_a": "i _", "q_s": "o _", "return": "... o i"},
    "gradindex.influence.blockwise.leave":
        {"c": "... o i", "q_a": "i _", "q_s": "o _", "return": "... o i"},
    "gradindex.influence.blockwise.rotated": {**AD, "q_a": "_ _", "q_s": "o _", "return": "b o _"},
    "gradindex.influence.blockwise.rotator": {**AD, "q_a": "_ _", "q_s": "o _"},
    "gradindex.influence.codes.Codes.empty": {"rows": "b", "return": "b K"},
    "gradindex.influence.codes.Codes.add": {"vectors": "b K", **AD},
    "gradindex.influence.codes.Codes.query_vectors": {"coordinates": "q o i", "return": "q K"},
    "gradindex.influence.codes.Codes.add_query": {"vectors": "q K", "c": "q o i"},
    "gradindex.influence.codes.score_error": {"norms": "n", "return": "n"},
    "gradindex.influence.preconditioned.query_vectors": {"return": "q K"},
    "gradindex.influence.preconditioned.add_query_vectors": {"vectors": "b K", **AD},
    "gradindex.influence.curvature.Curvature.damped": {"return": "o i"},
    "gradindex.influence.curvature.Curvature.divided": {"rotated": "... o i", "return": "... o i"},
    "gradindex.influence.curvature.Curvature.coordinates":
        {"gradient": "... o i", "return": "... o i"},
    "gradindex.influence.curvature.Curvature.leave_eigenbasis":
        {"coordinates": "... o i", "return": "... o i"},
    "gradindex.influence.device_codes.DeviceCodes.scores": {"vectors": "q K", "return": "q n"},
    "gradindex.influence.device_codes.many_scores": {"vectors": "q K", "return": "q n"},
    "gradindex.influence.device_codes.RoundedQueries.__init__": {"vectors": "q K"},
    "gradindex.influence.device_codes.RoundedQueries.inner": {"signs": "n k", "return": "q n"},
    "gradindex.influence.device_codes.bits_times_limbs":
        {"codes": "n k", "limbs": "8 k c", "return": "n c"},
    "gradindex.influence.device_codes.plain_bits_times_limbs":
        {"codes": "n k", "limbs": "8 k c", "return": "n c"},
    "gradindex.influence.sign_kernel.bits_times_limbs":
        {"codes": "n k", "limbs": "8 k c", "return": "n c"},
    "gradindex.influence.exact.Influences.__call__": AD,
    "gradindex.influence.exact.Influences.stacked": {"modules": "u", "return": "q b u"},
    "gradindex.influence.exact.Terms.__call__": AD,
    "gradindex.influence.exact.Terms.stacked": {"modules": "u", "return": "b t u"},
    "gradindex.influence.exact.GradientSizes.__call__": AD,
    "gradindex.influence.exact.GradientSizes.found": {"return": "3 b"},
    "gradindex.influence.exact.collect": {"return": "b _"},
    "gradindex.influence.exact.exact_scores":
        {"preconditioned": "q", "sequences": "n", "return": "q n"},
    "gradindex.influence.exact.self_influence": {"sequences": "n", "return": "n"},
    "gradindex.influence.gradients.backward": {"return": "b _"},
    "gradindex.influence.gradients.why_not_finite": {},
    "gradindex.influence.gradients.apply_inputs":
        {"a": "... t i", "matrix": "n _", "return": "... t n"},
    "gradindex.influence.gradients.gradient": {**AD, "return": "b o _"},
    "gradindex.influence.preconditioned.query_coordinates": {"return": ("q o i", "q t")},
    "gradindex.influence.preconditioned.precondition": {"coordinates": "q o i", "return": "q o i"},
    "gradindex.influence.preconditioned.query_square": {"c": "q o i", "return": "q"},
    "gradindex.influence.preconditioned.weigh": {"gradients": "q o i", "return": "q o i"},
    "gradindex.influence.preconditioned.prepare":
        {"coordinates": "q o i", "vectors": "q K", "squares": "q"},
    "gradindex.influence.preconditioned.Whole.terms": {**AD, "return": "b t"},
    "gradindex.influence.preconditioned.Whole.scores": {**AD, "return": "q b"},
    "gradindex.influence.preconditioned.Whole.arrays": {"return": "q o i"},
    "gradindex.influence.preconditioned.LowRank.of": {"p": "q o i"},
    "gradindex.influence.preconditioned.LowRank.terms": {**AD, "return": "b t"},
    "gradindex.influence.preconditioned.LowRank.scores": {**AD, "return": "q b"},
    "gradindex.influence.preconditioned.LowRank.arrays": {"return": ("q o r", "q r i")},
    "gradindex.influence.preconditioned.Preconditioned.__init__": {"gradients": "q o i"},
    "gradindex.influence.preconditioned.Preconditioned.add": {"gradients": "q o i"},
    "gradindex.influence.preconditioned.terms": {**AD, "p": "o _", "return": "b t"},
    "gradindex.influence.vocabulary.OverVocabulary.whole": {"return": "b n v"},
    "gradindex.influence.vocabulary.OverVocabulary.gradient": {"a": "b n i", "return": "m o i"},
    "gradindex.influence.vocabulary.OverVocabulary.of_rows":
        {"a": "b n i", "rows": "r", "weights": "r", "return": ("1 m i", "1 m v")},
    "gradindex.influence.vocabulary.OverVocabulary.terms":
        {"a": "b n i", "p": "v i", "return": "b n"},
    "gradindex.influence.steps.Movable.outputs": {"return": "..."},
    "gradindex.influence.steps.Movable.log_p": {"return": "b"},
    "gradindex.influence.steps.Movable.curvature_along": {"direction": "o i", "return": "b"},
    "gradindex.objective.next_token.NextToken.divergence":
        {"before": "b t v", "after": "b t v", "return": "b"},
    "gradindex.objective.classes.Classification.divergence":
        {"before": "b c", "after": "b c", "return": "b"},
    "gradindex.objective.pairs.Reward.divergence": {"before": "r 1", "after": "r 1", "return": "b"},
    "gradindex.objective.pairs.Preference.divergence":
        {"before": "r t v", "after": "r t v", "return": "b"},
    "gradindex.objective.batch.Batch.of": {"tokens": "b m", "real": "b m"},
    "gradindex.objective.batch.Batch.by_text": {"tensor": "b m", "return": "r t"},
    "gradindex.objective.batch.Batch.starts": {"return": "b x"},
    "gradindex.objective.batch.Batch.set_positions": {"positions": "b n"},
    "gradindex.objective.batch.Batch.real_inputs": {"a": "b n i", "return": "r i"},
    "gradindex.objective.batch.Batch.by_position": {"terms": "b n", "return": "b m"},
    "gradindex.objective.batch.halves": {"array": "n", "return": ("x", "y")},
    "gradindex.objective.batch.padded": {"rows": "b", "return": ("b m", "b m")},
    "gradindex.objective.whole_texts.WholeTexts.batch": {"rows": "b", "targets": "b"},
    "gradindex.objective.whole_texts.WholeTexts.outputs": {"return": "r c"},
    "gradindex.objective.classes.Classification.outputs": {"return": "b c"},
    "gradindex.objective.classes.Classification.label_numbers": {"return": "b"},
    "gradindex.objective.classes.Classification.log_p":
        {"outputs": "b c", "numbers": "b", "return": ("b 1", "b c")},
    "gradindex.objective.next_token.NextToken.counted": {"scored": "n", "return": "n"},
    "gradindex.objective.next_token.NextToken.targets":
        {"tokens": "n", "scored": "n", "return": "n"},
    "gradindex.objective.next_token.NextToken.outputs": {"return": "r t v"},
    "gradindex.objective.next_token.NextToken.label_numbers": {"return": "b m"},
    "gradindex.objective.next_token.NextToken.log_p":
        {"outputs": "r t v", "numbers": "b m", "return": ("b m", "r t v")},
    "gradindex.objective.next_token.bounded": {},  # of any shape
    "gradindex.objective.next_token.log_probability":
        {"logits": "r t v", "targets": "b m", "unscored": "n", "uniforms": "b m",
         "return": ("b m", "r t v")},
    "gradindex.objective.next_token.sample_labels": {"p": "n v", "uniforms": "n", "return": "n"},
    "gradindex.objective.pairs.deviation": {"z": "b 1", "return": "b 1"},
    "gradindex.objective.pairs.Reward.outputs": {"return": "r 1"},
    "gradindex.objective.pairs.Reward.log_p": {"outputs": "r 1", "return": ("b 1", "r 1")},
    "gradindex.objective.pairs.Preference.outputs": {"return": "r t v"},
    "gradindex.objective.pairs.Preference.answers": {"return": "b _"},
    "gradindex.objective.pairs.Preference.log_p":
        {"outputs": "r t v", "return": ("b 1", "r t v")},
    "gradindex.storage.background_file.BackgroundQueries.rates":
        {"scores": "q n", "digests": "n 2", "return": "2 n"},
    "gradindex.storage.background_file.thresholds": {"scores": "n"},
    "gradindex.storage.code_index.CodeIndex.encode": {"vectors": "n K", "return": "n c"},
    "gradindex.storage.code_index.CodeIndex.add": {"codes": "n c"},
    "gradindex.storage.code_index.CodeIndex.scores": {"query": "K", "return": "n"},
    "gradindex.storage.code_index.CodeIndex.many_scores": {"queries": "q K", "return": "q n"},
    "gradindex.storage.code_index.CodeIndex.some_signs": {"octets": "k", "return": ("n k", "n")},
    "gradindex.storage.code_index.CodeIndex.signs": {"return": ("n c", "n")},
    "gradindex.storage.code_index.CodeIndex.scales": {"return": "n 2"},
    "gradindex.storage.code_index.CodeIndex.codes": {"rows": "n", "return": "n c"},
    "gradindex.storage.code_index.scan": {"queries": "q K", "return": "q n"},
    "gradindex.storage.row_file.digest_of": {"return": "2"},
    "gradindex.storage.row_file.make_rows": {"records": "n", "norms": "n", "return": "n"},
    "gradindex.storage.row_file.first_equal": {"digests": "n 2", "return": "n"},
    "gradindex.storage.row_file.count_equal": {"digests": "n 2"},
    "gradindex.storage.row_file.write_rows": {"rows": "n"},
    "gradindex.storage.row_file.parse_rows": {"count": "n", "return": "n"},
    "gradindex.storage.row_file.write_ids": {"ids": "n"},
    "gradindex.storage.row_file.parse_ids": {"count": "n", "return": "n"},
    "gradindex.storage.row_file.parse_array": {"return": "n"},
    "gradindex.storage.token_file.write": {"sequences": "n"},
    "gradindex.storage.token_file.pack": {"sequences": "n"},
    "gradindex.storage.token_file.TokenMatrix.__init__": {"live": "n"},
    "gradindex.storage.token_file.TokenMatrix.scores": {"return": "N"},
    "indexer.calibrate.prepare_query": {"return": ("K", None)},
    "indexer.calibrate.own_query_vectors": {"records": "q", "return": "q K"},
    "indexer.calibrate.slope": {"error": "n", "truth": "n"},
    "indexer.encode.seal": {"codes": "n", "rows": "n", "sequences": "p"},
    "indexer.encode.encode_batch": {"records": "b", "return": "b K"},
    "indexer.fit.eigen.eigenvectors": {"covariance": "n n", "return": "n n"},
    "indexer.fit.folder.FitFolder.vectors": {"return": "n m"},
    "indexer.fit.batch_sums.add_covariances": {"sums": "n m"},
    "indexer.fit.batch_sums.add_eigenvalues": {"vectors": "n m", "sums": "o i"},
    "indexer.fit.batch_sums.add_products": {
        "sum_a": "n m", "sum_s": "p q", "inputs": "k j", "d": "b t o"},
    "indexer.fit.batch_sums.add_squares": {
        "total": "o i", "a": "b t j", "d": "b t o", "q_a": "i m", "q_s": "o p"},
    "indexer.fit.batch_sums.fit_batch": {"return": (None, None)},
    "indexer.fit.running_sums.Sums.zeros": {"return": "n m"},
    "indexer.fit.running_sums.Sums.totals": {"return": ("n m", None)},
    "search.rank.grouping.Grouping.total": {"values": "N", "return": "G"},
    "search.rank.grouping.Grouping.parts": {"return": "G"},
    "search.rank.grouping.Grouping.excess_of_squares": {"values": "N", "return": "G"},
    "search.rank.grouping.in_quarters": {"numbers": "n", "return": ("_", "n")},
    "search.rank.grouping.make_grouping": {"entries": "3 _", "signs": "N _", "steps": "N"},
    "search.rank.grouping.chosen_signs": {"return": ("n _", "n")},
    "search.rank.group_excess.excess_of": {
        "estimate": "N", "variance": "N", "return": ("G", "G", "G")},
    "search.rank.group_totals.total_groups": {"estimate": "N", "variance": "N"},
    "search.rank.ranking.CodeRanking.__init__": {"scores": "N", "norms": "N"},
    "search.rank.ranking.CodeRanking.best": {"return": ("n", "n")},
    "search.rank.ranking.CodeRanking.before": {"statistic": "n", "places": "n", "return": "n"},
    "search.rank.ranking.CodeRanking.scores_at": {"places": "n", "return": "n"},
    "search.rank.ranking.CodeRanking.scores": {"return": "N"},
    "search.rank.ranking.statistic": {"scores": "n", "norms": "n", "return": "n"},
    "search.rank.ranking.unit": {"norms": "n", "return": "n"},
    "search.rank.ranking.best": {"values": "N", "return": "n"},
    "search.rank.recall.inclusion_probability": {"influence": "n", "error": "n", "return": "n"},
    "search.rank.recall.included_error": {"influence": "n", "error": "n", "return": ("n", "n")},
    "search.rank.recall.estimated_recall": {"probabilities": "n"},
    "search.rank.recall.fit_error": {"margin": "n", "errors": "n", "sample": "m"},
    "search.rank.recall.margin": {"influence": "n", "error": "n", "return": "n"},
    "search.rank.recall.expected_recall": {"probabilities": "n", "later": "n"},
    "search.rank.shortlist.Shortlist.__init__": {"listed": "n"},
    "search.rank.shortlist.Shortlist.statement":
        {"places": "n", "influence": "n", "sample": "s", "of_sample": "s"},
    "search.rank.shortlist.Shortlist.probability":
        {"places": "n", "influence": "n", "return": "n"},
    "search.rank.shortlist.Shortlist.estimates":
        {"scores": "N", "counted": "n", "influence": "n", "sample": "s", "of_sample": "s",
         "return": ("N", "N")},
    "search.rank.shortlist.Shortlist.length_for": {"places": "n", "influence": "n"},
    "search.rank.snapshot.finite": {"scores": "... n", "return": "... n"},
    "search.rank.snapshot.Snapshot.code_scores": {"vectors": "q K", "return": "q N"},
    "search.rank.snapshot.Snapshot.rankings": {"vectors": "q K", "return": "q"},
    "search.rank.snapshot.Snapshot.stored_codes": {"places": "n", "return": "n c"},
}
LEFT_OUT = {  # of the modules below, and why
    "gradindex.influence.preconditioned.Preconditioned.arrays": "each module has one of two forms",
    "gradindex.influence.preconditioned.Preconditioned.from_arrays":
        "each module has one of two forms",
    "gradindex.influence.curvature.FiledEkfac.__init__":
        "only a function among its arguments has arrays",
    "gradindex.storage.row_file.array_bytes": "takes any array",
    "gradindex.influence.steps.Movable.moved": "a context",
    "indexer.calibrate.calibrate": "only a function among its arguments has arrays",
    "indexer.calibrate.score_pairs": "its arrays are in a dataclass",
    "indexer.encode.encode_batches": "a generator",
    "indexer.fit.eigen.eigenvectors_of_all": "a generator",
    "indexer.fit.units.FitUnits.adder": "only the function that it returns has arrays",
    "indexer.fit.units.FitUnits.sum_block": "only a function among its arguments has arrays",
}
MODULES = (  # and those of the folders among them
    "gradindex.influence", "gradindex.objective", "gradindex.storage.background_file",
    "gradindex.storage.code_index", "gradindex.storage.row_file", "gradindex.storage.token_file",
    "indexer.calibrate", "indexer.encode", "indexer.fit", "search.rank.group_excess",
    "search.rank.group_totals", "search.rank.grouping",
    "search.rank.ranking", "search.rank.recall", "search.rank.shortlist", "search.rank.snapshot",
)


def check(what: str, value: Any, shape: Any, sizes: dict[str, Any]) -> None:
    """Raise AssertionError where a value hasn't its shape, given the sizes known; adds to these."""
    if value is None or shape is None:
        return
    if isinstance(shape, tuple):
        assert len(value) == len(shape), f"{what}: {len(value)} parts, expected {len(shape)}"
        for part, expected in zip(value, shape, strict=True):
            check(what, part, expected, sizes)
    elif isinstance(value, ARRAYS):
        _agree(what, tuple(value.shape), shape, sizes)
    elif isinstance(value, int):
        _agree(what, (value,), shape, sizes)
    elif entries := _arrays_in(value):
        for entry in entries:
            _agree(what, tuple(entry.shape), shape, sizes)
            for letter in OWN.intersection(letters_of(shape)):
                sizes.pop(letter)
    elif not isinstance(value, dict):
        _agree(what, (len(value),), shape, sizes)


def _arrays_in(value: Any) -> list[Any]:
    """The entries of a list or dictionary of arrays; none of anything else."""
    entries = list(value.values()) if isinstance(value, dict) else value
    return list(entries) if isinstance(entries, (list, tuple)) and len(entries) > 0 and \
        isinstance(entries[0], ARRAYS) else []


letters_of = functools.cache(str.split)  # for there are many calls


def _agree(what: str, found: tuple[int, ...], shape: str, sizes: dict[str, Any]) -> None:
    letters, rest = letters_of(shape), found
    if letters[0] == "...":
        letters = letters[1:]
        before, rest = found[: len(found) - len(letters)], found[len(found) - len(letters) :]
        known = sizes.setdefault("...", before)
        assert known == before, f"{what} is {list(found)}, expected [{shape}] with {known} for ..."
    assert len(rest) == len(letters), f"{what} is {list(found)}, expected [{shape}]"
    for letter, size in zip(letters, rest, strict=True):
        if letter == "_":
            continue
        known = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
        assert known == size, f"{what} is {list(found)}, expected [{shape}] with {letter} = {known}"


def checked(name: str, function: Callable[..., Any], shapes: dict[str, Any]) -> Callable[..., Any]:
    """A function that checks the shapes of its arguments and of what it returns."""
    named = [parameter.name for parameter in inspect.signature(function).parameters.values()
             if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    labels = {part: f"{name}: {part if part != 'return' else 'what it returns'}" for part in shapes}
    verify = check  # beside the function, for it is to have the globals of another module

    def call(*positional: Any, **keywords: Any) -> Any:
        sizes: dict[str, Any] = {}
        for argument, value in (*zip(named, positional, strict=False), *keywords.items()):
            if argument in shapes:
                verify(labels[argument], value, shapes[argument], sizes)
        result = function(*positional, **keywords)
        if "return" in shapes:
            verify(labels["return"], result, shapes["return"], sizes)
        return result

    # with the globals of the function's module: by these, its examples are found
    copy = types.FunctionType(call.__code__, function.__globals__, function.__name__, None,
                              call.__closure__)
    return functools.update_wrapper(copy, function)


def home_of(name: str) -> tuple[Any, str]:
    """The module or class that has a function, and the function's name in it."""
    parts = name.split(".")
    classes = 1 if parts[-2][0].isupper() else 0
    home: Any = importlib.import_module(".".join(parts[: -1 - classes]))
    return (getattr(home, parts[-2]) if classes else home), parts[-1]


def install() -> None:
    """Check the functions of the table from now on, wherever a module of ours has one by name."""
    # first, so that all imports are made; the kernel's library isn't everywhere
    known = importlib.util.find_spec("triton") is not None
    homes = {name: home_of(name) for name in SHAPES if known or ".sign_kernel." not in name}
    replaced: dict[int, Any] = {}
    originals = []
    for name, (home, attribute) in homes.items():
        function = vars(home)[attribute]
        bound = isinstance(function, classmethod)
        copy: Any = checked(name, function.__func__ if bound else function, SHAPES[name])
        setattr(home, attribute, classmethod(copy) if bound else copy)
        originals.append(function)  # alive, so that no other object gets its number
        replaced[id(function)] = copy
    for module in [module for name, module in sys.modules.items()
                   if name.partition(".")[0] in PACKAGES and module is not None]:
        for attribute, value in list(vars(module).items()):
            if id(value) in replaced and isinstance(value, types.FunctionType):
                setattr(module, attribute, replaced[id(value)])


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions and methods of MODULES that take or give arrays, but for properties."""
    for name in MODULES:
        module = importlib.import_module(name)
        inner = [one.name for one in pkgutil.iter_modules(getattr(module, "__path__", []))]
        for each in [f"{name}.{one}" for one in inner] or [name]:
            yield from _functions_of(each, importlib.import_module(each), each)


def _functions_of(name: str, home: Any, module: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    for attribute, value in list(vars(home).items()):
        if isinstance(value, type) and value.__module__ == module and \
                not attribute.startswith("_") and not getattr(value, "_is_protocol", False):
            yield from _functions_of(f"{name}.{attribute}", value, module)
        function = value.__func__ if isinstance(value, classmethod) else value
        if not isinstance(function, types.FunctionType) or function.__module__ != module:
            continue
        written = function.__code__.co_filename != "<string>"  # no dataclass's own __init__
        public = not attribute.startswith("_") or attribute in ("__init__", "__call__")
        if public and written and any(
                kind in str(annotation) for annotation in inspect.get_annotations(
                    inspect.unwrap(function)).values() for kind in ("ndarray", "Tensor")):
            yield f"{name}.{attribute}", function

"""Arrays have the shapes that docstrings state, in every call of every test."""

import numpy as np
import pytest
import torch

from gradindex.influence import exact
from gradindex.influence.codes import score_error
from gradindex.influence.gradients import gradient
from gradindex.influence.preconditioned import LowRank, Preconditioned, precondition
from gradindex.modules import Module
from gradindex.storage.code_index import CodeIndex
from support.shapes import LEFT_OUT, SHAPES, check, checked, home_of, public_functions

MODULE = Module("m", 0, "mlp", 2, 3, False)


def test_every_call_is_checked():
    """Functions, methods and class methods, by whatever name a module has them."""
    a, d = torch.ones(4, 5, 3), torch.ones(4, 5, 2)
    assert gradient(MODULE, a, d).shape == (4, 2, 3)
    with pytest.raises(AssertionError, match=r"gradient: d is \[4, 6, 2\], expected \[b t o\]"):
        gradient(MODULE, a, torch.ones(4, 6, 2))
    with pytest.raises(AssertionError, match=r"a is \[5, 3\], expected \[b t i\]"):
        exact.Influences(Preconditioned({"m": torch.ones(1, 2, 3)}))(MODULE, a[0], d)
    with pytest.raises(AssertionError, match=r"norms is \[1, 2\]"):
        score_error(1.0, 1.0, norms=np.ones((1, 2)), length=64)
    with pytest.raises(AssertionError, match="p is"):
        LowRank.of(torch.ones(2, 3), 1)
    with pytest.raises(AssertionError, match=r"coordinates is \[3, 2, 3\].* with q = 2"):
        precondition({}, {"m": torch.ones(2, 2, 3), "n": torch.ones(3, 2, 3)})
    with pytest.raises(AssertionError, match="query is"):
        CodeIndex(64).scores(np.ones((1, 64), np.float32))


def test_what_is_returned_is_checked():
    def wrong(rows: int) -> tuple[np.ndarray, np.ndarray | None]:
        return np.ones((rows, 2)), np.ones(rows + 1)

    shapes = {"rows": "n", "return": ("n _", "n")}
    with pytest.raises(AssertionError, match=r"what it returns is \[4\], .* with n = 3"):
        checked("wrong", wrong, shapes)(3)
    assert checked("none", lambda rows: (np.ones((rows, 2)), None), shapes)(3)[1] is None


@pytest.mark.parametrize("value, shape, fits", [
    (np.ones((2, 3)), "b t", True), (np.ones((2, 3)), "b b", False), (np.ones((2, 3)), "2 _", True),
    (np.ones((2, 3)), "3 _", False), (np.ones((7, 2, 3)), "... o i", True),
    (np.ones(3), "... o i", False), (np.ones(3), "b t", False),
    ([np.ones((2, 3)), np.ones((2, 4))], "q i", True),
    ([np.ones((2, 3)), np.ones((1, 3))], "q i", False),
    ({"a": np.ones((2, 2)), "b": np.ones((3, 3))}, "p p", True), ({}, "p p", True),
    ((np.ones(2), np.ones(3)), ("b", "t"), True), ((np.ones(2), np.ones(3)), ("b", "b"), False),
    ((np.ones(2),), ("b", "t"), False), ([1, 2], "n", True), (None, "b t", True),
])
def test_what_fits_a_shape(value, shape, fits):
    if fits:
        check("it", value, shape, {})
    else:
        with pytest.raises(AssertionError, match="it"):
            check("it", value, shape, {})


def test_lengths_and_numbers_bind_letters():
    sizes = {}
    check("rows", 3, "n", sizes)
    check("ids", [5, 6, 7], "n", sizes)
    with pytest.raises(AssertionError, match="with n = 3"):
        check("array", np.ones(2), "n", sizes)


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_names_what_there_is(name):
    home, attribute = home_of(name)
    function = vars(home)[attribute]
    function = function.__func__ if isinstance(function, classmethod) else function
    code = function.__wrapped__.__code__
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assert set(SHAPES[name]) - {"return"} <= set(arguments)


def test_the_table_names_all_public_functions_of_arrays():
    names = {name for name, _ in public_functions()}
    assert names - SHAPES.keys() - LEFT_OUT.keys() == set()
    assert LEFT_OUT.keys() <= names

"""Names of files, on disks that don't tell a from A."""

import pytest

from gradindex.errors import InputError
from gradindex.modules import Module
from gradindex.storage.layout import refuse_equal_files


def modules(*names):
    return [Module(name, 0, "mlp", 2, 2, False) for name in names]


def test_names_that_differ_by_case_alone(tmp_path):
    (tmp_path / "segments").mkdir()
    sensitive = not (tmp_path / "SEGMENTS").exists()
    different = modules("layers.0.up", "layers.0.down", "layers.1.up")
    refuse_equal_files(tmp_path, different)
    if sensitive:
        refuse_equal_files(tmp_path, modules("layers.0.up", "layers.0.Up"))
        (tmp_path / "SEGMENTS").mkdir()  # what a disk answers that doesn't tell them apart
    refuse_equal_files(tmp_path, different)
    for one, other in (("layers.0.up", "layers.0.Up"), ("caf\u00e9", "cafe\u0301"),
                       ("straße", "STRASSE")):
        with pytest.raises(InputError, match=f"{one} and {other} differ by case alone"):
            refuse_equal_files(tmp_path, modules("first", one, "between", other))

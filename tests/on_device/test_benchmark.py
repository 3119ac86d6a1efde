"""benchmarks/gpu.py runs to its end, on a device too."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu


@pytest.mark.parametrize("part, dtype", [
    ("rescore", torch.float32), ("scan", torch.float32), ("eigen", torch.float32),
    pytest.param("agree", torch.float32, marks=pytest.mark.slow),
    *(pytest.param("model", dtype, marks=pytest.mark.slow)
      for dtype in (torch.float32, torch.bfloat16))])
def test_every_part_runs(part, dtype, capsys):
    gpu.PARTS[part](replace(gpu.SMALL, device="cuda", dtype=dtype, documents=120))
    said = capsys.readouterr().out
    assert "nan" not in said and said.count("\n") >= 3

"""The files of a large model's curvature, before and now: the fit's commits, and the first read.

    python -m benchmarks.curvature_files --before CHECKOUT [--maps 24] [--pass-seconds 20]

Both versions work on the same random matrices, of maps of 1,024 × 4,096: 2.1 GB of curvature for 24
of them. First sixteen blocks of A and S, of half of the maps, are added to the running sums;
between two a pass of `--pass-seconds` is reckoned (the clock is moved on, nobody waits). Then the
curvature is written, and read as a search does until its codes can be drawn.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WORK = r'''
import json, os, sys, time
from pathlib import Path
import torch
from gradindex.influence import curvature
from gradindex.influence.blockwise import covariance_shapes
from gradindex.influence.codes import Codes, CodeSettings
from gradindex.influence.curvature import Curvature, FiledEkfac
from gradindex.modules import Module
from gradindex.storage.integrity import CheckedFiles
from gradindex.storage.layout import module_file
from indexer.fit.running_sums import Block, BlockNotes, Sums

folder, maps, pass_seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
modules = [Module(f"block.{n}.mlp", n, "mlp", *((4096, 1024) if n % 2 else (1024, 4096)), False)
           for n in range(maps)]
found = {}

# the clock goes on by a pass for every block, without anybody waiting for it
moved, real = [0.0], time.monotonic
time.monotonic = lambda: real() + moved[0]
shapes = covariance_shapes(modules[: max(2, maps // 2)], 1)
sums = Sums(folder, "covariance-0-9", shapes, 16)
torch.manual_seed(0)
block = {name: torch.rand(shape) for name, shape in shapes.items()}
start, written = real(), 0
spent = 0.0
for number in range(16):
    moved[0] += pass_seconds
    before = sums._path.stat().st_mtime_ns if sums._path.exists() else 0
    begun = real()
    sums.add(number, Block(block, 1000, BlockNotes()))
    spent += real() - begun
    if sums._path.stat().st_mtime_ns != before:
        written += sums._path.stat().st_size
found["sums, seconds"] = spent
found["sums, GB written"] = written / 1e9
found["of the passes' and the commits' time"] = spent / (spent + 16 * pass_seconds)
del sums, block
for path in folder.glob("covariance*"):
    path.unlink()

facts, begun = {}, real()
for module in modules:
    o, i = module.shape
    made = Curvature(torch.rand(i, i), torch.rand(o, o), torch.rand(o, i))
    start = real()
    facts[module_file(module)] = curvature.save(folder, module, made)
    found["write, seconds"] = found.get("write, seconds", 0) + real() - start
found["GB"] = sum(one.size for one in facts.values()) / 1e9
files, host = CheckedFiles(folder, facts), torch.device("cpu")
os.sync()
start = real()
if hasattr(files, "tensors"):
    ekfac = FiledEkfac(lambda module, device: files.tensors(module_file(module), device), modules,
                       lambda _: host, torch.float32, 1, 1 << 40)
else:
    ekfac = FiledEkfac(lambda module: files.path(module_file(module)), modules, host,
                       torch.float32, 1, 1 << 40)
for module in modules:
    ekfac[module.name]
found["read, seconds"] = real() - start
start = real()
Codes(modules, ekfac, CodeSettings.of(131072, modules, 0, 0.1))
found["codes drawn, seconds"] = real() - start
print(json.dumps(found))
'''


def main() -> None:
    flags = argparse.ArgumentParser()
    flags.add_argument("--before", type=Path, required=True)
    flags.add_argument("--maps", type=int, default=24)
    flags.add_argument("--pass-seconds", type=float, default=20.0)
    asked = flags.parse_args()
    now = Path(__file__).parent.parent
    found = []
    for checkout in (asked.before, now):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", WORK, folder, str(asked.maps), str(asked.pass_seconds)],
                cwd=checkout, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    print(f"{'':<40} {'before':>10} {'now':>10}")
    for name, value in found[0].items():
        print(f"{name:<40} {value:>10.2f} {found[1][name]:>10.2f}")


if __name__ == "__main__":
    main()

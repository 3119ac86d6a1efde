"""A real pretrained model on real data, before and after: how soon an answer, and how true.

    git worktree add ../before ea9cf94
    python -m benchmarks.real_model MODEL DATA.jsonl --before ../before --part dry --layers 6
    python -m benchmarks.real_model MODEL DATA.jsonl --before ../before --part build --limit 160

MODEL is a folder with a causal language model (SmolLM2-135M-Instruct was used), DATA are JSON lines
with `question` and `answer` (GSM8K). `--layers N` keeps its first N blocks, for what takes hours on
the whole. Both checkouts run as commands, one after the other, by the same Python.

Parts: *dry*, `build --dry-run`: how long it takes, and what it says. *build*: every stage's seconds
beside what was announced, and the peak of memory.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIELDS = ("--prompt-field", "question", "--completion-field", "answer")
UNITS = {"s": 1, "min": 60, "h": 3600}


@dataclass
class Ran:
    """What a command took and said."""

    seconds: float
    peak: int
    lines: list[str]
    stages: dict[str, float] = field(default_factory=dict)


def seconds_in(text: str) -> float:
    """Seconds of "3 min 20 s" and the like.

    >>> seconds_in("1 h 02 min"), seconds_in("0.4 s")
    (3720.0, 0.4)
    """
    return sum(float(number) * UNITS[unit]
               for number, unit in re.findall(r"([\d.]+) (h|min|s)\b", text))


def run(checkout: Path, *arguments: object) -> Ran:
    """Run a command of gradindex of a checkout; its lines are shown as they come."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "gradindex", *map(str, arguments)], text=True,
        cwd=checkout,  # -m takes what lies there, before what PYTHONPATH says
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive",
             "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        print(f"    {time.monotonic() - begun:7.1f} s  {lines[-1][:150]}", file=sys.stderr)
    _, _, usage = os.wait4(process.pid, 0)
    ran = Ran(time.monotonic() - begun, usage.ru_maxrss * 1024, lines)
    for line in lines:
        if match := re.match(r"(\w+): .*\(([^()]* (?:s|min))\)$", line):
            ran.stages[match[1]] = seconds_in(match[2])
    return ran


def cut(model: Path, layers: int, folder: Path) -> Path:
    """The model with its first blocks alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.model.layers = network.model.layers[:layers]
    network.config.num_hidden_layers = layers
    network.config.layer_types = None
    network.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def dry(sides: dict[str, Path], model: Path, data: Path, work: Path, options: list[str]) -> None:
    """How long a dry run takes, and what it says."""
    print("| | seconds of the dry run | memory said | peak | estimate |\n|---|---|---|---|---|")
    for name, checkout in sides.items():
        ran = run(checkout, "build", model, data, *FIELDS, "-o", work / f"dry-{name}",
                  "--dry-run", *options)
        said = {line.split()[0]: line for line in ran.lines if line.split()}
        print(f"| {name} | {ran.seconds:.0f} | {said['memory'][10:]} | {ran.peak / 1e9:.2f} GB | "
              f"{said['estimate'][10:]} |", flush=True)


def build(sides: dict[str, Path], model: Path, data: Path, work: Path, options: list[str]) -> None:
    """Every stage of a build beside what was announced, and the peak of memory."""
    for name, checkout in sides.items():
        ran = run(checkout, "build", model, data, *FIELDS, "-o", work / f"index-{name}", *options)
        announced = [line for line in ran.lines if line.startswith("expected")]
        print(f"\n**{name}**: {ran.seconds:.0f} s, peak {ran.peak / 1e9:.2f} GB; announced: "
              f"{'; '.join(announced)}\n\n| stage | seconds |\n|---|---|")
        for stage, seconds in ran.stages.items():
            print(f"| {stage} | {seconds:.1f} |")
        encode, sequences = ran.stages["encode"], _sequences(ran.lines)
        fixed = sum(ran.stages.get(stage, 0.0) for stage in
                    ("batches", "pace", "pairs", "calibrate", "background"))
        share = fixed / (encode / sequences * 10_000)
        print(f"\nOutside the fit, whatever N: {fixed:.0f} s, {share:.1%} of encoding 10,000 "
              "sequences", flush=True)


def _sequences(lines: list[str]) -> int:
    [found] = [match[1] for line in lines if (match := re.search(r"→ ([\d,]+) sequences", line))]
    return int(found.replace(",", ""))


def main() -> None:
    """Run the parts that were asked for."""
    flags = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    flags.add_argument("model", type=Path)
    flags.add_argument("data", type=Path)
    flags.add_argument("--before", type=Path, help="a checkout of the version to compare with")
    flags.add_argument("--part", choices=("dry", "build"), required=True)
    flags.add_argument("--layers", type=int, help="of the model, its first ones")
    flags.add_argument("--work", type=Path, default=Path("real-model"), help="folder to work in")
    asked, options = flags.parse_known_args()
    asked.work, model, data = asked.work.absolute(), asked.model.absolute(), asked.data.absolute()
    asked.work.mkdir(exist_ok=True)
    if asked.layers is not None:
        model = asked.work / f"layers-{asked.layers}"
        if not model.is_dir():
            cut(asked.model.absolute(), asked.layers, model)
    sides = {"before": asked.before.absolute(), "now": ROOT} if asked.before else {"now": ROOT}
    print(json.dumps({"part": asked.part, "layers": asked.layers, "options": options,
                      "cores": os.cpu_count(), "load": os.getloadavg()[0]}) + "\n")
    {"dry": dry, "build": build}[asked.part](sides, model, data, asked.work, options)


if __name__ == "__main__":
    main()

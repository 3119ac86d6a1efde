"""How right is `gradindex build --dry-run`? Its numbers beside those of the build itself.

    python -m benchmarks.dry_run [--threads 1] [--only NAME]

For each setting a random model and text of the standard library are made, the dry run and then
the build run in processes of their own, and the build is watched: seconds from start to end (the
libraries' import included), bytes of the index, the most bytes it held on the way (looked at every
50 ms) and the peak of its resident memory. This process imports no torch: a child's peak begins
with its parent's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Setting:
    """A model, how much text, and arguments of the build."""

    layers: int
    hidden: int
    vocabulary: int
    length: int
    documents: int
    joined: bool  # a source file is one document, else its pieces are
    arguments: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "short": Setting(2, 192, 4096, 128, 1500, False, {"fit_sequences": 768}),
    "packed": Setting(4, 128, 4096, 256, 700, False, {
        "fit_sequences": 256, "pack": True, "modules": "all", "segment_size": 256}),
    "wide": Setting(2, 384, 8192, 512, 6, True, {
        "fit_sequences": 48, "bits": 32768, "batch_tokens": 2048}),
}


def main() -> None:
    """Print a table of estimated / measured."""
    flags = argparse.ArgumentParser()
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--only", choices=SETTINGS)
    flags.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = flags.parse_args()
    if asked.child:
        CHILDREN[asked.child[0]](**json.loads(asked.child[1]))
        return
    print(f"{asked.threads} threads; estimated / measured; load is of the machine, 1 min\n")
    print("| setting | seconds | index | most on disk | peak memory | the dry run took | load |\n"
          + "|---" * 7 + "|", flush=True)
    for name in [asked.only] if asked.only else SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(Path(folder), name, asked.threads), flush=True)


def measure(folder: Path, name: str, threads: int) -> str:
    """A row of the table."""
    arguments = {"folder": str(folder), "name": name}
    run("prepare", arguments, threads)
    dry = run("estimate", arguments, threads)
    assert not (folder / "index").exists()
    load = [os.getloadavg()[0]]
    built = run("build", arguments, threads, folder / "index")
    load.append(os.getloadavg()[0])
    found = json.loads((folder / "estimate.json").read_text())
    print(found.pop("lines"), file=sys.stderr)

    def pair(estimated: float, measured: float, unit: float) -> str:
        return f"{estimated / unit:.4g} / {measured / unit:.4g} = {estimated / measured:.2f}"

    return (f"| {name} | {pair(found['seconds'], built.seconds, 1)} | "
            f"{pair(found['disk'], built.disk, 1e6)} MB | "
            f"{pair(found['disk_most'], built.disk_most, 1e6)} MB | "
            f"{pair(found['memory'], built.memory, 1e6)} MB | {dry.seconds:.0f} s | "
            f"{load[0]:.1f}, {load[1]:.1f} |")


@dataclass
class Ran:
    """What a child took: seconds, bytes of memory and of a folder, at the end and at most."""

    seconds: float
    memory: int
    disk: int
    disk_most: int


def run(what: str, arguments: dict[str, str], threads: int, watched: Path | None = None) -> Ran:
    """Run a child and watch a folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive",
                   "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    begun, most = time.perf_counter(), 0
    child = subprocess.Popen([sys.executable, "-m", "benchmarks.dry_run", "--child", what,
                              json.dumps(arguments)], env=environment)
    while True:
        done, status, usage = os.wait4(child.pid, os.WNOHANG)
        if done:
            break
        most = max(most, bytes_in(watched) if watched else 0)
        time.sleep(0.05)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(f"{what} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return Ran(seconds, usage.ru_maxrss * unit, bytes_in(watched) if watched else 0, most)


def bytes_in(folder: Path) -> int:
    """Bytes of all files, of which some may be going."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


# ---- the children


def prepare(folder: str, name: str) -> None:
    """Write model/ and train.jsonl."""
    from benchmarks.workload import library
    from gradindex.demo.library_documents import standard_library_documents
    from gradindex.demo.small_model import DemoSettings, new_model, train_tokenizer

    setting, out = SETTINGS[name], Path(folder)
    texts = list(library()) if setting.joined else [
        document["text"] for document in standard_library_documents()]
    chosen = texts[:: max(1, len(texts) // setting.documents)][: setting.documents]
    tokenizer = train_tokenizer(texts[::10], setting.vocabulary)
    tokenizer.save_pretrained(out / "model")
    new_model(DemoSettings(
        length=setting.length, vocabulary=setting.vocabulary, layers=setting.layers,
        hidden=setting.hidden)).save_pretrained(out / "model")
    (out / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen))


def estimate(folder: str, name: str) -> None:
    """Write estimate.json."""
    import gradindex
    from gradindex.model.load_errors import quiet_transformers

    quiet_transformers()
    out = Path(folder)
    found = gradindex.estimate(out / "model", out / "train.jsonl", out / "index",
                               **SETTINGS[name].arguments)
    (out / "estimate.json").write_text(json.dumps({
        "seconds": found.seconds, "disk": sum(found.disk.values()), "disk_most": found.disk_most,
        "memory": found.memory.host, "lines": "\n".join(found.lines())}))


def build(folder: str, name: str) -> None:
    """Build the index, saying the stages on standard error."""
    import gradindex
    from gradindex.model.load_errors import quiet_transformers
    from gradindex.progress import stderr_progress

    quiet_transformers()
    out = Path(folder)
    gradindex.build(out / "model", out / "train.jsonl", out / "index", **SETTINGS[name].arguments,
                    progress=stderr_progress())


CHILDREN = {"prepare": prepare, "estimate": estimate, "build": build}

if __name__ == "__main__":
    main()

"""Is an index the same, byte by byte, as the one that another checkout of gradindex writes?

    git worktree add ../before COMMIT
    python -m benchmarks.same_index ../before

Both checkouts run the same commands on the same small models and data: texts, packed texts, chats,
prompts with completions, token files; split covariances, several dtypes, attention, fused experts;
two shards and a merge; then append, delete and compact. Every file is compared, but for the drift
that an append measures on a random sample. Exit code 1 where one differs.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gradindex.demo.small_model import train_tokenizer

WORDS = ["apple", "pear", "plum", "fig", "lime", "cherry", "mango", "quince", "hill", "river",
         "market", "garden", "harbour"]
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
            "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
            "{% endfor %}")
COMMON = ["--seq-len", "24", "--bits", "512", "--segment-size", "16", "--batch-tokens", "96"]
CASES = {
    "text": ("neox", "text.jsonl", ["--id-field", "url", "--keep-fields", "place"]),
    "packed": ("neox", "text.jsonl", ["--pack"]),
    "blocks": ("neox", "text.jsonl", ["--covariance-blocks", "2", "--modules", "all"]),
    "float64": ("neox", "text.jsonl", ["--dtype", "float64", "--seed", "3"]),
    "bfloat16": ("neox", "text.jsonl", ["--dtype", "bfloat16", "--fit-labels", "data"]),
    "pairs": ("neox", "pairs.jsonl", ["--damping", "0.01", "--fit-sequences", "20"]),
    "chat": ("neox", "chat.jsonl", []),
    "tokens": ("neox", "tokens.npy", []),
    "experts": ("mixtral", "tokens.npy", ["--max-memory", "2GB"]),
}


def make_inputs(folder: Path) -> None:
    """Two small models, and data of every kind."""
    random = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(random.choice(WORDS, int(random.integers(4, 30)))) + "."

    texts = [sentence() for _ in range(60)]
    texts[17] = texts[9]
    rows = {
        "text": [{"text": text, "url": f"doc/{n}", "place": WORDS[n % 5]}
                 for n, text in enumerate(texts)],
        "more": [{"text": sentence(), "url": f"more/{n}", "place": WORDS[n % 3]}
                 for n in range(20)],
        "pairs": [{"prompt": text[:20], "completion": text[20:] or "."} for text in texts],
        "chat": [{"messages": [{"role": "user", "content": text[:12]},
                               {"role": "assistant", "content": text[12:] or "."}]}
                 for text in texts],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    np.save(folder / "tokens.npy", random.integers(0, 300, (50, 24)).astype(np.int32))
    tokenizer = train_tokenizer(texts, 400)
    tokenizer.chat_template = TEMPLATE
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 20, "vocab_size": max(300, len(tokenizer)),
             "max_position_embeddings": 64}
    for name, family, more in (("neox", "gpt_neox", {}),
                               ("mixtral", "mixtral", {"num_key_value_heads": 1,
                                                       "num_local_experts": 4})):
        torch.manual_seed(7)
        network = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **sizes, **more), dtype=torch.float32)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        network.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def command(checkout: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """A command of that checkout, and the environment that it runs in."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return [sys.executable, "-m", "gradindex.cli", *arguments], environment


def run(checkout: Path, folder: Path, *arguments: str) -> None:
    """A command of that checkout, in `folder`."""
    words, environment = command(checkout, *arguments)
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(arguments)}\n{done.stderr}")


def build_all(checkout: Path, inputs: Path, folder: Path) -> None:
    """Every index that is compared, under its case's name."""
    for name, (model, data, flags) in CASES.items():
        run(checkout, folder, "build", str(inputs / model), str(inputs / data), "-o", name,
            *COMMON, *flags)
        print(f"  {checkout.name}: {name}", flush=True)
    run_shards(checkout, inputs, folder)
    run(checkout, folder, "merge", "shards")
    shutil.copytree(folder / "text", folder / "upkeep")
    (folder / "ids").write_text("3\n4\n17\n40\n")
    run(checkout, folder, "append", "upkeep", str(inputs / "more.jsonl"))
    run(checkout, folder, "delete", "upkeep", "--ids", "ids")
    run(checkout, folder, "compact", "upkeep")
    (folder / "ids").unlink()


def run_shards(checkout: Path, inputs: Path, folder: Path) -> None:
    """Two shards at once."""
    words, environment = command(checkout, "build", str(inputs / "neox"),
                                 str(inputs / "text.jsonl"), "-o", "shards", *COMMON)
    both = [subprocess.Popen([*words, "--shard", f"{number}/2"], cwd=folder, env=environment,
                             stderr=subprocess.DEVNULL) for number in (0, 1)]
    if any(shard.wait() for shard in both):
        raise SystemExit(f"{checkout}: a shard failed")


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(content_of(path)).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def content_of(path: Path) -> bytes:
    """A file's bytes; of a manifest all but how an append's Λ compared, which is a random sample's.

    Labels of that sample were drawn from another stream before, whose numbers a search used too.
    """
    content = path.read_bytes()
    if path.name == "manifest.json" and b'"drift"' in content:
        manifest = json.loads(content)
        del manifest["sha256"]
        for append in manifest["appended"]:
            del append["drift"], append["drift_error"]
        content = json.dumps(manifest).encode()
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    before = parser.parse_args().before.resolve()
    now = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Path(scratch, "inputs")
        inputs.mkdir()
        make_inputs(inputs)
        sides = []
        for checkout, name in ((before, "a"), (now, "b")):
            folder = Path(scratch, name)
            folder.mkdir()
            build_all(checkout, inputs, folder)
            sides.append(digests(folder))
    first, second = sides
    different = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    for name in different:
        print(f"differs: {name}")
    print(f"{len(first)} files of {len(CASES) + 2} indexes by {before.name}, {len(second)} by "
          f"{now.name}: {len(different)} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

"""`gradindex build`: flags → `indexer.build.build`. Imports only click until it runs."""

from typing import Any

import click


@click.command()
@click.argument("model")
@click.argument("data", nargs=-1, required=True)
@click.option("-o", "--out", required=True, metavar="INDEX", help="Folder to write the index to.")
@click.option("--text-field", metavar="NAME", help="Field of plain text [text].")
@click.option("--prompt-field", metavar="NAME", help="Field of the prompt [prompt].")
@click.option("--completion-field", metavar="NAME", help="Field of the completion [completion].")
@click.option("--messages-field", metavar="NAME", help="Field of chat messages [messages].")
@click.option("--id-field", metavar="NAME", help="Field with your own id, shown in results.")
@click.option("--keep-fields", metavar="A,B", help="Fields to carry into results.")
@click.option("--seq-len", type=int, help="Tokens a sequence [the model's context, at most 512].")
@click.option("--pack/--no-pack", default=False, help="Join documents with the end token [no].")
@click.option("--limit", type=int, help="Read only the first documents.")
@click.option("--strict", is_flag=True, help="Stop at the first row that can't be used.")
@click.option("--modules", default="mlp", show_default=True, metavar="RANGE|KINDS|REGEX",
              help="Linear modules to track: layers (8-15), mlp (all but attention), attention, "
                   "all (both), adapter (LoRA's own), several with commas; else names that match.")
@click.option("--fit-sequences", type=int, default=4096, show_default=True,
              help="Sequences to fit the curvature on.")
@click.option("--fit-labels", type=click.Choice(["model", "data"]), default="model",
              show_default=True, help="Labels sampled from the model, or the data's own.")
@click.option("--damping", type=float, default=0.1, show_default=True,
              help="λ as a factor of each module's mean eigenvalue.")
@click.option("--bits", type=int, help="Bits a code, K [256 a token, at least 16384].")
@click.option("--dtype", default="auto", show_default=True,
              help="auto (float32 on a CPU, the checkpoint's own on a GPU), float32, bfloat16, …")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--batch-tokens", type=int, default=4096, show_default=True,
              help="Padded tokens a batch.")
@click.option("--segment-size", type=int, default=4096, show_default=True,
              help="Sequences a segment, the unit of work and of resuming.")
@click.option("--train-sequences", type=int,
              help="Sequences the model was trained on, N_train [the number indexed].")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--tokenizer", metavar="PATH", help="Folder or hub id [the model's].")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--allow-pickle", is_flag=True, help="Load weights that aren't safetensors.")
def build(model: str, data: tuple[str, ...], keep_fields: str | None, **options: Any) -> None:
    """Fit curvature and encode every training sequence.

    MODEL is a hub id, id@revision or a folder. DATA are .jsonl (.gz, .zst), .parquet, .npy or text
    files, folders of them, or folders written by datasets' save_to_disk. The same command run
    again goes on where the last one stopped.

    \b
    Example:
      gradindex build ./my-model train.jsonl -o train.index --id-field url
    """
    from gradindex.model import quiet_transformers
    from gradindex.progress import stderr_progress
    from indexer.build import build as run

    quiet_transformers()
    names = tuple(name.strip() for name in (keep_fields or "").split(",") if name.strip())
    run(model, list(data), progress=stderr_progress(), keep_fields=names, **options)
    click.echo(f'next: gradindex search {options["out"]} -p "PROMPT" -c " COMPLETION"', err=True)

"""`gradindex view`: flags → a server."""

import contextlib
import gc
import os
from pathlib import Path
from typing import Any

import click

from gradindex.flags import options
from search.query_flags import INDEX_FLAGS, RAY_FLAGS, open_searcher


@click.command()
@options(INDEX_FLAGS)
@options(RAY_FLAGS)
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Address to listen on; off the loopback a token is asked for.")
@click.option("--name", "names", multiple=True, metavar="NAME[:PORT]",
              help="Another name by which the page is reached, through a proxy say.")
@click.option("--port", type=click.IntRange(1, 65535), help="[the first free one from 8765 on]")
@click.option("--no-open", is_flag=True, help="Don't open a browser.")
def view(
    index: Path, host: str, names: tuple[str, ...], port: int | None, no_open: bool, **flags: Any
) -> int:
    """Search in a local web page.

    Its form asks what the index's task asks: a prompt and a completion, a text and a label, or a
    prompt and its answers.

    Off the loopback everybody is asked for a token, as the password of any user: the one in
    GRADINDEX_TOKEN, or a new one that is printed. The page shows training text to who has it.

    \b
    Example:
      gradindex view train.index
    """
    # read when the threads of NumPy and PyTorch begin: idle ones leave pages their turn
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from search.serve import listening
    from search.serve.guard import bracketed, host_names, token_for

    # not of the index but of each search
    train_sequences = flags.pop("train_sequences")
    # before anything is opened: a token that can be guessed is refused at once
    token = token_for(host, os.environ.get("GRADINDEX_TOKEN"))
    searcher, progress = open_searcher(index, flags)
    socket = listening.listen(host, port)
    port = socket.getsockname()[1]
    address = f"http://{bracketed(host)}:{port}/"
    if token is not None:
        if "GRADINDEX_TOKEN" not in os.environ:
            progress.say(f"token, the password of any user: {token}")
        progress.say("warning: whoever reads the network reads the token and the training text; "
                     "put a proxy with TLS in front")
    progress.say(f"the page: {address} (Ctrl-C ends it)")
    if not no_open:
        click.launch(address)
    hosts = host_names(host, port, names)
    with contextlib.suppress(KeyboardInterrupt):  # the way to end it: nothing was interrupted
        listening.make_server(searcher, hosts, token, train_sequences).run(sockets=[socket])
    gc.unfreeze()  # or some library below complains that it was left with what was frozen
    progress.say("the page is closed")
    return 0

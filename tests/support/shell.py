"""A shell in which `gradindex` starts at once.

Importing torch takes seconds, and the documents show many commands. A server that has everything
imported forks for each of them; `gradindex` on the shell's path is a small client, which hands its
arguments, folder and open files over and ends with the exit code of the fork. The server runs no
thread, or a fork could wait for ever for a lock that one holds.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

CLIENT = """\
#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
told = json.dumps({{"arguments": sys.argv[1:], "folder": os.getcwd()}}).encode()
socket.send_fds(server, [told], [0, 1, 2])
sys.exit(int(server.recv(16) or 70))
"""


class Shell:
    """Runs blocks of bash; `folder` is for its own files. Close it in the end."""

    def __init__(self, folder: Path):
        address = folder / "socket"
        client = folder / "bin" / "gradindex"
        client.parent.mkdir()
        client.write_text(CLIENT.format(python=sys.executable, address=str(address)))
        client.chmod(0o755)
        self._environment = {
            **os.environ, "PATH": f"{client.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        self._server = subprocess.Popen(  # -P: what lies beside this file hides no library
            [sys.executable, "-P", __file__, str(address)], stdout=subprocess.PIPE, text=True,
            env=self._environment)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def run(self, block: str, folder: Path) -> str:
        """What a block prints in a folder, standard error included; it must end with 0."""
        from support.waiting import HANG  # here: as the server this file knows no `support`

        shown = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=HANG)
        assert shown.returncode == 0, f"{block}\n{shown.stdout}"
        return shown.stdout

    def close(self) -> None:
        """End the server."""
        assert self._server.stdout is not None
        self._server.kill()
        self._server.wait()
        self._server.stdout.close()


def serve(address: str) -> None:
    """Fork for everyone who comes to a socket at `address`."""
    import gradindex
    import indexer.cli  # noqa: F401
    import search.cli  # noqa: F401

    for name in gradindex.__all__:  # which imports where they live
        getattr(gradindex, name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            client, _ = listening.accept()
            if os.fork() == 0:
                code = 70
                with contextlib.suppress(OSError):
                    code = _answer(client)
                    client.sendall(str(code).encode())
                os._exit(code)
            client.close()


def _answer(client: socket.socket) -> int:
    """Run a client's command here, on its open files; the exit code."""
    from gradindex.cli import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    told, files, _, _ = socket.recv_fds(client, 1 << 16, 3)
    for own, its in enumerate(files):
        os.dup2(its, own)
        os.close(its)
    content = json.loads(told)
    os.chdir(content["folder"])
    sys.argv = ["gradindex", *content["arguments"]]
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # as Python does
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code


if __name__ == "__main__":
    serve(sys.argv[1])

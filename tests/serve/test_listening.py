"""Where the server listens, and the command that starts it."""

import http.client
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from support.waiting import HANG, heed_interrupts

# ---- the command


def test_view_serves_until_interrupted(index_folder: Path) -> None:
    """On 127.0.0.2, which is nobody's loopback for us: a token is made, told and asked for."""
    environment = {name: value for name, value in os.environ.items() if name != "GRADINDEX_TOKEN"}
    command = [sys.executable, "-m", "gradindex.cli", "view", str(index_folder), "--no-open",
               "--host", "127.0.0.2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               env=environment, preexec_fn=heed_interrupts)
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "the page: " in line:
            break
    token = re.search(r"token, the password of any user: (\S+)", said)
    address = re.search(r"the page: http://(127\.0\.0\.2:(\d+))/", said)
    assert token is not None and address is not None, said
    connection = http.client.HTTPConnection("127.0.0.2", int(address[2]), timeout=HANG)
    connection.request("GET", "/healthz")
    refused = connection.getresponse()
    assert refused.status == 401
    refused.read()
    connection.request("GET", "/healthz", headers={"Authorization": f"Bearer {token[1]}"})
    assert connection.getresponse().status == 200
    connection.close()
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=HANG)
    assert out == "" and "Traceback" not in rest and token[1] not in rest
    assert process.returncode == 0 and rest == "the page is closed\n"

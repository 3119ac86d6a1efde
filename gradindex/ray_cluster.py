"""Ray, through its only door: the cluster that --ray names.

Who reaches a cluster can run code on it. So an instance that is started here has no dashboard, and
only paths and plain values are handed to workers.
"""

import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from gradindex.errors import InputError

LOCAL = "local"  # the address of an instance that is started here


WITH_RAY = ("--device-map and --ray can't go together: a worker has one GPU. Use Ray for a model "
            "that a GPU holds, --device-map for one that none holds.")


def connect(address: str) -> Any:
    """The library, connected to the cluster at `address`.

    That is "auto", host:port, or LOCAL to start an instance on this machine. A process that is
    connected already stays so. Raises InputError where there is no Ray, or no cluster.
    """
    check_address(address)
    ray = load_ray()
    if not ray.is_initialized():
        options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, log_to_driver=False, logging_level="error", **options)
            # or Ray's thread says on standard output, which is data, what it thinks of dead workers
            ray._private.worker._worker_logs_enabled = False
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # which Ray has replaced
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"--ray {address}: no cluster can be reached there "
                f"({' '.join(str(error).split())[:200]}). Start one with `ray start --head`, or "
                "give --ray no address for an instance on this machine."
            ) from None
    return ray


def load_ray() -> Any:
    """The library. Raises InputError where it isn't installed."""
    # before the import, which reads it: gradindex sends nothing anywhere by itself
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--ray needs Ray, which can't be imported ({error}). Run pip install "
                         '"gradindex[ray]".') from None
    return ray


def check_address(address: str) -> None:
    """Raise InputError for an address that isn't one, or where nobody listens."""
    # Ray itself would try for minutes to reach nobody.
    host, _, port = address.rpartition(":")
    if address in (LOCAL, "auto"):
        return
    if not host or not port.isdecimal():
        raise InputError(f"--ray {address}: expected auto or host:port, or no address for workers "
                         "on this machine.")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--ray {address}: no cluster is there ({error}). Start one with ray start --head, or "
            "leave the address out for workers on this machine."
        ) from None


def absolute(name: str | Path) -> str | Path:
    """The path of a folder from the root; a hub id, which is no folder, as it is."""
    # Workers have another working directory.
    return Path(name).absolute() if Path(name).exists() else name

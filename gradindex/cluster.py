"""Where a Ray cluster is, as --ray says it. Ray itself is imported by who hands work to it."""

import socket

from gradindex.errors import InputError


def check_address(address: str) -> None:
    """Raise InputError for an address where nobody listens: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if address in ("local", "auto"):
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

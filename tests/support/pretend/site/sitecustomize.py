"""With PRETEND_DEVICE=1 in the environment, every Python that starts has the pretend device."""

import os

if os.environ.get("PRETEND_DEVICE"):
    from support.pretend import device

    device.install()

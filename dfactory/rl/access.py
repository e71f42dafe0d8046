"""Who may connect to a local Ray cluster. No Ray here: its native part reads the environment once, when it is imported."""

import os
import secrets
import sys


def lock_local_cluster() -> None:
    """Let only processes that inherit this one's token connect to the cluster that it is about to start.

    Ray 2.60 opens its ports on all interfaces, whatever address it is given. Does nothing where an existing cluster will
    be joined (RAY_ADDRESS), where the caller has chosen an authentication, or has imported Ray already.
    """
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_AUTH_MODE") or "ray" in sys.modules:
        return
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

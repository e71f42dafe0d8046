"""Restricts who may connect to a local Ray cluster. It does not import Ray, which reads the environment at its import."""

import os
import secrets
import sys


def lock_local_cluster() -> None:
    """Set a token, so that only processes that inherit it can connect to the cluster that this process will start.

    Ray 2.60 opens its ports on all interfaces, whatever address it is given. Does nothing if the run joins an existing
    cluster (RAY_ADDRESS), if the caller has chosen an authentication, or if Ray is already imported.
    """
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_AUTH_MODE") or "ray" in sys.modules:
        return
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))

"""A port of this machine only, for the pages that are served."""

from __future__ import annotations

import errno
import socket

from cagsr.errors import ConfigError

HOST = "127.0.0.1"


def listen(port: int) -> socket.socket:
    """Take the port on 127.0.0.1; 0 takes a free one. A browser that is too early waits instead of being refused.

    Raises:
        ConfigError: it is no port, taken, or not allowed.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port}: must lie between 0 (a free one) and 65535.")
    taken = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((HOST, port))
        taken.listen(128)
    except OSError as error:
        taken.close()
        why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
        raise ConfigError(f"--port {port}: {why}; give another one, or 0 for any that is free.") from None
    return taken

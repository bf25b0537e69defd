"""What systemd is told of the process: that it serves, that it stops. The protocol is sd_notify(3).

One datagram goes to the Unix socket that ``$NOTIFY_SOCKET`` names. systemd sets it for units of
``Type=notify``; where it is not set nobody wants to know.
"""

from __future__ import annotations

import os
import socket

READY = "READY=1"
STOPPING = "STOPPING=1"
_LIMIT = 1.0  # seconds that a full queue is waited for


def notify(state: str) -> None:
    """Tell systemd a state.

    Raises:
        OSError: it can't be told.
    """
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A name that begins with @ is of the abstract namespace, where a null byte stands for it.
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_LIMIT)
        sock.sendto(state.encode(), address)

"""Why what a client connection is doing ends before its time, and what the client hears of it."""

from __future__ import annotations

import enum

CLIENT_CLOSED_REQUEST = 499  # nginx's; for the log, nobody is there to read it


class Cause(enum.Enum):
    """Why a client connection's scope was cancelled, or would be at its deadline."""

    IDLE = enum.auto()
    HEAD_TIMEOUT = enum.auto()
    BODY_TIMEOUT = enum.auto()
    TARGET_TIMEOUT = enum.auto()
    CLIENT_STALLED = enum.auto()
    CLIENT_GONE = enum.auto()
    DRAINED = enum.auto()
    SHUTDOWN = enum.auto()


# Of a request that is being served; any other cause is the proxy ending.
INTERRUPT_STATUS = {
    Cause.BODY_TIMEOUT: 408,
    Cause.TARGET_TIMEOUT: 504,
    Cause.DRAINED: 504,
    Cause.CLIENT_STALLED: CLIENT_CLOSED_REQUEST,
    Cause.CLIENT_GONE: CLIENT_CLOSED_REQUEST,
}

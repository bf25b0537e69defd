"""Why a request did not end as its client and its target meant it to, and what the client hears.

One list for the log, the metrics, the deadlines of a connection and the answers of the proxy.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Self

from kamal_proxy.http.bodies import BodyTooLargeError, SpillFailedError, SpillFullError

if TYPE_CHECKING:
    from kamal_proxy.logs import Log

CLIENT_CLOSED_REQUEST = 499  # nginx's; for the log, nobody is there to read it


class Reason(enum.StrEnum):
    """Why; the value is the word in the log and in the metrics, ``status`` the answer."""

    status: int

    def __new__(cls, word: str, status: int) -> Self:
        """Make a member of a word and a status."""
        member = str.__new__(cls, word)
        member._value_ = word
        member.status = status
        return member

    # The client's doing
    BAD_REQUEST = "bad_request", 400
    HEAD_TIMEOUT = "head_timeout", 408
    BODY_TIMEOUT = "body_timeout", 408
    CLIENT_GONE = "client_gone", CLIENT_CLOSED_REQUEST
    CLIENT_STALLED = "client_stalled", CLIENT_CLOSED_REQUEST
    MISDIRECTED = "misdirected", 421
    # Limits
    HEAD_TOO_LARGE = "head_too_large", 431
    REQUEST_TOO_LARGE = "request_too_large", 413
    RESPONSE_TOO_LARGE = "response_too_large", 500
    SPILL_FULL = "spill_full", 507
    SPILL_FAILED = "spill_failed", 500
    # The target's doing
    TARGET_REFUSED = "target_refused", 502
    TARGET_FAILED = "target_failed", 502
    TARGET_TIMEOUT = "target_timeout", 504
    WEBSOCKET_IDLE = "websocket_idle", 504
    # The proxy's state
    NO_SERVICE = "no_service", 404
    NOT_SECURE = "tls_not_enabled", 503
    NO_TARGET = "no_healthy_target", 503
    STOPPED = "stopped", 503
    PAUSE_EXPIRED = "pause_expired", 504
    PAUSE_FULL = "pause_full", 503
    DRAINED = "drained", 504
    SHUTDOWN = "shutdown", 503
    # Nothing went wrong: a connection had nothing to do any more.
    IDLE = "idle", 0


class Refusal(Exception):
    """The proxy answers by itself.

    Attributes:
        reason: Why.
        status: The answer; that of the reason unless another one was given.
        message: What a stopped service tells its visitors.
    """

    def __init__(self, reason: Reason, message: str = "", status: int = 0) -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message
        self.status = status or reason.status


class TargetFailed(Exception):
    """The target broke the connection or the protocol, or never accepted a connection.

    Attributes:
        reason: Which of the two.
    """

    def __init__(self, text: str, reason: Reason = Reason.TARGET_FAILED) -> None:
        super().__init__(text)
        self.reason = reason


class StaleConnection(Exception):
    """A connection used before was closed by the target before it answered anything."""


class Unprocessed(Exception):
    """The target has said that it did nothing with the request (RFC 9113 8.7)."""


class ClientGone(Exception):
    """The client closed or broke its connection, or takes nothing any more.

    Attributes:
        reason: Which of them.
    """

    def __init__(self, reason: Reason = Reason.CLIENT_GONE) -> None:
        super().__init__(reason)
        self.reason = reason


BODY_ERRORS = (BodyTooLargeError, SpillFullError, SpillFailedError)


def body_refusal(log: Log, error: Exception, too_large: Reason) -> Refusal:
    """Return the answer to a body that can't be kept; what is not the peers' fault is logged.

    Args:
        log: Where.
        error: One of ``BODY_ERRORS``.
        too_large: The reason if it was the service's own limit.
    """
    if isinstance(error, BodyTooLargeError):
        return Refusal(too_large)
    log.error("Body can't be buffered", error=str(error))
    full = isinstance(error, SpillFullError)
    return Refusal(Reason.SPILL_FULL if full else Reason.SPILL_FAILED)

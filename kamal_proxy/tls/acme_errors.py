"""What went wrong with a certificate authority, in its own words and in ours.

Whatever an authority answers, or fails to, becomes an AcmeError with a sentence of one line, and
with what it means for the next attempt.
"""

from __future__ import annotations

import contextlib
import email.utils
import math
import ssl
import time
from typing import TYPE_CHECKING

import requests
from acme import errors, messages
from josepy.errors import Error as JoseError

from kamal_proxy.errors import AcmeError
from kamal_proxy.tls.schedule import MAX_REASON, Failure
from kamal_proxy.tls.transport import EndedError, RefusedAnswerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# What an error says about the next attempt (RFC 8555 6.7); for any other the name is refused.
_KINDS = {
    "rateLimited": Failure.ALL_LIMITED,
    "badNonce": Failure.UNREACHABLE,
    "serverInternal": Failure.UNREACHABLE,
    "unauthorized": Failure.ACCOUNT,
    "accountDoesNotExist": Failure.ACCOUNT,
    "externalAccountRequired": Failure.ACCOUNT,
    "badPublicKey": Failure.ACCOUNT,
    "badSignatureAlgorithm": Failure.ACCOUNT,
    "invalidContact": Failure.ACCOUNT,
    "invalidEmail": Failure.ACCOUNT,
    "unsupportedContact": Failure.ACCOUNT,
    "userActionRequired": Failure.ACCOUNT,
}
# Errors of a validation that another kind of challenge would meet as well.
_HOPELESS = {"caa", "dns", "dnssec", "rejectedIdentifier", "unknownHost"}
# What the libraries raise for data of another shape than they expect.
_MALFORMED = (
    errors.Error,
    JoseError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
    OverflowError,
)
_TOO_MANY_REQUESTS = 429


class ValidationError(AcmeError):
    """The authority could not validate a name.

    Attributes:
        challenge: The kind of challenge that it tried.
        hopeless: Whether another kind would meet the same.
    """

    def __init__(self, message: str, challenge: str, *, hopeless: bool = False) -> None:
        super().__init__(message, kind=Failure.REFUSED)
        self.challenge = challenge
        self.hopeless = hopeless


class UnknownAccountError(AcmeError):
    """The authority has forgotten the account."""


@contextlib.contextmanager
def translated(
    directory: str, retry_after: Callable[[], float | None], host: str = ""
) -> Iterator[None]:
    """Turn whatever a certificate authority can do wrong into AcmeError.

    Args:
        directory: URL of its directory.
        retry_after: Returns for how many seconds its last answer asks to be left alone.
        host: The name that is spoken of.
    """

    def unreachable(what: str, kind: Failure = Failure.UNREACHABLE) -> AcmeError:
        sentence = f"the certificate authority at {directory} {what}"
        return AcmeError(sentence, kind=kind, retry_after=retry_after())

    try:
        yield
    except EndedError as error:
        raise AcmeError("ended before it was done", kind=Failure.ENDED) from error
    except messages.Error as error:
        raise _told(error, host, retry_after()) from error
    except RefusedAnswerError as error:
        why = one_line(str(error))
        raise unreachable(f"gives an answer that can't be used: {why}") from error
    except requests.RequestException as error:
        raise unreachable(f"can't be reached: {_cause(error)}") from error
    except errors.ClientError as error:
        response = error.args[0] if error.args else None
        if not isinstance(response, requests.Response):
            why = one_line(str(error) or repr(error))
            raise unreachable(f"gives an answer that can't be used: {why}") from error
        limited = response.status_code == _TOO_MANY_REQUESTS
        raise unreachable(
            f"answers with status {response.status_code}",
            Failure.ALL_LIMITED if limited else Failure.UNREACHABLE,
        ) from error
    except OSError as error:  # a file of certificates that can't be read
        raise unreachable(f"can't be reached: {one_line(str(error))}") from error
    except _MALFORMED as error:
        why = one_line(repr(error))
        raise unreachable(f"gives an answer that can't be used: {why}") from error


def validation_error(authorization: messages.Authorization, kind: str) -> ValidationError:
    """Make the error about an authorization that is not pending and not valid."""
    for challenge in authorization.challenges:
        if challenge.error is not None:
            hopeless = _code(challenge.error) in _HOPELESS
            return ValidationError(f"{kind}: {_words(challenge.error)}", kind, hopeless=hopeless)
    return ValidationError(f"{kind}: no reason given ({authorization.status})", kind)


def one_line(text: str) -> str:
    """Return any text as one printable line that is not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 1] + "…"


def seconds_of(retry_after: str | None) -> float | None:
    """Return for how many seconds a Retry-After field asks; None if it does not make sense."""
    if retry_after is None:
        return None
    try:
        if retry_after.strip().isdecimal():
            seconds = float(retry_after)
        else:
            at = email.utils.parsedate_to_datetime(retry_after)
            seconds = at.timestamp() - time.time()
    except (ValueError, OverflowError, OSError):
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _told(error: messages.Error, host: str, retry_after: float | None) -> AcmeError:
    """Turn an error that an authority has told."""
    code = _code(error)
    if code == "accountDoesNotExist":
        return UnknownAccountError(_words(error), kind=Failure.ACCOUNT)
    kind = _KINDS.get(code, Failure.REFUSED)
    if kind is Failure.ALL_LIMITED and host and _is_about(host, _words(error)):
        kind = Failure.LIMITED
    return AcmeError(_words(error), kind=kind, retry_after=retry_after)


def _code(error: messages.Error) -> str:
    return str(error.typ).rpartition(":")[2]


def _words(error: messages.Error) -> str:
    """Return what an authority says is wrong."""
    parts = [str(error.detail or error.title or error.description or "no reason given")]
    parts += [str(each.detail) for each in error.subproblems or () if each.detail]
    return one_line(f"{'; '.join(parts)} ({_code(error)})")


def _is_about(host: str, words: str) -> bool:
    """Return whether a limit is that of a name, or of a domain above it, rather than of all.

    Let's Encrypt quotes names like "example.com" or, if there may be several, [example.com].
    """
    labels = host.split(".")
    above = (".".join(labels[number:]) for number in range(max(len(labels) - 1, 1)))
    return any(f'"{name}"' in words or f"[{name}]" in words for name in above)


def _cause(error: requests.RequestException) -> str:
    """Return what is at the bottom of a failed request."""
    cause: BaseException = error
    for _ in range(10):
        candidates = (getattr(cause, "reason", None), *cause.args, cause.__cause__)
        below = next((each for each in candidates if isinstance(each, BaseException)), None)
        if below is None:
            break
        cause = below
    if isinstance(cause, ssl.SSLCertVerificationError):
        return one_line(f"its certificate is not good: {cause.verify_message}")
    if isinstance(cause, OSError) and cause.strerror:
        return one_line(cause.strerror)
    return one_line(str(cause) or repr(cause))

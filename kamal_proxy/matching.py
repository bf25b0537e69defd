"""When a host or a path is the same as another: for routing, limits of paths, redirects. Pure."""

from __future__ import annotations

import re
from urllib.parse import unquote_to_bytes

_MAX_NAME = 253  # characters (RFC 1035 2.3.4)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# The last label is never a number, so that no address is a name (RFC 1123 2.1).
_DNS_NAME = re.compile(rf"(?:{_LABEL}\.)+(?![0-9]+$){_LABEL}")


def host_name(host: str) -> str:
    """Return a host as hosts are compared: lower case, without brackets and final dot."""
    return host.lower().strip("[]").removesuffix(".")


def decoded_path(path: bytes) -> bytes:
    """Return a path as paths are compared: decoded, but for slashes, which would separate."""
    if b"%" not in path:
        return path
    return unquote_to_bytes(path.replace(b"%2F", b"%252F").replace(b"%2f", b"%252f"))


def has_prefix(path: bytes, prefix: bytes) -> bool:
    """Return whether a decoded path begins with all segments of a prefix such as ``/api``."""
    if prefix == b"/":
        return True
    return path.startswith(prefix) and (
        len(path) == len(prefix) or path[len(prefix)] == 0x2F  # a slash
    )


def is_dns_name(host: str) -> bool:
    """Return whether a lower-case host is a name under a domain, such as ``app.example.com``."""
    return len(host) <= _MAX_NAME and _DNS_NAME.fullmatch(host) is not None

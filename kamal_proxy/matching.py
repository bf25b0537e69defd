"""When a host or a path is the same as another: for routing, limits of paths, redirects. Pure."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes


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

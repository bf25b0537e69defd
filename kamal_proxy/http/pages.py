"""The built-in error pages, complete and ready to send.

Pure. Only errors that the proxy itself makes use them; a target's own errors pass through. Pages
that a service brings along are not this module's business.
"""

from __future__ import annotations

import re
from functools import lru_cache
from http import HTTPStatus

CONTENT_TYPE = b"text/html; charset=utf-8"

# Python's own phrases differ between versions; these are the ones that the original sends.
_REASONS = {status.value: status.phrase for status in HTTPStatus} | {
    413: "Request Entity Too Large",
    414: "Request URI Too Long",
    416: "Requested Range Not Satisfiable",
    418: "I'm a teapot",
    422: "Unprocessable Entity",
    499: "Client Closed Request",
}

# Status -> what happened, and what a visitor can do about it.
_TEXTS = {
    404: (
        "Nothing to see at this address",
        "No application answers here. Check the address for a typing mistake.",
    ),
    413: (
        "That was too large",
        "What you sent is larger than this site accepts. Try something smaller.",
    ),
    502: (
        "The application can&#39;t be reached",
        "It is not running, or it broke off before it answered. Please try again in a moment.",
    ),
    503: (
        "Temporarily unavailable",
        "This site can&#39;t take requests right now. Please try again in a moment.",
    ),
    504: (
        "No answer in time",
        "The application took too long to answer. Please try again in a moment.",
    ),
}

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{heading} ({status})</title>
<style>
:root {{ --paper: #fbfaf8; --ink: #22252a; --quiet: #666b73; --line: #d9822b }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #17191d; --ink: #eceae6; --quiet: #9ba1aa; --line: #f0a14e }}
}}
* {{ box-sizing: border-box }}
body {{
  margin: 0; min-height: 100vh; padding: 2rem 1.5rem; display: grid; place-items: center;
  background: var(--paper); color: var(--ink);
  font: 1.125rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}}
main {{ width: 100%; max-width: 34rem; padding-left: 1.25rem; border-left: 4px solid var(--line) }}
h1 {{ margin: 0 0 .5rem; font-size: clamp(1.5rem, 6vw, 2.125rem); line-height: 1.2 }}
p {{ margin: 0; overflow-wrap: anywhere; white-space: pre-line }}
small {{ display: block; margin-top: 1.25rem; color: var(--quiet); font-size: .875rem }}
</style>
</head>
<body>
<main>
<h1>{heading}</h1>
<p dir="auto">{text}</p>
<small>Error {status}</small>
</main>
</body>
</html>
"""

# The same replacements as Go's html/template in a text position.
_ESCAPES = {
    ord("&"): "&amp;",
    ord("<"): "&lt;",
    ord(">"): "&gt;",
    ord('"'): "&#34;",
    ord("'"): "&#39;",
    ord("+"): "&#43;",
    0: "\ufffd",
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def reason(status: int) -> str:
    """Return the reason phrase of a status; empty for one that has none."""
    return _REASONS.get(status, "")


def escape(text: str) -> str:
    """Return a text as it may stand in HTML, also between quotes; lone surrogates become U+FFFD."""
    return _LONE_SURROGATE.sub("\ufffd", text).translate(_ESCAPES)


def render(status: int, message: str = "") -> bytes:
    """Return the page for a status, encoded as UTF-8.

    Args:
        status: The status of the response.
        message: What a 503 page says instead of its own text; escaped here. Other pages
            have no room for it.
    """
    if message and status == HTTPStatus.SERVICE_UNAVAILABLE:
        heading, _ = _TEXTS[status]
        return _PAGE.format(status=status, heading=heading, text=escape(message)).encode()
    return _page(status)


@lru_cache(maxsize=64)
def _page(status: int) -> bytes:
    if status not in _TEXTS:
        return f"<h1>{status} {reason(status)}</h1>".encode()
    heading, text = _TEXTS[status]
    return _PAGE.format(status=status, heading=heading, text=text).encode()

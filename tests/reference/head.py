"""The slow, obvious twin of ``_fastpath.scan_head``: one pattern per defect, the first one wins."""

from __future__ import annotations

import re

DEFECTS = {
    "line ends in LF without CR": re.compile(rb"(?<!\r)\n"),
    "CR without LF": re.compile(rb"\r(?=[^\n])"),
    "control character": re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"),
    "folded header line": re.compile(rb"\r\n(?=[ \t])"),
}


def scan_head(data: bytes) -> int:
    """Return the offset after the first blank line, or -1; ValueError for the first defect."""
    blank = data.find(b"\r\n\r\n")
    head = data if blank < 0 else data[: blank + 4]
    found = [
        (match.start(), what)
        for what, pattern in DEFECTS.items()
        if (match := pattern.search(head)) is not None
    ]
    if found:
        raise ValueError(min(found)[1])
    return blank if blank < 0 else blank + 4

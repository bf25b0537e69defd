"""Types of the compiled hot paths; see _fastpath.pyx for the design."""

def scan_head(data: bytes | bytearray | memoryview, start: int = 0) -> int:
    """Find the end of an HTTP/1.1 message head and refuse what is ambiguous (RFC 9112 2.2, 5.2).

    Args:
        data: The bytes received so far, beginning with the first byte of the start line.
        start: Offset from which to scan, when a shorter prefix was found incomplete before: three
            bytes before the end of that prefix (so that a blank line split over two reads is
            seen), or 0. At most ``len(data)``.

    Returns:
        The offset just after the blank line, or -1 when more data is needed.

    Raises:
        ValueError: LF without CR, CR without LF, a control character (NUL, DEL, ...) or a folded
            header line; the text says which.
    """

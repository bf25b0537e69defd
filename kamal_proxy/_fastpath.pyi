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

class ChunkScanner:
    """Follows the framing of a chunked body and refuses what is ambiguous (RFC 9112 7.1).

    Args:
        limit: Longest extension of one chunk, and longest trailers in all, in bytes.
    """

    def __init__(self, limit: int) -> None: ...
    @property
    def done(self) -> bool:
        """Whether the body has ended."""

    def scan(self, data: bytes | bytearray | memoryview) -> int:
        """Walk over the next bytes of the body.

        Returns:
            How many of them belong to it: all, unless it has ended.

        Raises:
            ValueError: the framing is malformed, or over a limit; the text says how.
        """

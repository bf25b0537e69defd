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

class FrameTracker:
    """Follows the frames of one direction of a WebSocket connection (RFC 6455 5.2).

    It judges nothing: whatever the bytes are, they are read as masked or unmasked frames with any
    opcode and reserved bits. What it says depends only on all bytes so far, not on how they came.
    A 64-bit length with the top bit set, which the RFC forbids, is a frame that never ends.
    """

    def __init__(self) -> None: ...
    @property
    def at_boundary(self) -> bool:
        """Whether no frame is half gone by. A message of several frames may be."""

    @property
    def closing(self) -> bool:
        """Whether a Close frame has begun: its first byte has gone by. It stays so."""

    @property
    def closed(self) -> bool:
        """Whether a whole Close frame has gone by. It stays so."""

    @property
    def frames(self) -> int:
        """How many whole frames have gone by, control frames included."""

    def scan(self, data: bytes | bytearray | memoryview, stop_at_boundary: bool = False) -> int:
        """Walk over the next bytes of the direction.

        Args:
            data: The bytes that follow those scanned so far.
            stop_at_boundary: Whether to stop at the first frame boundary, which may be where the
                data begins.

        Returns:
            How many bytes were walked over: all, unless stopped; scan the others next.
        """

def fnv1a_32(data: bytes | bytearray | memoryview) -> int:
    """Return the 32-bit FNV-1a hash of the data, which rollouts split requests by."""

# The framing of a response's body that is passed on as it comes; a part of the module _fastpath.
#
# Design. A body has a length, or comes in chunks that are not framed anew: what is passed on always
# ends within a chunk or behind a whole line. Only lines that can't be read in two ways are passed on;
# before any other, such as one with an extension or trailers, everything stops.

cdef enum:
    LONGEST_LINE = 17  # fifteen digits and CRLF, or what ends a body

cdef enum Followed:
    ODD_LINE = -1
    BAD_CHUNK = -2

cdef struct Framing:
    bint is_chunked
    bint is_received
    int64_t left  # of the body, or of a chunk
    int line_end  # bytes of the CRLF after a chunk that are still to come
    int64_t passed  # bytes of the body itself
    Py_ssize_t odd_at  # where what can't be passed on begins


cdef void _begin_framing(Framing *framing, int64_t length) noexcept nogil:
    """Begin a body of so many bytes, or with CHUNKED_BODY."""
    framing.is_chunked = length == CHUNKED_BODY
    framing.is_received = False
    framing.left = 0 if framing.is_chunked else length
    framing.line_end = 0
    framing.passed = 0


cdef Py_ssize_t _follow(Framing *framing, const uint8_t *data, Py_ssize_t size) noexcept nogil:
    """Follow the framing of the body; return how many bytes of it can be passed on.

    The rest is the incomplete beginning of a line, or comes after the end. Of a line that is
    not ordinary, or not what ends a chunk, ``odd_at`` is the offset.
    """
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t end, count
    cdef int64_t value
    cdef int digit
    if not framing.is_chunked:
        count = size if size < framing.left else <Py_ssize_t>framing.left
        framing.left -= count
        framing.passed += count
        framing.is_received = framing.left == 0
        return count
    while at < size:
        if framing.left:
            count = size - at if size - at < framing.left else <Py_ssize_t>framing.left
            framing.left -= count
            framing.passed += count
            at += count
            if not framing.left:
                framing.line_end = 2
            continue
        if framing.line_end:
            if data[at] != (0x0D if framing.line_end == 2 else 0x0A):
                framing.odd_at = at
                return BAD_CHUNK
            framing.line_end -= 1
            at += 1
            continue
        end = at
        value = 0
        while end < size and end - at < LENGTH_DIGITS:
            digit = _hex_digit(data[end])
            if digit < 0:
                break
            value = value * 16 + digit
            end += 1
        framing.odd_at = at
        if end == size or (end + 1 == size and end > at and data[end] == 0x0D):
            return at if end - at < LENGTH_DIGITS else ODD_LINE
        if end == at or data[end] != 0x0D or data[end + 1] != 0x0A:
            return ODD_LINE
        end += 2
        if value:
            framing.left = value
            at = end
        elif end < size and data[end] != 0x0D:
            return ODD_LINE  # trailers
        elif end + 1 >= size:
            return at
        elif data[end + 1] != 0x0A:
            return ODD_LINE
        else:
            framing.is_received = True
            return end + 2
    return at

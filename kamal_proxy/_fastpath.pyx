# cython: language_level=3
"""Compiled hot paths.

Design. Functions here take bytes-like objects, check the length once, then walk raw pointers; they
keep no state and allocate no Python object per byte. The buffer belongs to the caller and is only
held (PyObject_GetBuffer .. PyBuffer_Release) for the duration of one call. Every function that
parses has a slow, obvious twin in tests/reference and a hypothesis test that both agree.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

cdef enum:
    INCOMPLETE = -1
    BARE_LF = -2
    BARE_CR = -3
    CONTROL = -4
    OBS_FOLD = -5


cdef Py_ssize_t _scan_head(const unsigned char *data, Py_ssize_t length, Py_ssize_t start) noexcept nogil:
    """Return the offset just after the blank line that ends the head, or a negative verdict."""
    cdef Py_ssize_t i = start
    cdef unsigned char c
    while i < length:
        c = data[i]
        # Almost every byte of a head is printable; one comparison each lets them pass.
        if c >= 0x20 and c != 0x7F:
            i += 1
            continue
        if c == 0x0D:
            if i + 1 == length:
                return INCOMPLETE
            if data[i + 1] != 0x0A:
                return BARE_CR
            if i >= 2 and data[i - 1] == 0x0A:
                return i + 2
            if i + 2 < length and (data[i + 2] == 0x20 or data[i + 2] == 0x09):
                return OBS_FOLD
            i += 2
            continue
        if c == 0x0A:
            if i != start or i == 0 or data[i - 1] != 0x0D:
                return BARE_LF
            # A resumed scan began between CR and LF.
            if i + 1 < length and (data[i + 1] == 0x20 or data[i + 1] == 0x09):
                return OBS_FOLD
            i += 1
            continue
        if c != 0x09:
            return CONTROL
        # A resumed scan may begin exactly at the start of a line.
        if i >= 1 and data[i - 1] == 0x0A:
            return OBS_FOLD
        i += 1
    return INCOMPLETE


_VERDICTS = {
    BARE_LF: "line ends in LF without CR",
    BARE_CR: "CR without LF",
    CONTROL: "control character",
    OBS_FOLD: "folded header line",
}


def scan_head(data, Py_ssize_t start=0):
    """Find the end of an HTTP/1.1 message head and refuse what is ambiguous (RFC 9112 2.2, 5.2)."""
    cdef Py_buffer view
    cdef Py_ssize_t end
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if start < 0 or start > view.len:
            raise IndexError("start is outside the data")
        end = _scan_head(<const unsigned char *>view.buf, view.len, start)
    finally:
        PyBuffer_Release(&view)
    if end < INCOMPLETE:
        raise ValueError(_VERDICTS[end])
    return end

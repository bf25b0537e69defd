# cython: language_level=3, cdivision=True
"""Compiled hot paths.

Design. What is here takes bytes-like objects, checks the length once, then walks raw pointers and
allocates no Python object per byte. The buffer belongs to the caller and is only
held (PyObject_GetBuffer .. PyBuffer_Release) for the duration of one call. Every function that
parses has a slow, obvious twin in tests/reference and a hypothesis test that both agree.
"""

import os

cimport cython
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


cdef enum ChunkState:
    SIZE
    EXTENSION
    SIZE_LF
    DATA
    DATA_CR
    DATA_LF
    LINE_START
    TRAILER
    TRAILER_LF
    END_LF
    DONE


cdef class ChunkScanner:
    """Follows the framing of a chunked body and refuses what is ambiguous (RFC 9112 7.1)."""

    cdef ChunkState _state
    cdef unsigned long long _size  # of the current chunk, or what is left of it
    cdef int _digits
    cdef Py_ssize_t _line  # bytes so far of a size line, or of all trailers
    cdef Py_ssize_t _limit

    def __init__(self, Py_ssize_t limit):
        self._state = SIZE
        self._size = 0
        self._digits = 0
        self._line = 0
        self._limit = limit

    @property
    def done(self):
        return self._state == DONE

    def scan(self, data):
        cdef Py_buffer view
        cdef Py_ssize_t used
        cdef const char *wrong = NULL
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            used = self._scan(<const unsigned char *>view.buf, view.len, &wrong)
        finally:
            PyBuffer_Release(&view)
        if wrong != NULL:
            raise ValueError(wrong.decode("ascii"))
        return used

    cdef Py_ssize_t _scan(
        self, const unsigned char *data, Py_ssize_t length, const char **wrong
    ) noexcept nogil:
        """Walk over the data; on a violation, point ``wrong`` to a sentence (static storage)."""
        cdef Py_ssize_t i = 0
        cdef unsigned char c
        cdef int digit
        while i < length and self._state != DONE:
            if self._state == DATA:
                if <unsigned long long>(length - i) < self._size:
                    self._size -= <unsigned long long>(length - i)
                    return length
                i += <Py_ssize_t>self._size
                self._size = 0
                self._state = DATA_CR
                continue
            c = data[i]
            i += 1
            if self._state == SIZE:
                digit = _hex_digit(c)
                if digit >= 0:
                    self._digits += 1
                    # Fifteen digits are a petabyte; no sum of lengths can overflow.
                    if self._digits > 15:
                        wrong[0] = b"chunk size of more than 15 digits"
                        return i
                    self._size = self._size * 16 + <unsigned long long>digit
                    continue
                if self._digits == 0 or (c != 0x3B and c != 0x0D):
                    wrong[0] = b"malformed chunk size"
                    return i
                self._line = 0
                self._state = EXTENSION if c == 0x3B else SIZE_LF
                continue
            if self._state == EXTENSION or self._state == TRAILER or self._state == LINE_START:
                if c == 0x0D:
                    if self._state == EXTENSION:
                        self._state = SIZE_LF
                    else:
                        self._state = END_LF if self._state == LINE_START else TRAILER_LF
                    continue
                if self._state == LINE_START:
                    if c == 0x20 or c == 0x09:
                        wrong[0] = b"folded trailer line"
                        return i
                    self._state = TRAILER
                if c == 0x7F or (c < 0x20 and c != 0x09):
                    wrong[0] = b"control character in chunked framing"
                    return i
                self._line += 1
                if self._line > self._limit:
                    wrong[0] = b"chunk extension or trailers too long"
                    return i
                continue
            if self._state == DATA_CR:
                if c != 0x0D:
                    wrong[0] = b"chunk longer than its size"
                    return i
                self._state = DATA_LF
                continue
            # SIZE_LF, DATA_LF, TRAILER_LF, END_LF
            if c != 0x0A:
                wrong[0] = b"CR without LF in chunked framing"
                return i
            if self._state == SIZE_LF:
                self._line = 0
                self._state = DATA if self._size else LINE_START
            elif self._state == DATA_LF:
                self._digits = 0
                self._state = SIZE
            elif self._state == TRAILER_LF:
                self._state = LINE_START
            else:
                self._state = DONE
        return i


cdef inline int _hex_digit(unsigned char c) noexcept nogil:
    if 0x30 <= c <= 0x39:
        return c - 0x30
    c |= 0x20
    if 0x61 <= c <= 0x66:
        return c - 0x61 + 10
    return -1


cdef enum FrameState:
    FRAME_START
    FRAME_LENGTH
    FRAME_LONG_LENGTH
    FRAME_REST
    FRAME_ENDLESS


cdef class FrameTracker:
    """Follows the frames of one direction of a WebSocket connection (RFC 6455 5.2)."""

    cdef FrameState _state
    cdef unsigned long long _left  # of the frame after its length: mask and payload
    cdef int _digits  # bytes of a long length that are still to come
    cdef bint _masked
    cdef bint _is_close  # the current frame
    cdef bint _closing
    cdef bint _closed
    cdef unsigned long long _frames

    def __init__(self):
        self._state = FRAME_START
        self._left = 0
        self._digits = 0
        self._masked = False
        self._is_close = False
        self._closing = False
        self._closed = False
        self._frames = 0

    @property
    def at_boundary(self):
        return self._state == FRAME_START

    @property
    def closing(self):
        return self._closing

    @property
    def closed(self):
        return self._closed

    @property
    def frames(self):
        return self._frames

    def scan(self, data, bint stop_at_boundary=False):
        cdef Py_buffer view
        cdef Py_ssize_t used
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            used = self._scan(<const unsigned char *>view.buf, view.len, stop_at_boundary)
        finally:
            PyBuffer_Release(&view)
        return used

    cdef Py_ssize_t _scan(
        self, const unsigned char *data, Py_ssize_t length, bint stop
    ) noexcept nogil:
        cdef Py_ssize_t i = 0
        cdef unsigned char c
        if stop and self._state == FRAME_START:
            return 0
        while i < length:
            if self._state == FRAME_REST:
                if <unsigned long long>(length - i) < self._left:
                    self._left -= <unsigned long long>(length - i)
                    return length
                i += <Py_ssize_t>self._left
                self._left = 0
            elif self._state == FRAME_ENDLESS:
                return length
            else:
                c = data[i]
                i += 1
                if self._state == FRAME_START:
                    self._is_close = (c & 0x0F) == 0x08
                    self._closing = self._closing or self._is_close
                    self._state = FRAME_LENGTH
                    continue
                if self._state == FRAME_LENGTH:
                    self._masked = (c & 0x80) != 0
                    c &= 0x7F
                    if c >= 126:
                        self._left = 0
                        self._digits = 2 if c == 126 else 8
                        self._state = FRAME_LONG_LENGTH
                        continue
                    self._left = c
                else:
                    self._left = self._left << 8 | c
                    self._digits -= 1
                    if self._digits:
                        continue
                    # RFC 6455 5.2 forbids the top bit; without it the mask can't overflow the sum.
                    if self._left >> 63:
                        self._state = FRAME_ENDLESS
                        continue
                if self._masked:
                    self._left += 4
                if self._left:
                    self._state = FRAME_REST
                    continue
            self._frames += 1
            self._closed = self._closed or self._is_close
            self._state = FRAME_START
            if stop:
                return i
        return i


def fnv1a_32(data):
    """Return the 32-bit FNV-1a hash of the data."""
    cdef Py_buffer view
    cdef Py_ssize_t i
    cdef unsigned int value = 0x811C9DC5
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        for i in range(view.len):
            value = (value ^ (<const unsigned char *>view.buf)[i]) * <unsigned int>0x01000193
    finally:
        PyBuffer_Release(&view)
    return value


include "_system.pxi"
include "_readiness.pxi"
include "_heads.pxi"
include "_passage.pxi"
include "_media.pxi"
include "_sessions.pxi"
include "_calls.pxi"
include "_relay.pxi"
include "_framing.pxi"
include "_lane.pxi"
include "_access_log.pxi"

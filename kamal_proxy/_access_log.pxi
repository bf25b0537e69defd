# The log line of an exchange in the lane; a part of the module _fastpath.
#
# Design. The line is that of http/access_log.py and logs.py, byte for byte. Both heads are read once
# more when it is written, so that nothing has to be kept of them but themselves. What is not plain
# ASCII is left to Python.

from cpython.unicode cimport PyUnicode_DecodeUTF8

from urllib.parse import unquote_to_bytes

cdef enum:
    # A line has all of two heads, and parts of them twice; a byte can become three.
    LINE_ROOM = 12 * LANE_MAX_HEAD + 32768


cdef class AccessLog:
    """Writes the lines of one lane."""

    cdef Lane _lane
    cdef object _write, _text_of_second
    cdef bytes _scheme
    cdef int _port
    cdef bint _trusts_few
    cdef bytes _second_text
    cdef int64_t _second
    cdef Head _request
    cdef Head _response
    cdef uint8_t[LINE_ROOM] _line

    def __init__(
        self, Lane lane, write, text_of_second, bytes scheme, int port, bint trusts_few
    ):
        self._lane = lane
        self._write = write
        self._text_of_second = text_of_second
        self._scheme = scheme
        self._port = port
        self._trusts_few = trusts_few
        self._second = -1

    cdef int log(self, Visit visit, int status, int64_t duration, reason) except -1:
        """Write the line of an exchange that has ended."""
        cdef Output out
        cdef Head *head = &self._request
        cdef Head *answer = &self._response
        cdef const Field *field
        cdef Plan plan = visit._plan
        cdef Span told
        cdef bytes name, key, remote
        _scan_request(head, _bytes_of(visit._request), len(visit._request))
        if not _scan_response(answer, _bytes_of(visit._response), len(visit._response), visit._method):
            raise AssertionError("a response that was read can be read again")
        out.at = self._line
        out.end = self._line + sizeof(self._line)
        out.is_full = False
        _put(&out, b'{"time":"', 9)
        self._put_time(&out)
        _put(&out, b'","level":"INFO","msg":"Request","host":', 40)
        self._put_text(&out, &head.known[<int>HOST].value)
        _put(&out, b',"port":', 8)
        _put_number(&out, self._port)
        _put(&out, b',"path":', 8)
        self._put_path(&out, head)
        _put(&out, b',"request_id":', 14)
        if head.known[<int>REQUEST_ID] != NULL:
            self._put_text(&out, &head.known[<int>REQUEST_ID].value)
        else:
            _put(&out, b'"', 1)
            _put(&out, visit._id, ID_SIZE)
            _put(&out, b'"', 1)
        _put(&out, b',"status":', 10)
        _put_number(&out, status)
        _put(&out, b',"service":', 11)
        _put_bytes(&out, plan._quoted)
        _put(&out, b',"target":"', 11)
        _put_bytes(&out, self._lane._name_of(visit._target))
        _put(&out, b'","duration":', 13)
        _put_number(&out, duration)
        _put(&out, b',"method":"', 11)
        _put_bytes(&out, METHODS[head.method])
        _put(&out, b'","req_content_length":', 23)
        _put_number(&out, 0 if head.length == NO_LENGTH else head.length)
        _put(&out, b',"req_content_type":', 20)
        self._put_value(&out, head.known[<int>TYPE])
        _put(&out, b',"resp_content_length":', 23)
        _put_number(&out, visit._framing.passed)
        _put(&out, b',"resp_content_type":', 21)
        self._put_value(&out, answer.known[<int>TYPE])
        _put(&out, b',"client_addr":"', 16)
        _put_bytes(&out, visit._client)
        _put(&out, b'","client_port":"', 17)
        _put_number(&out, visit.address[1])
        _put(&out, b'","remote_addr":', 16)
        field = head.known[<int>FORWARDED_FOR]
        if field != NULL and not self._trusts_few:
            self._put_value(&out, field)
        elif field != NULL and visit._vouched:
            remote = self._lane.remote(visit, _copy_of(&field.value))
            _span_of(&told, remote)
            self._put_text(&out, &told)
        else:
            _put(&out, b'"', 1)
            _put_bytes(&out, visit._client)
            _put(&out, b'"', 1)
        _put(&out, b',"user_agent":', 14)
        self._put_value(&out, head.known[<int>AGENT])
        _put(&out, b',"proto":"HTTP/1.1","scheme":"', 30)
        _put_bytes(&out, self._scheme)
        _put(&out, b'","query":', 10)
        self._put_text(&out, &head.query)
        for name, key in plan._request_names:
            self._put_wanted(&out, head, name, key, False)
        for name, key in plan._response_names:
            self._put_wanted(&out, answer, name, key, True)
        if reason is not None:
            _put(&out, b',"reason":"', 11)
            _put_bytes(&out, reason.encode())
            _put(&out, b'"', 1)
        _put(&out, b"}", 1)
        if out.is_full:
            raise AssertionError("a line has at most so many bytes")
        self._write(PyUnicode_DecodeUTF8(<char *>self._line, out.at - self._line, NULL))
        return 0

    cdef int _put_time(self, Output *out) except -1:
        """Write now as Go prints it: RFC 3339, nanoseconds without trailing zeros."""
        cdef int64_t now = _nanoseconds(CLOCK_REALTIME)
        cdef int64_t part = now % 1000000000
        cdef uint8_t[10] digits
        cdef int i, size
        if now // 1000000000 != self._second:
            self._second = now // 1000000000
            self._second_text = self._text_of_second(self._second).encode()
        _put_bytes(out, self._second_text)
        if part:
            digits[0] = 0x2E
            for i in range(9, 0, -1):
                digits[i] = 0x30 + <uint8_t>(part % 10)
                part //= 10
            size = 10
            while digits[size - 1] == 0x30:
                size -= 1
            _put(out, digits, size)
        _put(out, b"Z", 1)
        return 0

    cdef int _put_text(self, Output *out, const Span *span) except -1:
        """Write a text in quotation marks."""
        cdef Py_ssize_t i
        for i in range(span.size):
            if not 0x20 <= span.at[i] <= 0x7E or span.at[i] == 0x22 or span.at[i] == 0x5C:
                _put_bytes(out, self._lane.quoted(_copy_of(span)))
                return 0
        _put(out, b'"', 1)
        _put_span(out, span)
        _put(out, b'"', 1)
        return 0

    cdef int _put_value(self, Output *out, const Field *field) except -1:
        if field == NULL:
            _put(out, b'""', 2)
            return 0
        return self._put_text(out, &field.value)

    cdef int _put_path(self, Output *out, const Head *head) except -1:
        cdef Span decoded
        cdef bytes path
        if not head.has_escape:
            return self._put_text(out, &head.path)
        path = unquote_to_bytes(_copy_of(&head.path))
        _span_of(&decoded, path)
        return self._put_text(out, &decoded)

    cdef int _put_wanted(
        self, Output *out, const Head *head, bytes name, bytes key, bint is_response
    ) except -1:
        """Write a field that an option asks for: all values of that (lower-case) name, joined.

        Of a response, only what the client gets.
        """
        cdef Span joined
        cdef bytes value
        cdef list values = []
        cdef int i
        for i in range(head.count):
            if is_response and _is_left_out(head, head.fields[i].meaning):
                continue
            if _is_word(&head.fields[i].name, PyBytes_AS_STRING(name), len(name)):
                values.append(_copy_of(&head.fields[i].value))
        value = b",".join(values)
        _span_of(&joined, value)
        _put_bytes(out, key)
        return self._put_text(out, &joined)

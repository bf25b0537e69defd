# Heads of ordinary HTTP/1.1 messages, read and written anew; a part of the module _fastpath.
#
# Design. What is read here is a part of what h11 and http/headers.py take, chosen so that no two
# implementations could read it in two ways: lines end in CRLF, names are letters, digits and
# hyphens, values hold neither tabs nor control characters, framing is said once, and no field asks
# for anything but a plain exchange. Everything else is not ordinary, is left to them, and nothing is
# said about it. What is ordinary has to come out as they would write it, byte for byte;
# tests/http/test_heads.py compares.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

cdef enum:
    MAX_FIELDS = 100
    MAX_METHOD = 7
    MAX_HOST = 260  # a name of 253 bytes, the dot of the root and a port (RFC 1035 2.3.4)
    LENGTH_DIGITS = 15  # no sum with such a length overflows
    GROWTH = 1024  # bytes that a head is longer at most when it is written, without what is given
    NO_LENGTH = -3
    CHUNKED_BODY = -1

# What a field means on its way to a target, or to a client.
cdef enum Meaning:
    PASSED  # as it is
    HOST
    CONNECTION
    LENGTH
    CODING
    TYPE
    AGENT
    REQUEST_ID
    REQUEST_START
    FORWARDED_FOR
    FORWARDED_PROTO
    FORWARDED_HOST
    KEEP_ALIVE
    BUFFERING
    ODD  # not ordinary

cdef struct Span:
    const uint8_t *at
    Py_ssize_t size

cdef struct Field:
    Span name
    Span value
    Meaning meaning

cdef struct Head:
    Py_ssize_t size  # with the blank line
    Py_ssize_t length  # of the body, CHUNKED_BODY or NO_LENGTH
    bint closes  # the connection ends with this message
    int count
    Field[MAX_FIELDS] fields
    Field *known[ODD]  # the one that has a meaning
    # of a request
    int method  # index into METHODS
    Span path, query, host_name
    bint has_query, has_escape
    # of a response
    int status
    Span reason

cdef struct Output:
    uint8_t *at
    uint8_t *end
    bint is_full

METHODS = (b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS")

cdef enum:
    GET_METHOD = 0
    HEAD_METHOD = 1
    POST_METHOD = 2
    PUT_METHOD = 3
    DELETE_METHOD = 4
    PATCH_METHOD = 5
    OPTIONS_METHOD = 6

cdef enum CharClass:
    IN_NAME = 1
    IN_TARGET = 2
    IN_VALUE = 4
    IN_HOST = 8
    IN_REASON = 16

cdef uint8_t[256] _classes


cdef void _classify():
    cdef int c
    for c in range(256):
        _classes[c] = 0
        if 0x61 <= (c | 0x20) <= 0x7A or 0x30 <= c <= 0x39 or c == 0x2D:
            _classes[c] |= IN_NAME | IN_HOST
        if c == 0x2E or c == 0x5F:
            _classes[c] |= IN_HOST
        if 0x21 <= c <= 0x7E and c != 0x23:
            _classes[c] |= IN_TARGET
        if c >= 0x20 and c != 0x7F:
            _classes[c] |= IN_VALUE
        if 0x20 <= c <= 0x7E:
            _classes[c] |= IN_REASON


_classify()


cdef inline bint _is_word(const Span *span, const char *word, Py_ssize_t size) noexcept nogil:
    """Compare with a word in lower case, which has no character that a lower case one looks like."""
    cdef Py_ssize_t i
    if span.size != size:
        return False
    for i in range(size):
        if (span.at[i] | 0x20) != <uint8_t>word[i]:
            return False
    return True


cdef Meaning _request_meaning(const Span *name) noexcept nogil:
    cdef Py_ssize_t size = name.size
    if size == 4:
        return HOST if _is_word(name, b"host", 4) else PASSED
    if size == 2:
        return ODD if _is_word(name, b"te", 2) else PASSED
    if size == 6:
        return ODD if _is_word(name, b"expect", 6) else PASSED
    if size == 7:
        return ODD if _is_word(name, b"upgrade", 7) else PASSED
    if size == 9:
        return ODD if _is_word(name, b"forwarded", 9) else PASSED
    if size == 10:
        if _is_word(name, b"connection", 10):
            return CONNECTION
        if _is_word(name, b"user-agent", 10):
            return AGENT
        return ODD if _is_word(name, b"keep-alive", 10) else PASSED
    if size == 12:
        if _is_word(name, b"content-type", 12):
            return TYPE
        return REQUEST_ID if _is_word(name, b"x-request-id", 12) else PASSED
    if size == 14:
        if _is_word(name, b"content-length", 14):
            return LENGTH
        return ODD if _is_word(name, b"x-kamal-target", 14) else PASSED
    if size == 15:
        if _is_word(name, b"x-forwarded-for", 15):
            return FORWARDED_FOR
        return REQUEST_START if _is_word(name, b"x-request-start", 15) else PASSED
    if size == 16:
        if _is_word(name, b"x-forwarded-host", 16):
            return FORWARDED_HOST
        return ODD if _is_word(name, b"proxy-connection", 16) else PASSED
    if size == 17:
        if _is_word(name, b"transfer-encoding", 17):
            return CODING
        return FORWARDED_PROTO if _is_word(name, b"x-forwarded-proto", 17) else PASSED
    if size == 18:
        return ODD if _is_word(name, b"proxy-authenticate", 18) else PASSED
    if size == 19:
        return ODD if _is_word(name, b"proxy-authorization", 19) else PASSED
    return PASSED


cdef Meaning _response_meaning(const Span *name) noexcept nogil:
    cdef Py_ssize_t size = name.size
    if size == 2:
        return ODD if _is_word(name, b"te", 2) else PASSED
    if size == 4:
        # It means nothing there, but h11 writes it before the others.
        return ODD if _is_word(name, b"host", 4) else PASSED
    if size == 7:
        return ODD if _is_word(name, b"upgrade", 7) else PASSED
    if size == 10:
        if _is_word(name, b"connection", 10):
            return CONNECTION
        return KEEP_ALIVE if _is_word(name, b"keep-alive", 10) else PASSED
    if size == 12:
        return TYPE if _is_word(name, b"content-type", 12) else PASSED
    if size == 14:
        return LENGTH if _is_word(name, b"content-length", 14) else PASSED
    if size == 16:
        return ODD if _is_word(name, b"proxy-connection", 16) else PASSED
    if size == 17:
        if _is_word(name, b"transfer-encoding", 17):
            return CODING
        return BUFFERING if _is_word(name, b"x-accel-buffering", 17) else PASSED
    if size == 18:
        return ODD if _is_word(name, b"proxy-authenticate", 18) else PASSED
    if size == 19:
        return ODD if _is_word(name, b"proxy-authorization", 19) else PASSED
    return PASSED


cdef bint _scan_fields(
    Head *head, const uint8_t *data, Py_ssize_t at, Py_ssize_t size, bint is_request
) noexcept nogil:
    """Read the fields from ``at`` to the blank line; return whether all are ordinary."""
    cdef Field *field
    cdef Py_ssize_t start
    head.count = 0
    head.closes = False
    head.length = NO_LENGTH
    memset(head.known, 0, sizeof(head.known))
    while True:
        if at + 2 > size:
            return False
        if data[at] == 0x0D:
            if data[at + 1] != 0x0A:
                return False
            head.size = at + 2
            break
        if head.count == MAX_FIELDS:
            return False
        field = &head.fields[head.count]
        head.count += 1
        start = at
        while at < size and _classes[data[at]] & IN_NAME:
            at += 1
        if at == start or at >= size or data[at] != 0x3A:
            return False
        field.name.at = data + start
        field.name.size = at - start
        at += 1
        while at < size and data[at] == 0x20:
            at += 1
        start = at
        while at < size and _classes[data[at]] & IN_VALUE:
            at += 1
        if at + 1 >= size or data[at] != 0x0D or data[at + 1] != 0x0A:
            return False
        field.value.at = data + start
        field.value.size = at - start
        while field.value.size and data[start + field.value.size - 1] == 0x20:
            field.value.size -= 1
        at += 2
        field.meaning = _request_meaning(&field.name) if is_request else _response_meaning(&field.name)
        if field.meaning == PASSED or field.meaning == KEEP_ALIVE:
            continue
        # Two of a kind, or one that says nothing, would have to be understood.
        if field.meaning == ODD or head.known[<int>field.meaning] != NULL or not field.value.size:
            return False
        head.known[<int>field.meaning] = field
    return _read_connection(head) and _read_framing(head)


cdef bint _read_connection(Head *head) noexcept nogil:
    cdef const Field *field = head.known[<int>CONNECTION]
    if field == NULL:
        return True
    head.closes = _is_word(&field.value, b"close", 5)
    return head.closes or _is_word(&field.value, b"keep-alive", 10)


cdef bint _read_framing(Head *head) noexcept nogil:
    cdef const Field *field = head.known[<int>LENGTH]
    cdef Py_ssize_t i
    if head.known[<int>CODING] != NULL:
        head.length = CHUNKED_BODY
        return field == NULL and _is_word(&head.known[<int>CODING].value, b"chunked", 7)
    if field == NULL:
        return True
    if field.value.size > LENGTH_DIGITS or (field.value.size > 1 and field.value.at[0] == 0x30):
        return False
    head.length = 0
    for i in range(field.value.size):
        if not 0x30 <= field.value.at[i] <= 0x39:
            return False
        head.length = head.length * 10 + (field.value.at[i] - 0x30)
    return True


cdef int _method(const uint8_t *data, Py_ssize_t size) noexcept nogil:
    """Return the index of a method, or -1."""
    if size == 3:
        if memcmp(data, b"GET", 3) == 0:
            return GET_METHOD
        return PUT_METHOD if memcmp(data, b"PUT", 3) == 0 else -1
    if size == 4:
        if memcmp(data, b"POST", 4) == 0:
            return POST_METHOD
        return HEAD_METHOD if memcmp(data, b"HEAD", 4) == 0 else -1
    if size == 5:
        return PATCH_METHOD if memcmp(data, b"PATCH", 5) == 0 else -1
    if size == 6:
        return DELETE_METHOD if memcmp(data, b"DELETE", 6) == 0 else -1
    if size == 7:
        return OPTIONS_METHOD if memcmp(data, b"OPTIONS", 7) == 0 else -1
    return -1


cdef bint _scan_request(Head *head, const uint8_t *data, Py_ssize_t size) noexcept nogil:
    """Read the head of a request; return whether it is whole and ordinary."""
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t start
    while at < size and at <= MAX_METHOD and data[at] != 0x20:
        at += 1
    if at >= size or data[at] != 0x20:
        return False
    head.method = _method(data, at)
    at += 1
    start = at
    if head.method < 0 or at >= size or data[at] != 0x2F:
        return False
    head.has_escape = head.has_query = False
    while at < size and _classes[data[at]] & IN_TARGET and data[at] != 0x3F:
        if data[at] == 0x25:
            head.has_escape = True
            if at + 2 >= size or _hex_digit(data[at + 1]) < 0 or _hex_digit(data[at + 2]) < 0:
                return False
        at += 1
    head.path.at = data + start
    head.path.size = at - start
    if at < size and data[at] == 0x3F:
        head.has_query = True
        at += 1
    start = at
    if head.has_query:
        while at < size and _classes[data[at]] & IN_TARGET:
            at += 1
    head.query.at = data + start
    head.query.size = at - start
    if at + 11 > size or memcmp(data + at, b" HTTP/1.1\r\n", 11) != 0:
        return False
    if not _scan_fields(head, data, at + 11, size, True):
        return False
    return _read_host(head)


cdef bint _read_host(Head *head) noexcept nogil:
    """Read a name with or without a port; addresses of IPv6 are not ordinary.

    It is written twice; that no head grows by much depends on its limit.
    """
    cdef const Field *field = head.known[<int>HOST]
    cdef Py_ssize_t i = 0
    if field == NULL or field.value.size > MAX_HOST:
        return False
    while i < field.value.size and _classes[field.value.at[i]] & IN_HOST:
        i += 1
    head.host_name.at = field.value.at
    head.host_name.size = i
    if i == 0:
        return False
    if i < field.value.size:
        if field.value.at[i] != 0x3A:
            return False
        i += 1
        while i < field.value.size and 0x30 <= field.value.at[i] <= 0x39:
            i += 1
    return i == field.value.size


cdef bint _scan_response(
    Head *head, const uint8_t *data, Py_ssize_t size, int method
) noexcept nogil:
    """Read the head of the final response to a request; return whether it is whole and ordinary.

    Then ``head.length`` is what follows: the bytes of the body, or CHUNKED_BODY.
    """
    cdef Py_ssize_t at = 13
    cdef int i
    if size < 15 or memcmp(data, b"HTTP/1.1 ", 9) != 0 or data[12] != 0x20:
        return False
    for i in range(9, 12):
        if not 0x30 <= data[i] <= 0x39:
            return False
    head.status = (data[9] - 0x30) * 100 + (data[10] - 0x30) * 10 + (data[11] - 0x30)
    if not 200 <= head.status <= 599:
        return False
    while at < size and _classes[data[at]] & IN_REASON:
        at += 1
    if at + 2 > size or data[at] != 0x0D or data[at + 1] != 0x0A:
        return False
    head.reason.at = data + 13
    head.reason.size = at - 13
    if not _scan_fields(head, data, at + 2, size, False):
        return False
    if head.status == 204 or head.status == 304:
        # Many say that nothing has no length; what is passed on says nothing (RFC 9110 8.6).
        if head.length != NO_LENGTH and (head.status == 304 or head.length != 0):
            return False
        head.length = 0
        return True
    # Without a length it ends with the connection. A response to HEAD has one, but no body.
    if head.length == NO_LENGTH or (method == HEAD_METHOD and head.length == CHUNKED_BODY):
        return False
    if method == HEAD_METHOD:
        head.length = 0
    return True


cdef inline void _put(Output *out, const void *data, Py_ssize_t size) noexcept nogil:
    if out.end - out.at < size:
        out.is_full = True
        return
    memcpy(out.at, data, <size_t>size)
    out.at += size


cdef inline void _put_bytes(Output *out, bytes data) noexcept:
    _put(out, <const char *>data, len(data))


cdef inline void _put_span(Output *out, const Span *span) noexcept nogil:
    _put(out, span.at, span.size)


cdef void _put_number(Output *out, int64_t number) noexcept nogil:
    """Write a number that is not negative."""
    cdef uint8_t[20] digits
    cdef int at = 20
    while True:
        at -= 1
        digits[at] = 0x30 + <uint8_t>(number % 10)
        number //= 10
        if not number:
            break
    _put(out, digits + at, 20 - at)


cdef void _put_field(Output *out, const Field *field) noexcept nogil:
    _put_span(out, &field.name)
    _put(out, b": ", 2)
    _put_span(out, &field.value)
    _put(out, b"\r\n", 2)


cdef void _put_passed_fields(Output *out, const Head *head) noexcept nogil:
    cdef int i
    cdef Meaning meaning
    for i in range(head.count):
        meaning = head.fields[i].meaning
        if meaning == PASSED or meaning == TYPE or meaning == AGENT or meaning == BUFFERING:
            _put_field(out, &head.fields[i])


cdef struct Route:
    # How a request is to be written; see http.headers.request_headers.
    Span client, scheme, target, request_id
    int64_t start  # milliseconds since 1970
    Py_ssize_t stripped  # bytes of the path that the target does not see
    bint is_believed  # the incoming X-Forwarded-* fields are


cdef void _put_joined(
    Output *out, const char *name, Py_ssize_t size, const Field *former, const Span *value
) noexcept nogil:
    _put(out, name, size)
    if former != NULL:
        _put_span(out, &former.value)
        _put(out, b", ", 2)
    _put_span(out, value)
    _put(out, b"\r\n", 2)


cdef void _write_request(Output *out, const Head *head, const Route *route) noexcept nogil:
    """Write the head that the target gets."""
    cdef const Field *host = head.known[<int>HOST]
    cdef const Field *former_for = head.known[<int>FORWARDED_FOR] if route.is_believed else NULL
    cdef const Field *former_host = head.known[<int>FORWARDED_HOST] if route.is_believed else NULL
    cdef const Field *former_proto = head.known[<int>FORWARDED_PROTO] if route.is_believed else NULL
    cdef const Field *start = head.known[<int>REQUEST_START]
    cdef Span path = head.path
    cdef bint has_length
    _put_method(out, head.method)
    path.at += route.stripped
    path.size -= route.stripped
    if path.size:
        _put_span(out, &path)
    else:
        _put(out, b"/", 1)
    if head.has_query:
        _put(out, b"?", 1)
        _put_span(out, &head.query)
    _put(out, b" HTTP/1.1\r\nHost: ", 17)
    _put_span(out, &host.value)
    _put(out, b"\r\n", 2)
    _put_passed_fields(out, head)
    _put_joined(out, b"X-Forwarded-For: ", 17, former_for, &route.client)
    _put_joined(
        out, b"X-Forwarded-Host: ", 18, NULL,
        &host.value if former_host == NULL else &former_host.value,
    )
    _put_joined(
        out, b"X-Forwarded-Proto: ", 19, NULL,
        &route.scheme if former_proto == NULL else &former_proto.value,
    )
    _put_joined(out, b"X-Request-ID: ", 14, NULL, &route.request_id)
    _put(out, b"X-Request-Start: ", 17)
    if start != NULL:
        _put_span(out, &start.value)
    else:
        _put(out, b"t=", 2)
        _put_number(out, route.start)
    _put(out, b"\r\n", 2)
    _put_joined(out, b"X-Kamal-Target: ", 16, NULL, &route.target)
    if head.length == CHUNKED_BODY:
        _put(out, b"Transfer-Encoding: chunked\r\n", 28)
    else:
        has_length = head.length != NO_LENGTH
        # RFC 9110 8.6: of these, servers may insist on a length even without a body.
        if has_length or (
            head.method == POST_METHOD or head.method == PUT_METHOD or head.method == PATCH_METHOD
        ):
            _put(out, b"Content-Length: ", 16)
            _put_number(out, head.length if has_length else 0)
            _put(out, b"\r\n", 2)
    _put(out, b"\r\n", 2)


cdef void _put_method(Output *out, int method) noexcept nogil:
    """Write a method and the space after it."""
    if method == GET_METHOD:
        _put(out, b"GET ", 4)
    elif method == HEAD_METHOD:
        _put(out, b"HEAD ", 5)
    elif method == POST_METHOD:
        _put(out, b"POST ", 5)
    elif method == PUT_METHOD:
        _put(out, b"PUT ", 4)
    elif method == DELETE_METHOD:
        _put(out, b"DELETE ", 7)
    elif method == PATCH_METHOD:
        _put(out, b"PATCH ", 6)
    else:
        _put(out, b"OPTIONS ", 8)


cdef void _write_response(
    Output *out, const Head *head, const Span *added, bint closes
) noexcept nogil:
    """Write the head that the client gets; ``added`` are whole lines."""
    _put(out, b"HTTP/1.1 ", 9)
    _put_number(out, head.status)
    _put(out, b" ", 1)
    _put_span(out, &head.reason)
    _put(out, b"\r\n", 2)
    _put_response_fields(out, head)
    _put_span(out, added)
    if head.length == CHUNKED_BODY:
        _put(out, b"Transfer-Encoding: chunked\r\n", 28)
    if closes:
        _put(out, b"Connection: close\r\n", 19)
    _put(out, b"\r\n", 2)


cdef inline bint _is_left_out(const Head *head, Meaning meaning) noexcept nogil:
    """Whether a field of a response goes no further; RFC 9110 8.6 has no length for a 204."""
    return meaning == CONNECTION or meaning == KEEP_ALIVE or meaning == CODING or (
        meaning == LENGTH and head.status == 204
    )


cdef void _put_response_fields(Output *out, const Head *head) noexcept nogil:
    cdef int i
    for i in range(head.count):
        if not _is_left_out(head, head.fields[i].meaning):
            _put_field(out, &head.fields[i])


cdef inline void _span_of(Span *span, bytes data) noexcept:
    span.at = <const uint8_t *>PyBytes_AS_STRING(data)
    span.size = PyBytes_GET_SIZE(data)


def rewrite_request(
    data,
    *,
    bytes client not None,
    bytes scheme not None,
    bytes target not None,
    bytes request_id not None,
    int64_t start,
    bint believed=False,
    Py_ssize_t stripped=0,
):
    cdef Py_buffer view
    cdef Head head
    cdef Route route
    cdef Output out
    cdef bytes room
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if not _scan_request(&head, <const uint8_t *>view.buf, view.len):
            return None
        if not 0 <= stripped <= head.path.size:
            raise ValueError("more than the path can't be stripped")
        if head.known[<int>REQUEST_ID] != NULL:
            route.request_id = head.known[<int>REQUEST_ID].value
        else:
            _span_of(&route.request_id, request_id)
        _span_of(&route.client, client)
        _span_of(&route.scheme, scheme)
        _span_of(&route.target, target)
        route.start = start
        route.stripped = stripped
        route.is_believed = believed
        room = bytes(
            view.len + len(client) + len(scheme) + len(target) + len(request_id) + GROWTH
        )
        out.at = <uint8_t *><char *>room
        out.end = out.at + len(room)
        out.is_full = False
        _write_request(&out, &head, &route)
        assert not out.is_full
        return (
            room[: out.at - <uint8_t *><char *>room],
            head.size,
            0 if head.length == NO_LENGTH else head.length,
            head.closes,
        )
    finally:
        PyBuffer_Release(&view)


def rewrite_response(
    data, bytes method not None, *, bytes added not None=b"", bint closes=False
):
    cdef Py_buffer view
    cdef Head head
    cdef Span lines
    cdef Output out
    cdef bytes room
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if not _scan_response(
            &head, <const uint8_t *>view.buf, view.len,
            _method(<const uint8_t *>PyBytes_AS_STRING(method), len(method)),
        ):
            return None
        _span_of(&lines, added)
        room = bytes(view.len + len(added) + GROWTH)
        out.at = <uint8_t *><char *>room
        out.end = out.at + len(room)
        out.is_full = False
        _write_response(&out, &head, &lines, closes)
        assert not out.is_full
        return (
            room[: out.at - <uint8_t *><char *>room],
            head.size,
            head.status,
            head.length,
            head.closes,
        )
    finally:
        PyBuffer_Release(&view)

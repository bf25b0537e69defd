# The lane of ordinary HTTP/1.1 exchanges; a part of the module _fastpath.
#
# Design. A connection in the lane has no task. Its requests are read, routed, sent to a target and
# answered by the poller's task as the sockets get ready, without waiting for anything. Whatever is
# not ordinary (a head that is not, a body still to come, no open connection to the target, a target
# that fails, a client that leaves, time that is up) is left to a task, which gets what is known of
# the exchange and goes on with h11 from there; http/lane.py does that. When it is done and the
# connection is quiet, it comes back here. Only a response that is being passed on ends here for good,
# whatever happens to it, as there is nothing else to be said to its client any more.
#
# While a request is in flight, its connection is the InFlight of the deployment that serves it.

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.math cimport INFINITY

cdef extern from * nogil:
    """
    #include <sys/random.h>
    """
    ssize_t getrandom(void *, size_t, unsigned int)
    int CLOCK_REALTIME

cdef enum:
    LANE_ROOM = 65536  # bytes read at once
    LANE_MAX_HEAD = 8192  # bytes; larger heads are for tasks
    MAX_PLANS = 1000
    RANDOM_ROOM = 4096
    ID_SIZE = 36

cdef enum LaneState:
    IDLE  # between two requests
    CONNECTING  # to a target, which is to get the request
    AWAITING  # a request was sent to a target, and no whole head has come back
    RELAYING  # the response is on its way to the client
    AWAY  # somebody else has the connection
    CLOSED

cdef enum Trouble:
    NOTHING_YET = -1
    BROKEN = -2


cdef class Plan:
    """What the lane knows of a service that a host and a prefix lead to."""

    cdef readonly object service
    cdef readonly object deployment
    cdef readonly str name
    cdef readonly bytes stripped  # from the path
    cdef bytes _prefix
    cdef bint _is_open
    cdef bint _forwards
    cdef double _timeout
    cdef double _max_request
    cdef bint _buffers_responses
    cdef double _max_response
    cdef bytes _added
    cdef bytes _quoted
    cdef list _request_names
    cdef list _response_names

    def __init__(
        self,
        service,
        bytes prefix,
        *,
        bint is_open,
        bint strips=False,
        bint forwards=False,
        double timeout=0.0,
        double max_request=INFINITY,
        bint buffers_responses=False,
        double max_response=INFINITY,
        bytes added=b"",
        bytes quoted=b"",
        request_names=(),
        response_names=(),
    ):
        self.service = service
        self.deployment = service.active
        self.name = service.name
        self._prefix = prefix
        self.stripped = prefix if strips and prefix != b"/" else b""
        self._is_open = is_open
        self._forwards = forwards
        self._timeout = timeout
        self._max_request = max_request
        self._buffers_responses = buffers_responses
        self._max_response = max_response
        self._added = added
        self._quoted = quoted
        self._request_names = list(request_names)
        self._response_names = list(response_names)

    cdef bint _takes(self, const Span *path) noexcept:
        cdef Py_ssize_t size = len(self._prefix)
        if size == 1:
            return True
        if path.size < size or memcmp(path.at, PyBytes_AS_STRING(self._prefix), size) != 0:
            return False
        return path.size == size or path.at[size] == 0x2F


cdef class Link(Actor):
    """A connection to a target, as the poller knows it; in use by one client at most."""

    cdef object _stream
    cdef int _fd
    cdef Visit _visit
    cdef bint _hung_up

    def __init__(self, Readiness readiness, stream):
        self._stream = stream
        self._fd = stream.fileno()
        self._visit = None
        self._hung_up = False
        stream.watch()
        readiness.pollables[self._fd] = self

    cdef int act(self, uint32_t events) except -1:
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self._hung_up = True
        if self._visit is None or self._hung_up:
            self._stream.ready(events)
        if self._visit is not None:
            self._visit._guard(TARGET_READY, events)
        return 0


cdef enum Step:
    CLIENT_READY
    TARGET_READY
    TIME_OVER
    BEGIN


cdef class Visit(Actor):
    """One connection of a client, in the lane or away."""

    cdef Lane _lane
    cdef readonly object stream
    cdef readonly tuple address
    cdef readonly bint was_served  # a request, in the lane or by a task
    cdef bytes _client
    cdef int _fd
    cdef bint _secured
    cdef bint _vouched
    cdef LaneState _state
    cdef bint _watched
    cdef bint _stirred  # something of the client's lies unread
    cdef bint _hung_up
    cdef bint _gone  # it has its grace
    cdef double _deadline
    # The exchange
    cdef Plan _plan
    cdef object _target
    cdef object _upstream
    cdef Link _link
    cdef bytes _request
    cdef bytes _response
    cdef int64_t _began  # nanoseconds
    cdef int _method
    cdef int _status
    cdef bint _closes  # the client's connection ends with it
    cdef bint _keeps  # the target's does not
    cdef Framing _framing
    cdef uint8_t[ID_SIZE] _id
    cdef uint8_t[LONGEST_LINE] _held
    cdef Py_ssize_t _held_size
    cdef bytes _odd  # what a task has to go on with once all before it is sent
    cdef str _failure  # why the target's response will never be whole
    cdef uint8_t *_pending
    cdef Py_ssize_t _pending_at
    cdef Py_ssize_t _pending_size

    def __init__(self, Lane lane, stream, tuple address, bint vouched):
        self._lane = lane
        self.stream = stream
        self._vouched = vouched
        self._secured = stream.secured
        self._fd = stream.fileno()
        self._set_address(address)
        self._state = IDLE
        self._pending = NULL

    def __dealloc__(self):
        free(self._pending)

    def _set_address(self, tuple address):
        self.address = address
        self._client = address[0].encode()

    # --- what others do with it -------------------------------------------------------------------

    @property
    def is_idle(self):
        return self._state == IDLE and self.stream.is_quiet_nowait()

    def begin(self, double patience):
        self._lane.readiness.pollables[self._fd] = self
        self._expect(patience)
        self._guard(BEGIN, 0)

    def come_back(self, tuple address, bint vouched):
        if address is not self.address:
            self._set_address(address)
        self._vouched = vouched
        self._state = IDLE
        self._hung_up = self._stirred = False
        self.was_served = True
        self._lane.readiness.pollables[self._fd] = self
        self._watch()
        self._expect(self._lane.idle_timeout)

    cdef double _expire(self, double now) except -1:
        """End it if it takes too long; return when that is to be looked at again."""
        if self._deadline <= now:
            self._guard(TIME_OVER, 0)
        return self._deadline

    def begin_drain(self, drain):
        pass  # whatever is in the lane ends by itself

    def abort_drained(self):
        self._interrupt(self._lane.drained)

    def cancel(self, reason):
        self._interrupt(reason)

    cdef int _interrupt(self, reason) except -1:
        try:
            if self._state == IDLE:
                self._close(False)
            elif self._state == AWAITING or self._state == CONNECTING:
                self._give_away(b"", b"", reason)
            elif self._state == RELAYING:
                if reason is self._lane.drained:
                    self._lane.tell_drained(self._target, self._path())
                self._cut(reason, 0)
        except Exception as error:
            self._break(error)
        return 0

    cdef int act(self, uint32_t events) except -1:
        self._guard(CLIENT_READY, events)
        return 0

    cdef int _guard(self, Step step, uint32_t events) except -1:
        """Take a step."""
        try:
            if step == CLIENT_READY:
                self._client_ready(events)
            elif step == TARGET_READY:
                self._target_ready(events)
            elif step == TIME_OVER:
                self._time_over()
            else:
                self._read_request()
        except Exception as error:
            self._break(error)
        return 0

    cdef int _break(self, error) except -1:
        """End the connection after a bug, which must cost no other."""
        self._lane.tell_bug(self, error)
        if self._state != AWAY:  # which cares for itself
            self._let_go(False)
            self._close(False)
        return 0

    # --- its client -------------------------------------------------------------------------------

    cdef int _client_ready(self, uint32_t events) except -1:
        if self._state == AWAY or self._state == CLOSED:
            return 0
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self._hung_up = True
        if events and (self._hung_up or (self._secured and self._state != IDLE)):
            self.stream.ready(events)
        if self._state == IDLE:
            return self._read_request()
        if events & EPOLLIN:
            self._stirred = True
        if self._state == AWAITING or self._state == CONNECTING:
            if self._is_gone():
                self._give_away(b"", b"", None)
        elif self._pending_size:
            if events == 0 or events & (EPOLLOUT | EPOLLHUP | EPOLLERR):
                self._flush()
        elif events == 0:
            self._relay()
        elif self._is_gone():
            self._begin_grace()
        return 0

    cdef bint _is_gone(self) except -1:
        """Whether the client has closed its side and nothing it sent lies unread."""
        if self._secured:
            return self._stirred and self.stream.hung_up
        return self._hung_up and self.stream.at_eof_nowait()

    cdef int _begin_grace(self) except -1:
        """Give a client that may have left some time to take what is still coming."""
        if not self._gone:
            self._gone = True
            self._expect(self._lane.gone_grace)
        return 0

    cdef Py_ssize_t _receive(self) except -3:
        """Read from the client into the lane's buffer; NOTHING_YET or BROKEN if that is not to be."""
        cdef Py_ssize_t count
        cdef bytes data
        if not self._secured:
            count = recv(self._fd, self._lane._input, LANE_ROOM, MSG_DONTWAIT)
            if count >= 0:
                return count
            return NOTHING_YET if errno == EAGAIN or errno == EINTR else BROKEN
        try:
            data = self.stream.receive_nowait(LANE_ROOM)
        except self._lane.broken:
            return BROKEN
        if data is None:
            return NOTHING_YET
        memcpy(self._lane._input, PyBytes_AS_STRING(data), len(data))
        return len(data)

    cdef Py_ssize_t _send(self, iovec *parts, int count) except -3:
        """Send to the client; BROKEN if that is not to be."""
        cdef msghdr message
        cdef Py_ssize_t sent
        if not self._secured:
            memset(&message, 0, sizeof(message))
            message.msg_iov = parts
            message.msg_iovlen = count
            sent = sendmsg(self._fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent >= 0:
                return sent
            return 0 if errno == EAGAIN or errno == EINTR else BROKEN
        try:
            return self.stream.send_nowait(_joined(parts, count))
        except self._lane.broken:
            return BROKEN

    # --- the request ------------------------------------------------------------------------------

    cdef int _read_request(self) except -1:
        cdef Py_ssize_t size = self._receive()
        # The end of what TLS brings may have come along: no event will tell of it.
        self._stirred = self._secured and self.stream.hung_up
        if size == NOTHING_YET:
            return self._watch()
        if size <= 0:
            return self._close(False)
        return self._serve(size)

    cdef int _watch(self) except -1:
        """Have events told; not before the first read, which may be all."""
        if not self._watched:
            self._watched = True
            self.stream.watch()
        return 0

    cdef int _leave(self, Py_ssize_t size) except -1:
        """Let a task have the connection, with what was read."""
        self._go_away()
        try:
            self._lane.leave(self, PyBytes_FromStringAndSize(<char *>self._lane._input, size))
        except Exception:
            self._lane.close(self, linger=False)
            raise
        return 0

    cdef int _go_away(self) except -1:
        """Leave the lane: the stream itself is told of events from now on."""
        self._state = AWAY
        self._lane.readiness.pollables[self._fd] = self.stream
        self._deadline = INFINITY
        return 0

    cdef int _serve(self, Py_ssize_t size) except -1:
        """Send the request that was read to a target, if it is ordinary."""
        cdef Lane lane = self._lane
        cdef Head *head = &lane._head
        cdef Py_ssize_t body
        cdef Plan plan
        if not _scan_request(head, lane._input, size) or head.length == CHUNKED_BODY:
            return self._leave(size)
        body = 0 if head.length == NO_LENGTH else head.length
        # What is still to come, or came too early, is for a task.
        if (
            head.size > lane._max_head_size
            or head.count > lane._max_fields
            or head.size + body != size
        ):
            return self._leave(size)
        plan = lane._find(head)
        if plan is None or body > plan._max_request:
            return self._leave(size)
        target = plan.deployment.choose(_NOBODY)
        if target is None:
            return self._leave(size)
        self._began = _nanoseconds(CLOCK_MONOTONIC)
        self._plan = plan
        self._target = target
        self._request = PyBytes_FromStringAndSize(<char *>lane._input, size)
        self._method = head.method
        self._closes = head.closes
        self.was_served = True
        self._status = 0
        self._framing.passed = 0
        self._held_size = 0
        self._gone = False
        plan.deployment.begin(self)
        target.in_flight += 1
        lane.metrics.enter(plan.name)
        self._state = AWAITING
        self._watch()
        self._expect(plan._timeout)
        if head.known[<int>REQUEST_ID] == NULL:
            lane._write_id(self._id)
        self._upstream = target.connections.take_idle(
            lane.fresh_age if head.method == POST_METHOD or head.method == PATCH_METHOD or body
            else lane.idle_age
        )
        if self._upstream is not None:
            lane.metrics.reuse(plan.name)
        else:
            self._upstream = target.connections.connect_nowait()
            if self._upstream is None:
                return self._give_away(b"", b"", None)
            self._state = CONNECTING
            self._expect(min(plan._timeout, lane._connect_timeout))
        self._link = self._upstream.link
        if self._link is None:
            self._link = self._upstream.link = Link(lane.readiness, self._upstream.stream)
        self._link._visit = self
        return self._ask(head, lane._input + head.size, body)

    cdef int _connected(self, uint32_t events) except -1:
        """Send the request, now that there is a connection, or leave it to a task to find one."""
        cdef Head *head = &self._lane._head
        if self._upstream.stream.connect_error_nowait():
            return self._give_away(b"", b"", None)
        if not events & EPOLLOUT:
            return 0
        _scan_request(head, _bytes_of(self._request), len(self._request))
        return self._ask(
            head, _bytes_of(self._request) + head.size, len(self._request) - head.size
        )

    cdef int _ask(self, const Head *head, const uint8_t *body, Py_ssize_t body_size) except -1:
        """Send the request."""
        cdef Lane lane = self._lane
        cdef Output out
        cdef Route route
        cdef iovec[2] parts
        cdef msghdr message
        cdef Py_ssize_t sent, size
        cdef bytes target = lane._name_of(self._target)
        _span_of(&route.client, self._client)
        _span_of(&route.scheme, lane._scheme)
        _span_of(&route.target, target)
        if head.known[<int>REQUEST_ID] != NULL:
            route.request_id = head.known[<int>REQUEST_ID].value
        else:
            route.request_id.at = self._id
            route.request_id.size = ID_SIZE
        route.start = _nanoseconds(CLOCK_REALTIME) // 1000000
        route.stripped = len(self._plan.stripped)
        route.is_believed = self._plan._forwards and (self._vouched or not lane._trusts_few)
        lane._open_output(&out)
        _write_request(&out, head, &route)
        assert not out.is_full
        parts[0].iov_base = lane._output
        parts[0].iov_len = out.at - lane._output
        parts[1].iov_base = <void *>body
        parts[1].iov_len = body_size
        memset(&message, 0, sizeof(message))
        message.msg_iov = parts
        message.msg_iovlen = 2 if body_size else 1
        sent = sendmsg(self._link._fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
        size = parts[0].iov_len + body_size
        if self._state == CONNECTING:
            if sent < 0 and (errno == EAGAIN or errno == EINTR):
                self._upstream.stream.watch(writes=True)
                return 0
            if sent < 0:
                return self._give_away(b"", b"", None)
            self._state = AWAITING
            self._deadline += lane._rest_of(self._plan._timeout)
            lane.metrics.connect(self._plan.name, ok=True)
        if sent == size:
            # With its request a client may have closed its side.
            return self._give_away(b"", b"", None) if self._is_gone() else 0
        if sent < 0 and errno != EAGAIN and errno != EINTR:
            # It may have answered before it closed.
            return self._give_away(b"", b"", None)
        return self._give_away(b"", _joined(parts, 2)[max(0, sent):], None)

    # --- the response -----------------------------------------------------------------------------

    cdef int _target_ready(self, uint32_t events) except -1:
        if self._state == CONNECTING:
            self._connected(events)
            # No other event will tell of what the target has said, or closed, by itself.
            if self._state == AWAITING and events & (EPOLLIN | EPOLLRDHUP):
                return self._read_answer()
            return 0
        if self._state == AWAITING:
            return self._read_answer()
        if self._state == RELAYING and not self._pending_size:
            return self._relay()
        return 0

    cdef Py_ssize_t _receive_answer(self, Py_ssize_t before) noexcept:
        """Read from the target, to behind so many bytes that are in the lane's buffer already."""
        cdef Py_ssize_t count = recv(
            self._link._fd, self._lane._input + before, LANE_ROOM - before, MSG_DONTWAIT
        )
        if count > 0:
            return count
        if count < 0 and (errno == EAGAIN or errno == EINTR):
            return NOTHING_YET
        return BROKEN

    cdef int _read_answer(self) except -1:
        cdef Lane lane = self._lane
        cdef Head *head = &lane._head
        cdef const uint8_t *data = lane._input
        cdef Py_ssize_t size = self._receive_answer(0)
        cdef Py_ssize_t body
        cdef Output out
        cdef Span added
        cdef iovec[2] parts
        if size == NOTHING_YET:
            return 0
        if size == BROKEN:
            return self._give_away(b"", b"", None)
        if not (_scan_response(head, data, size, self._method) and self._may_pass(head, size)):
            return self._give_away(PyBytes_FromStringAndSize(<char *>data, size), b"", None)
        body = size - head.size
        _begin_framing(&self._framing, head.length)
        body = _follow(&self._framing, data + head.size, body)
        if body < 0:
            self._framing.passed = 0
            return self._give_away(PyBytes_FromStringAndSize(<char *>data, size), b"", None)
        self._keeps = not head.closes
        self._hold(data + head.size + body, size - head.size - body)
        self._response = PyBytes_FromStringAndSize(<char *>data, head.size)
        self._status = head.status
        self._closes = self._closes or lane._server.closing
        self._state = RELAYING
        self._deadline = INFINITY
        lane._open_output(&out)
        _span_of(&added, self._plan._added)
        _write_response(&out, head, &added, self._closes)
        assert not out.is_full
        parts[0].iov_base = lane._output
        parts[0].iov_len = out.at - lane._output
        parts[1].iov_base = <void *>(data + head.size)
        parts[1].iov_len = body
        if self._pass_on(parts, 2 if body else 1, parts[0].iov_len + body):
            # What filled the buffer has left something behind.
            if size == LANE_ROOM or self._link._hung_up:
                return self._relay()
            self._wait_for_target()
        return 0

    cdef bint _may_pass(self, const Head *head, Py_ssize_t size) noexcept:
        """Whether what was read of a response can be passed on as it comes."""
        cdef Py_ssize_t body = size - head.size
        if head.size > self._lane._max_head_size:
            return False
        if head.length == CHUNKED_BODY:
            return True
        if body > head.length:
            return False
        if not self._plan._buffers_responses or self._lane._is_made_to_stream(head):
            return True
        return body == head.length and body <= self._plan._max_response

    cdef int _wait_for_target(self) except -1:
        if self._is_gone():
            self._begin_grace()
        return 0

    cdef int _relay(self) except -1:
        """Pass on what comes of the body, until there is nothing for now."""
        cdef uint8_t *data = self._lane._input
        cdef Py_ssize_t size, passed
        cdef iovec part
        cdef int turn
        for turn in range(READS_PER_TURN):
            memcpy(data, self._held, <size_t>self._held_size)
            size = self._receive_answer(self._held_size)
            if size == NOTHING_YET:
                return self._wait_for_target()
            if size == BROKEN:
                return self._fail("the target closed the connection")
            size += self._held_size
            self._held_size = 0
            passed = _follow(&self._framing, data, size)
            if passed == BAD_CHUNK:
                # What came before is the client's.
                passed = self._framing.odd_at
                self._failure = "malformed chunk"
            elif passed == ODD_LINE:
                passed = self._framing.odd_at
                self._odd = PyBytes_FromStringAndSize(<char *>data + passed, size - passed)
            else:
                self._hold(data + passed, size - passed)
            if passed:
                part.iov_base = data
                part.iov_len = passed
                if not self._pass_on(&part, 1, passed):
                    return 0
            elif not self._all_sent():
                return 0
            if size < LANE_ROOM and not self._link._hung_up:
                return self._wait_for_target()
        self._lane.readiness.get_in_line(self)
        return 0

    cdef int _hold(self, const uint8_t *data, Py_ssize_t size) except -1:
        """Keep the beginning of a line; what comes after the end of a response is not kept."""
        if self._framing.is_received:
            if size:
                self._keeps = False
        elif size:
            assert size <= LONGEST_LINE
            memcpy(self._held, data, size)
            self._held_size = size
        return 0

    cdef bint _pass_on(self, iovec *parts, int count, Py_ssize_t size) except -1:
        """Send to the client, or keep what it does not take; return whether to read on."""
        cdef Py_ssize_t sent = self._send(parts, count)
        cdef Py_ssize_t part
        cdef int i
        if sent == size:
            return self._all_sent()
        if sent == BROKEN:
            self._cut(self._lane.client_gone, self._lane.client_closed)
            return False
        self._pending = <uint8_t *>realloc(self._pending, size - sent)
        if self._pending == NULL:
            raise MemoryError
        self._pending_at = 0
        self._pending_size = size - sent
        size = 0
        for i in range(count):
            part = <Py_ssize_t>parts[i].iov_len
            if sent < part:
                memcpy(self._pending + size, <uint8_t *>parts[i].iov_base + sent, part - sent)
                size += part - sent
                sent = 0
            else:
                sent -= part
        self.stream.watch(writes=True)
        return self._allow_stall()

    cdef int _allow_stall(self) except -1:
        return 0 if self._gone else self._expect(self._lane.stall_timeout)

    cdef bint _all_sent(self) except -1:
        """Go on after all that was read has been sent; return whether to read on."""
        if self._odd is not None:
            self._give_away(self._odd, b"", None)
            return False
        if self._failure is not None:
            self._fail(self._failure)
            return False
        if self._framing.is_received:
            self._finish()
            return False
        return True

    cdef int _flush(self) except -1:
        """Send what the client did not take before."""
        cdef iovec part
        cdef Py_ssize_t sent
        part.iov_base = self._pending + self._pending_at
        part.iov_len = self._pending_size
        sent = self._send(&part, 1)
        if sent == BROKEN:
            return self._cut(self._lane.client_gone, self._lane.client_closed)
        self._pending_at += sent
        self._pending_size -= sent
        if self._pending_size:
            # Who takes a little at a time has not stalled.
            return self._allow_stall() if sent else 0
        free(self._pending)
        self._pending = NULL
        if not self._gone:
            self._deadline = INFINITY
        if self._all_sent():
            return self._relay()
        return 0

    # --- ends of an exchange ----------------------------------------------------------------------

    cdef int _finish(self) except -1:
        """Be done with an exchange that went well."""
        self._account(self._status, None)
        self._let_go(self._keeps)
        if self._closes or self._lane._server.closing:
            return self._close(True)
        self._state = IDLE
        self._expect(self._lane.idle_timeout)
        if self._stirred or self._hung_up:
            self._lane.readiness.get_in_line(self)
        return 0

    cdef int _fail(self, str failure) except -1:
        """End a response that will never be whole."""
        self._lane.tell_failure(self._target, self._path(), f"response cut short: {failure}")
        return self._cut(self._lane.target_failed, 0)

    cdef int _cut(self, reason, int status) except -1:
        """End a response that has begun: an end of the connection is the only way to say so."""
        self._lane.metrics.failure(self._plan.name, reason)
        self._account(status or self._status, reason)
        self._let_go(False)
        return self._close(not status)

    cdef int _let_go(self, bint keeps) except -1:
        """Leave the deployment, and give the connection to the target back."""
        cdef Plan plan = self._plan
        if plan is None:
            return 0
        self._plan = None
        self._lane.metrics.leave(plan.name)
        self._unlink()
        upstream, self._upstream = self._upstream, None
        target, self._target = self._target, None
        self._request = self._response = self._odd = None
        self._failure = None
        free(self._pending)
        self._pending = NULL
        self._pending_size = 0
        if upstream is not None:
            if keeps:
                upstream.keep()
            else:
                upstream.stream.close()
        target.in_flight -= 1
        plan.deployment.end(self)
        return 0

    cdef void _unlink(self):
        if self._link is not None:
            self._link._visit = None
            self._link = None

    cdef int _close(self, bint may_linger) except -1:
        """End the connection; the client is given time to read if it may still be sending."""
        if self._state == CLOSED:
            return 0
        self._go_away()
        self._state = CLOSED
        self._lane.close(self, linger=may_linger and not self.stream.is_quiet_nowait())
        return 0

    cdef int _give_away(self, bytes received, bytes unsent, reason) except -1:
        """Let a task go on with the exchange: with what has come of the response, and why not here."""
        cdef Plan plan = self._plan
        upstream, self._upstream = self._upstream, None
        self._unlink()
        self._plan = None
        remaining = self._deadline - self._lane._now()
        if self._state == CONNECTING:
            upstream.stream.close()
            upstream = None
            remaining += self._lane._rest_of(plan._timeout)
        self._go_away()
        try:
            begun = self._lane._make_begun(
                former=self, service=plan.service, deployment=plan.deployment, target=self._target,
                upstream=upstream, prefix=plan.stripped, request_id=self._request_id(),
                started=self._began, remaining=remaining, unsent=unsent,
                response=self._response or b"", sent=self._framing.passed, received=received,
            )
            self._lane.give_away(self, self._request, begun, reason)
        except Exception:
            self._plan, self._upstream = plan, upstream
            self._let_go(False)
            self._lane.close(self, linger=False)
            raise
        self._target = self._request = self._response = self._odd = None
        return 0

    cdef bytes _request_id(self):
        cdef Head *head = &self._lane._head
        _scan_request(head, _bytes_of(self._request), len(self._request))
        if head.known[<int>REQUEST_ID] != NULL:
            return _copy_of(&head.known[<int>REQUEST_ID].value)
        return PyBytes_FromStringAndSize(<char *>self._id, ID_SIZE)

    cdef bytes _path(self):
        cdef Head *head = &self._lane._head
        _scan_request(head, _bytes_of(self._request), len(self._request))
        return _copy_of(&head.path)

    # --- time -------------------------------------------------------------------------------------

    cdef int _expect(self, double seconds) except -1:
        self._deadline = self._lane._now() + seconds
        if self._deadline < self._lane._next:
            self._lane._next = self._deadline
            self._lane.look_at(self._deadline)
        return 0

    cdef int _time_over(self) except -1:
        if self._state == IDLE:
            return self._close(False)
        if self._state == AWAITING or self._state == CONNECTING:
            return self._give_away(b"", b"", None)
        if self._gone:
            return self._cut(self._lane.client_gone, self._lane.client_closed)
        return self._cut(self._lane.client_stalled, self._lane.client_closed)

    # --- the log and the metrics ------------------------------------------------------------------

    cdef int _account(self, int status, reason) except -1:
        """Write the line of an exchange, and count it."""
        cdef Lane lane = self._lane
        cdef int64_t duration = _nanoseconds(CLOCK_MONOTONIC) - self._began
        lane.metrics.request(self._plan.name, METHODS[self._method], status, duration / 1e9)
        lane._log.log(self, status, duration, reason)
        return 0


cdef class Lane:
    """All connections of one port that are in the lane, and what they have in common.

    Python's subclass says what is to be done where the lane ends; see http/lane.py.
    """

    cdef readonly Readiness readiness
    cdef readonly object metrics
    cdef Py_ssize_t _max_head_size
    cdef int _max_fields
    cdef readonly double idle_timeout, stall_timeout, idle_age, fresh_age, gone_grace
    cdef double _connect_timeout
    cdef readonly object drained, client_gone, client_stalled, target_failed, broken
    cdef readonly int client_closed
    cdef bytes _validation
    cdef tuple _streamed
    cdef bint _trusts_few
    cdef AccessLog _log
    cdef object _server, _routes, _table, _read_clock, _make_begun
    cdef bytes _scheme
    cdef dict _plans
    cdef dict _names
    cdef double _next
    cdef double _batch_time
    cdef uint64_t _batch
    cdef Head _head
    cdef uint8_t[RANDOM_ROOM] _random
    cdef int _random_left
    cdef uint8_t[LANE_ROOM] _input
    cdef uint8_t[LANE_MAX_HEAD + 4 * GROWTH] _output

    def __init__(
        self,
        Readiness readiness,
        *,
        server,
        clock,
        make_begun,
        bytes validation,
        tuple streamed,
        double idle_age,
        double fresh_age,
        double gone_grace,
        double connect_timeout,
        drained,
        client_gone,
        client_stalled,
        target_failed,
        int client_closed,
        broken,
        second_text,
    ):
        self.readiness = readiness
        self._server = server
        self._routes = server.routes
        self.metrics = server.metrics
        self._read_clock = clock
        self._make_begun = make_begun
        self._scheme = server.scheme.encode()
        self._trusts_few = True if server.trusted_proxies else False
        self._log = AccessLog(
            self, server.log.write, second_text, self._scheme, server.port, self._trusts_few
        )
        self._validation = validation
        self._streamed = streamed
        self._max_head_size = min(server.options.max_head_size, LANE_MAX_HEAD)
        self._max_fields = server.options.max_headers
        self.idle_timeout = server.options.idle_timeout
        self.stall_timeout = server.options.stall_timeout
        self.idle_age = idle_age
        self.fresh_age = fresh_age
        self.gone_grace = gone_grace
        self._connect_timeout = connect_timeout
        self.drained = drained
        self.client_gone = client_gone
        self.client_stalled = client_stalled
        self.target_failed = target_failed
        self.client_closed = client_closed
        self.broken = broken
        self._plans = {}
        self._names = {}
        self._table = None
        self._next = INFINITY
        self._batch = 0
        self._random_left = 0

    cdef double _now(self) except -1:
        """The time on the loop's clock, read once for each batch of events."""
        if not self.readiness.is_telling:
            return self._read_clock()
        if self._batch != self.readiness.batch:
            self._batch = self.readiness.batch
            self._batch_time = self._read_clock()
        return self._batch_time

    cdef double _rest_of(self, double timeout) noexcept:
        """Return what is left of the time for a response when that for connecting is over."""
        return max(0.0, timeout - self._connect_timeout)

    @property
    def next_deadline(self):
        return self._next

    def sweep(self, visits):
        """End what takes too long."""
        cdef double now = self._read_clock()
        cdef double next = INFINITY
        cdef Visit visit
        # Whoever begins to wait meanwhile is not among them.
        self._next = INFINITY
        for visit in visits:
            next = min(next, visit._expire(now))
        self._next = min(self._next, next)

    cdef Plan _find(self, const Head *head):
        """Return the plan for a request, or None."""
        cdef Plan plan
        cdef bytes host
        table = self._routes()
        if table is not self._table:
            self._table = table
            self._plans.clear()
            self._names.clear()
        if self._validation and head.path.size >= len(self._validation) and (
            memcmp(head.path.at, PyBytes_AS_STRING(self._validation), len(self._validation)) == 0
        ):
            return None
        host = _copy_of(&head.known[<int>HOST].value)
        plans = self._plans.get(host)
        if plans is None:
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            plans = self._plans[host] = self.plans(
                table, (<bytes>_copy_of(&head.host_name)).decode("ascii")
            )
        for plan in <tuple>plans:
            if head.has_escape and len(plan._prefix) > 1:
                return None
            if plan._takes(&head.path):
                return plan if plan._is_open else None
        return None

    cdef bint _is_made_to_stream(self, const Head *head) noexcept:
        """Return whether a response is made to be read as it comes; see http.headers.is_streamed."""
        cdef const Field *field = head.known[<int>BUFFERING]
        cdef Span kind
        cdef Py_ssize_t size = 0
        cdef bytes streamed
        if field != NULL and _is_word(&field.value, b"no", 2):
            return True
        field = head.known[<int>TYPE]
        if field == NULL:
            return False
        kind = field.value
        while size < kind.size and kind.at[size] != 0x3B:
            size += 1
        kind.size = size
        while kind.size and kind.at[kind.size - 1] == 0x20:
            kind.size -= 1
        for streamed in self._streamed:
            if _is_word(&kind, PyBytes_AS_STRING(streamed), len(streamed)):
                return True
        kind.size = 16
        return field.value.size >= 16 and _is_word(&kind, b"application/grpc", 16)

    cdef bytes _name_of(self, target):
        name = self._names.get(target)
        if name is None:
            name = self._names[target] = target.name.encode()
        return name

    cdef void _open_output(self, Output *out) noexcept:
        out.at = self._output
        out.end = self._output + sizeof(self._output)
        out.is_full = False

    cdef int _write_id(self, uint8_t *id) except -1:
        """Write a random UUID (RFC 9562 5.4)."""
        cdef uint8_t *random
        cdef int i, at
        if self._random_left < 16:
            if getrandom(self._random, RANDOM_ROOM, 0) != RANDOM_ROOM:
                _raise_errno()
            self._random_left = RANDOM_ROOM
        self._random_left -= 16
        random = self._random + self._random_left
        random[6] = (random[6] & 0x0F) | 0x40
        random[8] = (random[8] & 0x3F) | 0x80
        at = 0
        for i in range(16):
            if i == 4 or i == 6 or i == 8 or i == 10:
                id[at] = 0x2D
                at += 1
            id[at] = _HEX[random[i] >> 4]
            id[at + 1] = _HEX[random[i] & 0x0F]
            at += 2
        return 0


_NOBODY = frozenset()
cdef const uint8_t *_HEX = <const uint8_t *>b"0123456789abcdef"


cdef inline int64_t _nanoseconds(int clock) noexcept nogil:
    cdef timespec now
    clock_gettime(clock, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline const uint8_t *_bytes_of(bytes data) noexcept:
    return <const uint8_t *>PyBytes_AS_STRING(data)


cdef inline bytes _copy_of(const Span *span):
    return PyBytes_FromStringAndSize(<const char *>span.at, span.size)


cdef bytes _joined(const iovec *parts, int count):
    if count == 1:
        return PyBytes_FromStringAndSize(<char *>parts[0].iov_base, parts[0].iov_len)
    cdef bytes joined = PyBytes_FromStringAndSize(NULL, parts[0].iov_len + parts[1].iov_len)
    memcpy(PyBytes_AS_STRING(joined), parts[0].iov_base, parts[0].iov_len)
    memcpy(PyBytes_AS_STRING(joined) + parts[0].iov_len, parts[1].iov_base, parts[1].iov_len)
    return joined

# Bytes that pass from one socket to another without waking a task; a part of the module _fastpath.
#
# Design. A passage has the events of its source. What has come is received into a buffer that all
# passages share, sent at once, and followed by the tracker as far as it was sent. That is all it
# does: when the sink is full, or broken, or the source has ended, or broken, it stops, and whoever
# waits for the source is woken and gets what is left over: the bytes that were not sent, the end, or
# the error. Nothing is read until that task lets it go on, so for a slow reader no more is ever held
# back than one read has brought. Everything that takes time is thus the task's: waiting for room,
# a stall, a last frame.

cdef enum:
    PASSING = 65536

# Empty between two calls; the GIL is held as long as anything is in it. To release it for a copy of
# 64 KiB, which takes 10 us, would gain other threads nothing: they wait for milliseconds anyway.
cdef unsigned char _passing[PASSING]


cdef class Passage(Actor):
    """One direction between two sockets."""

    cdef Readiness _readiness
    cdef readonly object source
    cdef object _sink
    cdef int _source_fd
    cdef int _sink_fd
    cdef FrameTracker _frames
    cdef object _clock
    cdef readonly bint carries
    cdef bint _stopped
    cdef bint _hung_up
    cdef object _left_over  # bytes, or an exception; None: nothing
    cdef readonly unsigned long long sent
    cdef readonly double last

    def __cinit__(self, Readiness readiness not None, source, sink, FrameTracker frames, clock):
        self._readiness = readiness
        self.source = source
        self._sink = sink
        self._source_fd = source.fileno()
        self._sink_fd = sink.fileno()
        self._frames = frames
        self._clock = clock

    def begin(self):
        if not self._stopped:
            self.source.tell(self)
            self._hung_up = not self.source.is_drained_by(0)
            self.carries = True
        return self.carries

    def carry(self):
        return self.carries and self._carry()

    def take(self):
        left_over, self._left_over = self._left_over, None
        if isinstance(left_over, BaseException):
            raise left_over
        return left_over

    def stop(self):
        self.carries = False
        self._stopped = True
        if self._readiness.pollables.get(self._source_fd) is self:
            self.source.tell(self.source)
            # No event comes for what was left unread because of others' turns.
            self.source.wake_reader()

    cdef int act(self, uint32_t events) except -1:
        cdef uint32_t others = events
        if events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR):
            self._hung_up = True
        if self.carries:
            others &= ~EPOLLIN
            if events != EPOLLOUT:
                try:
                    if self._carry():
                        self._readiness.get_in_line(self)
                except BaseException as error:
                    # It costs this connection, not the poller: the task that waits is told.
                    self._leave(error)
                if not self.carries:
                    others |= EPOLLIN
        if others:
            # Who waits for room in the source, as the sink of the other direction, waits there too.
            self.source.ready(others)
        return 0

    cdef bint _carry(self) except -1:
        """Pass on what has come; return whether there may be more."""
        cdef ssize_t size, sent
        cdef int turn
        if not self._are_open():
            self.carries = False
            return False
        for turn in range(READS_PER_TURN):
            size = recv(self._source_fd, _passing, PASSING, MSG_DONTWAIT)
            if size < 0:
                if errno != EAGAIN:
                    self._leave(OSError(errno, os.strerror(errno)))
                return False
            if size == 0:
                self._leave(b"")
                return False
            sent = send(self._sink_fd, _passing, <size_t>size, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                sent = 0  # the task's own attempt tells why
            self.sent += <unsigned long long>sent
            if self._frames is not None:
                self._frames._scan(_passing, sent, False)
            if sent < size:
                self._leave((<const char *>_passing)[sent:size])
                return False
            if self._clock is not None:
                self.last = self._clock()
            # Of what comes after a short read, there is an event; of an end that came before, none.
            if size < PASSING and not self._hung_up:
                return False
        return True

    cdef void _leave(self, left_over):
        self._left_over = left_over
        self.carries = False

    cdef bint _are_open(self):
        """Return whether the descriptors are still those of the two streams."""
        sink = self._readiness.pollables.get(self._sink_fd)
        if isinstance(sink, Passage):
            sink = (<Passage>sink).source
        return sink is self._sink and self._readiness.pollables.get(self._source_fd) is self

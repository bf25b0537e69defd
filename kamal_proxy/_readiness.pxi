# Who is told that a descriptor is ready; a part of the module _fastpath.
#
# Design. Descriptors are registered once, edge-triggered, in one epoll, and each has one pollable
# that is told of its events: a Python object whose tasks wait for them, or an Actor, whose work is
# done right here, in the poller's task, without a task of its own. An Actor that stops before it is
# done, to let the others have their turn, gets in line: no event would come for what is left.

cdef enum:
    EVENTS_PER_BATCH = 64
    READS_PER_TURN = 4  # of an actor; then it gets in line


cdef class Actor:
    """What is told of events without a detour through Python; a base class."""

    cdef bint _in_line

    def ready(self, int events):
        self.act(<uint32_t>events)

    cdef int act(self, uint32_t events) except -1:
        """Do what these events allow; 0 for one that was in line. Must not take long."""
        raise NotImplementedError


cdef class Readiness:
    """The pollables of one epoll."""

    cdef int _epoll
    cdef readonly dict pollables
    cdef list _line
    cdef uint64_t batch  # its number
    cdef bint is_telling
    cdef epoll_event[EVENTS_PER_BATCH] _events

    def __cinit__(self, *args, **kwargs):
        self.pollables = {}
        self._line = []
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        if self._epoll < 0:
            _raise_errno()

    def __dealloc__(self):
        self.close()

    def close(self):
        if self._epoll >= 0:
            close(self._epoll)
            self._epoll = -1

    def fileno(self):
        return self._epoll

    @property
    def has_line(self):
        return len(self._line) > 0

    def watch(self, int fd, uint32_t edges, uint32_t former):
        cdef epoll_event event
        event.events = edges
        event.data.u64 = <uint64_t>fd
        if epoll_ctl(self._epoll, EPOLL_CTL_MOD if former else EPOLL_CTL_ADD, fd, &event):
            _raise_errno()

    def ignore(self, int fd):
        cdef epoll_event event
        if epoll_ctl(self._epoll, EPOLL_CTL_DEL, fd, &event):
            _raise_errno()

    cdef void get_in_line(self, Actor actor):
        if not actor._in_line:
            actor._in_line = True
            self._line.append(actor)

    def tell(self):
        self.batch += 1
        self.is_telling = True
        try:
            return self._tell()
        finally:
            self.is_telling = False

    cdef int _tell(self) except -1:
        cdef Actor actor
        cdef list line = self._line
        cdef int told = len(line)
        cdef int count, i
        cdef bint is_own = True
        if told:
            self._line = []
            for actor in line:
                actor._in_line = False
                actor.act(0)
        count = epoll_wait(self._epoll, self._events, EVENTS_PER_BATCH, 0)
        for i in range(count):
            # What was closed earlier in this batch may have left an event behind.
            pollable = self.pollables.get(<int>self._events[i].data.u64)
            if isinstance(pollable, Actor):
                (<Actor>pollable).act(self._events[i].events)
            elif pollable is not None:
                is_own = False
                pollable.ready(self._events[i].events)
            told += 1
        # Whoever is in line has much to do: what tasks have to do comes first.
        return told if is_own and not len(self._line) else 0


cdef int _raise_errno() except -1:
    raise OSError(errno, os.strerror(errno))


def is_quiet(int fd):
    cdef char byte
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 and errno == EAGAIN

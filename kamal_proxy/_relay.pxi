# The datagram relay; a part of the module _fastpath. _system.pxi has the system's declarations,
# _sessions.pxi the table of sessions that the relay builds on.
#
# Design. A Relay moves the datagrams of one UDP service. It holds one epoll with the service's
# listener sockets, the upstream socket of every session, and one timer. Python waits for that
# epoll's descriptor and calls run(), which moves a bounded number of datagrams with the GIL
# released, and creates no Python object for any of them. Python is asked only about datagrams of
# clients without a session (newcomers) and about targets that refuse; it gets both as lists after
# run() and answers with admit(), refuse() and move().
#
#   client -> listener: recvmmsg a batch, look each sender up, chain what belongs to one session,
#             then one call per session: send() for one datagram, one sendmsg() with UDP_SEGMENT for
#             equal ones, sendmmsg() for the rest.
#   target -> upstream: recvmsg() of each ready session, or recvmmsg() when few are ready (then each
#             has probably several), gathered over sessions into one sendmmsg() on the listener.
#
# A session is a Flow, or a ring of Flows: one per target when its service has no affinity, or while
# an ICE client's target is still asked for; one per port when it has a pair of ports. The first of
# them, the head, stands for all. Structures and their owners:
#
#   Relay     (with its bases CallTable and SessionTable) owns everything below, all memory and every
#             descriptor but those of the listeners, which the caller of listen() closes after
#             unlisten() or close().
#   Flow      allocated by _new_flow, and in these lists at once: a bucket of the flow table (heads
#             and second flows of pairs, by listener and client), a slot of the wheel (heads only), the members of its
#             generation (heads only), the unanswered (heads only, until the first answer), those of
#             one client address (heads only); those that others are asked for are in two more, by
#             age and by the client's network. _end takes it out of all and puts it and its ring
#             into the graveyard, because events of the current batch may still point to them;
#             _bury frees them once no batch is being worked on.
#   Media     of the head of a session that may carry calls; freed with it.
#   Newcomer  owns copies of its datagrams (Piece) until the next run().
#
# Nothing scans all flows: a datagram costs one bucket, expiry one slot of a wheel (100 ms each, 102
# s around; what lies further ahead is looked at again when its turn comes). A datagram writes the
# time into its flow and does not touch the wheel: when the flow's turn comes there, the time it was
# last heard decides whether it is over or put further ahead.
#
# Addresses are kept as 16 bytes, IPv4 mapped into IPv6 (RFC 4291 2.5.5.2), ports in network order.

cdef enum:
    AHEAD = 3                 # flows that are fetched into it before they are needed
    BATCH = 64                # datagrams, or trains of them, that are read before they are sent on
    READS_PER_BATCH = 32      # of these, how many may come from sessions while few are ready
    # A slot takes the largest datagram, or train of datagrams (UDP_GRO). The odd remainder keeps the
    # beginnings of the slots from falling into the same sets of the processor's caches.
    SLOT_SIZE = 65536 + 17 * 64
    MAX_PAYLOAD = 65507       # of UDP over IPv4: what one train may hold
    MAX_TRAIN = 64            # UDP_MAX_SEGMENTS of older kernels
    MAX_PARTS = 4 * BATCH     # iovecs of one round of sending
    CONTROL_SIZE = 256        # bytes of control messages of one datagram
    CONTROL_ROOM = 2048       # the same for a batch, in words of 8 bytes
    MAX_EVENTS = 256
    MAX_STARVED = 16          # listeners that are read when no event tells of one
    FEW_MOVED = 8             # a round that moved fewer ends the run: there is nothing to gain
    LINGER = 1000             # microseconds that a busy run waits for more
    SHORT_LINGER = 100        # the same when nothing could interrupt it
    MAX_NEWCOMERS = 256
    MAX_PIECES = 512          # datagrams, or trains, that newcomers have sent before Python decided
    PIECES_EACH = 64          # a round reads no more from a listener
    MAX_REFUSALS = 256
    MAX_PINS = MAX_EVENTS     # in one round each event may pin one session
    ASKS_EACH = 50            # Binding requests of one client, in a second, that go to all targets
    ASKS = 5000               # the same of all clients
    ASK_AGAIN = 2000          # milliseconds between two times that others are asked for a client
    STALE = 8000              # milliseconds that a target is silent while its client sends requests
    MANY_REFUSALS = 3
    TELLINGS = 4              # errors of other clients' ports that one call may be told before it works
    MAX_ERRORS = 2048         # messages read from a listener's error queue at a time
    KEPT_SIZE = 1472          # largest first datagram that is kept for another target
    KEPT_TOTAL = 4194304      # bytes of them
    AVOIDED = 1000            # milliseconds that a target which refused is passed over

# Bits of the result of run().
cpdef enum:
    RUN_MORE = 1
    RUN_NEWCOMERS = 2
    RUN_REFUSED = 4
    RUN_EMPTIED = 8
    RUN_PINNED = 16


cdef struct Piece:
    Piece *next
    uint32_t size
    uint16_t segment
    uint8_t tos

cdef struct Newcomer:
    Ip client
    Ip local
    uint32_t scope
    uint16_t client_port
    uint16_t listener
    uint32_t hash
    uint32_t count
    Piece *first
    Piece *last

cdef struct Refusal:
    uint32_t number
    uint32_t stamp

cdef struct Pin:
    uint32_t number
    uint32_t stamp
    uint64_t key


cdef inline uint32_t _train(uint32_t size, uint32_t segment) noexcept nogil:
    """Return how many datagrams of ``segment`` bytes there are in ``size`` bytes; 0: one."""
    return (size + segment - 1) // segment if segment and size else 1


cdef inline uint32_t _first_size(const Piece *piece) noexcept nogil:
    """Return the size of a datagram, or of the first of a train."""
    return min(piece.size, <uint32_t>piece.segment) if piece.segment else piece.size


cdef bint _knows_client(const uint8_t *data, uint32_t size, uint32_t segment) noexcept nogil:
    """Return whether a datagram, or one of a train, is an answer that only the own server gives."""
    cdef uint32_t step, kind
    while True:
        step = min(size, segment) if segment else size
        kind = _two(data) if _kind(data, step) == KIND_STUN else 0
        if kind == STUN_SUCCESS or (
            kind == STUN_ERROR and _error_code(data, step) == ROLE_CONFLICT
        ):
            return True
        data += step
        size -= step
        if not size:
            return False


cdef inline bint _is_request(const uint8_t *data, uint32_t size) noexcept nogil:
    return size >= STUN_HEADER and _kind(data, size) == KIND_STUN and _two(data) == STUN_REQUEST


cdef bint _is_error(const uint8_t *data, uint32_t size) noexcept nogil:
    return _kind(data, size) == KIND_STUN and _two(data) == STUN_ERROR


@cython.final
@cython.no_gc
cdef class Relay(CallTable):
    """Moves the datagrams of one UDP service; see _fastpath.pyi."""

    cdef int _interrupt       # a descriptor whose readiness ends a run, or -1
    cdef bint _interrupted
    # What Python is asked about.
    cdef Newcomer _newcomers[MAX_NEWCOMERS]
    cdef uint32_t _newcomer_count
    cdef uint32_t _piece_count
    cdef Refusal _refusals[MAX_REFUSALS]
    cdef uint32_t _refusal_count
    cdef Pin _pins[MAX_PINS]
    cdef uint32_t _pin_count
    cdef uint64_t _ask_second # in which ``_asks`` were counted
    cdef uint32_t _asks
    # One batch in: what recvmsg() fills, and what was found out about each datagram.
    cdef uint8_t *_slots
    cdef mmsghdr _in[BATCH]
    cdef iovec _in_parts[BATCH]
    cdef sockaddr_in6 _names[BATCH]
    cdef uint64_t _in_control[CONTROL_ROOM]
    cdef Ip _clients[BATCH]
    cdef uint32_t _hashes[BATCH]
    cdef Flow *_owners[BATCH]
    cdef int16_t _follower[BATCH]
    cdef uint16_t _segment[BATCH]  # bytes of a datagram of a train, or 0
    cdef uint8_t _tos[BATCH]
    # One round out: what sendmsg() is given, and what it was made of.
    cdef mmsghdr _out[BATCH]
    cdef iovec _out_parts[MAX_PARTS]
    cdef sockaddr_in6 _out_names[BATCH]
    cdef uint64_t _out_control[CONTROL_ROOM]
    cdef uint32_t _out_segments[BATCH]  # datagrams of a train
    cdef uint16_t _out_segment[BATCH]  # bytes of each but the last
    cdef uint8_t _out_tos[BATCH]
    cdef bint _out_closed[BATCH]  # nothing may be appended to this train
    cdef Flow *_out_flows[BATCH]
    cdef int _outs
    cdef int _parts
    cdef int _out_listener    # where what is gathered for clients goes, or -1
    cdef int _reads           # slots used by what is gathered for clients
    # Counters.
    cdef uint64_t _in_count
    cdef uint64_t _in_bytes
    cdef uint64_t _out_count
    cdef uint64_t _out_bytes
    cdef uint64_t _overflowed

    def __cinit__(self, bytes seed not None, *, bint sockets=True):
        cdef int i
        # Most of it is never touched, and costs no memory until it is.
        self._slots = <uint8_t *>mmap(
            NULL, BATCH * SLOT_SIZE, PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0,
        )
        if <void *>self._slots == MAP_FAILED:
            self._slots = NULL
            raise MemoryError
        for i in range(BATCH):
            self._in_parts[i].iov_base = self._slots + <size_t>i * SLOT_SIZE
            self._in_parts[i].iov_len = SLOT_SIZE
        self._out_listener = -1
        self._interrupt = -1

    def __dealloc__(self):
        self._forget_newcomers()
        if self._slots != NULL:
            munmap(self._slots, BATCH * SLOT_SIZE)

    def close(self):
        self._forget_newcomers()
        self._shut()

    def unlisten_all(self, numbers):
        """Forget listeners; their sessions end, and what newcomers sent to them is dropped."""
        cdef uint32_t i
        SessionTable.unlisten_all(self, numbers)
        for i in range(self._newcomer_count):
            if not self._listeners[self._newcomers[i].listener].used:
                self._drop_newcomer(&self._newcomers[i], DROP_BACKLOG)

    def run(self, int milliseconds):
        """Move what waits, for about so long at most."""
        cdef int moved, result = 0, linger = SHORT_LINGER if self._interrupt < 0 else LINGER
        cdef uint64_t started
        cdef bint may_wait = False
        self._require_open()
        self._forget_newcomers()
        self._forget_refusals()
        self._pin_count = 0
        with nogil:
            started = self._clock = _now()
            moved = self._round(0)
            while moved >= FEW_MOVED:
                if (
                    self._clock - started >= <uint64_t>milliseconds
                    or self._newcomer_count or self._refusal_count or self._emptied
                    or self._pin_count
                    or self._interrupted
                ):
                    result = RUN_MORE
                    break
                # Where so much comes, more will. Waiting here for a moment costs less than the way
                # back through the event loop, and holds nobody up: who else has something to do
                # interrupts.
                if not may_wait:
                    self._watch_interrupt(EPOLLIN)
                    may_wait = True
                moved = self._round(linger)
            if may_wait:
                self._watch_interrupt(0)
            self._interrupted = False
            self._bury()
        if self._newcomer_count:
            result |= RUN_NEWCOMERS
        if self._refusal_count:
            result |= RUN_REFUSED
        if self._pin_count:
            result |= RUN_PINNED
        if self._emptied:
            self._emptied = False
            result |= RUN_EMPTIED
        return result

    def interrupt_by(self, int fd):
        """Let the readiness of a descriptor end a run."""
        cdef epoll_event event
        self._require_open()
        event.events = 0  # until a run may wait
        event.data.u64 = _INTERRUPT_TAG
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        self._interrupt = fd

    cdef void _watch_interrupt(self, uint32_t events) noexcept nogil:
        cdef epoll_event event
        if self._interrupt >= 0:
            event.events = events
            event.data.u64 = _INTERRUPT_TAG
            epoll_ctl(self._epoll, EPOLL_CTL_MOD, self._interrupt, &event)

    cdef int _round(self, int patience) noexcept nogil:
        """Work on one set of events; return how many datagrams were read.

        Args:
            patience: Microseconds to wait for an event.
        """
        cdef epoll_event events[MAX_EVENTS]
        cdef epoll_event *event
        cdef int count, i, each, moved = 0
        cdef uint64_t tag
        cdef Flow *flow
        cdef timespec time
        cdef bint listened = False
        cdef uint32_t listener
        if patience:
            time.tv_sec = 0
            time.tv_nsec = patience * 1000
            count = epoll_wait_precisely(self._epoll, events, MAX_EVENTS, &time)
            self._clock = _now()
        else:
            count = epoll_wait(self._epoll, events, MAX_EVENTS, 0)
        if count <= 0:
            return 0
        # When few are ready, those that are have probably several datagrams waiting.
        each = READS_PER_BATCH // count
        each = 1 if each < 1 else each
        for i in range(count):
            if i + AHEAD < count:
                prefetch(events[i + AHEAD].data.ptr)  # a tag does no harm
            event = &events[i]
            tag = event.data.u64
            if tag & 0xFF == _TIMER_TAG:
                self._tick()
            elif tag & 0xFF == _INTERRUPT_TAG:
                self._interrupted = True
            elif tag & 0xFF == _LISTENER_TAG:
                listened = True
                moved += self._from_clients(<uint32_t>(tag >> 8), event.events)
            else:
                flow = <Flow *>event.data.ptr
                if not flow.ended:
                    moved += self._from_target(flow, each)
        if count == MAX_EVENTS and not listened:
            # So many targets send that no listener is among the events: they are not to starve it.
            for listener in range(min(self._listener_room, MAX_STARVED)):
                for i in range(MAX_EVENTS // BATCH):
                    each = self._from_clients(listener, 0)
                    moved += each
                    if each < BATCH:
                        break
        self._flush_to_clients()
        return moved

    @property
    def traffic(self):
        return self._in_count + self._out_count

    def counters(self):
        cdef int i
        return {
            "created": self._created,
            "moved": self._moved_sessions,
            "datagrams_in": self._in_count,
            "bytes_in": self._in_bytes,
            "datagrams_out": self._out_count,
            "bytes_out": self._out_bytes,
            "kernel_drops": self._overflowed,
            "dropped": {DROP_REASONS[i]: self._dropped[i] for i in range(DROPS)},
            "ended": {END_REASONS[i]: self._ended[i] for i in range(ENDS)},
        }

    # From clients to targets

    cdef int _from_clients(self, uint32_t number, uint32_t events) noexcept nogil:
        cdef Listener *listener = &self._listeners[number]
        cdef int count, i
        cdef Flow *flow
        cdef Flow *head
        cdef mmsghdr *message
        cdef Ip local
        cdef uint32_t scope, size
        cdef uint16_t port
        cdef int16_t first = -1, last = -1
        if not listener.used:
            return 0
        if events & EPOLLERR:
            self._read_errors(number)
        # The slots are about to be written to.
        self._flush_to_clients()
        for i in range(BATCH):
            message = &self._in[i]
            message.msg_hdr.msg_name = &self._names[i]
            message.msg_hdr.msg_namelen = sizeof(sockaddr_in6)
            message.msg_hdr.msg_iov = &self._in_parts[i]
            message.msg_hdr.msg_iovlen = 1
            message.msg_hdr.msg_control = <uint8_t *>self._in_control + i * CONTROL_SIZE
            message.msg_hdr.msg_controllen = CONTROL_SIZE
            message.msg_hdr.msg_flags = 0
        # An error of a client's port is told instead of reading; each call tells, and so clears, one.
        for i in range(TELLINGS):
            count = recvmmsg(listener.fd, self._in, BATCH, MSG_DONTWAIT, NULL)
            if count >= 0 or not _is_told_error(errno):
                break
        if count <= 0:
            return 0
        # All hashes first, so that buckets and flows are on their way from memory when their turn
        # comes.
        for i in range(count):
            if listener.inet:
                _mapped(&self._clients[i], sin_address(<sockaddr_in *>&self._names[i]))
            else:
                memcpy(&self._clients[i], sin6_address(&self._names[i]), 16)
            self._hashes[i] = self._hash(number, &self._clients[i], self._names[i].sin6_port)
            prefetch(&self._buckets[self._hashes[i] & self._mask])
        # ``first`` .. ``last`` chain the first datagram of each session, in the order they came; the
        # session's own datagrams are chained from there.
        for i in range(count):
            if i + AHEAD < count:
                prefetch(self._buckets[self._hashes[i + AHEAD] & self._mask])
            message = &self._in[i]
            size = message.msg_len
            memset(&local, 0, sizeof(local))
            self._read_control(&message.msg_hdr, i, &local, &listener.overflow)
            if message.msg_hdr.msg_flags & MSG_TRUNC:
                self._dropped[DROP_TRUNCATED] += 1
                continue
            port = self._names[i].sin6_port  # at the same place in a sockaddr_in
            scope = 0 if listener.inet else self._names[i].sin6_scope_id
            if port == 0:
                self._dropped[DROP_INVALID] += 1
                continue
            if self.mode == MODE_STOPPED:
                self._dropped[DROP_STOPPED] += _train(size, self._segment[i])
                continue
            flow = self._find(self._hashes[i], number, &self._clients[i], port, scope, &local)
            if flow == NULL:
                self._note_newcomer(number, port, scope, &local, i, size)
                continue
            head = flow.head
            if self._has_media and head.media != NULL:
                self._hear(
                    flow, BY_CLIENT, <uint8_t *>self._in_parts[i].iov_base, size, self._segment[i]
                )
                if (
                    _is_request(<uint8_t *>self._in_parts[i].iov_base, size)
                    and self._may_be_lost(head)
                    # It gets there anyway: without room for a copy, the next one will do.
                    and self._newcomer_count < MAX_NEWCOMERS and self._piece_count < MAX_PIECES
                ):
                    head.media.asked_at = self._clock
                    self._note_newcomer(number, port, scope, &local, i, size)
            head.client_heard = self._clock
            if head.asked <= head.target_heard:
                head.asked = self._clock
            if self._has_media and head.media != NULL and head.media.key:
                self._ask_all(
                    head, <uint8_t *>self._in_parts[i].iov_base, size, self._segment[i],
                    self._tos[i],
                )
                if not head.media.settled:
                    continue
            if flow.turn != NULL:
                self._spread(
                    flow, <uint8_t *>self._in_parts[i].iov_base, size, self._segment[i],
                    self._tos[i],
                )
                continue
            self._owners[i] = flow
            self._follower[i] = -1
            if flow.first < 0:
                flow.first = flow.last = i
                if first < 0:
                    first = i
                else:
                    # A session's last datagram leads on to the next session's first: -2 - index.
                    self._follower[self._owners[last].last] = -2 - i
                last = i
            else:
                # What leads on from the session's last datagram moves to the new last one.
                self._follower[i] = self._follower[flow.last]
                self._follower[flow.last] = i
                flow.last = i
        self._send_chains(first)
        return count

    cdef void _send_chains(self, int16_t index) noexcept nogil:
        """Send on what was read from clients, session by session."""
        cdef Flow *flow
        cdef int16_t following
        while index >= 0:
            flow = self._owners[index]
            flow.first = -1
            following = self._follower[index]
            if (
                following < 0 and self._segment[index] == 0 and self._tos[index] == 0
                and flow.header == NULL
            ):
                self._send_one(flow, <uint8_t *>self._in_parts[index].iov_base, self._in[index].msg_len)
            else:
                while True:
                    following = self._follower[index]
                    self._put(
                        flow, True, <uint8_t *>self._in_parts[index].iov_base, self._in[index].msg_len,
                        self._segment[index], self._tos[index],
                    )
                    if following < 0:
                        break
                    index = following
                self._flush(flow.fd, flow)
            index = <int16_t>(-2 - following) if following <= -2 else <int16_t>-1

    cdef void _send_one(self, Flow *flow, const uint8_t *data, uint32_t size) noexcept nogil:
        """Send one datagram to the target of a flow with the cheapest call."""
        cdef bint again = False
        if not self._opens_sockets:
            self._in_count += 1
            return
        while send(flow.fd, data, size, MSG_DONTWAIT) < 0:
            # An error that an earlier datagram met is told instead of sending this one.
            if errno == EINTR:
                continue
            if errno == ECONNREFUSED:
                self._note_refusal(flow)
            if again or not _is_told_error(errno):
                self._count_failed(errno, 1)
                return
            again = True
        self._in_count += 1
        self._in_bytes += size

    cdef void _send_alone(self, Flow *flow, uint8_t *data, uint32_t size, uint8_t tos) noexcept nogil:
        """Send one datagram to the target of a flow, with all that belongs to it."""
        if tos == 0 and flow.header == NULL:
            self._send_one(flow, data, size)
        else:
            self._put(flow, True, data, size, 0, tos)
            self._flush(flow.fd, flow)

    cdef void _spread(
        self, Flow *head, uint8_t *data, uint32_t size, uint32_t segment, uint8_t tos
    ) noexcept nogil:
        """Send the datagrams of a session without affinity, each to the next target."""
        cdef uint32_t step
        while True:
            step = min(size, segment) if segment else size
            self._send_alone(self._next_turn(head), data, step, tos)
            data += step
            size -= step
            if not size:
                return

    cdef inline Flow *_next_turn(self, Flow *head) noexcept nogil:
        """Return the flow whose turn it is in a session without affinity."""
        cdef Flow *flow = head.turn.ring
        # Past targets that are down or have just refused; if all are, the first has its turn.
        while flow != head.turn and (
            self._targets[flow.target].down or self._has_refused(flow)
        ):
            flow = flow.ring
        head.turn = flow
        return flow

    # From targets to clients

    cdef int _from_target(self, Flow *flow, int each) noexcept nogil:
        """Read up to ``each`` datagrams of a target and gather them for the client."""
        cdef int count, i, slot
        cdef mmsghdr *message
        cdef Flow *owner
        if self._reads + each > BATCH or (
            self._out_listener >= 0 and self._out_listener != flow.listener
        ):
            self._flush_to_clients()
        slot = self._reads
        for i in range(slot, slot + each):
            message = &self._in[i]
            message.msg_hdr.msg_name = NULL
            message.msg_hdr.msg_namelen = 0
            message.msg_hdr.msg_iov = &self._in_parts[i]
            message.msg_hdr.msg_iovlen = 1
            message.msg_hdr.msg_control = <uint8_t *>self._in_control + i * CONTROL_SIZE
            message.msg_hdr.msg_controllen = CONTROL_SIZE
            message.msg_hdr.msg_flags = 0
        if each == 1:
            count = <int>recvmsg(flow.fd, &self._in[slot].msg_hdr, MSG_DONTWAIT)
            if count >= 0:
                self._in[slot].msg_len = <unsigned int>count
                count = 1
        else:
            count = recvmmsg(flow.fd, &self._in[slot], each, MSG_DONTWAIT, NULL)
        if count <= 0:
            if count < 0 and errno == ECONNREFUSED:
                self._note_refusal(flow)
            return 1  # an event was used up: not nothing
        if flow.refusals:
            flow.refusals = 0
        if not flow.head.answered and not _is_asked(flow):
            self._answered(flow.head)
        for i in range(slot, slot + count):
            self._read_control(&self._in[i].msg_hdr, i, NULL, &flow.overflow)
            if self._has_media and flow.head.media != NULL:
                owner = self._answer(
                    flow, <uint8_t *>self._in_parts[i].iov_base, self._in[i].msg_len,
                    self._segment[i],
                )
                if owner == NULL:
                    self._dropped[DROP_HELD_BACK] += _train(self._in[i].msg_len, self._segment[i])
                    continue
                flow = owner
            flow.head.target_heard = self._clock
            if self._in[i].msg_hdr.msg_flags & MSG_TRUNC:
                self._dropped[DROP_TRUNCATED] += 1
            elif self.mode == MODE_STOPPED:
                self._dropped[DROP_STOPPED] += _train(self._in[i].msg_len, self._segment[i])
            else:
                self._out_listener = flow.listener
                self._put(
                    flow, False, <uint8_t *>self._in_parts[i].iov_base, self._in[i].msg_len,
                    self._segment[i], self._tos[i],
                )
        self._reads = slot + count
        return count

    cdef void _flush_to_clients(self) noexcept nogil:
        if self._out_listener >= 0:
            self._flush(self._listeners[self._out_listener].fd, NULL)
        self._out_listener = -1
        self._reads = 0

    # Reading what the kernel says beside a datagram

    cdef void _read_control(
        self, msghdr *message, int index, Ip *local, uint32_t *dropped
    ) noexcept nogil:
        """Take the train's segment size, type of service, local address and overflow counter.

        Args:
            local: Of a listener's datagram, where to write the local address; NULL otherwise.
            dropped: What the socket's overflow counter was before.
        """
        cdef cmsghdr *control = CMSG_FIRSTHDR(message)
        cdef int number
        cdef uint32_t overflow
        self._segment[index] = 0
        self._tos[index] = 0
        while control != NULL:
            if control.cmsg_level == IPPROTO_IPV6:
                if control.cmsg_type == IPV6_PKTINFO and local != NULL:
                    memcpy(local, CMSG_DATA(control), 16)
                elif control.cmsg_type == IPV6_TCLASS:
                    memcpy(&number, CMSG_DATA(control), sizeof(int))
                    self._tos[index] = <uint8_t>number
            elif control.cmsg_level == IPPROTO_IP:
                if control.cmsg_type == IP_PKTINFO and local != NULL:
                    _mapped(local, &(<in_pktinfo *>CMSG_DATA(control)).ipi_addr)
                elif control.cmsg_type == IP_TOS:
                    self._tos[index] = CMSG_DATA(control)[0]
            elif control.cmsg_level == SOL_UDP and control.cmsg_type == UDP_GRO:
                memcpy(&number, CMSG_DATA(control), sizeof(int))
                self._segment[index] = <uint16_t>number
            elif control.cmsg_level == SOL_SOCKET and control.cmsg_type == SO_RXQ_OVFL:
                memcpy(&overflow, CMSG_DATA(control), sizeof(uint32_t))
                self._overflowed += <uint32_t>(overflow - dropped[0])
                dropped[0] = overflow
            control = CMSG_NXTHDR(message, control)

    cdef void _read_errors(self, uint32_t number) noexcept nogil:
        """Read which clients' ports are closed (ICMP) from a listener's queue of errors."""
        cdef msghdr message
        cdef sockaddr_in6 name
        cdef iovec part
        cdef uint8_t data[64]
        cdef uint8_t room[512]
        cdef cmsghdr *control
        cdef sock_extended_err *error
        cdef Ip client
        cdef uint16_t port
        cdef int i
        for i in range(MAX_ERRORS):
            memset(&message, 0, sizeof(message))
            memset(&name, 0, sizeof(name))
            part.iov_base = data
            part.iov_len = sizeof(data)
            message.msg_name = &name
            message.msg_namelen = sizeof(name)
            message.msg_iov = &part
            message.msg_iovlen = 1
            message.msg_control = room
            message.msg_controllen = sizeof(room)
            if recvmsg(self._listeners[number].fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT) < 0:
                return
            if name.sin6_family == AF_INET:
                port = (<sockaddr_in *>&name).sin_port
                _mapped(&client, sin_address(<sockaddr_in *>&name))
            else:
                port = name.sin6_port
                memcpy(&client, sin6_address(&name), 16)
            control = CMSG_FIRSTHDR(&message)
            while control != NULL:
                if (control.cmsg_level == IPPROTO_IPV6 and control.cmsg_type == IPV6_RECVERR) or (
                    control.cmsg_level == IPPROTO_IP and control.cmsg_type == IP_RECVERR
                ):
                    error = <sock_extended_err *>CMSG_DATA(control)
                    if error.ee_errno == <uint32_t>ECONNREFUSED:
                        self._client_refused(number, &client, port)
                control = CMSG_NXTHDR(&message, control)

    cdef void _client_refused(self, uint32_t number, const Ip *client, uint16_t port) noexcept nogil:
        """Take note that a client's port seems to be closed; its silence has to confirm that."""
        cdef Flow *flow = self._buckets[self._hash(number, client, port) & self._mask]
        while flow != NULL:
            if (
                flow.client_port == port and flow.listener == number and _same(&flow.client, client)
                and not self._is_spare(flow)
            ):
                self._hint(flow.head, END_CLIENT_GONE)
            flow = flow.bucket_next

    # Sending

    cdef void _put(
        self, Flow *flow, bint to_target, uint8_t *data, uint32_t size, uint16_t segment, uint8_t tos
    ) noexcept nogil:
        """Append a datagram, or a train of datagrams of ``segment`` bytes, to what will be sent.

        Equal datagrams of one flow that follow each other become one train (UDP_SEGMENT).
        """
        cdef uint32_t step
        if segment and (size <= segment or flow.no_train or (to_target and flow.header != NULL)):
            # Not to be sent as a train.
            while True:
                step = min(size, <uint32_t>segment)
                self._append(flow, to_target, data, step, step, tos)
                data += step
                size -= step
                if not size:
                    return
        self._append(flow, to_target, data, size, segment if segment else size, tos)

    cdef void _append(
        self, Flow *flow, bint to_target, uint8_t *data, uint32_t size, uint32_t segment, uint8_t tos
    ) noexcept nogil:
        """Append ``size`` bytes in datagrams of ``segment`` bytes; the last may be shorter."""
        cdef int last = self._outs - 1
        cdef uint32_t header = flow.header_size if to_target else 0
        cdef uint32_t count = _train(size, segment)
        cdef mmsghdr *message
        if last >= 0 and self._out_flows[last] == flow and not self._out_closed[last]:
            # ``msg_len`` is only written by the kernel after the call; here it sums up the bytes.
            message = &self._out[last]
            if (
                not flow.no_train and size > 0 and segment + header <= self._out_segment[last]
                and (count == 1 or segment + header == self._out_segment[last])
                and self._out_tos[last] == tos
                and self._out_segments[last] + count <= MAX_TRAIN
                and message.msg_len + size + header <= MAX_PAYLOAD
                and self._parts + 2 <= MAX_PARTS
            ):
                self._add_part(message, flow, data, size, header)
                self._out_segments[last] += count
                self._out_closed[last] = size % segment != 0 or segment + header < self._out_segment[last]
                return
        if self._outs == BATCH or self._parts + 2 > MAX_PARTS:
            if to_target:
                self._flush(flow.fd, flow)
            else:
                self._flush(self._listeners[flow.listener].fd, NULL)
        last = self._outs
        self._outs += 1
        message = &self._out[last]
        memset(&message.msg_hdr, 0, sizeof(msghdr))
        message.msg_len = 0
        message.msg_hdr.msg_iov = &self._out_parts[self._parts]
        self._add_part(message, flow, data, size, header)
        self._out_flows[last] = flow
        self._out_segments[last] = count
        self._out_segment[last] = <uint16_t>(segment + header)
        self._out_tos[last] = tos
        self._out_closed[last] = size == 0 or size % segment != 0
        message.msg_hdr.msg_control = <uint8_t *>self._out_control + last * CONTROL_SIZE
        if not to_target:
            self._address_to_client(&message.msg_hdr, flow, last)

    cdef void _add_part(
        self, mmsghdr *message, Flow *flow, uint8_t *data, uint32_t size, uint32_t header
    ) noexcept nogil:
        if header:
            self._out_parts[self._parts].iov_base = flow.header
            self._out_parts[self._parts].iov_len = header
            self._parts += 1
            message.msg_hdr.msg_iovlen += 1
        self._out_parts[self._parts].iov_base = data
        self._out_parts[self._parts].iov_len = size
        self._parts += 1
        message.msg_hdr.msg_iovlen += 1
        message.msg_len += size + header

    cdef void _address_to_client(self, msghdr *message, Flow *flow, int index) noexcept nogil:
        """Send from the address that the client sent to."""
        cdef sockaddr_in6 *name = &self._out_names[index]
        cdef in6_pktinfo six
        cdef in_pktinfo four
        cdef bint known = flow.local.high != 0 or flow.local.low != 0
        message.msg_name = name
        if self._listeners[flow.listener].inet:
            (<sockaddr_in *>name).sin_family = <sa_family_t>AF_INET
            (<sockaddr_in *>name).sin_port = flow.client_port
            memcpy(sin_address(<sockaddr_in *>name), <uint8_t *>&flow.client + 12, 4)
            message.msg_namelen = sizeof(sockaddr_in)
            if known:
                memset(&four, 0, sizeof(four))
                memcpy(&four.ipi_spec_dst, <uint8_t *>&flow.local + 12, 4)
                _control(message, IPPROTO_IP, IP_PKTINFO, &four, sizeof(four))
            return
        name.sin6_family = <sa_family_t>AF_INET6
        name.sin6_port = flow.client_port
        name.sin6_flowinfo = 0
        name.sin6_scope_id = flow.scope
        memcpy(sin6_address(name), &flow.client, 16)
        message.msg_namelen = sizeof(sockaddr_in6)
        if known:
            memset(&six, 0, sizeof(six))
            memcpy(&six.ipi6_addr, &flow.local, 16)
            six.ipi6_ifindex = flow.scope
            _control(message, IPPROTO_IPV6, IPV6_PKTINFO, &six, sizeof(six))

    cdef void _flush(self, int fd, Flow *flow) noexcept nogil:
        """Send what was appended.

        Args:
            flow: Whose target it goes to; NULL if it goes to clients.
        """
        cdef int i, done = 0, sent, number, told = 0
        cdef uint16_t segment
        cdef mmsghdr *message
        cdef bint six
        for i in range(self._outs):
            message = &self._out[i]
            if self._out_segments[i] > 1:
                segment = self._out_segment[i]
                _control(&message.msg_hdr, SOL_UDP, UDP_SEGMENT, &segment, sizeof(segment))
            if self._out_tos[i]:
                number = self._out_tos[i]
                if flow != NULL:
                    six = self._targets[flow.target].address.sin6_family == AF_INET6
                else:
                    six = not _is_mapped(&self._out_flows[i].client)
                if six:
                    _control(&message.msg_hdr, IPPROTO_IPV6, IPV6_TCLASS, &number, sizeof(int))
                else:
                    _control(&message.msg_hdr, IPPROTO_IP, IP_TOS, &number, sizeof(int))
            if not message.msg_hdr.msg_controllen:
                message.msg_hdr.msg_control = NULL
        while done < self._outs:
            if not self._opens_sockets and flow != NULL:
                sent = self._outs
            elif self._outs - done == 1:
                number = <int>sendmsg(fd, &self._out[done].msg_hdr, MSG_DONTWAIT)
                sent = 1 if number >= 0 else -1
                if sent == 1:
                    self._out[done].msg_len = <unsigned int>number
            else:
                sent = sendmmsg(fd, &self._out[done], self._outs - done, MSG_DONTWAIT)
            if sent > 0:
                for i in range(done, done + sent):
                    self._count_sent(i, flow != NULL)
                done += sent
                told = 0
                continue
            number = errno
            if number == EINTR:
                continue
            if number == ECONNREFUSED and flow != NULL:
                self._note_refusal(flow)
            told += 1
            if _is_told_error(number) and told < (2 if flow != NULL else TELLINGS):
                continue
            told = 0
            if self._out_segments[done] > 1 and (
                number == EINVAL or number == EIO or number == EMSGSIZE
            ):
                # This way takes no trains: a device without checksums, or a smaller MTU.
                self._out_flows[done].no_train = True
                self._send_split(fd, done, flow != NULL)
            elif flow == NULL and self._send_from_anywhere(fd, done, number):
                self._count_sent(done, False)
            elif number == EAGAIN:
                for i in range(done, self._outs):
                    self._dropped[DROP_BUFFER_FULL] += self._out_segments[i]
                done = self._outs
                break
            else:
                self._count_failed(number, self._out_segments[done])
            done += 1
        self._outs = 0
        self._parts = 0

    cdef bint _send_from_anywhere(self, int fd, int index, int number) noexcept nogil:
        """Answer from the address that the kernel chooses, where the client's destination can't be it.

        That is so for a broadcast or a multicast address. Return whether the datagram was sent.
        """
        cdef msghdr *message = &self._out[index].msg_hdr
        cdef cmsghdr *control = CMSG_FIRSTHDR(message)
        cdef ssize_t sent
        if number != EINVAL and number != ENETUNREACH and number != EADDRNOTAVAIL:
            return False
        while control != NULL:
            if control.cmsg_level == IPPROTO_IPV6 and control.cmsg_type == IPV6_PKTINFO:
                _without_address(<in6_pktinfo *>CMSG_DATA(control))
            elif control.cmsg_level == IPPROTO_IP and control.cmsg_type == IP_PKTINFO:
                memset(CMSG_DATA(control), 0, sizeof(in_pktinfo))
            control = CMSG_NXTHDR(message, control)
        sent = sendmsg(fd, message, MSG_DONTWAIT)
        if sent >= 0:
            self._out[index].msg_len = <unsigned int>sent
        return sent >= 0

    cdef void _count_sent(self, int index, bint to_target) noexcept nogil:
        if to_target:
            self._in_count += self._out_segments[index]
            self._in_bytes += self._out[index].msg_len
        else:
            self._out_count += self._out_segments[index]
            self._out_bytes += self._out[index].msg_len

    cdef void _send_split(self, int fd, int index, bint to_target) noexcept nogil:
        """Send the datagrams of a train one by one."""
        cdef msghdr message = self._out[index].msg_hdr
        cdef size_t header = self._out_flows[index].header_size if to_target else 0
        cdef size_t segment = self._out_segment[index] - header
        cdef size_t i, left
        cdef iovec parts[2]
        cdef ssize_t sent
        cdef cmsghdr *control = CMSG_FIRSTHDR(&message)
        # The segment size was appended before the type of service; blank it instead of moving that.
        while control != NULL:
            if control.cmsg_level == SOL_UDP and control.cmsg_type == UDP_SEGMENT:
                memset(CMSG_DATA(control), 0, sizeof(uint16_t))
            control = CMSG_NXTHDR(&message, control)
        message.msg_iov = parts
        message.msg_iovlen = 2 if header else 1
        i = 0
        while i < self._out[index].msg_hdr.msg_iovlen:
            if header:
                parts[0] = self._out[index].msg_hdr.msg_iov[i]
                i += 1
            left = self._out[index].msg_hdr.msg_iov[i].iov_len
            parts[message.msg_iovlen - 1] = self._out[index].msg_hdr.msg_iov[i]
            while left:
                parts[message.msg_iovlen - 1].iov_len = min(left, segment)
                sent = sendmsg(fd, &message, MSG_DONTWAIT)
                if sent < 0 and _is_told_error(errno):
                    sent = sendmsg(fd, &message, MSG_DONTWAIT)
                if sent < 0:
                    self._count_failed(errno, 1)
                elif to_target:
                    self._in_count += 1
                    self._in_bytes += <uint64_t>sent
                else:
                    self._out_count += 1
                    self._out_bytes += <uint64_t>sent
                left -= parts[message.msg_iovlen - 1].iov_len
                parts[message.msg_iovlen - 1].iov_base = (
                    <uint8_t *>parts[message.msg_iovlen - 1].iov_base
                    + parts[message.msg_iovlen - 1].iov_len
                )
            i += 1

    cdef void _count_failed(self, int number, uint32_t count) noexcept nogil:
        """Count datagrams that could not be sent, by the error that sending them gave."""
        if number == EAGAIN or number == ENOBUFS:
            self._dropped[DROP_BUFFER_FULL] += count
        elif number == EMSGSIZE:
            self._dropped[DROP_TOO_LONG] += count
        elif number == ECONNREFUSED:
            self._dropped[DROP_REFUSED] += count
        elif _is_told_error(number):
            self._dropped[DROP_UNREACHABLE] += count
        else:
            self._dropped[DROP_FAILED] += count

    # Newcomers

    cdef void _note_newcomer(
        self, uint32_t listener, uint16_t port, uint32_t scope, const Ip *local, int index,
        uint32_t size,
    ) noexcept nogil:
        """Keep a datagram of a client without a session until Python has decided."""
        cdef uint32_t hashed = self._hashes[index]
        cdef Ip *client = &self._clients[index]
        cdef uint32_t i
        cdef uint32_t count = _train(size, self._segment[index])
        cdef Newcomer *newcomer
        cdef Piece *piece
        if (
            self.mode == MODE_PAUSED or (self._is_full() and not self._can_evict())
        ) and not self._is_no_further(hashed, listener, client, port, scope, local):
            self._dropped[DROP_PAUSED if self.mode == MODE_PAUSED else DROP_LIMIT] += count
            return
        newcomer = NULL
        for i in range(self._newcomer_count):
            newcomer = &self._newcomers[i]
            if (
                newcomer.hash == hashed and newcomer.client_port == port
                and _same(&newcomer.client, client) and _same(&newcomer.local, local)
                and newcomer.listener == listener and newcomer.scope == scope
            ):
                break
            newcomer = NULL
        if (
            self._piece_count == MAX_PIECES
            or (newcomer == NULL and self._newcomer_count == MAX_NEWCOMERS)
            or (newcomer != NULL and newcomer.count == PIECES_EACH)
        ):
            self._dropped[DROP_BACKLOG] += count
            return
        piece = <Piece *>malloc(sizeof(Piece) + size)
        if piece == NULL:
            self._dropped[DROP_BACKLOG] += count
            return
        piece.next = NULL
        piece.size = size
        piece.segment = self._segment[index]
        piece.tos = self._tos[index]
        memcpy(<uint8_t *>(piece + 1), self._in_parts[index].iov_base, size)
        if newcomer == NULL:
            newcomer = &self._newcomers[self._newcomer_count]
            self._newcomer_count += 1
            memset(newcomer, 0, sizeof(Newcomer))
            newcomer.client = client[0]
            newcomer.local = local[0]
            newcomer.scope = scope
            newcomer.client_port = port
            newcomer.listener = <uint16_t>listener
            newcomer.hash = hashed
            newcomer.first = piece
        else:
            newcomer.last.next = piece
        newcomer.last = piece
        newcomer.count += 1
        self._piece_count += 1

    cdef bint _is_no_further(
        self, uint32_t hashed, uint32_t listener, const Ip *client, uint16_t port, uint32_t scope,
        const Ip *local,
    ) noexcept nogil:
        """Return whether a newcomer has a session, or is the other half of one."""
        cdef Newcomer newcomer
        if self._find(hashed, listener, client, port, scope, local) != NULL:
            return True
        if self._listeners[listener].partner < 0:
            return False
        newcomer.client = client[0]
        newcomer.local = local[0]
        newcomer.scope = scope
        newcomer.client_port = port
        newcomer.listener = <uint16_t>listener
        return self._partner(&newcomer, NEAREST) != NULL

    def newcomers(self):
        cdef uint32_t i
        cdef Newcomer *newcomer
        self._require_open()
        found = []
        for i in range(self._newcomer_count):
            newcomer = &self._newcomers[i]
            if newcomer.first == NULL:
                continue
            found.append((
                i,
                newcomer.listener,
                (<char *>&newcomer.client)[:16] + (<char *>&newcomer.client_port)[:2],
                (<char *>&newcomer.local)[:16]
                + (<char *>&self._listeners[newcomer.listener].port)[:2],
            ))
        return found

    cdef Newcomer *_newcomer(self, uint32_t number) except NULL:
        self._require_open()
        if number >= self._newcomer_count or self._newcomers[number].first == NULL:
            raise ValueError("there is no such newcomer")
        return &self._newcomers[number]

    def following(self, uint32_t number):
        """Return generation and target of a live session of the same client address, or None."""
        cdef Newcomer *newcomer = self._newcomer(number)
        cdef Flow *flow = self._address_place(&newcomer.client)[0]
        while flow != NULL:
            if _same(&flow.client, &newcomer.client) and not _is_undecided(flow.head):
                return flow.head.generation, flow.target
            flow = flow.address_next
        return None

    def opening(self, uint32_t number):
        """Return the first Binding request of a newcomer, else the first datagram."""
        cdef Piece *first = self._newcomer(number).first
        cdef Piece *piece = first
        while piece != NULL:
            if _is_request(<uint8_t *>(piece + 1), _first_size(piece)):
                first = piece
                break
            piece = piece.next
        return (<const char *>(first + 1))[:_first_size(first)]

    def partner(self, uint32_t number):
        """Return session, generation and target of the other half of a pair, or None."""
        cdef Flow *flow = self._partner(self._newcomer(number), NEIGHBOURS)
        return None if flow == NULL else (_number(flow), flow.generation, flow.target)

    def undecided_from(self, uint32_t number):
        """Return how many sessions of a newcomer's network others are asked for."""
        cdef uint32_t count
        self._asked_in(&self._newcomer(number).client, &count)
        return count

    def cease_asking(self, number=None):
        """Ask no more for the client that others are asked for longest; see _fastpath.pyi."""
        cdef uint32_t count
        cdef Flow *head
        self._require_open()
        if number is None:
            head = self._asked_first
        else:
            head = self._asked_in(&self._newcomer(number).client, &count)
        self._clock = _now()
        if head == NULL or self._clock - head.media.asked_at < FAIR_CHANCE:
            return False
        if _is_undecided(head):
            self._end(head, END_EVICTED)
        else:
            self._stop_asking(head)
        self._bury()
        return True

    def has_session(self, uint32_t number):
        """Return whether a newcomer has a session, but maybe with the wrong target."""
        return self._session_of(self._newcomer(number)) != NULL

    cdef Flow *_session_of(self, Newcomer *newcomer) noexcept nogil:
        return self._find(
            newcomer.hash, newcomer.listener, &newcomer.client, newcomer.client_port,
            newcomer.scope, &newcomer.local,
        )

    def ask(
        self, uint32_t number, targets, uint64_t key, bytes header not None=b"", *, bare=()
    ):
        """Ask other targets whether they know the client of a session; see _fastpath.pyi."""
        cdef Newcomer *newcomer = self._newcomer(number)
        cdef Flow *head = self._session_of(newcomer)
        cdef Flow *flow
        cdef int error = 0
        cdef Piece *piece
        cdef uint32_t target, own
        if not key:
            raise ValueError("a key has a bit that is not 0")
        if head == NULL or head.media == NULL or head.media.key or head.ring != head:
            return False
        if len(header) > HEADER_ROOM:
            raise ValueError(f"the header has more than {HEADER_ROOM} bytes")
        own = head.target
        for target in targets:
            if target >= self._target_room or not self._targets[target].held:
                raise ValueError("there is no such target")
        self._clock = _now()
        head.media.settled = True
        self._begin_asking(head, key)
        for target in targets:
            if target == own:
                continue
            flow = self._new_flow(target, newcomer, 0, &error)
            if flow != NULL and not _give_header(flow, b"" if target in bare else header):
                self._to_graveyard(flow)
                error = ENOMEM
            if error:
                break
            flow.head = head
            flow.ring = head.ring
            head.ring = flow
        if error or head.ring == head:
            self._stop_asking(head)
            self._bury()
        if error:
            raise OSError(error, os.strerror(error))
        self._schedule(head)
        self._arm()
        # The session's own target has had it already.
        while newcomer.first != NULL:
            piece = newcomer.first
            if head.media.key:
                self._ask_all(head, <uint8_t *>(piece + 1), piece.size, piece.segment, piece.tos)
            newcomer.first = piece.next
            free(piece)
        return True

    def join(self, uint32_t number, uint64_t session, bytes header not None=b""):
        """Make a newcomer the second half of a session and send on what it has sent so far."""
        cdef Newcomer *newcomer = self._newcomer(number)
        cdef Flow *head = self._session(session)
        if len(header) > HEADER_ROOM:
            raise ValueError(f"the header has more than {HEADER_ROOM} bytes")
        if head == NULL or not self._takes_leg(head):
            raise ValueError("there is no such session, or it is whole")
        self._clock = _now()
        self._grow_table()
        self._send_pieces(self._add_leg(head, newcomer, header, 0), newcomer)

    def admit(
        self, uint32_t number, uint32_t generation, targets, bytes header not None=b"", *,
        uint64_t asking=0, bare=(),
    ):
        """Begin the session of a newcomer and send on what it has sent so far."""
        cdef Newcomer *newcomer = self._newcomer(number)
        cdef Flow *head
        cdef Piece *piece
        cdef uint32_t size
        if len(header) > HEADER_ROOM:
            raise ValueError(f"the header has more than {HEADER_ROOM} bytes")
        if self._session_of(newcomer) != NULL:
            raise ValueError("there is such a session already")
        if self.mode == MODE_PAUSED:
            # It seemed to be the other half of a session, which has another one by now.
            self._drop_newcomer(newcomer, DROP_PAUSED)
            return
        self._clock = _now()
        head = self._begin(
            generation, targets, newcomer, header, 0, False, self._clock, asking, bare
        )
        piece = newcomer.first
        size = _first_size(piece)
        if head.media != NULL and _is_request(<uint8_t *>(piece + 1), size):
            head.media.asked_at = self._clock  # its target is known, and has a moment to answer
        if head.turn == NULL and not asking and size <= KEPT_SIZE and self._kept + size <= KEPT_TOTAL:
            head.kept = <uint8_t *>malloc(size + 1)
            if head.kept != NULL:
                memcpy(head.kept, piece + 1, size)
                head.kept_size = <uint16_t>size
                head.kept_tos = piece.tos
                self._kept += size
        self._send_pieces(head, newcomer)

    cdef void _send_pieces(self, Flow *flow, Newcomer *newcomer) noexcept nogil:
        """Send on what a newcomer has sent until its session began."""
        cdef Flow *head = flow.head
        cdef Piece *piece
        head.client_heard = self._clock
        if head.asked <= head.target_heard:
            head.asked = self._clock
        while newcomer.first != NULL:
            piece = newcomer.first
            if head.media != NULL:
                self._hear(flow, BY_CLIENT, <uint8_t *>(piece + 1), piece.size, piece.segment)
            if _is_undecided(head):
                self._ask_all(
                    head, <uint8_t *>(piece + 1), piece.size, piece.segment, piece.tos
                )
            elif head.turn != NULL:
                self._spread(head, <uint8_t *>(piece + 1), piece.size, piece.segment, piece.tos)
            else:
                self._put(
                    flow, True, <uint8_t *>(piece + 1), piece.size, piece.segment, piece.tos
                )
                self._flush(flow.fd, flow)
            newcomer.first = piece.next
            free(piece)

    def refuse(self, uint32_t number, str reason not None):
        """Drop what a newcomer has sent, for one of ``DROP_REASONS``."""
        self._drop_newcomer(self._newcomer(number), DROP_REASONS.index(reason))

    cdef void _forget_newcomers(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self._newcomer_count):
            self._drop_newcomer(&self._newcomers[i], DROP_BACKLOG)
        self._newcomer_count = self._piece_count = 0

    cdef void _drop_newcomer(self, Newcomer *newcomer, int reason) noexcept nogil:
        cdef Piece *piece
        # What its session's own target has had is not lost.
        cdef bint lost = newcomer.first != NULL and self._session_of(newcomer) == NULL
        while newcomer.first != NULL:
            piece = newcomer.first
            if lost:
                self._dropped[reason] += _train(piece.size, piece.segment)
            newcomer.first = piece.next
            free(piece)

    # Targets that refuse

    cdef void _note_refusal(self, Flow *flow) noexcept nogil:
        """Take note that a target's port is closed (ICMP); Python is asked what to do."""
        cdef Flow *listed
        if flow.refusals == 0:
            flow.refused_since = self._clock
        flow.refusals += 1
        flow.refused_at = self._clock
        if self._is_spare(flow) or _is_asked(flow):
            return
        # A pair moves as a whole, and so is listed once, though the second half may have come since
        # the first was. Without affinity each flow tells of its own target.
        listed = flow if flow.head.turn != NULL else flow.head
        if not listed.refused_now and self._refusal_count < MAX_REFUSALS:
            listed.refused_now = True
            self._refusals[self._refusal_count].number = flow.number
            self._refusals[self._refusal_count].stamp = flow.stamp
            self._refusal_count += 1

    cdef void _forget_refusals(self) noexcept nogil:
        cdef uint32_t i
        cdef Flow *flow
        for i in range(self._refusal_count):
            flow = self._numbered_flow(self._refusals[i].number, self._refusals[i].stamp)
            if flow != NULL:
                flow.refused_now = flow.head.refused_now = False
        self._refusal_count = 0

    def refusals(self):
        cdef uint32_t i
        cdef Flow *flow
        cdef Flow *head
        self._require_open()
        found = []
        for i in range(self._refusal_count):
            flow = self._numbered_flow(self._refusals[i].number, self._refusals[i].stamp)
            if flow != NULL:
                head = flow.head
                found.append((
                    _number(head),
                    head.generation,
                    flow.target,
                    head.turn == NULL and not _is_bound(head),
                    head.answered,
                    head.moves,
                    flow.refusals,
                    (flow.refused_at - flow.refused_since) / 1000.0,
                    _client_end(head),
                    self._local_end(head),
                ))
        return found

    def move(self, uint64_t session, uint32_t generation, uint32_t target):
        """Move a session to another target and send it the first datagram, if it is still kept."""
        cdef Flow *head = self._session(session)
        cdef Flow *flow
        cdef Flow old[2]  # the sockets that the flows had
        cdef int number, moved = 0, i
        self._require_generation(generation)
        if head == NULL:
            return False
        if head.turn != NULL or _is_asked(head.ring):
            raise ValueError("a session that asks several targets, or is without affinity, stays")
        if target >= self._target_room or not self._targets[target].held:
            raise ValueError("there is no such target")
        self._clock = _now()
        flow = head
        while True:
            old[moved] = flow[0]
            number = self._attach(flow, target, 0)
            if number < 0:
                break
            moved += 1
            flow = flow.ring
            if flow == head:
                break
        if number < 0:
            if moved:  # the first flow of a pair goes back to its old socket
                self._detach(head)
                _take_socket(head, &old[0])
            raise OSError(-number, os.strerror(-number))
        for i in range(moved):
            self._detach(&old[i])
        if generation != head.generation:
            self._leave(head)
            self._join(head, generation)
            self._schedule(head)
            self._arm()
        flow = head
        while True:
            flow.refusals = 0
            flow = flow.ring
            if flow == head:
                break
        if head.media != NULL:
            _forget_target(head.media)
        head.moves += 1
        self._moved_sessions += 1
        if head.kept != NULL:
            self._put(head, True, head.kept, head.kept_size, 0, head.kept_tos)
            self._flush(head.fd, head)
        return True

    # Clients whose target is still asked for

    cdef void _ask_all(
        self, Flow *head, uint8_t *data, uint32_t size, uint32_t segment, uint8_t tos
    ) noexcept nogil:
        """Send Binding requests to all targets that are asked whether a client is their own."""
        cdef uint32_t step
        cdef Flow *flow
        cdef uint32_t candidates = self._candidates(head)
        cdef bint settled = head.media.settled
        cdef bint is_sure = candidates == 1 and not settled
        while True:
            step = min(size, segment) if segment else size
            if not is_sure and not _is_request(data, step):
                self._dropped[DROP_UNDECIDED] += not settled
            elif not is_sure and not self._may_ask(head.media):
                self._dropped[DROP_ASK_LIMIT] += not settled
            else:
                flow = head
                while True:
                    # A head that has its target is not asked: it gets everything anyway.
                    if _is_asked(flow) and (candidates == 0 or not self._has_refused(flow)):
                        self._send_alone(flow, data, step, tos)
                    flow = flow.ring
                    if flow == head:
                        break
            data += step
            size -= step
            if not size:
                return

    cdef inline bint _has_refused(self, const Flow *flow) noexcept nogil:
        """Return whether a target's port was found closed a moment ago."""
        return flow.refused_at != 0 and self._clock - flow.refused_at < AVOIDED

    cdef uint32_t _candidates(self, Flow *head) noexcept nogil:
        """Return how many targets of an undecided session have not refused."""
        cdef Flow *flow = head
        cdef uint32_t count = 0
        while True:
            count += not self._has_refused(flow)
            flow = flow.ring
            if flow == head:
                return count

    cdef bint _may_ask(self, Media *media) noexcept nogil:
        cdef uint64_t second = self._clock // 1000
        if media.ask_second != second:
            media.ask_second = second
            media.asks = 0
        if self._ask_second != second:
            self._ask_second = second
            self._asks = 0
        # The first one is passed on whatever the others do: a flood of theirs must not keep it out.
        if media.asks >= ASKS_EACH or (media.asks and self._asks >= ASKS):
            return False
        media.asks += 1
        self._asks += 1
        return True

    cdef Flow *_answer(
        self, Flow *flow, const uint8_t *data, uint32_t size, uint32_t segment
    ) noexcept nogil:
        """Take note of what a target says; return the flow that has its socket now.

        The first target that knows the client is the session's from then on. NULL: it may be
        another's client, and must not hear this.
        """
        cdef Flow *head = flow.head
        if head.media.key:
            if self._pin_count < MAX_PINS and _knows_client(data, size, segment):
                self._pins[self._pin_count].number = head.number
                self._pins[self._pin_count].stamp = head.stamp
                self._pins[self._pin_count].key = head.media.key
                self._pin_count += 1
                flow = self._pin(head, flow)
                self._answered(head)
            elif head.media.settled:
                # An error of its own target, too, would be a second answer, and fail the client.
                if flow != head or _is_error(data, size):
                    return NULL
            elif self._candidates(head) != 1:
                return NULL
            elif head.ring == head and not _is_error(data, size):
                # There was nobody else to ask: whoever speaks like that need not speak ICE.
                self._pin(head, head)
                self._answered(head)
        self._hear(flow, BY_TARGET, data, size, segment)
        return flow

    def pins(self):
        cdef uint32_t i
        cdef Flow *flow
        self._require_open()
        found = []
        for i in range(self._pin_count):
            flow = self._numbered_flow(self._pins[i].number, self._pins[i].stamp)
            if flow != NULL:
                found.append((_number(flow), self._pins[i].key, flow.target, flow.generation))
        return found

    # Goodbyes

    def say_goodbye(
        self, uint64_t session, bytes to_client not None, bytes to_target not None
    ):
        """Send RTCP to both sides of a session; see _fastpath.pyi."""
        cdef Flow *head = self._session(session)
        cdef Flow *flow
        self._require_open()
        if max(len(to_client), len(to_target)) > KEPT_SIZE:
            raise ValueError(f"a goodbye has at most {KEPT_SIZE} bytes")
        if head == NULL or _is_undecided(head):
            return False
        flow = self._rtcp_of(head)
        if flow == NULL:
            return False
        self._clock = _now()
        if to_client:
            self._put(flow, False, <uint8_t *><char *>to_client, <uint32_t>len(to_client), 0, 0)
            self._flush(self._listeners[flow.listener].fd, NULL)
        if to_target:
            self._put(flow, True, <uint8_t *><char *>to_target, <uint32_t>len(to_target), 0, 0)
            self._flush(flow.fd, flow)
        return True

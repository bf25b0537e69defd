# Sessions that carry calls, WebRTC or plain RTP; a part of the module _fastpath. See _relay.pxi for
# the design, _media.pxi for what datagrams are.
#
# CallTable remembers of each such session what its sides have shown: sources of RTP, whether it is
# encrypted, and what hints at its end. It decides which target a client belongs to that has asked
# several, and lists whom a goodbye is due to; it sends nothing.


cdef inline void _take_socket(Flow *flow, const Flow *other) noexcept nogil:
    """Let a flow have the upstream socket of another one, and what belongs to that."""
    flow.fd = other.fd
    flow.target = other.target
    flow.header = other.header
    flow.header_size = other.header_size
    flow.overflow = other.overflow
    flow.source_port = other.source_port
    flow.refusals = other.refusals
    flow.no_train = other.no_train


@cython.no_gc
cdef class CallTable(SessionTable):
    """The part of a Relay that knows calls."""

    @property
    def undecided(self):
        return self._undecided

    @property
    def pairs(self):
        """How many sessions have both flows of a pair; all sessions are looked at."""
        cdef uint64_t count = 0
        cdef uint32_t i
        cdef Flow *head
        for i in range(self._generation_room):
            head = self._generations[i].members
            while head != NULL:
                count += head.turn == NULL and head.ring != head and not _is_asked(head.ring)
                head = head.member_next
        return count

    cdef Flow *_session(self, uint64_t session) noexcept nogil:
        """Return the head of a session, or NULL if it has ended."""
        cdef Flow *flow = self._numbered_flow(<uint32_t>session, <uint32_t>(session >> 32))
        return NULL if flow == NULL else flow.head

    def assign(self, uint64_t session, uint32_t generation):
        """Make a session one of another generation."""
        cdef Flow *head = self._session(session)
        self._require_generation(generation)
        if head == NULL:
            return False
        if head.generation != generation:
            self._clock = _now()
            self._leave(head)
            self._join(head, generation)
            self._schedule(head)
            self._arm()
        return True

    def end(self, uint64_t session):
        """Cut a session."""
        cdef Flow *head = self._session(session)
        self._require_open()
        if head == NULL:
            return False
        self._end(head, END_CUT)
        self._bury()
        return True

    def ask_again(self):
        """Stop to ask for the targets of clients: there are others to ask now."""
        cdef uint32_t i
        cdef Flow *head
        cdef Flow *following
        self._require_open()
        for i in range(self._generation_room):
            head = self._generations[i].members
            while head != NULL:
                following = head.member_next
                if _is_undecided(head):
                    self._end(head, END_UNANSWERED)
                elif head.media != NULL and head.media.key:
                    self._stop_asking(head)
                head = following
        self._bury()

    cdef Flow *_pin(self, Flow *head, Flow *winner) noexcept nogil:
        """Let one of the targets that a session has asked be its target; return the head.

        The head is in all tables: it takes the socket of the winner, and all other flows end.
        """
        cdef Flow lost
        cdef epoll_event event
        if winner != head:
            lost = head[0]
            _take_socket(head, winner)
            _take_socket(winner, &lost)
            event.events = EPOLLIN
            event.data.ptr = head
            epoll_ctl(self._epoll, EPOLL_CTL_MOD, head.fd, &event)
            _forget_target(head.media)
            head.rtcp = NULL
        self._changed += 1
        self._stop_asking(head)
        self._schedule(head)
        self._arm()
        return head

    cdef inline bint _is_spare(self, const Flow *flow) noexcept nogil:
        """Return whether a flow carries only RTCP beside another one: its end says little."""
        return (
            flow.head.turn == NULL and flow.ring != flow and not _is_asked(flow.head.ring)
            and self._listeners[flow.listener].is_rtcp
        )

    # What the sides say

    cdef void _hear(
        self, Flow *flow, int side, const uint8_t *data, uint32_t size, uint32_t segment
    ) noexcept nogil:
        """Take note of a datagram, or of each of a train."""
        cdef uint32_t step
        while True:
            step = min(size, segment) if segment else size
            self._hear_one(flow, side, data, step)
            data += step
            size -= step
            if not size:
                return

    cdef void _hear_one(
        self, Flow *flow, int side, const uint8_t *data, uint32_t size
    ) noexcept nogil:
        cdef Flow *head = flow.head
        cdef Media *media = head.media
        cdef Voice *voice = &media.voices[side]
        cdef int kind = _kind(data, size)
        cdef uint32_t ssrc
        if side == BY_TARGET and not media.spoken:
            media.spoken = kind != KIND_STUN or _two(data) != STUN_ERROR
        if kind == KIND_RTP:
            voice.at = self._clock
            memcpy(&ssrc, data + 8, 4)
            if ssrc != voice.last or voice.left or not voice.count:
                _note_source(voice, ssrc)
        elif kind == KIND_RTCP:
            head.rtcp = flow
            self._hear_rtcp(head, voice, data, size)
        elif kind == KIND_STUN:
            self._hear_stun(head, side, _two(data))
        elif kind == KIND_DTLS:
            # Only the target's word counts: a stranger can send in the client's name.
            media.dtls = media.dtls or side == BY_TARGET
            # Who has RTCP that all can read has no DTLS to end.
            if (
                (media.dtls or media.ice or media.plain <= media.garbled)
                and _has_alert(data, size)
            ):
                self._hint(head, END_DTLS_CLOSED)

    cdef void _hear_stun(self, Flow *head, int side, uint32_t kind) noexcept nogil:
        cdef Media *media = head.media
        if side == BY_TARGET:
            if kind == STUN_SUCCESS:
                media.waiting_since = 0
                if not media.ice:
                    media.ice = True
                    self._schedule(head)
                    self._arm()
        elif kind == STUN_REQUEST and media.waiting_since == 0:
            media.waiting_since = self._clock

    cdef bint _may_be_lost(self, Flow *head) noexcept nogil:
        """Return whether others are to be asked for a client that sends a Binding request.

        Its target has never recognised it, or does not any more: ICE may have restarted, with
        another server, from the same port. The session goes on meanwhile, as anybody could have
        sent the request.
        """
        cdef Media *media = head.media
        return (
            media.key == 0 and head.ring == head and media.waiting_since != 0
            and self._clock - media.asked_at >= ASK_AGAIN
            and (not media.spoken or self._is_stale(head))
        )

    cdef bint _is_stale(self, Flow *head) noexcept nogil:
        """Return whether a target gives no sign of life to a client that keeps asking."""
        if self._clock - head.media.waiting_since < FAIR_CHANCE:
            return False
        return head.refusals >= MANY_REFUSALS or (
            self._clock - head.media.waiting_since >= STALE
            and self._clock - min(head.target_heard, self._clock) >= STALE
        )

    cdef void _hear_rtcp(
        self, Flow *head, Voice *voice, const uint8_t *data, uint32_t size
    ) noexcept nogil:
        cdef const uint8_t *packet
        cdef const uint8_t *name
        cdef uint32_t at = 0, length, i, ssrc, name_size
        cdef bint left = False
        if not _is_compound(data, size):
            head.media.garbled += 1
            return
        head.media.plain += 1
        while at < size:
            packet = data + at
            length = (_two(packet + 2) + 1) * 4
            at += length
            if (packet[1] == RTCP_SR or packet[1] == RTCP_RR) and length >= 8:
                memcpy(&ssrc, packet + 4, 4)
                _note_source(voice, ssrc)
            elif packet[1] == RTCP_SDES and voice.cname == NULL:
                name = _cname(packet, length, &name_size)
                if name != NULL and name_size:
                    voice.cname = <uint8_t *>malloc(name_size)
                    if voice.cname != NULL:
                        memcpy(voice.cname, name, name_size)
                        voice.cname_size = name_size
            elif packet[1] == RTCP_BYE:
                left = True
                for i in range(min(<uint32_t>(packet[0] & 31), length // 4 - 1)):
                    memcpy(&ssrc, packet + 4 + 4 * i, 4)
                    _note_bye(voice, ssrc)
        if left and voice.count and voice.left == (<uint32_t>1 << voice.count) - 1:
            self._hint(head, END_BYE)

    # Goodbyes

    def begin_goodbye(self, uint32_t generation):
        """Let :meth:`goodbyes` begin with the sessions that there are now."""
        self._require_generation(generation)
        self._generations[generation].cursor = self._generations[generation].members

    def goodbyes(self, uint32_t generation, uint32_t count):
        """Return the next sessions that a goodbye is due to; see _fastpath.pyi."""
        cdef Generation *chosen
        cdef Flow *head
        cdef Media *media
        self._require_generation(generation)
        chosen = &self._generations[generation]
        found = []
        while chosen.cursor != NULL and <uint32_t>len(found) < count:
            head = chosen.cursor
            chosen.cursor = head.member_next
            media = head.media
            if media == NULL or _is_undecided(head):
                continue
            found.append((
                _number(head),
                True if media.ice or media.dtls or media.garbled > media.plain else False,
                _sources(&media.voices[BY_CLIENT]),
                _name(&media.voices[BY_CLIENT]),
                _sources(&media.voices[BY_TARGET]),
                _name(&media.voices[BY_TARGET]),
            ))
        return found

    cdef Flow *_rtcp_of(self, Flow *head) noexcept nogil:
        """Return the flow of a session that RTCP goes by, or NULL if none is known."""
        cdef Flow *flow = head
        if head.rtcp != NULL:
            return head.rtcp
        while True:
            if self._listeners[flow.listener].is_rtcp:
                return flow
            flow = flow.ring
            if flow == head:
                return NULL


cdef void _forget_target(Media *media) noexcept nogil:
    """Forget what the target of a session has shown: it has another one now."""
    free(media.voices[BY_TARGET].cname)
    memset(&media.voices[BY_TARGET], 0, sizeof(Voice))
    media.spoken = media.ice = media.dtls = False
    media.waiting_since = 0


cdef void _note_source(Voice *voice, uint32_t ssrc) noexcept nogil:
    cdef uint32_t i
    voice.last = ssrc
    for i in range(voice.count):
        if voice.ssrcs[i] == ssrc:
            voice.left &= ~(<uint32_t>1 << i)
            return
    if voice.count < MAX_SSRCS:
        voice.ssrcs[voice.count] = ssrc
        voice.count += 1


cdef void _note_bye(Voice *voice, uint32_t ssrc) noexcept nogil:
    cdef uint32_t i
    for i in range(voice.count):
        if voice.ssrcs[i] == ssrc:
            voice.left |= <uint32_t>1 << i


cdef tuple _sources(const Voice *voice):
    cdef uint32_t i
    return tuple([ntohl(voice.ssrcs[i]) for i in range(voice.count)])


cdef bytes _name(const Voice *voice):
    return b"" if voice.cname == NULL else (<const char *>voice.cname)[:voice.cname_size]

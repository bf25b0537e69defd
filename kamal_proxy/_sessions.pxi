# The table of a relay's sessions; a part of the module _fastpath. See _relay.pxi for the design.
#
# SessionTable owns every session with its upstream socket, the wheel that ends them, and the tables
# of what they refer to: listeners, targets, generations. It moves no datagram.

cdef enum:
    LINE = 64                 # bytes of a line of the processor's cache
    TICK = 100                # milliseconds of a slot of the wheel
    WHEEL = 1024
    WHEEL_WORDS = 16
    COARSE = 10000            # deadlines this far ahead, in milliseconds, fall on whole seconds
    EXPIRE_AT_ONCE = 256
    FAIR_CHANCE = 1000        # milliseconds in which a target may answer before a session is evicted
    CONFIRM = 2000            # milliseconds of silence that confirm a hint
    CONFIRM_QUIET = 8000      # the same of who was quiet anyway: with ICE, checks every 4 to 6 seconds
    WITHDRAWN = 5000          # milliseconds after which who still talks takes a hint back
    CONSENT = 30000           # milliseconds without which ICE's consent has lapsed (RFC 7675 5.1)
    UNDECIDED = 10000         # milliseconds for which other targets are asked for a client
    NEIGHBOURS = 1024         # sessions of one address that are looked at, at most
    NEAREST = 32              # the same for a datagram that will probably be dropped
    PORT_TRIES = 64
    PORT_TRIES_IN_A_ROW = 8   # of them, those before the search goes on anywhere
    ASKED_BUCKETS = 256
    RECORD_BYTES = 72
    HEADER_ROOM = 52

cdef double LONGEST = 1e9     # seconds: as good as for ever, and far from any overflow


cdef inline uint64_t _milliseconds(double seconds) noexcept nogil:
    """Return a time in milliseconds; what is no time, such as NaN, is none at all."""
    return <uint64_t>((seconds if seconds < LONGEST else LONGEST) * 1000) if seconds > 0 else 0



# How what a service's clients send is treated.
cdef enum:
    MODE_RUNNING
    MODE_PAUSED
    MODE_STOPPED


# Why a datagram was dropped, and why a session ended; the texts are labels of metrics.
cdef enum:
    DROP_TRUNCATED
    DROP_INVALID
    DROP_PAUSED
    DROP_STOPPED
    DROP_LIMIT
    DROP_BACKLOG
    DROP_NO_TARGET
    DROP_NO_SOCKET
    DROP_BUFFER_FULL
    DROP_TOO_LONG
    DROP_UNREACHABLE
    DROP_REFUSED
    DROP_FAILED
    DROP_UNDECIDED
    DROP_HELD_BACK
    DROP_ASK_LIMIT
    DROPS

DROP_REASONS = (
    "truncated", "invalid", "paused", "stopped", "session_limit", "newcomer_backlog", "no_target",
    "no_socket", "buffer_full", "too_long", "unreachable", "refused", "failed",
    "undecided", "held_back", "ask_limit",
)

cdef enum:
    END_IDLE
    END_UNANSWERED
    END_EVICTED
    END_CLIENT_GONE
    END_CUT
    END_REMOVED
    END_BYE
    END_DTLS_CLOSED
    END_CONSENT_LAPSED
    ENDS

END_REASONS = (
    "idle", "unanswered", "evicted", "client_gone", "cut", "removed", "bye", "dtls_closed",
    "consent_lapsed",
)


cdef struct Flow:
    # The first 64 bytes, a line of the cache: what a datagram is compared with and sent by.
    Ip client
    Ip local
    Flow *bucket_next
    uint32_t scope
    uint32_t hash
    uint16_t client_port
    uint16_t listener
    int fd
    uint16_t target
    uint16_t generation
    bool answered
    bool ended
    bool no_train             # the way to the target, or to the client, takes no trains
    uint8_t header_size       # of the PROXY protocol header before each datagram to the target
    # The second line: what a datagram writes.
    Flow *head
    Flow *ring                # the next flow of the session, back to the head in the end
    Flow *turn                # of a head without affinity: the flow whose turn it was, else NULL
    uint8_t *header
    uint64_t client_heard     # milliseconds: last datagram of the client; of the head
    uint64_t target_heard     # milliseconds: last datagram of the target, or the begin; of the head
    uint64_t asked            # milliseconds: first datagram of the client that was not answered yet
    int16_t first             # places in the batch that is being worked on, or -1
    int16_t last
    uint32_t refusals         # since the target was last heard
    # All else.
    bool listed               # it is in the flow table and among those of its client's address
    bool let_go               # its client's datagrams begin another session
    bool refused_now          # it is in the list of refusals already
    uint8_t kept_tos
    uint16_t kept_size
    uint8_t *kept             # the first datagram, until the target answers
    uint64_t begun            # milliseconds
    uint32_t overflow         # the kernel's counter of answers it dropped, as last seen
    uint64_t refused_since    # milliseconds: the first of these refusals
    uint64_t refused_at       # milliseconds: the last refusal ever
    uint64_t gone_since       # milliseconds: when something hinted at the session's end, or 0
    int gone_reason           # what it was
    Media *media              # of the head of a session whose media are looked at, else NULL
    Flow *rtcp                # of such a head: the flow that RTCP was seen on, or NULL
    uint32_t number
    uint32_t stamp
    uint32_t moves
    uint16_t source_port      # of the upstream socket, once somebody asked for it
    Flow *bucket_back         # keeps removal from walking the bucket
    Flow *slot_back
    Flow *slot_next
    int32_t slot
    Flow *member_back
    Flow *member_next
    Flow *older
    Flow *newer
    Flow *address_back
    Flow *address_next

cdef struct PortMap:
    PortMap *next
    sockaddr_in6 address      # or a sockaddr_in
    uint32_t users
    uint32_t last             # the port that was tried last
    uint8_t taken[8192]       # one bit per port

cdef struct Target:
    bint used                 # this place of the table is taken
    bint held                 # Python may still choose it
    bint down                 # unhealthy: sessions without affinity pass it over
    uint32_t flows
    sockaddr_in6 address      # or a sockaddr_in
    socklen_t size
    PortMap *ports            # the source ports that lead to this address, or NULL

cdef struct Generation:
    bint used
    bint affinity
    uint64_t idle             # milliseconds
    uint64_t unanswered       # milliseconds
    uint64_t live
    uint64_t ended[ENDS]
    Flow *members
    bint media                # what its sessions carry is looked at
    bint hurried              # its sessions end as soon as they are silent
    Flow *cursor              # the next of its members that a goodbye is due to

cdef struct Listener:
    bint used
    int fd
    uint16_t port             # network order
    bint inet                 # an AF_INET socket
    bint leaving
    bint is_rtcp              # of a pair, the one for RTCP
    int32_t partner           # the other listener of the pair, or -1
    uint32_t overflow         # the kernel's counter of datagrams it dropped, as last seen


# What an event of the epoll is about: a tag in its lowest byte, or the pointer to a flow, whose
# lowest bits are 0.
cdef enum:
    _TIMER_TAG = 1
    _LISTENER_TAG = 2
    _INTERRUPT_TAG = 3


cdef inline uint64_t _mix(uint64_t value) noexcept nogil:
    """The finaliser of splitmix64."""
    value += <uint64_t>0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * <uint64_t>0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * <uint64_t>0x94D049BB133111EB
    return value ^ (value >> 31)


cdef inline uint64_t _fnv1a_64(const uint8_t *data, Py_ssize_t size, uint64_t value) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(size):
        value = (value ^ data[i]) * <uint64_t>0x100000001B3
    return value


def target_seed(bytes text not None):
    """Return what a target is known by in :func:`rendezvous`."""
    return _mix(_fnv1a_64(<const uint8_t *><char *>text, len(text), <uint64_t>0xCBF29CE484222325))


def rendezvous(bytes key not None, seeds, uint64_t secret):
    """Choose a target for a key by rendezvous hashing."""
    cdef uint64_t hashed = _fnv1a_64(
        <const uint8_t *><char *>key, len(key), <uint64_t>0xCBF29CE484222325 ^ secret
    )
    cdef uint64_t score, best = 0
    cdef Py_ssize_t index = 0, chosen = -1
    for seed in seeds:
        score = _mix(hashed ^ <uint64_t>seed)
        if chosen < 0 or score > best:
            best = score
            chosen = index
        index += 1
    if chosen < 0:
        raise ValueError("there is no target to choose from")
    return chosen


cdef inline uint64_t _heard(const Flow *flow) noexcept nogil:
    """Return when a session last had a datagram, in either direction."""
    return max(flow.client_heard, flow.target_heard)


cdef inline Ip _network(const Ip *ip) noexcept nogil:
    """Return what one host has of the addresses: a /64 of IPv6, or one of IPv4."""
    cdef Ip network = ip[0]
    if not _is_mapped(ip):
        network.low = 0
    return network


cdef inline bint _is_undecided(const Flow *head) noexcept nogil:
    """Return whether a session has no target yet, and asks several."""
    return head.media != NULL and head.media.key != 0 and not head.media.settled


cdef inline bint _is_asked(const Flow *flow) noexcept nogil:
    """Return whether a flow leads to a target that is asked whether the client is its own."""
    return (
        flow.head.media != NULL and flow.head.media.key != 0
        and (flow != flow.head or not flow.head.media.settled)
    )


cdef inline bint _is_bound(const Flow *head) noexcept nogil:
    """Return whether no other target could go on with a session: it has agreed on keys with one."""
    return head.media != NULL and (head.media.key != 0 or head.media.ice or head.media.dtls)


cdef inline uint64_t _silence(const Flow *head) noexcept nogil:
    """Return for how long a session that seems to be over must be silent to be so.

    With ICE, silence says little of who sent no media just before, as with data channels.
    """
    cdef uint64_t spoke
    if head.media == NULL or not head.media.ice:
        return CONFIRM
    spoke = head.media.voices[BY_CLIENT].at
    if head.gone_reason != END_CLIENT_GONE:
        spoke = max(spoke, head.media.voices[BY_TARGET].at)
    return CONFIRM if spoke + CONFIRM > head.gone_since else CONFIRM_QUIET


cdef bint _give_header(Flow *flow, bytes header) noexcept:
    """Let a flow have what its datagrams to the target begin with; False without memory."""
    if header:
        flow.header = <uint8_t *>malloc(len(header))
        if flow.header == NULL:
            return False
        memcpy(flow.header, <char *>header, len(header))
        flow.header_size = <uint8_t>len(header)
    return True


cdef inline uint64_t _number(const Flow *flow) noexcept nogil:
    """Return what Python knows a session by."""
    return <uint64_t>flow.stamp << 32 | flow.number


cdef inline bytes _client_end(const Flow *flow):
    return (<const char *>&flow.client)[:16] + (<const char *>&flow.client_port)[:2]


cdef class SourcePorts:
    """Which source ports lead to which target address; see _fastpath.pyi."""

    cdef PortMap *_maps
    cdef uint32_t _low
    cdef uint32_t _high
    cdef uint8_t _avoided[8192]  # one bit per port

    def __cinit__(self, uint32_t low, uint32_t high):
        if not 1 <= low <= high <= 65535:
            raise ValueError("ports are from 1 to 65535")
        self._low = low
        self._high = high

    def __dealloc__(self):
        # Relays hold a reference to this for as long as they use one of its maps.
        cdef PortMap *ports
        while self._maps != NULL:
            ports = self._maps
            self._maps = ports.next
            free(ports)

    def avoid(self, uint32_t low, uint32_t high):
        """Take no port of a range from now on."""
        self._mark(low, high, True)

    def allow(self, uint32_t low, uint32_t high):
        """Take ports of a range again."""
        self._mark(low, high, False)

    cdef int _mark(self, uint32_t low, uint32_t high, bint avoided) except -1:
        cdef uint32_t port
        if not 1 <= low <= high <= 65535:
            raise ValueError("ports are from 1 to 65535")
        for port in range(low, high + 1):
            if avoided:
                self._avoided[port >> 3] |= <uint8_t>(1 << (port & 7))
            else:
                self._avoided[port >> 3] &= <uint8_t>~(1 << (port & 7))
        return 0

    cdef inline bint _is_avoided(self, uint32_t port) noexcept nogil:
        return self._avoided[port >> 3] >> (port & 7) & 1

    cdef bint _is_held(self, uint32_t port) noexcept nogil:
        """Return whether a port leads to any address, and so is this process's own."""
        cdef PortMap *ports = self._maps
        while ports != NULL:
            if ports.taken[port >> 3] >> (port & 7) & 1:
                return True
            ports = ports.next
        return False

    cdef bint _is_taken_beside(self, const PortMap *ports, uint32_t port) noexcept nogil:
        """Return whether a port leads to an address by another map.

        A target with the ports of the listeners has one map for all of them.
        """
        cdef PortMap *other = self._maps
        cdef sockaddr_in6 address
        while other != NULL:
            if (
                other != ports and other.taken[port >> 3] >> (port & 7) & 1
                and (other.address.sin6_port == 0 or ports.address.sin6_port == 0)
            ):
                address = other.address
                address.sin6_port = ports.address.sin6_port
                if memcmp(&address, &ports.address, sizeof(sockaddr_in6)) == 0:
                    return True
            other = other.next
        return False

    cdef PortMap *_use(self, const sockaddr_in6 *address, uint64_t secret) noexcept nogil:
        """Return the map of an address, to be given back with _leave; NULL without memory."""
        cdef PortMap *ports = self._maps
        while ports != NULL:
            if memcmp(&ports.address, address, sizeof(sockaddr_in6)) == 0:
                ports.users += 1
                return ports
            ports = ports.next
        ports = <PortMap *>calloc(1, sizeof(PortMap))
        if ports == NULL:
            return NULL
        ports.address = address[0]
        ports.users = 1
        ports.last = <uint32_t>(self._low + _mix(secret) % (self._high - self._low + 1))
        ports.next = self._maps
        self._maps = ports
        return ports

    cdef void _leave(self, PortMap *ports) noexcept nogil:
        cdef PortMap **place = &self._maps
        ports.users -= 1
        if ports.users:
            return
        while place[0] != ports:
            place = &place[0].next
        place[0] = ports.next
        free(ports)


# The collector would clear ``_ports`` before __dealloc__ needs it; nothing here can be in a cycle.
@cython.no_gc
cdef class SessionTable:
    """The sessions of one UDP service; the part of a Relay that moves no datagram."""

    RECORD_SIZE = RECORD_BYTES

    cdef int _epoll
    cdef int _timer
    cdef bint _begun          # the descriptors are ours; without __cinit__ they would be 0
    cdef bint _closed
    cdef bint _opens_sockets
    cdef uint64_t _secret_a
    cdef uint64_t _secret_b
    cdef public int mode
    cdef public uint64_t limit
    cdef SourcePorts _ports
    # The flow table: buckets of heads; numbers name flows to Python.
    cdef Flow **_buckets
    cdef Flow **_addresses
    cdef uint32_t _mask
    cdef Flow **_numbered
    cdef uint32_t *_free_numbers
    cdef uint32_t _numbers
    cdef uint32_t _free_count
    cdef uint32_t _stamp
    cdef uint64_t _live
    cdef uint64_t _leaving    # of them, those that were let go
    cdef uint64_t _sockets    # upstream sockets that are open
    cdef Flow *_oldest        # of those that were never answered
    cdef Flow *_newest
    cdef Flow *_graveyard
    cdef uint64_t _kept       # bytes of first datagrams
    cdef uint64_t _clock      # milliseconds: the time of this batch
    cdef bint _emptied        # a generation has lost its last session
    # The wheel.
    cdef Flow *_wheel[WHEEL]
    cdef uint64_t _filled[WHEEL_WORDS]
    cdef uint64_t _turned     # the tick up to which everything was looked at
    cdef uint64_t _armed      # the tick that the timer waits for, 0 if none
    # Tables that Python fills.
    cdef Target *_targets
    cdef uint32_t _target_room
    cdef Generation *_generations
    cdef uint32_t _generation_room
    cdef Listener *_listeners
    cdef uint32_t _listener_room
    cdef uint32_t _listener_hint  # all places before it are taken
    cdef bint _has_media      # there are, or were, sessions whose media are looked at
    cdef uint64_t _restored   # the session that was restored last
    # Sessions that others are asked for.
    cdef uint64_t _undecided
    cdef Flow *_asked_first   # for the longest
    cdef Flow *_asked_last
    cdef Flow *_asked[ASKED_BUCKETS]  # by the network of the client
    # Counters.
    cdef uint64_t _dropped[DROPS]
    cdef uint64_t _ended[ENDS]
    cdef uint64_t _created
    cdef uint64_t _moved_sessions
    cdef uint64_t _changed    # how often a session has got a half, or found its target

    def __cinit__(self, bytes seed not None, *, bint sockets=True):
        cdef epoll_event event
        self._epoll = -1
        self._timer = -1
        self._begun = True
        if len(seed) != 16:
            raise ValueError("the seed must have 16 bytes")
        memcpy(&self._secret_a, <char *>seed, 8)
        memcpy(&self._secret_b, <char *>seed + 8, 8)
        self._opens_sockets = sockets
        self.mode = MODE_RUNNING
        self.limit = 10000
        self._mask = 1023
        self._buckets = <Flow **>calloc(self._mask + 1, sizeof(Flow *))
        self._addresses = <Flow **>calloc(self._mask + 1, sizeof(Flow *))
        if self._buckets == NULL or self._addresses == NULL:
            raise MemoryError
        self._turned = _now() // TICK
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        self._timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._epoll < 0 or self._timer < 0:
            raise OSError(errno, os.strerror(errno))
        event.events = EPOLLIN
        event.data.u64 = _TIMER_TAG
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, self._timer, &event) < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        self._shut()
        free(self._buckets)
        free(self._addresses)
        free(self._numbered)
        free(self._free_numbers)
        free(self._targets)
        free(self._generations)
        free(self._listeners)

    def fileno(self):
        self._require_open()
        return self._epoll

    cdef void _shut(self) noexcept:
        """End every session and close every descriptor that is ours; harmless when repeated."""
        cdef uint32_t i
        if self._closed or not self._begun:
            return
        self._closed = True
        for i in range(self._generation_room):
            while self._generations[i].members != NULL:
                self._end(self._generations[i].members, END_REMOVED)
        self._bury()
        for i in range(self._target_room):
            if self._targets[i].used:
                self._targets[i].held = False
                self._release_target(i)
        if self._timer >= 0:
            close(self._timer)
        if self._epoll >= 0:
            close(self._epoll)
        self._timer = self._epoll = -1

    cdef int _require_open(self) except -1:
        if self._closed:
            raise ValueError("the relay is closed")
        return 0

    # Listeners, targets, generations: tables whose places are used again

    def listen(self, int fd):
        cdef sockaddr_in6 name
        cdef socklen_t size = sizeof(name)
        cdef epoll_event event
        cdef uint32_t i
        cdef Listener *listener
        cdef int kind = 0
        cdef socklen_t kind_size = sizeof(kind)
        self._require_open()
        if getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &kind_size) < 0:
            raise OSError(errno, os.strerror(errno))
        if kind != SOCK_DGRAM:
            raise OSError(EINVAL, "the listener is no UDP socket")
        if getsockname(fd, <sockaddr *>&name, &size) < 0:
            raise OSError(errno, os.strerror(errno))
        if name.sin6_family != AF_INET and name.sin6_family != AF_INET6:
            raise OSError(EINVAL, "the listener is no UDP socket")
        for i in range(self._listener_hint, self._listener_room):
            if not self._listeners[i].used:
                break
        else:
            i = self._listener_room
            if i >= 65535:
                raise ValueError("a relay has at most 65535 listeners")
            self._listeners = <Listener *>_grown(
                self._listeners, &self._listener_room, sizeof(Listener)
            )
        listener = &self._listeners[i]
        event.events = EPOLLIN
        event.data.u64 = _LISTENER_TAG | (<uint64_t>i << 8)
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
            raise OSError(errno, os.strerror(errno))
        listener.used = True
        listener.fd = fd
        listener.port = name.sin6_port  # at the same place in a sockaddr_in
        listener.inet = name.sin6_family == AF_INET
        listener.overflow = 0
        listener.leaving = listener.is_rtcp = False
        listener.partner = -1
        self._listener_hint = i + 1
        return i

    cdef Listener *_listener(self, uint32_t number) except NULL:
        self._require_open()
        if number >= self._listener_room or not self._listeners[number].used:
            raise ValueError("there is no such listener")
        return &self._listeners[number]

    def unlisten(self, uint32_t number):
        """Forget a listener; its sessions end."""
        self.unlisten_all((number,))

    def unlisten_all(self, numbers):
        """Forget listeners; their sessions end. All sessions are looked at once."""
        cdef epoll_event event
        cdef Flow *head
        cdef Flow *following
        cdef Listener *listener
        cdef uint32_t i, number
        wanted = tuple(numbers)
        for number in wanted:
            self._listener(number)
        for number in wanted:
            self._listeners[number].leaving = True
        for i in range(self._generation_room):
            head = self._generations[i].members
            while head != NULL:
                following = head.member_next
                if (
                    self._listeners[head.listener].leaving
                    or self._listeners[head.ring.listener].leaving
                ):
                    self._end(head, END_REMOVED)
                head = following
        self._bury()
        for number in wanted:
            listener = &self._listeners[number]
            if listener.used:  # not named twice
                epoll_ctl(self._epoll, EPOLL_CTL_DEL, listener.fd, &event)
                listener.used = listener.leaving = False
                self._unpair(number)
                self._listener_hint = min(self._listener_hint, number)

    def add_target(self, str host not None, uint16_t port, uint32_t scope=0):
        cdef uint32_t i
        cdef Target *target
        cdef sockaddr_in6 address
        cdef socklen_t size = _socket_address(host, port, scope, &address)
        self._require_open()
        for i in range(self._target_room):
            if not self._targets[i].used:
                break
        else:
            i = self._target_room
            if i >= 65535:
                raise ValueError("a relay has at most 65535 targets")
            self._targets = <Target *>_grown(self._targets, &self._target_room, sizeof(Target))
        target = &self._targets[i]
        memset(target, 0, sizeof(Target))
        target.used = target.held = True
        target.address = address
        target.size = size
        return i

    def drop_target(self, uint32_t number):
        """No session is opened to this target any more; those that it has go on."""
        self._require_open()
        if number >= self._target_room or not self._targets[number].held:
            raise ValueError("there is no such target")
        self._targets[number].held = False
        self._release_target(number)

    def set_down(self, uint32_t target, bint down):
        """Say whether a target is unhealthy: sessions without affinity pass it over."""
        self._require_open()
        if target >= self._target_room or not self._targets[target].used:
            raise ValueError("there is no such target")
        self._targets[target].down = down

    cdef void _release_target(self, uint32_t number) noexcept nogil:
        cdef Target *target = &self._targets[number]
        if target.used and not target.held and target.flows == 0:
            if target.ports != NULL:
                self._ports._leave(target.ports)
                target.ports = NULL
            target.used = False

    def use_ports(self, SourcePorts ports not None):
        """Choose upstream source ports here, each once per target, not once on the whole host."""
        self._require_open()
        if self._ports is None:
            self._ports = ports
        elif self._ports is not ports:
            raise ValueError("a relay keeps its source ports")

    def add_generation(
        self, double idle, double unanswered, *, bint affinity=True, bint media=False
    ):
        cdef uint32_t i
        cdef Generation *generation
        self._require_open()
        if media and not affinity:
            raise ValueError("media need affinity")
        for i in range(self._generation_room):
            if not self._generations[i].used:
                break
        else:
            i = self._generation_room
            if i >= 65535:
                raise ValueError("a relay has at most 65535 generations")
            self._generations = <Generation *>_grown(
                self._generations, &self._generation_room, sizeof(Generation)
            )
        generation = &self._generations[i]
        memset(generation, 0, sizeof(Generation))
        generation.used = True
        generation.affinity = affinity
        generation.media = media
        self._has_media = self._has_media or media
        generation.idle = _milliseconds(idle)
        generation.unanswered = _milliseconds(unanswered)
        return i

    def drop_generation(self, uint32_t number):
        """Forget a generation that has no session left."""
        self._require_generation(number)
        if self._generations[number].live:
            raise ValueError("the generation has sessions")
        self._generations[number].used = False

    cdef int _require_generation(self, uint32_t number) except -1:
        self._require_open()
        if number >= self._generation_room or not self._generations[number].used:
            raise ValueError("there is no such generation")
        return 0

    def sessions(self, uint32_t generation):
        self._require_generation(generation)
        return self._generations[generation].live

    def ended(self, uint32_t generation):
        cdef int i
        self._require_generation(generation)
        return {END_REASONS[i]: self._generations[generation].ended[i] for i in range(ENDS)}

    def let_go(self, uint32_t generation):
        """Take the sessions of a generation without affinity from their clients.

        They take no further datagram of a client, only answers that are on their way. Sessions
        with affinity go on.
        """
        cdef Flow *flow
        self._require_generation(generation)
        if self._generations[generation].affinity:
            return
        flow = self._generations[generation].members
        while flow != NULL:
            self._let_go(flow)
            flow = flow.member_next
        self._arm()

    cdef void _let_go(self, Flow *head) noexcept nogil:
        """Let a session's client begin another one; this one ends once it is silent."""
        cdef Flow *flow = head
        if head.let_go:
            return
        head.let_go = True
        self._leaving += 1
        while True:
            self._unlist(flow)
            flow = flow.ring
            if flow == head:
                break
        self._schedule(head)

    def hurry(self, uint32_t generation):
        """From now on the sessions of a generation end as soon as they are silent for a moment."""
        cdef Flow *flow
        self._require_generation(generation)
        self._clock = _now()
        self._generations[generation].hurried = True
        flow = self._generations[generation].members
        while flow != NULL:
            self._schedule(flow)
            flow = flow.member_next
        self._arm()

    def stuck(self, uint32_t generation, uint32_t target, double seconds, uint32_t count):
        """Return sessions whose client goes on talking to a target that is silent."""
        cdef uint64_t silence = _milliseconds(seconds)
        cdef Flow *flow
        self._require_generation(generation)
        self._clock = _now()
        found = []
        flow = self._generations[generation].members
        while flow != NULL and <uint32_t>len(found) < count:
            if (
                flow.target == target and flow.turn == NULL and not _is_bound(flow)
                and flow.asked > flow.target_heard and self._clock - flow.asked >= silence
                and self._clock - flow.client_heard < silence
            ):
                found.append((_number(flow), _client_end(flow), self._local_end(flow)))
            flow = flow.member_next
        return found

    def flows_to(self, uint32_t target):
        self._require_open()
        if target >= self._target_room or not self._targets[target].used:
            raise ValueError("there is no such target")
        return self._targets[target].flows

    def adopt(self, uint32_t former, uint32_t generation, targets):
        """Make sessions of some targets those of another generation; see _fastpath.pyi."""
        cdef Flow *head
        cdef Flow *flow
        cdef Flow *following
        cdef bint moves
        self._require_generation(former)
        self._require_generation(generation)
        for target in targets.values():
            if target >= self._target_room or not self._targets[<uint32_t>target].held:
                raise ValueError("there is no such target")
        head = self._generations[former].members
        while head != NULL:
            following = head.member_next
            if head.turn == NULL:
                moves = head.target in targets
                flow = head
                while True:
                    if flow.target in targets:
                        self._rename(flow, <uint32_t>targets[flow.target])
                    flow = flow.ring
                    if flow == head:
                        break
                if moves:
                    self._leave(head)
                    self._join(head, generation)
                    self._schedule(head)
            head = following
        self._arm()

    cdef void _rename(self, Flow *flow, uint32_t number) noexcept nogil:
        """Let a flow have another number for the address that it is connected to."""
        cdef Target *old = &self._targets[flow.target]
        cdef Target *new = &self._targets[number]
        if old.ports != NULL and new.ports == NULL:
            # The same map: it is the same address.
            new.ports = old.ports
            new.ports.users += 1
        new.flows += 1
        old.flows -= 1
        self._release_target(flow.target)
        flow.target = <uint16_t>number

    def end_some(self, uint32_t generation, uint32_t count, *, bint removed=False):
        """End up to ``count`` sessions of a generation; return how many are left."""
        self._require_generation(generation)
        while count and self._generations[generation].members != NULL:
            self._end(self._generations[generation].members, END_REMOVED if removed else END_CUT)
            count -= 1
        self._bury()
        return self._generations[generation].live

    cdef inline bint _is_full(self) noexcept nogil:
        """Return whether there may be no further session; those let go have made room for theirs."""
        return self._live - self._leaving >= self.limit

    cdef inline bint _can_evict(self) noexcept nogil:
        """Return whether a session may make room for another one.

        One that goes both ways may not, nor one whose target has had no time to answer: newcomers
        in a flood would push each other out before any is answered, and cost more than to drop.
        """
        return self._oldest != NULL and self._clock - self._oldest.begun >= FAIR_CHANCE

    cdef bytes _local_end(self, const Flow *flow):
        cdef const Listener *listener = &self._listeners[flow.listener]
        return (<const char *>&flow.local)[:16] + (<const char *>&listener.port)[:2]

    def evict(self):
        """End the oldest session that no target has answered; return False if there is none."""
        self._require_open()
        self._clock = _now()
        if not self._can_evict():
            return False
        self._end(self._oldest, END_EVICTED)
        self._bury()
        return True

    # Counters

    @property
    def live(self):
        return self._live

    @property
    def full(self):
        return self._is_full()

    @property
    def sockets(self):
        return self._sockets

    @property
    def shed(self):
        return self._dropped[DROP_LIMIT]

    @property
    def changes(self):
        return 2 * self._created - self._live + self._moved_sessions + self._changed

    @property
    def closed(self):
        return self._closed

    # The flow table

    cdef inline uint32_t _hash(self, uint32_t listener, const Ip *client, uint16_t port) noexcept nogil:
        """Hash the client's end only: what the kernel tells of an error lacks the local address."""
        cdef uint64_t value = _mix(client.low ^ self._secret_a)
        value = _mix(value ^ client.high ^ self._secret_b)
        value = _mix(value ^ (<uint64_t>listener << 16 | port))
        return <uint32_t>value

    cdef inline Flow *_find(
        self, uint32_t hashed, uint32_t listener, const Ip *client, uint16_t port, uint32_t scope,
        const Ip *local,
    ) noexcept nogil:
        cdef Flow *flow = self._buckets[hashed & self._mask]
        while flow != NULL:
            if (
                flow.hash == hashed and flow.client_port == port and _same(&flow.client, client)
                and _same(&flow.local, local) and flow.listener == listener and flow.scope == scope
            ):
                return flow
            flow = flow.bucket_next
        return NULL

    cdef inline Flow **_address_place(self, const Ip *client) noexcept nogil:
        return &self._addresses[self._hash(0, client, 0) & self._mask]

    cdef void _list(self, Flow *flow) noexcept nogil:
        """Let datagrams of the client find the session."""
        cdef Flow **bucket = &self._buckets[flow.hash & self._mask]
        cdef Flow **place = self._address_place(&flow.client)
        flow.bucket_next = bucket[0]
        flow.bucket_back = NULL
        if bucket[0] != NULL:
            bucket[0].bucket_back = flow
        bucket[0] = flow
        flow.address_next = place[0]
        flow.address_back = NULL
        if place[0] != NULL:
            place[0].address_back = flow
        place[0] = flow
        flow.listed = True

    cdef void _unlist(self, Flow *flow) noexcept nogil:
        if not flow.listed:
            return
        flow.listed = False
        if flow.bucket_back != NULL:
            flow.bucket_back.bucket_next = flow.bucket_next
        else:
            self._buckets[flow.hash & self._mask] = flow.bucket_next
        if flow.bucket_next != NULL:
            flow.bucket_next.bucket_back = flow.bucket_back
        if flow.address_back != NULL:
            flow.address_back.address_next = flow.address_next
        else:
            self._address_place(&flow.client)[0] = flow.address_next
        if flow.address_next != NULL:
            flow.address_next.address_back = flow.address_back

    cdef int _grow_table(self) except -1:
        """Keep the buckets short; called when a session begins."""
        cdef uint32_t room = self._mask + 1, i
        cdef Flow **buckets
        cdef Flow **addresses
        cdef Flow *head
        cdef Flow *flow
        if self._live < room or room >= <uint32_t>1 << 22:
            return 0
        buckets = <Flow **>calloc(room * 2, sizeof(Flow *))
        addresses = <Flow **>calloc(room * 2, sizeof(Flow *))
        if buckets == NULL or addresses == NULL:
            free(buckets)
            free(addresses)
            raise MemoryError
        free(self._buckets)
        free(self._addresses)
        self._buckets = buckets
        self._addresses = addresses
        self._mask = room * 2 - 1
        for i in range(self._generation_room):
            head = self._generations[i].members
            while head != NULL:
                flow = head
                while True:
                    # Those that were let go, and all but one without affinity, stay out.
                    if flow.listed:
                        self._list(flow)
                    flow = flow.ring
                    if flow == head:
                        break
                head = head.member_next
        return 0

    # The life of a session

    cdef Flow *_begin(
        self, uint32_t generation, targets, const Newcomer *newcomer, bytes header, uint16_t port,
        bint answered, uint64_t heard, uint64_t key=0, bare=(),
    ) except NULL:
        """Begin a session: its flows, and all the lists that it is in."""
        cdef Flow *head = NULL
        cdef Flow *last = NULL
        cdef Flow *flow
        cdef Generation *chosen
        cdef int number = 0
        cdef uint32_t target, count = 0
        self._require_open()
        self._require_generation(generation)
        chosen = &self._generations[generation]
        if key and not chosen.media:
            raise ValueError("only sessions of media ask for their target")
        if chosen.affinity and not key and len(targets) > 1:
            raise ValueError("a session with affinity has one target")
        self._grow_table()
        for target in targets:
            if target >= self._target_room or not self._targets[target].held:
                raise ValueError("there is no such target")
        for target in targets:
            flow = self._new_flow(target, newcomer, port, &number)
            if flow != NULL:
                if not _give_header(flow, b"" if target in bare else header):
                    number = ENOMEM
                if head == NULL:
                    head = flow
                else:
                    last.ring = flow
                flow.head = head
                flow.ring = head
                last = flow
                count += 1
            if number:
                break
        if number:
            if head != NULL:
                self._to_graveyard(head)
                self._bury()
            raise OSError(number, os.strerror(number))
        if head == NULL:
            raise ValueError("a session needs a target")
        if chosen.media:
            head.media = <Media *>calloc(1, sizeof(Media))
            if head.media == NULL:
                self._to_graveyard(head)
                self._bury()
                raise MemoryError
            if key:
                self._begin_asking(head, key)
        head.client_heard = head.target_heard = heard
        head.begun = self._clock
        if not chosen.affinity:
            # Not all sessions begin with the same target: some clients send a single datagram.
            head.turn = last
            for _ in range(self._created % count):
                head.turn = head.turn.ring
        self._join(head, generation)
        self._live += 1
        self._created += 1
        if answered:
            head.answered = True
        else:
            head.older = self._newest
            if self._newest != NULL:
                self._newest.newer = head
            else:
                self._oldest = head
            self._newest = head
        self._list(head)
        self._schedule(head)
        self._arm()
        return head

    cdef Flow *_new_flow(
        self, uint32_t target, const Newcomer *newcomer, uint16_t port, int *number
    ) noexcept nogil:
        """Make a flow with its socket; NULL with ``number`` set to the error if it can't be made."""
        cdef Flow *flow
        cdef uint32_t room, i
        cdef void *grown
        if not self._free_count:
            room = self._numbers * 2 if self._numbers else 256
            grown = realloc(self._numbered, room * sizeof(Flow *))
            if grown == NULL:
                number[0] = ENOMEM
                return NULL
            self._numbered = <Flow **>grown
            grown = realloc(self._free_numbers, room * sizeof(uint32_t))
            if grown == NULL:
                number[0] = ENOMEM
                return NULL
            self._free_numbers = <uint32_t *>grown
            for i in range(self._numbers, room):
                self._numbered[i] = NULL
                self._free_numbers[self._free_count] = i
                self._free_count += 1
            self._numbers = room
        flow = <Flow *>aligned_alloc(LINE, (sizeof(Flow) + LINE - 1) // LINE * LINE)
        if flow == NULL:
            number[0] = ENOMEM
            return NULL
        memset(flow, 0, sizeof(Flow))
        flow.client = newcomer.client
        flow.local = newcomer.local
        flow.scope = newcomer.scope
        flow.client_port = newcomer.client_port
        flow.listener = newcomer.listener
        flow.hash = newcomer.hash
        number[0] = -self._attach(flow, target, port)
        if number[0]:
            free(flow)
            return NULL
        self._free_count -= 1
        flow.number = self._free_numbers[self._free_count]
        self._numbered[flow.number] = flow
        self._stamp += 1
        flow.stamp = self._stamp
        flow.head = flow.ring = flow
        flow.slot = -1
        flow.first = -1
        return flow

    cdef Flow *_numbered_flow(self, uint32_t number, uint32_t stamp) noexcept nogil:
        """Return a flow, or NULL if its session has ended."""
        cdef Flow *flow
        if number >= self._numbers:
            return NULL
        flow = self._numbered[number]
        return flow if flow != NULL and flow.stamp == stamp else NULL

    cdef void _join(self, Flow *head, uint32_t number) noexcept nogil:
        """Make a session one of a generation."""
        cdef Generation *generation = &self._generations[number]
        head.generation = <uint16_t>number
        head.member_back = NULL
        head.member_next = generation.members
        if generation.members != NULL:
            generation.members.member_back = head
        generation.members = head
        generation.live += 1

    cdef void _leave(self, Flow *head) noexcept nogil:
        """Take a session out of its generation."""
        cdef Generation *generation = &self._generations[head.generation]
        if head.member_back != NULL:
            head.member_back.member_next = head.member_next
        else:
            generation.members = head.member_next
        if head.member_next != NULL:
            head.member_next.member_back = head.member_back
        if generation.cursor == head:
            generation.cursor = head.member_next
        generation.live -= 1
        if not generation.live:
            self._emptied = True

    cdef inline void _answered(self, Flow *head) noexcept nogil:
        """The target has answered: the session is a live two-way one from now on."""
        head.answered = True
        self._leave_unanswered(head)
        self._forget_kept(head)

    cdef void _leave_unanswered(self, Flow *head) noexcept nogil:
        if head.older != NULL:
            head.older.newer = head.newer
        elif self._oldest == head:
            self._oldest = head.newer
        if head.newer != NULL:
            head.newer.older = head.older
        elif self._newest == head:
            self._newest = head.older
        head.older = head.newer = NULL

    cdef void _forget_kept(self, Flow *head) noexcept nogil:
        if head.kept != NULL:
            self._kept -= head.kept_size
            free(head.kept)
            head.kept = NULL

    cdef void _end(self, Flow *head, int reason) noexcept nogil:
        """End a session; its memory lives on in the graveyard until the batch is over."""
        cdef Flow *flow = head
        while True:
            self._unlist(flow)
            flow = flow.ring
            if flow == head:
                break
        if head.media != NULL and head.media.key:
            self._leave_asked(head)
        self._leave_slot(head)
        self._leave_unanswered(head)
        self._forget_kept(head)
        self._leave(head)
        self._generations[head.generation].ended[reason] += 1
        self._live -= 1
        self._leaving -= head.let_go
        self._ended[reason] += 1
        self._to_graveyard(head)

    cdef void _to_graveyard(self, Flow *head) noexcept nogil:
        cdef Flow *flow = head
        cdef Flow *following
        while True:
            following = flow.ring
            self._detach(flow)
            flow.ended = True
            self._numbered[flow.number] = NULL
            self._free_numbers[self._free_count] = flow.number
            self._free_count += 1
            flow.member_next = self._graveyard
            self._graveyard = flow
            if following == head:
                return
            flow = following

    cdef void _bury(self) noexcept nogil:
        cdef Flow *flow
        while self._graveyard != NULL:
            flow = self._graveyard
            self._graveyard = flow.member_next
            if flow.media != NULL:
                free(flow.media.voices[BY_CLIENT].cname)
                free(flow.media.voices[BY_TARGET].cname)
                free(flow.media)
            free(flow.header)
            free(flow)

    # Sessions that others are asked for

    cdef Flow **_asked_place(self, const Ip *client) noexcept nogil:
        cdef Ip network = _network(client)
        return &self._asked[self._hash(0, &network, 0) % ASKED_BUCKETS]

    cdef void _begin_asking(self, Flow *head, uint64_t key) noexcept nogil:
        cdef Flow **place = self._asked_place(&head.client)
        cdef Media *media = head.media
        media.key = key
        media.asked_at = self._clock
        media.asked_newer = NULL
        media.asked_older = self._asked_last
        if self._asked_last != NULL:
            self._asked_last.media.asked_newer = head
        else:
            self._asked_first = head
        self._asked_last = head
        media.asked_back = NULL
        media.asked_next = place[0]
        if place[0] != NULL:
            place[0].media.asked_back = head
        place[0] = head
        self._undecided += 1

    cdef void _leave_asked(self, Flow *head) noexcept nogil:
        cdef Media *media = head.media
        media.key = 0
        if media.asked_older != NULL:
            media.asked_older.media.asked_newer = media.asked_newer
        else:
            self._asked_first = media.asked_newer
        if media.asked_newer != NULL:
            media.asked_newer.media.asked_older = media.asked_older
        else:
            self._asked_last = media.asked_older
        if media.asked_back != NULL:
            media.asked_back.media.asked_next = media.asked_next
        else:
            self._asked_place(&head.client)[0] = media.asked_next
        if media.asked_next != NULL:
            media.asked_next.media.asked_back = media.asked_back
        self._undecided -= 1

    cdef Flow *_asked_in(self, const Ip *client, uint32_t *count) noexcept nogil:
        """Return the first of those in the network of a client, NULL if there is none.

        Args:
            count: Set to how many there are.
        """
        cdef Ip network = _network(client), other
        cdef Flow *head = self._asked_place(client)[0]
        cdef Flow *first = NULL
        count[0] = 0
        while head != NULL:
            other = _network(&head.client)
            if _same(&network, &other):
                count[0] += 1
                first = head
            head = head.media.asked_next
        return first

    cdef void _stop_asking(self, Flow *head) noexcept nogil:
        """Let a session be its head only: the other flows end."""
        cdef Flow *others = head.ring
        cdef Flow *last = others
        if others != head:
            while last.ring != head:
                last = last.ring
            last.ring = others
            head.ring = head
            self._to_graveyard(others)
        self._leave_asked(head)
        if not head.media.settled:
            head.rtcp = NULL  # it may have been one of those
        head.media.settled = False

    # Pairs of ports: two flows, one session

    def pair(self, uint32_t rtp, uint32_t rtcp):
        """Say that two listeners are for RTP and RTCP of the same sessions."""
        self._listener(rtp)
        self._listener(rtcp)
        if rtp == rtcp:
            raise ValueError("a pair has two listeners")
        self._unpair(rtp)
        self._unpair(rtcp)
        self._listeners[rtp].partner = <int32_t>rtcp
        self._listeners[rtcp].partner = <int32_t>rtp
        self._listeners[rtp].is_rtcp = False
        self._listeners[rtcp].is_rtcp = True

    cdef void _unpair(self, uint32_t number) noexcept nogil:
        """Let a listener, and the one that was its partner, be of no pair."""
        cdef int32_t other = self._listeners[number].partner
        self._listeners[number].is_rtcp = False
        self._listeners[number].partner = -1
        if other >= 0:
            self._listeners[other].is_rtcp = False
            self._listeners[other].partner = -1

    cdef Flow *_partner(self, const Newcomer *newcomer, int left) noexcept nogil:
        """Return the session whose other half a newcomer is, or NULL.

        That of the same client address on the other port of the pair: best from the port beside
        the newcomer's, else from any, as after address translation; of the last ``left`` only.
        """
        cdef Listener *listener = &self._listeners[newcomer.listener]
        cdef uint32_t other
        cdef uint16_t port
        cdef Flow *flow
        if listener.partner < 0:
            return NULL
        other = <uint32_t>listener.partner
        port = htons(<uint16_t>(ntohs(newcomer.client_port) + (-1 if listener.is_rtcp else 1)))
        flow = self._find(
            self._hash(other, &newcomer.client, port), other, &newcomer.client, port,
            newcomer.scope, &newcomer.local,
        )
        if flow != NULL and self._takes_leg(flow):
            return flow
        flow = self._address_place(&newcomer.client)[0]
        while flow != NULL and left:
            left -= 1
            if (
                flow.listener == other and _same(&flow.client, &newcomer.client)
                and _same(&flow.local, &newcomer.local) and flow.scope == newcomer.scope
                and self._takes_leg(flow)
                # One that has its RTCP on the same port needs no other half; this is its neighbour's.
                and (not listener.is_rtcp or flow.rtcp == NULL)
                and not flow.media.ice
            ):
                return flow
            flow = flow.address_next
        return NULL

    cdef inline bint _takes_leg(self, const Flow *flow) noexcept nogil:
        """Return whether a flow is all of its session, which has a target."""
        return (
            flow.ring == flow and flow.media != NULL and flow.media.key == 0 and not flow.let_go
        )

    cdef Flow *_add_leg(
        self, Flow *head, const Newcomer *newcomer, bytes header, uint16_t port
    ) except NULL:
        """Give a session its second flow."""
        cdef int number = 0
        cdef Flow *leg = self._new_flow(head.target, newcomer, port, &number)
        if leg != NULL and not _give_header(leg, header):
            self._to_graveyard(leg)
            self._bury()
            number = ENOMEM
        if number:
            raise OSError(number, os.strerror(number))
        leg.head = leg.ring = head
        head.ring = leg
        self._changed += 1
        self._list(leg)
        return leg

    # Upstream sockets

    cdef int _attach(self, Flow *flow, uint32_t place, uint16_t port) noexcept nogil:
        """Connect a flow to a target; return 0 or the negative number of an error."""
        cdef Target *target = &self._targets[place]
        cdef int number
        cdef epoll_event event
        cdef int fd = self._open(target, self._listeners[flow.listener].port, port)
        if fd < 0:
            return fd
        if self._opens_sockets:
            event.events = EPOLLIN
            event.data.ptr = flow
            if epoll_ctl(self._epoll, EPOLL_CTL_ADD, fd, &event) < 0:
                number = -errno
                self._leave_port(target, fd)
                close(fd)
                return number
        flow.fd = fd
        flow.source_port = 0
        flow.overflow = 0
        flow.target = <uint16_t>place
        target.flows += 1
        self._sockets += 1
        return 0

    cdef void _detach(self, Flow *flow) noexcept nogil:
        """Close the flow's socket."""
        cdef Target *target = &self._targets[flow.target]
        cdef epoll_event unused
        if self._opens_sockets:
            # Closing does not do that while a forked process holds the socket open, and its events
            # would come with a pointer to what is gone (epoll(7)).
            epoll_ctl(self._epoll, EPOLL_CTL_DEL, flow.fd, &unused)
            self._leave_port(target, flow.fd)
            close(flow.fd)
        flow.fd = -1
        self._sockets -= 1
        target.flows -= 1
        self._release_target(flow.target)

    cdef int _open(self, Target *target, uint16_t same, uint16_t port) noexcept nogil:
        """Open the upstream socket of a session; return it, or the negative number of an error.

        Args:
            same: The port, in network order, of a target that has the ports of the listeners.
            port: Source port that it must have, or 0.
        """
        cdef int fd, one = 1, size = 1048576, number
        cdef sockaddr_in6 address = target.address
        if address.sin6_port == 0:  # at the same place in a sockaddr_in
            address.sin6_port = same
        if not self._opens_sockets:
            return 1 << 30  # nothing that any call would take for a descriptor
        fd = socket(target.address.sin6_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if fd < 0:
            return -errno
        # What can't be had of these is done without.
        setsockopt(fd, SOL_UDP, UDP_GRO, &one, sizeof(int))
        setsockopt(fd, SOL_SOCKET, SO_RXQ_OVFL, &one, sizeof(int))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(int))
        if target.address.sin6_family == AF_INET6:
            setsockopt(fd, IPPROTO_IPV6, IPV6_RECVTCLASS, &one, sizeof(int))
        else:
            setsockopt(fd, IPPROTO_IP, IP_RECVTOS, &one, sizeof(int))
        number = 0
        if port or self._ports is not None:
            number = self._bind(fd, target, port)
        if number == 0 and connect(fd, <sockaddr *>&address, target.size) < 0:
            number = -errno
            self._leave_port(target, fd)
        if number < 0:
            close(fd)
            return number
        if port or self._ports is not None:
            self._empty(fd)
        return fd

    cdef int _bind(self, int fd, Target *target, uint16_t port) noexcept nogil:
        """Bind a source port; return 0 or the negative number of an error.

        With ports of our own choice a port is used once per target address, which SO_REUSEADDR
        allows; connect() would not refuse to use it twice. Without, SO_REUSEADDR must not be set:
        together with a port that the kernel chooses it has given two sockets with the same
        addresses and ports.
        """
        cdef int number, tries = PORT_TRIES
        cdef uint32_t place, low, high, left
        cdef PortMap *ports
        if self._ports is None:
            return self._bind_to(fd, target, port)
        if target.ports == NULL:
            target.ports = self._ports._use(&target.address, self._secret_a ^ self._clock)
            if target.ports == NULL:
                return -ENOMEM
        ports = target.ports
        if port:
            if (
                ports.taken[port >> 3] >> (port & 7) & 1
                or self._ports._is_taken_beside(ports, port)
            ):
                return -EADDRINUSE
            return self._take_port(fd, target, port)
        low, high = self._ports._low, self._ports._high
        place = ports.last
        left = high - low + 1
        while left:
            left -= 1
            if tries > PORT_TRIES - PORT_TRIES_IN_A_ROW:
                place = place + 1 if low <= place < high else low
            else:
                # Another proxy on this host takes its ports in a row, too: on anywhere.
                place = low + <uint32_t>(
                    _mix(self._secret_a ^ <uint64_t>left << 32 ^ place) % (high - low + 1)
                )
            if (
                ports.taken[place >> 3] >> (place & 7) & 1
                or self._ports._is_avoided(place) or self._ports._is_taken_beside(ports, place)
            ):
                continue
            ports.last = place  # also if somebody has it: the next search begins after it
            number = self._take_port(fd, target, <uint16_t>place)
            if number == 0:
                return 0
            tries -= 1
            if number != -EADDRINUSE or not tries:
                return number
            if tries == PORT_TRIES - PORT_TRIES_IN_A_ROW:
                left = high - low + 1
        return -EADDRNOTAVAIL

    cdef int _take_port(self, int fd, Target *target, uint16_t port) noexcept nogil:
        """Bind a port that does not lead to the target's address yet.

        Another process may relay to the same address, and choose ports in the same way. Of two
        sockets with the same addresses and ports one would get the answers to both, so no port is
        shared with others: its first socket is bound without SO_REUSEADDR, which fails if anybody
        has it, and allows further ones only afterwards. These can be ours only, as every process
        begins like that.
        """
        cdef int shared = self._ports._is_held(port), one = 1, number
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &shared, sizeof(int))
        number = self._bind_to(fd, target, port)
        if number == 0:
            setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(int))
            target.ports.taken[port >> 3] |= <uint8_t>(1 << (port & 7))
        return number

    cdef int _bind_to(self, int fd, Target *target, uint16_t port) noexcept nogil:
        cdef sockaddr_in6 address
        memset(&address, 0, sizeof(address))
        address.sin6_family = target.address.sin6_family
        address.sin6_port = htons(port)  # at the same place in a sockaddr_in
        return -errno if bind(fd, <sockaddr *>&address, target.size) < 0 else 0

    cdef void _leave_port(self, Target *target, int fd) noexcept nogil:
        """Let the source port of a socket that is about to be closed be used again."""
        cdef sockaddr_in6 name
        cdef socklen_t size = sizeof(name)
        cdef uint16_t port
        if target.ports != NULL and getsockname(fd, <sockaddr *>&name, &size) == 0:
            port = ntohs(name.sin6_port)
            target.ports.taken[port >> 3] &= <uint8_t>~(1 << (port & 7))

    cdef void _empty(self, int fd) noexcept nogil:
        """Throw away what strangers sent to the port between bind() and connect()."""
        cdef msghdr message
        memset(&message, 0, sizeof(message))
        while recvmsg(fd, &message, MSG_DONTWAIT) >= 0:
            self._dropped[DROP_INVALID] += 1

    # The wheel

    cdef uint64_t _deadline(self, Flow *flow) noexcept nogil:
        """Return when a session is over if nothing more is heard."""
        cdef Generation *generation = &self._generations[flow.generation]
        cdef uint64_t patience = generation.idle if flow.answered else generation.unanswered
        cdef uint64_t deadline
        if flow.let_go or generation.hurried:
            patience = min(patience, CONFIRM)
        deadline = _heard(flow) + patience
        if patience >= COARSE:  # so that quiet sessions wake nobody more than once a second
            deadline = (deadline + 999) // 1000 * 1000
        if flow.media != NULL and flow.media.key:
            # Also if its client goes on: there may be other targets to ask by then.
            deadline = min(deadline, flow.media.asked_at + UNDECIDED)
        if flow.gone_since:
            deadline = min(deadline, self._gone_at(flow))
        if flow.media != NULL and flow.media.ice:
            deadline = min(deadline, self._lapsed_at(flow))
        return deadline

    cdef uint64_t _gone_at(self, Flow *flow) noexcept nogil:
        """Return when a hint at the session's end is confirmed if nothing more is heard.

        A client whose port is closed is gone even while its target goes on sending. All else that
        hints, anybody could have forged: both sides must have fallen silent.
        """
        if flow.gone_reason == END_CLIENT_GONE:
            return flow.gone_since + _silence(flow)
        return max(flow.gone_since, _heard(flow)) + _silence(flow)

    cdef uint64_t _lapsed_at(self, Flow *flow) noexcept nogil:
        """Return when nobody can go on any more for lack of consent (RFC 7675 5.1)."""
        cdef uint64_t lapsed = flow.client_heard + CONSENT
        if flow.media.waiting_since:
            lapsed = min(
                lapsed, max(flow.media.waiting_since + CONSENT, flow.target_heard + CONFIRM)
            )
        return lapsed

    cdef void _hint(self, Flow *head, int reason) noexcept nogil:
        """Take note that a session seems to be over; silence has to confirm that."""
        self._withdraw_hint(head)  # an older one that does not hold any more is not in the way
        if head.gone_since == 0:
            head.gone_since = self._clock
            head.gone_reason = reason
            self._schedule(head)
            self._arm()

    cdef void _withdraw_hint(self, Flow *flow) noexcept nogil:
        """Forget a hint if what was heard since then speaks against it."""
        cdef uint64_t grace = 0 if flow.gone_reason == END_CLIENT_GONE else WITHDRAWN
        cdef uint64_t heard = (
            flow.client_heard if flow.gone_reason == END_CLIENT_GONE else _heard(flow)
        )
        if flow.gone_since and heard > flow.gone_since + grace:
            flow.gone_since = 0

    cdef int _why(self, Flow *flow) noexcept nogil:
        """Return why a session that is over is over."""
        if flow.gone_since and self._clock >= self._gone_at(flow):
            return flow.gone_reason
        if flow.media != NULL and flow.media.ice and self._clock >= self._lapsed_at(flow):
            return END_CONSENT_LAPSED
        return END_IDLE if flow.answered else END_UNANSWERED

    cdef void _schedule(self, Flow *flow) noexcept nogil:
        """Put a session where the wheel comes along at its deadline, or before."""
        cdef uint64_t tick = (self._deadline(flow) + TICK - 1) // TICK
        self._leave_slot(flow)
        tick = max(tick, self._turned + 1)
        tick = min(tick, self._turned + WHEEL - 1)
        flow.slot = <int32_t>(tick % WHEEL)
        flow.slot_back = NULL
        flow.slot_next = self._wheel[flow.slot]
        if flow.slot_next != NULL:
            flow.slot_next.slot_back = flow
        self._wheel[flow.slot] = flow
        self._filled[flow.slot // 64] |= <uint64_t>1 << (flow.slot % 64)

    cdef void _leave_slot(self, Flow *flow) noexcept nogil:
        if flow.slot < 0:
            return
        if flow.slot_back != NULL:
            flow.slot_back.slot_next = flow.slot_next
        else:
            self._wheel[flow.slot] = flow.slot_next
        if flow.slot_next != NULL:
            flow.slot_next.slot_back = flow.slot_back
        if self._wheel[flow.slot] == NULL:
            self._filled[flow.slot // 64] &= ~(<uint64_t>1 << (flow.slot % 64))
        flow.slot = -1

    cdef void _arm(self) noexcept nogil:
        """Let the timer fire when the next filled slot is due."""
        cdef itimerspec when
        cdef uint64_t tick = self._turned + 1, end = self._turned + WHEEL
        while tick < end and not self._filled[tick % WHEEL // 64] >> (tick % 64) & 1:
            # To the next word when the rest of this one is empty.
            if self._filled[tick % WHEEL // 64] >> (tick % 64) == 0:
                tick = (tick // 64 + 1) * 64
            else:
                tick += 1
        if tick >= end or (self._armed and self._armed <= tick):
            return
        self._armed = tick
        memset(&when, 0, sizeof(when))
        when.it_value.tv_sec = <long>(tick * TICK // 1000)
        when.it_value.tv_nsec = <long>(tick * TICK % 1000 * 1000000)
        timerfd_settime(self._timer, TFD_TIMER_ABSTIME, &when, NULL)

    cdef void _tick(self) noexcept nogil:
        """End the sessions that are over; put the others further ahead."""
        cdef uint64_t fired, now = self._clock // TICK
        cdef uint64_t tick = self._turned + 1
        cdef int left = EXPIRE_AT_ONCE
        cdef Flow *flow
        read(self._timer, &fired, sizeof(fired))
        self._armed = 0
        if now >= WHEEL and tick < now - WHEEL + 1:
            tick = now - WHEEL + 1
        while tick <= now and left:
            self._turned = tick
            while self._wheel[tick % WHEEL] != NULL:
                if not left:
                    self._turned = tick - 1  # the rest of the slot comes next
                    break
                left -= 1
                flow = self._wheel[tick % WHEEL]
                self._withdraw_hint(flow)
                if (
                    flow.media != NULL and flow.media.key and flow.media.settled
                    and self._clock >= flow.media.asked_at + UNDECIDED
                ):
                    self._stop_asking(flow)
                if self._clock < self._deadline(flow):
                    self._schedule(flow)
                else:
                    self._end(flow, self._why(flow))
            tick += 1
        self._arm()

    # Sessions that outlive the process

    def export(self, uint32_t generation, numbers):
        """Return the sessions of a generation as records; see _fastpath.pyi."""
        cdef Flow *head
        cdef Flow *flow
        cdef uint8_t *record
        cdef uint64_t used = 0
        cdef bytes records
        self._require_generation(generation)
        self._clock = _now()
        # Two for each session there is, which may have that many flows; what is not used is cut off.
        records = bytes(self._generations[generation].live * 2 * RECORD_BYTES)
        record = <uint8_t *><char *>records
        head = self._generations[generation].members
        while head != NULL:
            if (
                head.turn == NULL and head.target in numbers
                and not _is_undecided(head) and not head.let_go
            ):
                flow = head
                while True:
                    if self._write_record(record + used, flow, <uint16_t>numbers[flow.target]):
                        used += RECORD_BYTES
                    flow = flow.ring
                    if flow == head or _is_asked(flow):
                        break
            head = head.member_next
        return records[:used]

    cdef bint _write_record(self, uint8_t *record, Flow *flow, uint16_t target_number) noexcept:
        cdef sockaddr_in6 *address = &self._targets[flow.target].address
        cdef sockaddr_in6 own
        cdef socklen_t size = sizeof(own)
        cdef Ip target
        cdef uint16_t ports[4]
        cdef uint32_t numbers[3]
        if not flow.source_port and self._opens_sockets:
            if getsockname(flow.fd, <sockaddr *>&own, &size) < 0:
                return False
            flow.source_port = ntohs(own.sin6_port)
        if address.sin6_family == AF_INET6:
            memcpy(&target, sin6_address(address), 16)
        else:
            _mapped(&target, sin_address(<sockaddr_in *>address))
        ports[0] = htole16(ntohs(flow.client_port))
        ports[1] = htole16(ntohs(self._listeners[flow.listener].port))
        ports[2] = htole16(
            ntohs(address.sin6_port if address.sin6_port else self._listeners[flow.listener].port)
        )
        ports[3] = htole16(flow.source_port)
        numbers[0] = htole32(flow.scope)
        numbers[1] = htole32(address.sin6_scope_id if address.sin6_family == AF_INET6 else 0)
        numbers[2] = htole32(
            <uint32_t>min(self._clock - _heard(flow.head), <uint64_t>0xFFFFFFFF)
        )
        target_number = htole16(target_number)
        memcpy(record, &flow.client, 16)
        memcpy(record + 16, &flow.local, 16)
        memcpy(record + 32, &target, 16)
        memcpy(record + 48, ports, 8)
        memcpy(record + 56, numbers, 12)
        memcpy(record + 68, &target_number, 2)
        record[70] = flow.head.answered | (flow != flow.head) << 1
        record[71] = 0
        return True

    def restore(
        self, uint32_t listener, bytes client not None, uint32_t scope, bytes local not None,
        uint32_t generation, uint32_t target, uint16_t port, bint answered, double idle,
        bytes header not None=b"", *, bint second=False,
    ):
        """Begin a session that an earlier process had, or its other half; see _fastpath.pyi."""
        cdef Newcomer newcomer
        cdef Flow *head
        cdef uint64_t quiet = _milliseconds(idle)
        self._require_open()
        if len(client) != 18 or len(local) != 16 or len(header) > HEADER_ROOM:
            raise ValueError("client, local or header has the wrong size")
        self._listener(listener)
        memset(&newcomer, 0, sizeof(newcomer))
        memcpy(&newcomer.client, <char *>client, 16)
        memcpy(&newcomer.client_port, <char *>client + 16, 2)
        memcpy(&newcomer.local, <char *>local, 16)
        newcomer.scope = scope
        newcomer.listener = <uint16_t>listener
        newcomer.hash = self._hash(listener, &newcomer.client, newcomer.client_port)
        self._clock = _now()
        head = self._numbered_flow(
            <uint32_t>self._restored, <uint32_t>(self._restored >> 32)
        ) if second else NULL
        self._restored = 0  # if this one fails, the next one is not the other half of that before
        if self._find(
            newcomer.hash, listener, &newcomer.client, newcomer.client_port, scope, &newcomer.local
        ) != NULL:
            raise ValueError("there is such a session already")
        if (
            head != NULL and head.target == target and self._takes_leg(head)
            and self._listeners[listener].partner == head.listener
            and _same(&head.client, &newcomer.client)
        ):
            self._add_leg(head, &newcomer, header, port)
            return False
        head = self._begin(
            generation, (target,), &newcomer, header, port, answered,
            self._clock - min(quiet, self._clock),
        )
        self._restored = _number(head)
        if head.media != NULL:
            head.media.spoken = answered
        return True

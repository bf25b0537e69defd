# The datagram relay: a part of the module _fastpath, included by _fastpath.pyx.
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
# A session is a Flow, or a ring of Flows, one per target, when its service has no affinity; the
# first of them, the head, stands for all in every table. Structures and their owners:
#
#   Relay     owns everything below, all memory and every descriptor but those of the listeners,
#             which the caller of listen() closes after unlisten() or close().
#   Flow      allocated by _new_flow, and in these lists at once: a bucket of the flow table (heads
#             only, by listener and client), a slot of the wheel (heads only), the members of its
#             generation (heads only), the unanswered (heads only, until the first answer), those of
#             one client address (heads only). _end takes it out of all and puts it and its ring
#             into the graveyard, because events of the current batch may still point to them;
#             _bury frees them once no batch is being worked on.
#   Newcomer  owns copies of its datagrams (Piece) until the next run().
#
# Nothing scans all flows: a datagram costs one bucket, expiry one slot of a wheel (100 ms each, 102
# s around; what lies further ahead is looked at again when its turn comes). A datagram writes the
# time into its flow and does not touch the wheel: when the flow's turn comes there, the time it was
# last heard decides whether it is over or put further ahead.
#
# Addresses are kept as 16 bytes, IPv4 mapped into IPv6 (RFC 4291 2.5.5.2), ports in network order.

from libc.errno cimport (
    EADDRINUSE, EADDRNOTAVAIL, EAGAIN, ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, EINTR, EINVAL, EIO,
    EMSGSIZE, ENETDOWN, ENETUNREACH, ENOBUFS, ENOMEM, ENOPROTOOPT, EOPNOTSUPP, EPROTO, errno,
)
from libc.stdint cimport int16_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcmp, memcpy, memset

cdef extern from * nogil:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <arpa/inet.h>
    #include <endian.h>
    #include <linux/errqueue.h>
    #include <stdlib.h>
    #include <netinet/in.h>
    #include <sys/epoll.h>
    #include <sys/mman.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <sys/timerfd.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>
    #ifndef UDP_SEGMENT
    #define UDP_SEGMENT 103
    #endif
    #ifndef UDP_GRO
    #define UDP_GRO 104
    #endif
    #ifndef SOL_UDP
    #define SOL_UDP 17
    #endif
    /* Accesses through macros that Cython can't express. */
    static inline struct in6_addr *sin6_address(struct sockaddr_in6 *sa) { return &sa->sin6_addr; }
    /* epoll_pwait2(2) is newer than some C libraries; 441 everywhere. An older kernel refuses. */
    static inline int epoll_wait_precisely(
        int epoll, struct epoll_event *events, int room, const struct timespec *patience
    ) { return (int)syscall(441, epoll, events, room, patience, NULL, 0); }
    #define prefetch(address) __builtin_prefetch(address)
    static inline struct in_addr *sin_address(struct sockaddr_in *sa) { return &sa->sin_addr; }
    """
    ctypedef unsigned int socklen_t
    ctypedef unsigned short sa_family_t
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr:
        sa_family_t sa_family
    struct sockaddr_in:
        sa_family_t sin_family
        uint16_t sin_port
    struct sockaddr_in6:
        sa_family_t sin6_family
        uint16_t sin6_port
        uint32_t sin6_flowinfo
        uint32_t sin6_scope_id
    in6_addr *sin6_address(sockaddr_in6 *)
    in_addr *sin_address(sockaddr_in *)
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex
    struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr
    struct sock_extended_err:
        uint32_t ee_errno
    cmsghdr *CMSG_FIRSTHDR(msghdr *)
    cmsghdr *CMSG_NXTHDR(msghdr *, cmsghdr *)
    unsigned char *CMSG_DATA(cmsghdr *)
    size_t CMSG_LEN(size_t)
    size_t CMSG_SPACE(size_t)
    int AF_INET, AF_INET6, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_CLOEXEC
    int SOL_SOCKET, SOL_UDP, IPPROTO_IP, IPPROTO_IPV6
    int SO_REUSEADDR, SO_RCVBUF, SO_RXQ_OVFL, SO_TYPE, UDP_SEGMENT, UDP_GRO
    int IP_PKTINFO, IP_TOS, IP_RECVTOS, IP_RECVERR
    int IPV6_PKTINFO, IPV6_TCLASS, IPV6_RECVTCLASS, IPV6_RECVERR
    int MSG_DONTWAIT, MSG_TRUNC, MSG_ERRQUEUE, MSG_NOSIGNAL
    int socket(int, int, int)
    int bind(int, const sockaddr *, socklen_t)
    int connect(int, const sockaddr *, socklen_t)
    int setsockopt(int, int, int, const void *, socklen_t)
    int getsockopt(int, int, int, void *, socklen_t *)
    int getsockname(int, sockaddr *, socklen_t *)
    ssize_t send(int, const void *, size_t, int)
    ssize_t sendmsg(int, const msghdr *, int)
    ssize_t recvmsg(int, msghdr *, int)
    int recvmmsg(int, mmsghdr *, unsigned int, int, void *)
    int sendmmsg(int, mmsghdr *, unsigned int, int)
    ctypedef int bool "_Bool"
    void prefetch(const void *)
    void *aligned_alloc(size_t, size_t)
    int inet_pton(int, const char *, void *)
    uint16_t htole16(uint16_t)
    uint32_t htole32(uint32_t)
    uint16_t htons(uint16_t)
    uint16_t ntohs(uint16_t)
    ctypedef union epoll_data_t:
        void *ptr
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int)
    int epoll_ctl(int, int, int, epoll_event *)
    int epoll_wait(int, epoll_event *, int, int)
    int epoll_wait_precisely(int, epoll_event *, int, const timespec *)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL
    uint32_t EPOLLIN, EPOLLERR
    struct timespec:
        long tv_sec
        long tv_nsec
    struct itimerspec:
        timespec it_interval
        timespec it_value
    int CLOCK_MONOTONIC, TFD_NONBLOCK, TFD_CLOEXEC, TFD_TIMER_ABSTIME
    int clock_gettime(int, timespec *)
    int timerfd_create(int, int)
    int timerfd_settime(int, int, const itimerspec *, itimerspec *)
    ssize_t read(int, void *, size_t)
    int close(int)
    void *mmap(void *, size_t, int, int, int, long)
    int munmap(void *, size_t)
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE

cdef enum:
    LINE = 64                 # bytes of a line of the processor's cache
    AHEAD = 3                 # flows that are fetched into it before they are needed
    BATCH = 64                # datagrams, or trains of them, that are read before they are sent on
    READS_PER_BATCH = 32      # of these, how many may come from sessions while few are ready
    # A slot takes the largest datagram, or train of datagrams (UDP_GRO). The odd remainder keeps the
    # beginnings of the slots from falling into the same sets of the processor's caches.
    SLOT_SIZE = 65536 + 17 * 64
    MAX_PAYLOAD = 65507       # of UDP over IPv4: what one train may hold
    MAX_TRAIN = 64            # UDP_MAX_SEGMENTS of older kernels
    MAX_PARTS = 4 * BATCH     # iovecs of one round of sending
    CONTROL_SIZE = 256
    MAX_EVENTS = 256
    FEW_MOVED = 8             # a round that moved fewer ends the run: there is nothing to gain
    LINGER = 100              # microseconds that a busy run waits for more
    MAX_NEWCOMERS = 256
    MAX_PIECES = 512          # datagrams, or trains, that newcomers have sent before Python decided
    PIECES_EACH = 16
    MAX_REFUSALS = 256
    MAX_ERRORS = 64           # messages read from a listener's error queue at a time
    KEPT_SIZE = 1472          # largest first datagram that is kept for another target
    KEPT_TOTAL = 4194304      # bytes of them
    TICK = 100                # milliseconds of a slot of the wheel
    WHEEL = 1024
    WHEEL_WORDS = 16
    COARSE = 10000            # deadlines this far ahead, in milliseconds, fall on whole seconds
    EXPIRE_AT_ONCE = 256
    CONFIRM = 2000            # milliseconds of silence that confirm a hint
    AVOIDED = 1000            # milliseconds that a target which refused is passed over
    PORT_TRIES = 64
    RECORD_BYTES = 72
    HEADER_ROOM = 52

cdef double LONGEST = 1e9     # seconds: as good as for ever, and far from any overflow

# Bits of the result of run().
cpdef enum:
    RUN_MORE = 1
    RUN_NEWCOMERS = 2
    RUN_REFUSED = 4
    RUN_EMPTIED = 8

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
    DROPS

DROP_REASONS = (
    "truncated", "invalid", "paused", "stopped", "session_limit", "newcomer_backlog", "no_target",
    "no_socket", "buffer_full", "too_long", "unreachable", "refused", "failed",
)

cdef enum:
    END_IDLE
    END_UNANSWERED
    END_EVICTED
    END_CLIENT_GONE
    END_CUT
    END_REMOVED
    ENDS

END_REASONS = ("idle", "unanswered", "evicted", "client_gone", "cut", "removed")

cdef struct Ip:
    uint64_t high
    uint64_t low

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
    uint64_t heard            # milliseconds: last datagram in either direction; of the head
    uint64_t client_heard     # milliseconds: last datagram of the client; of the head
    uint64_t batch            # the batch of datagrams that ``first`` and ``last`` are places of
    int16_t first
    int16_t last
    uint32_t refusals         # since the target was last heard
    # All else.
    bool listed               # it is in the flow table and among those of its client's address
    bool refused_now          # it is in the list of refusals already
    uint8_t kept_tos
    uint16_t kept_size
    uint8_t *kept             # the first datagram, until the target answers
    uint64_t refused_since    # milliseconds: the first of these refusals
    uint64_t refused_at       # milliseconds: the last refusal ever
    uint64_t gone_since       # milliseconds: when the client's port refused, or 0
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
    uint32_t last             # the port that was taken last
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

cdef struct Listener:
    bint used
    int fd
    uint16_t port             # network order
    bint inet                 # an AF_INET socket
    uint32_t overflow         # the kernel's counter of datagrams it dropped, as last seen

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


cdef inline uint64_t _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1000000


cdef inline uint32_t _train(uint32_t size, uint32_t segment) noexcept nogil:
    """Return how many datagrams of ``segment`` bytes there are in ``size`` bytes; 0: one."""
    return (size + segment - 1) // segment if segment and size else 1


cdef inline bint _is_told_error(int number) noexcept nogil:
    """Return whether an error may be that of an earlier datagram (ICMP), told by the next call."""
    return (
        number == ECONNREFUSED or number == EHOSTUNREACH or number == ENETUNREACH
        or number == EHOSTDOWN or number == ENETDOWN or number == EPROTO or number == ENOPROTOOPT
        or number == EMSGSIZE or number == EOPNOTSUPP
    )


cdef void *_grown(void *table, uint32_t *room, size_t size) except NULL:
    """Return a table with more room, what is new zeroed; the old one is freed."""
    cdef uint32_t wanted = room[0] * 2 if room[0] else 4
    cdef void *grown = realloc(table, wanted * size)
    if grown == NULL:
        raise MemoryError
    memset(<uint8_t *>grown + room[0] * size, 0, (wanted - room[0]) * size)
    room[0] = wanted
    return grown


cdef socklen_t _socket_address(
    str host, uint16_t port, uint32_t scope, sockaddr_in6 *address
) except 0:
    """Write the address of a socket; return its size."""
    cdef bytes text = host.encode("ascii", "replace")
    memset(address, 0, sizeof(sockaddr_in6))
    if inet_pton(AF_INET, text, sin_address(<sockaddr_in *>address)) == 1:
        (<sockaddr_in *>address).sin_family = <sa_family_t>AF_INET
        (<sockaddr_in *>address).sin_port = htons(port)
        return sizeof(sockaddr_in)
    memset(address, 0, sizeof(sockaddr_in6))
    if inet_pton(AF_INET6, text, sin6_address(address)) != 1:
        raise ValueError(f"{host!r} is not an IP address")
    address.sin6_family = <sa_family_t>AF_INET6
    address.sin6_port = htons(port)
    address.sin6_scope_id = scope
    return sizeof(sockaddr_in6)


# What an event of the epoll is about: a tag in its lowest byte, or the pointer to a flow, whose
# lowest bits are 0.
cdef enum:
    _TIMER_TAG = 1
    _LISTENER_TAG = 2


cdef inline bint _same(const Ip *a, const Ip *b) noexcept nogil:
    return a.low == b.low and a.high == b.high


cdef inline void _mapped(Ip *to, const void *four) noexcept nogil:
    """Write an IPv4 address, mapped into IPv6."""
    cdef uint8_t *data = <uint8_t *>to
    memset(data, 0, 10)
    data[10] = 0xFF
    data[11] = 0xFF
    memcpy(data + 12, four, 4)


cdef inline bint _is_mapped(const Ip *ip) noexcept nogil:
    cdef const uint8_t *data = <const uint8_t *>ip
    cdef uint32_t part
    memcpy(&part, data + 8, 4)
    return ip.high == 0 and part == <uint32_t>0xFFFF0000


cdef inline void *_control(
    msghdr *message, int level, int kind, const void *value, size_t size
) noexcept nogil:
    """Append a control message; msg_controllen is what is used so far, the room is the caller's."""
    cdef cmsghdr *control = <cmsghdr *>(<uint8_t *>message.msg_control + message.msg_controllen)
    control.cmsg_len = CMSG_LEN(size)
    control.cmsg_level = level
    control.cmsg_type = kind
    memcpy(<uint8_t *>control + CMSG_LEN(0), value, size)
    message.msg_controllen += CMSG_SPACE(size)
    return control


cdef class SourcePorts:
    """Which source ports lead to which target address; see _fastpath.pyi."""

    cdef PortMap *_maps
    cdef uint32_t _low
    cdef uint32_t _high

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


cdef class Relay:
    """Moves the datagrams of one UDP service; see _fastpath.pyi."""

    RECORD_SIZE = RECORD_BYTES

    cdef int _epoll
    cdef int _timer
    cdef bint _closed
    cdef bint _opens_sockets
    cdef uint64_t _secret_a
    cdef uint64_t _secret_b
    cdef public int mode
    cdef public uint64_t limit
    cdef SourcePorts _ports
    # The flow table: buckets of heads; numbers name flows to Python.
    cdef Flow **_buckets
    cdef uint32_t _mask
    cdef Flow **_addresses
    cdef Flow **_numbered
    cdef uint32_t *_free_numbers
    cdef uint32_t _numbers
    cdef uint32_t _free_count
    cdef uint32_t _stamp
    cdef uint64_t _live
    cdef Flow *_oldest
    cdef Flow *_newest
    cdef Flow *_graveyard
    cdef uint64_t _kept
    cdef uint64_t _clock      # milliseconds: the time of this batch
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
    # What Python is asked about.
    cdef Newcomer *_newcomers
    cdef uint32_t _newcomer_count
    cdef uint32_t _piece_count
    cdef Refusal *_refusals
    cdef uint32_t _refusal_count
    cdef bint _emptied
    # Room for one batch in, and one round out.
    cdef uint8_t *_slots
    cdef mmsghdr *_in
    cdef iovec *_in_parts
    cdef sockaddr_in6 *_names
    cdef uint8_t *_in_control
    cdef Ip *_clients
    cdef uint32_t *_hashes
    cdef Flow **_owners
    cdef int16_t *_follower
    cdef uint16_t *_segment
    cdef uint8_t *_tos
    cdef uint64_t _batch
    cdef mmsghdr *_out
    cdef iovec *_out_parts
    cdef sockaddr_in6 *_out_names
    cdef uint8_t *_out_control
    cdef uint32_t *_out_segments
    cdef uint16_t *_out_segment
    cdef uint8_t *_out_tos
    cdef bint *_out_closed    # nothing may be appended to this train
    cdef Flow **_out_flows
    cdef int _outs
    cdef int _parts
    cdef int _out_listener    # where what is gathered for clients goes
    cdef int _reads           # slots used by what is gathered for clients
    # Counters.
    cdef uint64_t _dropped[DROPS]
    cdef uint64_t _ended[ENDS]
    cdef uint64_t _created
    cdef uint64_t _in_count
    cdef uint64_t _in_bytes
    cdef uint64_t _out_count
    cdef uint64_t _out_bytes
    cdef uint64_t _overflowed
    cdef uint64_t _moved_sessions

    def __cinit__(self, bytes seed not None, *, bint sockets=True):
        cdef epoll_event event
        cdef int i
        self._epoll = -1
        self._timer = -1
        self._closed = False
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
        self._newcomers = <Newcomer *>calloc(MAX_NEWCOMERS, sizeof(Newcomer))
        self._refusals = <Refusal *>calloc(MAX_REFUSALS, sizeof(Refusal))
        self._in = <mmsghdr *>calloc(BATCH, sizeof(mmsghdr))
        self._in_parts = <iovec *>calloc(BATCH, sizeof(iovec))
        self._names = <sockaddr_in6 *>calloc(BATCH, sizeof(sockaddr_in6))
        self._in_control = <uint8_t *>calloc(BATCH, CONTROL_SIZE)
        self._clients = <Ip *>calloc(BATCH, sizeof(Ip))
        self._hashes = <uint32_t *>calloc(BATCH, sizeof(uint32_t))
        self._owners = <Flow **>calloc(BATCH, sizeof(Flow *))
        self._follower = <int16_t *>calloc(BATCH, sizeof(int16_t))
        self._segment = <uint16_t *>calloc(BATCH, sizeof(uint16_t))
        self._tos = <uint8_t *>calloc(BATCH, sizeof(uint8_t))
        self._out = <mmsghdr *>calloc(BATCH, sizeof(mmsghdr))
        self._out_parts = <iovec *>calloc(MAX_PARTS, sizeof(iovec))
        self._out_names = <sockaddr_in6 *>calloc(BATCH, sizeof(sockaddr_in6))
        self._out_control = <uint8_t *>calloc(BATCH, CONTROL_SIZE)
        self._out_segments = <uint32_t *>calloc(BATCH, sizeof(uint32_t))
        self._out_segment = <uint16_t *>calloc(BATCH, sizeof(uint16_t))
        self._out_tos = <uint8_t *>calloc(BATCH, sizeof(uint8_t))
        self._out_closed = <bint *>calloc(BATCH, sizeof(bint))
        self._out_flows = <Flow **>calloc(BATCH, sizeof(Flow *))
        if (
            not self._buckets or not self._addresses or not self._newcomers or not self._refusals
            or not self._in or not self._in_parts or not self._names or not self._in_control
            or not self._clients or not self._hashes or not self._owners or not self._follower or not self._segment or not self._tos
            or not self._out or not self._out_parts or not self._out_names or not self._out_control
            or not self._out_segments or not self._out_segment or not self._out_tos
            or not self._out_closed or not self._out_flows
        ):
            raise MemoryError
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
        self._turned = _now() // TICK
        self._epoll = epoll_create1(EPOLL_CLOEXEC)
        self._timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)
        if self._epoll < 0 or self._timer < 0:
            raise OSError(errno, "a relay needs an epoll and a timer")
        event.events = EPOLLIN
        event.data.u64 = _TIMER_TAG
        if epoll_ctl(self._epoll, EPOLL_CTL_ADD, self._timer, &event) < 0:
            raise OSError(errno, "the timer can't be waited for")

    def __dealloc__(self):
        self._shut()
        free(self._buckets)
        free(self._addresses)
        free(self._numbered)
        free(self._free_numbers)
        free(self._targets)
        free(self._generations)
        free(self._listeners)
        free(self._newcomers)
        free(self._refusals)
        free(self._in)
        free(self._in_parts)
        free(self._names)
        free(self._in_control)
        free(self._clients)
        free(self._hashes)
        free(self._owners)
        free(self._follower)
        free(self._segment)
        free(self._tos)
        free(self._out)
        free(self._out_parts)
        free(self._out_names)
        free(self._out_control)
        free(self._out_segments)
        free(self._out_segment)
        free(self._out_tos)
        free(self._out_closed)
        free(self._out_flows)
        if self._slots != NULL:
            munmap(self._slots, BATCH * SLOT_SIZE)

    def fileno(self):
        self._require_open()
        return self._epoll

    def close(self):
        self._shut()

    cdef void _shut(self) noexcept:
        """End every session and close every descriptor that is ours; harmless when repeated."""
        cdef uint32_t i
        if self._closed:
            return
        self._closed = True
        for i in range(self._generation_room):
            while self._generations[i].members != NULL:
                self._end(self._generations[i].members, END_REMOVED)
        self._bury()
        self._forget_newcomers()
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
            raise OSError(errno, "the listener can't be used")
        if kind != SOCK_DGRAM:
            raise OSError(EINVAL, "the listener is no UDP socket")
        if getsockname(fd, <sockaddr *>&name, &size) < 0:
            raise OSError(errno, "the listener can't be used")
        if name.sin6_family != AF_INET and name.sin6_family != AF_INET6:
            raise OSError(EINVAL, "the listener is no UDP socket")
        for i in range(self._listener_room):
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
            raise OSError(errno, "the listener can't be waited for")
        listener.used = True
        listener.fd = fd
        listener.port = name.sin6_port  # at the same place in a sockaddr_in
        listener.inet = name.sin6_family == AF_INET
        listener.overflow = 0
        return i

    def unlisten(self, uint32_t number):
        """Forget a listener; its sessions end."""
        cdef epoll_event event
        cdef Flow *flow
        cdef Flow *following
        cdef uint32_t i
        self._require_open()
        if number >= self._listener_room or not self._listeners[number].used:
            raise ValueError("there is no such listener")
        for i in range(self._generation_room):
            flow = self._generations[i].members
            while flow != NULL:
                following = flow.member_next
                if flow.listener == number:
                    self._end(flow, END_REMOVED)
                flow = following
        self._bury()
        for i in range(self._newcomer_count):
            if self._newcomers[i].listener == number:
                self._drop_newcomer(&self._newcomers[i], DROP_BACKLOG)
        epoll_ctl(self._epoll, EPOLL_CTL_DEL, self._listeners[number].fd, &event)
        self._listeners[number].used = False

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

    cdef void _release_target(self, uint32_t number) noexcept nogil:
        cdef Target *target = &self._targets[number]
        if target.used and not target.held and target.flows == 0:
            if target.ports != NULL:
                self._ports._leave(target.ports)
                target.ports = NULL
            target.used = False

    def add_generation(self, double idle, double unanswered, *, bint affinity=True):
        cdef uint32_t i
        cdef Generation *generation
        self._require_open()
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
        generation.idle = <uint64_t>(min(max(idle, 0.0), LONGEST) * 1000)
        generation.unanswered = <uint64_t>(min(max(unanswered, 0.0), LONGEST) * 1000)
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

    def retire(self, uint32_t generation):
        """Let go of the sessions of a generation without affinity.

        They take no further datagram of a client, only answers that are on their way. Sessions
        with affinity go on.
        """
        cdef Flow *flow
        cdef Generation *retired
        self._require_generation(generation)
        retired = &self._generations[generation]
        if not retired.affinity:
            retired.idle = min(retired.idle, <uint64_t>CONFIRM)
            retired.unanswered = min(retired.unanswered, <uint64_t>CONFIRM)
            flow = retired.members
            while flow != NULL:
                self._unlist(flow)
                self._schedule(flow)
                flow = flow.member_next
            self._arm()

    def adopt(self, uint32_t former, uint32_t generation, targets):
        """Make sessions of some targets those of another generation; see _fastpath.pyi."""
        cdef Flow *flow
        cdef Flow *following
        cdef Target *old
        cdef Target *new
        self._require_generation(former)
        self._require_generation(generation)
        for target in targets.values():
            if target >= self._target_room or not self._targets[<uint32_t>target].held:
                raise ValueError("there is no such target")
        flow = self._generations[former].members
        while flow != NULL:
            following = flow.member_next
            if flow.turn == NULL and flow.target in targets:
                old = &self._targets[flow.target]
                new = &self._targets[<uint32_t>targets[flow.target]]
                if old.ports != NULL and new.ports == NULL:
                    # The same map: it is the same address.
                    new.ports = old.ports
                    new.ports.users += 1
                new.flows += 1
                old.flows -= 1
                self._release_target(flow.target)
                flow.target = <uint16_t>(new - self._targets)
                self._leave(flow)
                self._join(flow, generation)
                self._schedule(flow)
            flow = following
        self._arm()

    def end_some(self, uint32_t generation, uint32_t count, *, bint removed=False):
        """End up to ``count`` sessions of a generation; return how many are left."""
        self._require_generation(generation)
        while count and self._generations[generation].members != NULL:
            self._end(self._generations[generation].members, END_REMOVED if removed else END_CUT)
            count -= 1
        self._bury()
        return self._generations[generation].live

    def use_ports(self, SourcePorts ports not None):
        """Choose upstream source ports here, each once per target, not once on the whole host."""
        self._require_open()
        if self._ports is None:
            self._ports = ports
        elif self._ports is not ports:
            raise ValueError("a relay keeps its source ports")

    # Counters

    @property
    def live(self):
        return self._live

    @property
    def changes(self):
        return 2 * self._created - self._live + self._moved_sessions

    @property
    def closed(self):
        return self._closed

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

    # Moving datagrams

    def run(self, int milliseconds):
        """Move what waits, for about so long at most."""
        cdef int moved, result = 0
        cdef uint64_t started
        self._require_open()
        self._forget_newcomers()
        self._forget_refusals()
        with nogil:
            started = self._clock = _now()
            moved = self._round(0)
            while moved >= FEW_MOVED:
                if (
                    self._clock - started >= <uint64_t>milliseconds
                    or self._newcomer_count or self._refusal_count or self._emptied
                ):
                    result = RUN_MORE
                    break
                # Where so much comes, more will. Waiting here for a moment costs less than the way
                # back through the event loop, and holds that up no longer than the moving does.
                moved = self._round(LINGER)
            self._bury()
        if self._newcomer_count:
            result |= RUN_NEWCOMERS
        if self._refusal_count:
            result |= RUN_REFUSED
        if self._emptied:
            self._emptied = False
            result |= RUN_EMPTIED
        return result

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
            elif tag & 0xFF == _LISTENER_TAG:
                moved += self._from_clients(<uint32_t>(tag >> 8), event.events)
            else:
                flow = <Flow *>event.data.ptr
                if not flow.ended:
                    moved += self._from_target(flow, each)
        self._flush_to_clients()
        return moved

    cdef inline Flow *_next_turn(self, Flow *head) noexcept nogil:
        """Return the flow whose turn it is in a session without affinity."""
        cdef Flow *flow = head.turn.ring
        # Past targets that are down or have just refused; if all are, the first has its turn.
        while flow != head.turn and (
            self._targets[flow.target].down
            or (flow.refused_at and self._clock - flow.refused_at < AVOIDED)
        ):
            flow = flow.ring
        head.turn = flow
        return flow

    cdef void _spread(
        self, Flow *head, uint8_t *data, uint32_t size, uint32_t segment, uint8_t tos
    ) noexcept nogil:
        """Send the datagrams of a session without affinity, each to the next target."""
        cdef Flow *flow
        cdef uint32_t step
        while True:
            step = min(size, segment) if segment else size
            flow = self._next_turn(head)
            if tos == 0 and flow.header == NULL:
                self._send_one(flow, data, step)
            else:
                self._put(flow, True, data, step, 0, tos)
                self._flush(flow.fd, flow)
            data += step
            size -= step
            if not size:
                return

    # From clients to targets

    cdef int _from_clients(self, uint32_t number, uint32_t events) noexcept nogil:
        cdef Listener *listener = &self._listeners[number]
        cdef int count, i
        cdef Flow *flow
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
            message.msg_hdr.msg_control = self._in_control + i * CONTROL_SIZE
            message.msg_hdr.msg_controllen = CONTROL_SIZE
            message.msg_hdr.msg_flags = 0
        count = recvmmsg(listener.fd, self._in, BATCH, MSG_DONTWAIT, NULL)
        if count <= 0:
            return 0  # an error of a client's port was told; the queue of errors has it too
        self._batch += 1
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
            self._read_control(&message.msg_hdr, i, &local, listener)
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
            flow.heard = flow.client_heard = self._clock
            if flow.turn != NULL:
                self._spread(
                    flow, <uint8_t *>self._in_parts[i].iov_base, size, self._segment[i],
                    self._tos[i],
                )
                continue
            self._owners[i] = flow
            self._follower[i] = -1
            if flow.batch != self._batch:
                flow.batch = self._batch
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

    # From targets to clients

    cdef int _from_target(self, Flow *flow, int each) noexcept nogil:
        """Read up to ``each`` datagrams of a target and gather them for the client."""
        cdef int count, i, slot
        cdef mmsghdr *message
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
            message.msg_hdr.msg_control = self._in_control + i * CONTROL_SIZE
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
        flow.head.heard = self._clock
        if flow.refusals:
            flow.refusals = 0
        if not flow.head.answered:
            self._answered(flow.head)
        for i in range(slot, slot + count):
            self._read_control(&self._in[i].msg_hdr, i, NULL, NULL)
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
        self, msghdr *message, int index, Ip *local, Listener *listener
    ) noexcept nogil:
        """Take the train's segment size, type of service, local address and overflow counter.

        Args of a listener's datagram only: ``local``, ``listener``; NULL otherwise.
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
                if listener != NULL:
                    self._overflowed += <uint32_t>(overflow - listener.overflow)
                    listener.overflow = overflow
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
                and flow.gone_since == 0
            ):
                flow.gone_since = self._clock
                self._schedule(flow)
                self._arm()
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
        message.msg_hdr.msg_control = self._out_control + last * CONTROL_SIZE
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
        cdef int i, done = 0, sent, number
        cdef bint again = False
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
                again = False
                continue
            number = errno
            if number == EINTR:
                continue
            if number == ECONNREFUSED and flow != NULL:
                self._note_refusal(flow)
            if _is_told_error(number) and not again:
                again = True
                continue
            again = False
            if self._out_segments[done] > 1 and (
                number == EINVAL or number == EIO or number == EMSGSIZE
            ):
                # This way takes no trains: a device without checksums, or a smaller MTU.
                self._out_flows[done].no_train = True
                self._send_split(fd, done, flow != NULL)
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
            flow = self._generations[i].members
            while flow != NULL:
                # Those that a retired generation without affinity has let go of stay out.
                if flow.listed:
                    self._list(flow)
                flow = flow.member_next
        return 0

    # The life of a session

    cdef int _open(self, Target *target, uint16_t port) noexcept nogil:
        """Open the upstream socket of a session; return it, or the negative number of an error.

        Args:
            port: Source port that it must have, or 0.
        """
        cdef int fd, one = 1, size = 1048576, number
        if not self._opens_sockets:
            return 1 << 30  # nothing that any call would take for a descriptor
        fd = socket(target.address.sin6_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)
        if fd < 0:
            return -errno
        # What can't be had of these is done without.
        setsockopt(fd, SOL_UDP, UDP_GRO, &one, sizeof(int))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(int))
        if target.address.sin6_family == AF_INET6:
            setsockopt(fd, IPPROTO_IPV6, IPV6_RECVTCLASS, &one, sizeof(int))
        else:
            setsockopt(fd, IPPROTO_IP, IP_RECVTOS, &one, sizeof(int))
        number = 0
        if port or self._ports is not None:
            number = self._bind(fd, target, port)
        if number == 0 and connect(fd, <sockaddr *>&target.address, target.size) < 0:
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
        cdef int one = 1, number = -EADDRNOTAVAIL, tries
        cdef uint32_t place, low, high
        cdef PortMap *ports
        if self._ports is None:
            return self._bind_to(fd, target, port)
        if target.ports == NULL:
            target.ports = self._ports._use(&target.address, self._secret_a ^ self._clock)
            if target.ports == NULL:
                return -ENOMEM
        ports = target.ports
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(int))
        if port:
            if ports.taken[port >> 3] >> (port & 7) & 1:
                return -EADDRINUSE
            number = self._bind_to(fd, target, port)
            if number == 0:
                ports.taken[port >> 3] |= <uint8_t>(1 << (port & 7))
            return number
        low, high = self._ports._low, self._ports._high
        place = ports.last
        tries = PORT_TRIES
        for _ in range(high - low + 1):
            place = place + 1 if low <= place < high else low
            if ports.taken[place >> 3] >> (place & 7) & 1:
                continue
            number = self._bind_to(fd, target, <uint16_t>place)
            if number == 0:
                ports.taken[place >> 3] |= <uint8_t>(1 << (place & 7))
                ports.last = place
                return 0
            tries -= 1
            if number != -EADDRINUSE or not tries:
                return number
        return -EADDRNOTAVAIL

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

    cdef int _attach(self, Flow *flow, uint32_t place, uint16_t port) noexcept nogil:
        """Connect a flow to a target; return 0 or the negative number of an error."""
        cdef Target *target = &self._targets[place]
        cdef int number
        cdef epoll_event event
        cdef int fd = self._open(target, port)
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
        flow.target = <uint16_t>place
        target.flows += 1
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
        target.flows -= 1
        self._release_target(flow.target)

    cdef Flow *_new_flow(self, uint32_t target, uint16_t port, int *number) noexcept nogil:
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
        return flow

    cdef Flow *_begin(
        self, uint32_t generation, targets, const Newcomer *newcomer, bytes header, uint16_t port,
        bint answered, uint64_t heard,
    ) except NULL:
        """Begin a session: its flows, and all the lists that it is in."""
        cdef Flow *head = NULL
        cdef Flow *last = NULL
        cdef Flow *flow
        cdef Generation *chosen
        cdef int number = 0
        cdef uint32_t target
        self._require_open()
        self._require_generation(generation)
        self._grow_table()
        for target in targets:
            if target >= self._target_room or not self._targets[target].held:
                raise ValueError("there is no such target")
        for target in targets:
            flow = self._new_flow(target, port, &number)
            if flow != NULL and header:
                flow.header = <uint8_t *>malloc(len(header))
                if flow.header == NULL:
                    number = ENOMEM
                else:
                    memcpy(flow.header, <char *>header, len(header))
                    flow.header_size = <uint8_t>len(header)
            if flow != NULL:
                if head == NULL:
                    head = flow
                else:
                    last.ring = flow
                flow.head = head
                flow.ring = head
                last = flow
            if number:
                break
        if number:
            if head != NULL:
                self._to_graveyard(head)
                self._bury()
            raise OSError(number, os.strerror(number))
        if head == NULL:
            raise ValueError("a session needs a target")
        chosen = &self._generations[generation]
        head.client = newcomer.client
        head.local = newcomer.local
        head.scope = newcomer.scope
        head.client_port = newcomer.client_port
        head.listener = newcomer.listener
        head.hash = newcomer.hash
        head.heard = head.client_heard = heard
        flow = head.ring
        while flow != head:  # what sending to the client asks of a flow
            flow.client = head.client
            flow.local = head.local
            flow.scope = head.scope
            flow.client_port = head.client_port
            flow.listener = head.listener
            flow.generation = <uint16_t>generation
            flow = flow.ring
        if not chosen.affinity:
            head.turn = last
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
        generation.live -= 1
        if not generation.live:
            self._emptied = True

    cdef void _answered(self, Flow *head) noexcept nogil:
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
        self._unlist(head)
        self._leave_slot(head)
        self._leave_unanswered(head)
        self._forget_kept(head)
        self._leave(head)
        self._generations[head.generation].ended[reason] += 1
        self._live -= 1
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
            free(flow.header)
            free(flow)

    # The wheel

    cdef uint64_t _deadline(self, Flow *flow) noexcept nogil:
        """Return when a session is over if nothing more is heard."""
        cdef Generation *generation = &self._generations[flow.generation]
        cdef uint64_t patience = generation.idle if flow.answered else generation.unanswered
        cdef uint64_t deadline = flow.heard + patience
        if patience >= COARSE:  # so that quiet sessions wake nobody more than once a second
            deadline = (deadline + 999) // 1000 * 1000
        if flow.gone_since:
            deadline = min(deadline, flow.gone_since + CONFIRM)
        return deadline

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
                if flow.gone_since and flow.client_heard > flow.gone_since:
                    flow.gone_since = 0
                if self._clock < self._deadline(flow):
                    self._schedule(flow)
                elif flow.gone_since:
                    self._end(flow, END_CLIENT_GONE)
                else:
                    self._end(flow, END_IDLE if flow.answered else END_UNANSWERED)
            tick += 1
        self._arm()

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
        if self.mode == MODE_PAUSED:
            self._dropped[DROP_PAUSED] += count
            return
        if self._live >= self.limit and self._oldest == NULL:
            self._dropped[DROP_LIMIT] += count
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

    cdef void _forget_newcomers(self) noexcept nogil:
        cdef uint32_t i
        for i in range(self._newcomer_count):
            self._drop_newcomer(&self._newcomers[i], DROP_BACKLOG)
        self._newcomer_count = self._piece_count = 0

    cdef void _drop_newcomer(self, Newcomer *newcomer, int reason) noexcept nogil:
        cdef Piece *piece
        while newcomer.first != NULL:
            piece = newcomer.first
            self._dropped[reason] += _train(piece.size, piece.segment)
            newcomer.first = piece.next
            free(piece)

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
            if _same(&flow.client, &newcomer.client):
                return flow.generation, flow.target
            flow = flow.address_next
        return None

    def admit(self, uint32_t number, uint32_t generation, targets, bytes header not None=b""):
        """Begin the session of a newcomer and send on what it has sent so far."""
        cdef Newcomer *newcomer = self._newcomer(number)
        cdef Flow *head
        cdef Piece *piece
        cdef uint32_t size
        if len(header) > HEADER_ROOM:
            raise ValueError(f"the header has more than {HEADER_ROOM} bytes")
        self._clock = _now()
        head = self._begin(generation, targets, newcomer, header, 0, False, self._clock)
        piece = newcomer.first
        # Of a train, the first datagram.
        size = min(piece.size, <uint32_t>piece.segment) if piece.segment else piece.size
        if head.turn == NULL and size <= KEPT_SIZE and self._kept + size <= KEPT_TOTAL:
            head.kept = <uint8_t *>malloc(size + 1)
            if head.kept != NULL:
                memcpy(head.kept, piece + 1, size)
                head.kept_size = <uint16_t>size
                head.kept_tos = piece.tos
                self._kept += size
        with nogil:
            while piece != NULL:
                if head.turn != NULL:
                    self._spread(
                        head, <uint8_t *>(piece + 1), piece.size, piece.segment, piece.tos
                    )
                else:
                    self._put(
                        head, True, <uint8_t *>(piece + 1), piece.size, piece.segment, piece.tos
                    )
                    self._flush(head.fd, head)
                newcomer.first = piece.next
                free(piece)
                piece = newcomer.first

    def refuse(self, uint32_t number, str reason not None):
        """Drop what a newcomer has sent, for one of ``DROP_REASONS``."""
        self._drop_newcomer(self._newcomer(number), DROP_REASONS.index(reason))

    def evict(self):
        """End the oldest session that no target has answered; return False if there is none."""
        self._require_open()
        if self._oldest == NULL:
            return False
        self._end(self._oldest, END_EVICTED)
        self._bury()
        return True

    # Targets that refuse

    cdef void _note_refusal(self, Flow *flow) noexcept nogil:
        """Take note that a target's port is closed (ICMP); Python is asked what to do."""
        if flow.refusals == 0:
            flow.refused_since = self._clock
        flow.refusals += 1
        flow.refused_at = self._clock
        if not flow.refused_now and self._refusal_count < MAX_REFUSALS:
            flow.refused_now = True
            self._refusals[self._refusal_count].number = flow.number
            self._refusals[self._refusal_count].stamp = flow.stamp
            self._refusal_count += 1

    cdef Flow *_numbered_flow(self, uint32_t number, uint32_t stamp) noexcept nogil:
        """Return a flow, or NULL if its session has ended."""
        cdef Flow *flow
        if number >= self._numbers:
            return NULL
        flow = self._numbered[number]
        return flow if flow != NULL and flow.stamp == stamp else NULL

    cdef void _forget_refusals(self) noexcept nogil:
        cdef uint32_t i
        cdef Flow *flow
        for i in range(self._refusal_count):
            flow = self._numbered_flow(self._refusals[i].number, self._refusals[i].stamp)
            if flow != NULL:
                flow.refused_now = False
        self._refusal_count = 0

    def refusals(self):
        cdef uint32_t i
        cdef Flow *flow
        self._require_open()
        found = []
        for i in range(self._refusal_count):
            flow = self._numbered_flow(self._refusals[i].number, self._refusals[i].stamp)
            if flow != NULL:
                found.append((
                    <uint64_t>flow.stamp << 32 | flow.number,
                    flow.generation,
                    flow.target,
                    flow.head.turn == NULL,
                    flow.head.answered,
                    flow.moves,
                    flow.refusals,
                    (flow.refused_at - flow.refused_since) / 1000.0,
                    (<char *>&flow.client)[:16] + (<char *>&flow.client_port)[:2],
                    (<char *>&flow.local)[:16] + (<char *>&self._listeners[flow.listener].port)[:2],
                ))
        return found

    def move(self, uint64_t session, uint32_t generation, uint32_t target):
        """Move a session to another target and send it the first datagram, if it is still kept."""
        cdef Flow *flow = self._numbered_flow(<uint32_t>session, <uint32_t>(session >> 32))
        cdef Flow old
        cdef int number
        self._require_generation(generation)
        if flow == NULL:
            return False
        if flow.head.turn != NULL:
            raise ValueError("a session without affinity has all targets")
        if target >= self._target_room or not self._targets[target].held:
            raise ValueError("there is no such target")
        self._clock = _now()
        old = flow[0]
        number = self._attach(flow, target, 0)
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        self._detach(&old)
        if generation != flow.generation:
            self._leave(flow)
            self._join(flow, generation)
            self._schedule(flow)
            self._arm()
        flow.moves += 1
        flow.refusals = 0
        self._moved_sessions += 1
        if flow.kept != NULL:
            self._put(flow, True, flow.kept, flow.kept_size, 0, flow.kept_tos)
            self._flush(flow.fd, flow)
        return True

    def set_down(self, uint32_t target, bint down):
        """Say whether a target is unhealthy: sessions without affinity pass it over."""
        self._require_open()
        if target >= self._target_room or not self._targets[target].used:
            raise ValueError("there is no such target")
        self._targets[target].down = down

    # Sessions that outlive the process

    def export(self, uint32_t generation, numbers):
        """Return the sessions of a generation as records; see _fastpath.pyi."""
        cdef Flow *flow
        cdef uint8_t *record
        cdef uint64_t used = 0
        cdef bytes records
        self._require_generation(generation)
        self._clock = _now()
        # One for each session there is; those that are not exported leave room at the end.
        records = bytes(self._generations[generation].live * RECORD_BYTES)
        record = <uint8_t *><char *>records
        flow = self._generations[generation].members
        while flow != NULL:
            if flow.turn == NULL and flow.target in numbers:
                if self._write_record(record + used, flow, <uint16_t>numbers[flow.target]):
                    used += RECORD_BYTES
            flow = flow.member_next
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
        ports[2] = htole16(ntohs(address.sin6_port))
        ports[3] = htole16(flow.source_port)
        numbers[0] = htole32(flow.scope)
        numbers[1] = htole32(address.sin6_scope_id if address.sin6_family == AF_INET6 else 0)
        numbers[2] = htole32(<uint32_t>min(self._clock - flow.heard, <uint64_t>0xFFFFFFFF))
        target_number = htole16(target_number)
        memcpy(record, &flow.client, 16)
        memcpy(record + 16, &flow.local, 16)
        memcpy(record + 32, &target, 16)
        memcpy(record + 48, ports, 8)
        memcpy(record + 56, numbers, 12)
        memcpy(record + 68, &target_number, 2)
        record[70] = flow.answered
        record[71] = 0
        return True

    def restore(
        self, uint32_t listener, bytes client not None, uint32_t scope, bytes local not None,
        uint32_t generation, uint32_t target, uint16_t port, bint answered, double idle,
        bytes header not None=b"",
    ):
        """Begin a session that an earlier process had; ``port`` is its upstream source port."""
        cdef Newcomer newcomer
        cdef uint64_t quiet = <uint64_t>(min(max(idle, 0.0), LONGEST) * 1000)
        self._require_open()
        if len(client) != 18 or len(local) != 16 or len(header) > HEADER_ROOM:
            raise ValueError("client, local or header has the wrong size")
        if listener >= self._listener_room or not self._listeners[listener].used:
            raise ValueError("there is no such listener")
        memset(&newcomer, 0, sizeof(newcomer))
        memcpy(&newcomer.client, <char *>client, 16)
        memcpy(&newcomer.client_port, <char *>client + 16, 2)
        memcpy(&newcomer.local, <char *>local, 16)
        newcomer.scope = scope
        newcomer.listener = <uint16_t>listener
        newcomer.hash = self._hash(listener, &newcomer.client, newcomer.client_port)
        self._clock = _now()
        if self._find(
            newcomer.hash, listener, &newcomer.client, newcomer.client_port, scope, &newcomer.local
        ) != NULL:
            raise ValueError("there is such a session already")
        self._begin(
            generation, (target,), &newcomer, header, port, answered,
            self._clock - min(quiet, self._clock),
        )

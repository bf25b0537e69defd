# What the kernel and the C library offer to the relay; a part of the module _fastpath.
#
# Declarations, and the small functions that only put such a call or structure into better words.
# Addresses are kept as 16 bytes, IPv4 mapped into IPv6 (RFC 4291 2.5.5.2), ports in network order.

from libc.errno cimport (
    EADDRINUSE, EADDRNOTAVAIL, EAGAIN, ECONNREFUSED, EHOSTDOWN, EHOSTUNREACH, EINTR, EINVAL, EIO,
    EMSGSIZE, ENETDOWN, ENETUNREACH, ENOBUFS, ENOMEM, ENOPROTOOPT, EOPNOTSUPP, EPROTO, errno,
)
from libc.stdint cimport int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
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
    int MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC, MSG_ERRQUEUE, MSG_NOSIGNAL
    int socket(int, int, int)
    int bind(int, const sockaddr *, socklen_t)
    int connect(int, const sockaddr *, socklen_t)
    int setsockopt(int, int, int, const void *, socklen_t)
    int getsockopt(int, int, int, void *, socklen_t *)
    int getsockname(int, sockaddr *, socklen_t *)
    ssize_t recv(int, void *, size_t, int)
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
    uint32_t ntohl(uint32_t)
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
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    uint32_t EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLHUP, EPOLLERR
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

cdef struct Ip:
    uint64_t high
    uint64_t low


cdef inline uint64_t _now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000 + <uint64_t>now.tv_nsec // 1000000


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


cdef inline void _without_address(in6_pktinfo *info) noexcept nogil:
    """Make the address the unspecified one of its family."""
    if _is_mapped(<Ip *>&info.ipi6_addr):
        memset(<uint8_t *>&info.ipi6_addr + 12, 0, 4)
    else:
        memset(&info.ipi6_addr, 0, 16)


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

# What datagrams of WebRTC and RTP are; a part of the module _fastpath. See _relay.pxi for the design.
#
# Everything here looks at bytes of strangers: each read is behind a check of the length. Nothing
# is decided here. ``look_at`` shows to tests what the C functions find; tests/reference/media.py is
# the slow twin of all of it.

# The first byte tells what shares a port (RFC 7983); RTCP is told from RTP by the second (RFC 5761).
cdef enum:
    KIND_OTHER
    KIND_STUN
    KIND_DTLS
    KIND_TURN
    KIND_RTP
    KIND_RTCP

_KINDS = ("other", "stun", "dtls", "turn", "rtp", "rtcp")

cdef enum:
    STUN_HEADER = 20
    STUN_COOKIE = 0x2112A442
    STUN_REQUEST = 0x0001     # Binding (RFC 8489)
    STUN_SUCCESS = 0x0101
    STUN_ERROR = 0x0111
    STUN_ERROR_CODE = 0x0009  # an attribute
    ROLE_CONFLICT = 487       # RFC 8445 7.3.1.1: only who knows the client tells it that
    DTLS_HEADER = 13
    DTLS_ALERT = 21
    RTP_HEADER = 12
    RTCP_SR = 200
    RTCP_RR = 201
    RTCP_SDES = 202
    RTCP_BYE = 203
    SDES_CNAME = 1
    MAX_SSRCS = 31            # that one BYE can name

# Which side of a session sent something.
cdef enum:
    BY_CLIENT
    BY_TARGET


cdef struct Voice:
    # The sources (SSRC, network order) that one side of a session has shown.
    uint32_t last
    uint32_t left             # one bit for each that has said BYE
    uint32_t count
    uint32_t ssrcs[MAX_SSRCS]
    uint8_t *cname            # of one of them, or NULL
    uint32_t cname_size
    uint64_t at               # milliseconds: the last RTP

cdef struct Flow              # a session has one Media, which its head owns

cdef struct Media:
    Voice voices[2]
    uint64_t key              # of a session whose client other targets are asked for, else 0
    uint64_t asked_at         # milliseconds: when that began, or would have if there were others
    uint64_t waiting_since    # milliseconds: the first Binding request without a success, or 0
    uint64_t ask_second       # in which ``asks`` were counted
    uint32_t asks
    uint32_t plain            # RTCP that could be read
    uint32_t garbled          # and that could not, as SRTCP can't
    bool settled              # it has a target nevertheless, with which it goes on meanwhile
    bool spoken               # the target has said something else than a STUN error
    bool ice                  # the target has answered a Binding request
    bool dtls                 # the target has spoken DTLS
    # While others are asked: the sessions that began to be asked for before and after, and those
    # in the same bucket by network, younger ones first.
    Flow *asked_older
    Flow *asked_newer
    Flow *asked_back
    Flow *asked_next


cdef inline uint32_t _two(const uint8_t *data) noexcept nogil:
    return <uint32_t>data[0] << 8 | data[1]


cdef inline uint32_t _four(const uint8_t *data) noexcept nogil:
    return <uint32_t>data[0] << 24 | <uint32_t>data[1] << 16 | <uint32_t>data[2] << 8 | data[3]


cdef inline int _kind(const uint8_t *data, uint32_t size) noexcept nogil:
    """Return which protocol a datagram is of."""
    cdef uint8_t first
    if size == 0:
        return KIND_OTHER
    first = data[0]
    if 128 <= first < 192:
        if size >= 2 and 192 <= data[1] < 224:
            return KIND_RTCP if size >= 8 else KIND_OTHER
        return KIND_RTP if size >= RTP_HEADER else KIND_OTHER
    if first < 4:
        if (
            size >= STUN_HEADER and _four(data + 4) == STUN_COOKIE
            and _two(data + 2) == size - STUN_HEADER and size % 4 == 0
        ):
            return KIND_STUN
        return KIND_OTHER
    if 20 <= first < 64:
        return KIND_DTLS
    return KIND_TURN if 64 <= first < 80 else KIND_OTHER


cdef uint32_t _error_code(const uint8_t *data, uint32_t size) noexcept nogil:
    """Return the code of a STUN error response (RFC 8489 14.8), 0 if it has none."""
    cdef uint32_t at = STUN_HEADER, length, hundreds
    while at + 4 <= size:
        length = _two(data + at + 2)
        if at + 4 + length > size:
            return 0
        if _two(data + at) == STUN_ERROR_CODE:
            if length < 4:
                return 0
            hundreds = data[at + 6] & 7
            return hundreds * 100 + data[at + 7] if 3 <= hundreds <= 6 and data[at + 7] < 100 else 0
        at += 4 + (length + 3) // 4 * 4
    return 0


cdef bint _has_alert(const uint8_t *data, uint32_t size) noexcept nogil:
    """Return whether one of the DTLS records is an alert from after the handshake (RFC 6347 4.1)."""
    cdef uint32_t at = 0, length
    while at + DTLS_HEADER <= size:
        length = _two(data + at + 11)
        if at + DTLS_HEADER + length > size:
            return False
        if data[at] == DTLS_ALERT and data[at + 1] == 0xFE and _two(data + at + 3) >= 1:
            return True
        at += DTLS_HEADER + length
    return False


cdef bint _is_compound(const uint8_t *data, uint32_t size) noexcept nogil:
    """Return whether RTCP packets fill a datagram exactly (RFC 3550 6.1), which SRTCP never does."""
    cdef uint32_t at = 0, length
    while at + 4 <= size:
        length = (_two(data + at + 2) + 1) * 4
        if (
            data[at] >> 6 != 2 or at + length > size or (at == 0 and length < 8)
            or (data[at] & 0x20 and at + length != size)
        ):
            return False
        at += length
    return at == size


cdef const uint8_t *_cname(const uint8_t *packet, uint32_t length, uint32_t *size) noexcept nogil:
    """Return the first CNAME of an SDES packet (RFC 3550 6.5), NULL if it has none."""
    cdef uint32_t at = 4, chunks = packet[0] & 31
    while chunks and at + 4 <= length:
        chunks -= 1
        at += 4
        while at < length and packet[at] != 0:
            if at + 2 > length or at + 2 + packet[at + 1] > length:
                return NULL
            if packet[at] == SDES_CNAME:
                size[0] = packet[at + 1]
                return packet + at + 2
            at += 2 + packet[at + 1]
        at = at // 4 * 4 + 4  # at least one zero, and up to 32 bits
    return NULL


def look_at(data not None):
    """Return what a relay makes of a datagram; see _fastpath.pyi."""
    cdef bytes copy = bytes(data)
    cdef const uint8_t *bytes_ = <const uint8_t *><char *>copy
    cdef const uint8_t *packet
    cdef const uint8_t *name
    cdef uint32_t size = <uint32_t>len(copy), at = 0, length, i, name_size = 0
    cdef int kind = _kind(bytes_, size)
    cdef bint plain = kind == KIND_RTCP and _is_compound(bytes_, size)
    cdef bint named = False
    senders = []
    byes = []
    cname = b""
    while plain and at < size:
        packet = bytes_ + at
        length = (_two(packet + 2) + 1) * 4
        at += length
        if (packet[1] == RTCP_SR or packet[1] == RTCP_RR) and length >= 8:
            senders.append(_four(packet + 4))
        elif packet[1] == RTCP_BYE:
            for i in range(min(packet[0] & 31, length // 4 - 1)):
                byes.append(_four(packet + 4 + 4 * i))
        elif packet[1] == RTCP_SDES and not named:
            name = _cname(packet, length, &name_size)
            if name != NULL:
                named = True
                cname = (<const char *>name)[:name_size]
    stun_type = _two(bytes_) if kind == KIND_STUN else 0
    return (
        _KINDS[kind],
        stun_type,
        _error_code(bytes_, size) if stun_type == STUN_ERROR else 0,
        kind == KIND_DTLS and _has_alert(bytes_, size),
        _four(bytes_ + 8) if kind == KIND_RTP else 0,
        plain,
        tuple(senders),
        tuple(byes),
        cname,
    )

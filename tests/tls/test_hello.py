"""The first message of TLS clients: real ones, every way to cut them, and any bytes."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamal_proxy.tls.hello import (
    MAX_HELLO,
    MAX_RECORDS,
    ClientHello,
    HelloError,
    parse_untrusted,
)
from tests.fuzzing import at_least
from tests.tls.hellos import (
    TLS_1_2,
    TLS_1_3,
    alpn,
    extension,
    message,
    real_hello,
    records,
    server_name,
    sized,
    supported_versions,
)

V = ssl.TLSVersion

REAL = [
    (real_hello(), ClientHello("app.test", (b"h2", b"http/1.1"), (TLS_1_3, TLS_1_2))),
    (real_hello(newest=V.TLSv1_2), ClientHello("app.test", (b"h2", b"http/1.1"), (TLS_1_2,))),
    (
        real_hello(oldest=V.TLSv1_3, alpn=["acme-tls/1"]),
        ClientHello("app.test", (b"acme-tls/1",), (TLS_1_3,)),
    ),
    (real_hello(None, alpn=()), ClientHello("", (), (TLS_1_3, TLS_1_2))),
    (real_hello("APP.Test"), ClientHello("app.test", (b"h2", b"http/1.1"), (TLS_1_3, TLS_1_2))),
    (real_hello("bücher.test", alpn=()), ClientHello("xn--bcher-kva.test", (), (TLS_1_3, TLS_1_2))),
]

# What Chrome sends: reserved values among the extensions, versions and protocols (RFC 8701).
GREASED = records(
    message(
        extension(0x3A3A),
        server_name(b"app.test"),
        extension(23),
        supported_versions(0x8A8A, TLS_1_3, TLS_1_2),
        extension(65281, b"\0"),
        extension(51, sized(b"\x4a\x4a\0\1\0\x11\xec" + sized(bytes(1216), 2), 2)),
        alpn(b"h2", b"http/1.1"),
        extension(0xCACA, b"\0"),
    )
)
HELLOS = [*REAL, (GREASED, ClientHello("app.test", (b"h2", b"http/1.1"), (TLS_1_3, TLS_1_2)))]


def refused(data: bytes) -> HelloError:
    with pytest.raises(HelloError) as caught:
        parse_untrusted(data)
    assert str(caught.value) == caught.value.reason
    return caught.value


@pytest.mark.parametrize(("raw", "hello"), HELLOS)
def test_hellos(raw: bytes, hello: ClientHello) -> None:
    for rest in (b"", b"GET / HTTP/1.1\r\n\r\n", raw, b"\0"):
        assert parse_untrusted(raw + rest) == hello
        assert parse_untrusted(bytearray(raw + rest)) == hello


@pytest.mark.parametrize(("raw", "hello"), HELLOS)
def test_each_beginning_of_a_hello_needs_more(raw: bytes, hello: ClientHello) -> None:
    for end in range(len(raw)):
        assert parse_untrusted(raw[:end]) is None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 100, 116, 16384])
def test_a_hello_over_several_records(size: int) -> None:
    content = message(server_name(b"app.test"), alpn(b"h2"))
    raw = records(content, size if len(content) <= size * MAX_RECORDS else 2)
    assert parse_untrusted(raw) == ClientHello("app.test", (b"h2",), (TLS_1_2,))
    for end in range(len(raw)):
        assert parse_untrusted(raw[:end]) is None


def test_records_that_are_cut_differently() -> None:
    content = message(server_name(b"app.test"))
    for cut in range(1, len(content)):
        raw = records(content[:cut]) + records(content[cut:])
        assert parse_untrusted(raw) == ClientHello("app.test", (), (TLS_1_2,))


def test_a_hello_that_shares_its_last_record() -> None:
    raw = records(message(server_name(b"app.test")) + b"\x0e\0\0\0")
    assert parse_untrusted(raw) == ClientHello("app.test", (), (TLS_1_2,))


def test_the_number_of_records_is_limited() -> None:
    content = message(extension(21, bytes(2000)), server_name(b"app.test"))
    size = -(-len(content) // MAX_RECORDS)
    assert len(records(content, size)) == len(content) + MAX_RECORDS * 5
    assert parse_untrusted(records(content, size)) is not None
    for many in (records(content, size - 1), records(content, 1)):
        assert refused(many).reason == "the hello is spread over too many records"


def test_the_size_is_limited() -> None:
    def padded(size: int) -> bytes:
        bare = len(message(extension(21)))
        return message(extension(21, bytes(size - bare)))

    assert parse_untrusted(records(padded(MAX_HELLO - 100))) is not None
    over = records(padded(MAX_HELLO + 1))
    assert parse_untrusted(over[:8]) is None
    assert refused(over[:9]).reason == "the hello is too long", "once the message tells its length"
    # A length that fits, in so many records that what stands around them does not.
    raw = records(padded(MAX_HELLO), 600)
    assert parse_untrusted(raw[: MAX_HELLO - 1]) is None
    assert refused(raw[:MAX_HELLO]).reason == "the hello is too long"


# The name


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (b"app.test", "app.test"),
        (b"APP.TEST", "app.test"),
        (b"app.test.", "app.test"),
        (b"localhost", "localhost"),
        (b"_srv.a-b.test", "_srv.a-b.test"),
        (b"192.0.2.1", "192.0.2.1"),
        (b"a" * 253, "a" * 253),
        (b"a" * 254, ""),
        (b"", ""),
        (b".", ""),
        (b"app.test..", ""),
        (b".test", ""),
        (b"app..test", ""),
        (b"app.test\0.evil", ""),
        (b"app test", ""),
        (b"*.test", ""),
        (b"b\xc3\xbccher.test", ""),
        (b"B\xdcCHER.test", ""),
        (b"[::1]", ""),
        (b"../../etc", ""),
        (b"a/b", ""),
        (b"a\nb", ""),
        (b"a\n", ""),
    ],
)
def test_names(sent: bytes, name: str) -> None:
    hello = parse_untrusted(records(message(server_name(sent))))
    assert hello == ClientHello(name, (), (TLS_1_2,))


def test_a_name_of_another_type_is_no_name() -> None:
    hello = parse_untrusted(records(message(server_name(b"app.test", kind=1))))
    assert hello == ClientHello("", (), (TLS_1_2,))


def test_the_first_name_counts() -> None:
    names = b"".join(
        bytes([kind]) + sized(name, 2) for kind, name in [(1, b"x"), (0, b"a"), (0, b"b")]
    )
    hello = parse_untrusted(records(message(extension(0, sized(names, 2)))))
    assert hello is not None
    assert hello.server_name == "a"


@pytest.mark.parametrize(
    "name", ["app.test", "APP.test", "a" * 63 + ".test", "_x.test", "10.0.0.1"]
)
def test_openssl_sees_the_same_name(name: str) -> None:
    seen: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda connection, name, context: seen.append(name)
    for raw in (records(message(server_name(name.encode()))), real_hello(name)):
        incoming = ssl.MemoryBIO()
        incoming.write(raw)
        with pytest.raises(ssl.SSLError):  # there is no certificate
            context.wrap_bio(incoming, ssl.MemoryBIO(), server_side=True).do_handshake()
        hello = parse_untrusted(raw)
        assert hello is not None
        # Addresses are no names (RFC 6066 3), and OpenSSL's client sends none.
        assert hello.server_name == (seen.pop() or "").lower()


# Other fields


def test_a_hello_without_extensions() -> None:
    assert parse_untrusted(records(message(version=0x0301))) == ClientHello("", (), (0x0301,))
    assert parse_untrusted(records(message(session=b""))) == ClientHello("", (), (TLS_1_2,))


def test_reserved_versions_are_ignored() -> None:
    raw = records(
        message(supported_versions(*(n << 8 | n for n in range(0x0A, 0x100, 0x10)), 0x0304))
    )
    assert parse_untrusted(raw) == ClientHello("", (), (TLS_1_3,))


@pytest.mark.parametrize("twice", [server_name(b"a.test"), alpn(b"h2"), supported_versions(1)])
def test_an_extension_that_matters_may_come_once(twice: bytes) -> None:
    error = refused(records(message(twice, extension(23), twice)))
    assert error.reason == "the hello has an extension twice"
    assert parse_untrusted(records(message(twice, extension(23), extension(23)))) is not None


def body(raw: bytes) -> bytes:
    """Return a hello message without its header."""
    return raw[4:]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        bytes(33),
        body(message())[:34] + b"\x21" + bytes(32),  # a session that is longer than all
        body(message())[:-3],  # half of the ciphers
        body(message())[:-1],  # a compression method that is missing
        body(message()) + b"\0",
        body(message()) + b"\0\5\0\0\0",
        body(message()) + b"\0\4\0\0\0\1",
        body(message(extension(0, b"\0"))),
        body(message(extension(0, b"\0\5\0\0\1a"))),
        body(message(extension(0, sized(b"\0\0\5a", 2)))),
        body(message(extension(16, b"\0\3\2h"))),
        body(message(extension(16, b"\0\3\3h2"))),
        body(message(extension(43, b"\2\3"))),
        body(message(extension(43, b"\3\3\4\3"))),
    ],
)
def test_malformed_fields(broken: bytes) -> None:
    assert refused(records(b"\x01" + sized(broken, 3))).reason == "the hello is malformed"


# What is something else


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n",
        b"G",
        b"GET",
        b"GET ",
        b"POST /",
        b"PROPFIND http://app.test/ HTTP/1.1\r\n",
        b"OPTIONS * HTTP/1.1\r\n",
        b"CONNECT app.test:443 HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_http_is_recognised(raw: bytes) -> None:
    error = refused(raw)
    assert (error.reason, error.is_http) == ("HTTP without TLS", True)


@pytest.mark.parametrize(
    "raw",
    [
        b"\0",
        b"\x15\x03\x03\x00\x02\x02\x28",  # an alert
        b"\x17\x03\x03\x00\x05hello",
        b"\x80\x2e\x01\x03\x01",  # a hello of SSL 2
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x03\x00\x00\x13\x0e\xe0",  # a remote desktop
        b"\r\n\r\n\0\r\nQUIT\n\x21",
        b"get / HTTP/1.1",
        b"GET\t/",
        b"G\0",
        b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
        b"\x16\x02",
        b"\x16\x16",
    ],
)
def test_what_is_neither(raw: bytes) -> None:
    error = refused(raw)
    assert (error.reason, error.is_http) == ("not TLS", False)


@pytest.mark.parametrize("length", [0, 16385, 65535])
def test_records_of_an_impossible_length(length: int) -> None:
    raw = b"\x16\x03\x01" + length.to_bytes(2, "big")
    assert refused(raw).reason == "a record has an impossible length"
    begun = records(message()[:10]) + raw
    assert refused(begun).reason == "a record has an impossible length"


def test_the_second_record_must_be_of_the_same_type() -> None:
    begun = records(message()[:10])
    assert parse_untrusted(begun) is None
    assert refused(begun + b"\x15").reason == "not TLS"
    assert not refused(begun + b"GET / HTTP/1.1").is_http


def test_another_message_is_refused_at_its_first_byte() -> None:
    for kind in (0, 2, 16, 255):
        raw = records(bytes([kind]) + sized(bytes(100), 3))
        assert parse_untrusted(raw[:5]) is None
        assert refused(raw[:6]).reason == "the first message is no hello"


def test_a_message_without_anything() -> None:
    assert refused(records(b"\x01\0\0\0")).reason == "the hello is malformed"


# Any bytes

_EXTENSIONS = st.builds(extension, st.integers(0, 65535), st.binary(max_size=40)) | st.sampled_from(
    [server_name(b"app.test"), alpn(b"h2"), supported_versions(TLS_1_3), extension(0, b"\0")]
)


@pytest.mark.fuzz
@at_least(300)
@given(st.binary(max_size=200))
@example(b"\x16\x03\x01\x40\x00\x01")
def test_any_bytes(data: bytes) -> None:
    for start in (b"", b"\x16\x03\x01", b"\x16\x03\x01\x00\x50\x01\x00\x00"):
        judge(start + data)


@pytest.mark.fuzz
@at_least(300)
@given(
    st.lists(_EXTENSIONS, max_size=6),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.integers(1, 300),
)
def test_changed_hellos(extensions: list[bytes], changes: list[tuple[int, int]], size: int) -> None:
    raw = bytearray(records(message(*extensions), size))
    for position, value in changes:
        raw[position % len(raw)] = value
    judge(bytes(raw))


def judge(data: bytes) -> None:
    """Check that what is said of a beginning is not taken back."""
    verdicts: list[ClientHello | str | None] = []
    for end in range(0, len(data) + 1, max(1, len(data) // 40)):
        try:
            verdict: ClientHello | str | None = parse_untrusted(data[:end])
        except HelloError as error:
            # With more of it, what began like HTTP may turn out to be something else again.
            verdict = "not TLS" if error.is_http else error.reason
        verdicts.append(verdict)
    known = [verdict for verdict in verdicts if verdict is not None]
    assert verdicts[: len(verdicts) - len(known)] == [None] * (len(verdicts) - len(known))
    assert len(set(known)) <= 1

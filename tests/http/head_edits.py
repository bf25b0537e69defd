"""Changes of heads, each said by three numbers, so that it is cheap to draw one at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PIECES = [
    *(b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"\n\n", b"\r\r\n", b"\0", b" ", b"  ", b"\t", b"\x0b"),
    *(b"\x01", b"\x1f", b"\x7f", b"\x80", b"\xa0", b"\xff", b"_", b"-", b":", b",", b";", b'"'),
    *(b"#", b"?", b"%", b"%2", b"%zz", b"%00", b"/", b"*", b"+", b"0", b"5", b"x", b"[::1]", b"@"),
    *(b"close", b"chunked", b"HTTP/1.1", b"HTTP/1.0", b"Host: b\r\n", b"\r\n ", b"\r\n\t"),
]
NAMES = [
    *(b"Host", b"Connection", b"Content-Length", b"Transfer-Encoding", b"Content-Type", b"TE"),
    *(b"User-Agent", b"X-Request-ID", b"X-Request-Start", b"X-Forwarded-For", b"Upgrade", b"Via"),
    *(b"X-Forwarded-Host", b"X-Forwarded-Proto", b"X-Kamal-Target", b"Forwarded", b"Expect"),
    *(b"Keep-Alive", b"Proxy-Connection", b"Proxy-Authenticate", b"Proxy-Authorization", b"X-A"),
    *(b"X-Accel-Buffering", b"Trailer", b"Cookie", b"Set-Cookie", b"Transfer_Encoding", b"X_A"),
    *(b"Content-Length ", b"Content_Length", b" Host", b"", b"X-Forwarded_For", b"Accept"),
]
VALUES = [
    *(b"", b" ", b"0", b"5", b"+5", b"-5", b"0x5", b"5, 5", b"5,6", b"05", b"5 5", b"5.0", b"1_0"),
    *(b"9" * 15, b"1" + b"0" * 15, b"9" * 20, b"9" * 21, b"\xb2", b"chunked", b"CHUNKED", b"a:80"),
    *(b"chunked, chunked", b"identity", b"gzip, chunked", b"chunked;q=1", b"chunked,", b"xchunked"),
    *(b"\tchunked", b"close", b"Close", b"keep-alive", b"keep-alive, close", b"close,", b"x-a"),
    *(b"upgrade", b"Upgrade, Keep-Alive", b"host", b"a", b"a.test", b"A.Test.:", b"[::1]", b"a, b"),
    *(b"a b", b"a@b", b"a/b", b":80", b"a:8x", b"192.0.2.1", b"h" * 260, b"h" * 261, b"t=1", b"no"),
    *(b"h2c", b"100-continue", b"trailers", b"https", b"\xfc", b"a\tb", b"a\0b", b"a\r\n b"),
]
FIRST_LINES = [
    *(b"GET / HTTP/1.1", b"HEAD /a?b HTTP/1.1", b"PUT /%61%2f HTTP/1.1", b"PATCH //a/ HTTP/1.1"),
    *(b"GET /a#b HTTP/1.1", b"GET http://a/ HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET * HTTP/1.1"),
    *(b"CONNECT a:80 HTTP/1.1", b"CONNECT / HTTP/1.1", b"GET / HTTP/1.0", b"GET / HTTP/1.2"),
    *(b"PRI * HTTP/2.0", b"GET / HTTP/2.0", b"GET /%zz HTTP/1.1", b"GET /%2 HTTP/1.1", b"GET /"),
    *(b"GET /?%zz HTTP/1.1", b"GET  / HTTP/1.1", b"get / HTTP/1.1", b"GET / HTTP/1.1 ", b""),
    *(b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.1 204 x", b"HTTP/1.0 200 x"),
    *(b"HTTP/1.1 304 x", b"HTTP/1.1 100 x", b"HTTP/1.1 101 x", b"HTTP/1.1 600 x", b"HTTP/2 200"),
    *(b"HTTP/1.1 205 x", b"HTTP/1.1 2000 x", b"HTTP/1.1 020 x", b"HTTP/1.1 599 \xfc"),
]
ENDINGS = [
    b"\n",
    b"\r",
    b"\r\r\n",
    b" \r\n",
    b"\t\r\n",
    b"\r\n ",
    b"\r\n\t",
    b"\n\r\n",
    b"\0\r\n",
    b"",
]
COLONS = [b" :", b"\t:", b"::", b":\t", b":", b":   ", b"", b"\r\n:", b": \r\n "]


def _insert(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) + 1)
    return data[:at] + PIECES[b % len(PIECES)] + data[at:]


def _replace(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) + 1)
    return data[:at] + PIECES[b % len(PIECES)] + data[at + 1 + (b >> 8) % 3 :]


def _delete(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) + 1)
    return data[:at] + data[at + 1 + b % 3 :]


def _set_byte(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) + 1)
    return data[:at] + bytes((b & 0xFF,)) + data[at + 1 :]


def _flip_bit(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) or 1)
    return data[:at] + bytes((byte ^ 1 << b % 8) for byte in data[at : at + 1]) + data[at + 1 :]


def _cut(data: bytes, a: int, b: int) -> bytes:
    return data[: a % (len(data) + 1)]


def _repeat_part(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) + 1)
    return data[:at] + data[at : at + b % 40] * 2 + data[at + b % 40 :]


def _add_line(data: bytes, a: int, b: int) -> bytes:
    return _with_line(data, a >> 8, _field(a, b))


def _duplicate_line(data: bytes, a: int, b: int) -> bytes:
    lines = data.split(b"\r\n")
    return _with_line(data, a, lines[b % len(lines)])


def _with_line(data: bytes, number: int, line: bytes) -> bytes:
    lines = data.split(b"\r\n")
    lines.insert(number % len(lines), line)
    return b"\r\n".join(lines)


def _field(a: int, b: int) -> bytes:
    return NAMES[a % len(NAMES)] + b": " + VALUES[b % len(VALUES)]


def _remove_line(data: bytes, a: int, b: int) -> bytes:
    lines = data.split(b"\r\n")
    del lines[a % len(lines)]
    return b"\r\n".join(lines)


def _swap_lines(data: bytes, a: int, b: int) -> bytes:
    lines = data.split(b"\r\n")
    a, b = a % len(lines), b % len(lines)
    lines[a], lines[b] = lines[b], lines[a]
    return b"\r\n".join(lines)


def _set_first_line(data: bytes, a: int, b: int) -> bytes:
    return FIRST_LINES[b % len(FIRST_LINES)] + b"\r\n" + data.partition(b"\r\n")[2]


def _set_value(data: bytes, a: int, b: int) -> bytes:
    name = VALUES[b % len(VALUES)]
    return _changed_line(data, a, lambda line: line.partition(b":")[0] + b": " + name)


def _set_case(data: bytes, a: int, b: int) -> bytes:
    cases: list[Callable[[bytes], bytes]] = [bytes.lower, bytes.upper, bytes.swapcase, bytes.title]
    return _changed_line(data, a, cases[b % len(cases)])


def _set_colon(data: bytes, a: int, b: int) -> bytes:
    colon = COLONS[b % len(COLONS)]
    return _changed_line(data, a, lambda line: line.replace(b": ", colon, 1))


def _set_ending(data: bytes, a: int, b: int) -> bytes:
    lines = data.split(b"\r\n")
    at = 1 + a % len(lines)
    return b"\r\n".join(lines[:at]) + ENDINGS[b % len(ENDINGS)] + b"\r\n".join(lines[at:])


def _changed_line(data: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    lines = data.split(b"\r\n")
    number %= len(lines)
    lines[number] = change(lines[number])
    return b"\r\n".join(lines)


def _add_many_lines(data: bytes, a: int, b: int) -> bytes:
    first, end, rest = data.partition(b"\r\n")
    return first + end + b"X-%d: b\r\n" % a * (b % 210) + rest


def _lengthen(data: bytes, a: int, b: int) -> bytes:
    at = a % (len(data) + 1)
    return data[:at] + bytes((data[at - 1] if data else 0x41,)) * (b % 9000) + data[at:]


EDITS: list[Callable[[bytes, int, int], bytes]] = [
    *(_insert, _replace, _delete, _set_byte, _flip_bit, _cut, _repeat_part),
    *(_add_line, _duplicate_line, _remove_line, _swap_lines, _set_first_line, _set_value),
    *(_set_case, _set_colon, _set_ending, _add_many_lines, _lengthen),
]


def edited(data: bytes, kind: int, a: int, b: int) -> bytes:
    """Return the data changed in the way that the numbers say; any numbers from 0 to 65535 do."""
    return EDITS[kind % len(EDITS)](data, a, b)

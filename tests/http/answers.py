"""What the clients of HTTP/2 and HTTP/3 share: the fields of a request, and what has come of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

Fields: TypeAlias = "Sequence[tuple[bytes, bytes]]"


@attrs.define(eq=False)
class Answer:
    """What has come on one stream.

    Attributes:
        informational: Status codes of 1xx responses.
        fields: Fields of the response.
        body: Its body so far.
        trailers: Its trailers.
        ended: Whether the last of it has come.
        reset: The code with which the server has reset the stream, else None.
    """

    informational: list[int] = attrs.field(factory=list)
    fields: list[tuple[bytes, bytes]] = attrs.field(factory=list)
    body: bytearray = attrs.field(factory=bytearray)
    trailers: list[tuple[bytes, bytes]] = attrs.field(factory=list)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.get(b":status")[0]) if self.fields else 0

    @property
    def content(self) -> bytes:
        return bytes(self.body)

    def get(self, name: bytes) -> list[bytes]:
        return [value for each, value in self.fields if each == name]


def request_fields(
    path: bytes = b"/",
    *,
    method: bytes = b"GET",
    host: bytes = b"app.test",
    headers: Fields = (),
) -> list[tuple[bytes, bytes]]:
    """Return the fields of a request.

    Args:
        path: Its path.
        method: Its method.
        host: Its authority.
        headers: More fields.
    """
    return [
        (b":method", method),
        (b":scheme", b"https"),
        (b":authority", host),
        (b":path", path),
        *headers,
    ]

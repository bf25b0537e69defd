"""A stream socket whose bytes are encrypted, and the handshake of a server that begins it.

The rules of ``sockets`` hold here too: try the call, wait on EAGAIN, deadlines by the caller's
scope. OpenSSL works in memory only; all that is its business is what the bytes mean. What is wrong
with them ends the connection as if the network had broken it.
"""

from __future__ import annotations

import contextlib
import select
import ssl
from typing import TYPE_CHECKING, Final

import trio

from kamal_proxy.sockets import READ_SIZE, SocketStream

if TYPE_CHECKING:
    from collections.abc import Callable

#: Plaintext that is encrypted at a time and handed to the kernel at once, in bytes.
BLOCK_SIZE: Final = 64 * 1024

_MAX_RECORD = 16 * 1024  # bytes of plaintext (RFC 8446 5.1)
# A read asks for no less than a record with what is around it: a small one would only ask again.
_MIN_READ = _MAX_RECORD + 512
# Received bytes that may bring no data one after another: the rest of a record, a change of keys.
_MAX_BARREN = READ_SIZE
# A read that brought less than this part of its bytes as data makes the next one small: a change of
# keys costs as much as 20 KB of data, and nobody else has a turn while they are processed.
_THIN = 16
# What OpenSSL says by itself (tickets, answers to changes of keys, to renegotiations) goes with the
# next data. Bytes that are sent without any, and that may wait for a peer that does not read them.
_MANY_ANSWERS = 4 * 1024
_MAX_ANSWERS = 16 * 1024
# Received bytes that count as a call where tasks take turns: many small records cost a lot.
_BYTES_PER_CALL = 2048
_NOTHING = memoryview(b"")


class HandshakeError(Exception):
    """A handshake came to nothing.

    Attributes:
        reason: Why, in a few words that do not depend on what the client sent.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def alert(code: int) -> bytes:
    """Return the record that tells a client why it is refused before anything is encrypted.

    Args:
        code: The description (RFC 8446 6): 112 is unrecognized_name.
    """
    return b"\x15\x03\x03\x00\x02\x02" + bytes([code])


class Handshake:
    """The server's side of a handshake, which never waits; the caller does, and reads.

    It has no task: its caller is one that deals with many connections.

    Args:
        stream: The connection. It is closed, but not its socket, once the handshake is done; until
            then, and if that fails, it stays the caller's.
        context: What to offer.
        server_name: The name that the client asked for.
    """

    __slots__ = (
        "_connection",
        "_done",
        "_incoming",
        "_outgoing",
        "_server_name",
        "_stream",
        "_unsent",
    )

    def __init__(
        self, stream: SocketStream, context: ssl.SSLContext, *, server_name: str = ""
    ) -> None:
        self._stream = stream
        self._server_name = server_name
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._connection = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._unsent = _NOTHING
        self._done = False

    @property
    def stalled(self) -> bool:
        """Whether nothing is to be read before :meth:`flush` has sent something."""
        return bool(self._unsent)

    def proceed(self, data: bytes) -> TlsStream | None:
        """Go on with what has arrived.

        Args:
            data: What was read of the connection; nothing if that has ended.

        Returns:
            The encrypted stream, which has the socket now, if the handshake is done.

        Raises:
            HandshakeError: the client broke it off, or there is nothing both sides agree on. The
                client was told if that was possible without waiting.
        """
        if not data:
            raise HandshakeError("the client closed the connection")
        self._incoming.write(data)
        try:
            self._connection.do_handshake()
            self._done = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            if self._outgoing.pending:
                with contextlib.suppress(trio.BrokenResourceError):
                    self._stream.send_nowait(self._outgoing.read())
            raise HandshakeError(_reason(error)) from error
        # In TLS 1.3 only tickets are left in the end, and they can go with the first answer.
        if self._outgoing.pending and not (self._done and self._connection.version() == "TLSv1.3"):
            self._unsent = memoryview(self._outgoing.read())
        return self.flush()

    def flush(self) -> TlsStream | None:
        """Send what the socket had no room for.

        Returns:
            As :meth:`proceed` does.

        Raises:
            HandshakeError: the client broke the connection.
        """
        if self._unsent:
            try:
                self._unsent = self._unsent[self._stream.send_nowait(self._unsent) :]
            except trio.BrokenResourceError as error:
                raise HandshakeError("the client broke the connection") from error
            if self._unsent:
                self._stream.watch(writes=True)
                return None
        if not self._done:
            return None
        return TlsStream(
            self._stream, self._connection, self._incoming, self._outgoing, self._server_name
        )


class TlsStream(SocketStream):
    """An encrypted connection. Made by a ``Handshake``; used like any ``SocketStream``.

    A write that :meth:`send_nowait` did not take as a whole is to be repeated with the bytes that
    were not taken, though some of them may be on their way: nothing can take encrypted bytes back.
    Whoever writes something else instead has sent them all the same, as with a cancelled write.

    Attributes:
        alpn: The protocol that both sides speak; empty if the client offered none of ours.
        version: ``TLSv1.2`` or ``TLSv1.3``.
        server_name: The name that the client asked for; empty if it asked for none.
        resumed: Whether a session was resumed, which saves the costly part of a handshake.
        client_ca: What the client's certificate was verified by; the caller sets it.
    """

    secured = True

    __slots__ = (
        "_ahead",
        "_barren",
        "_begun",
        "_connection",
        "_cut",
        "_ended",
        "_failure",
        "_incoming",
        "_outgoing",
        "_stirred",
        "_thin",
        "_unsent",
        "alpn",
        "client_ca",
        "resumed",
        "server_name",
        "version",
    )

    def __init__(
        self,
        stream: SocketStream,
        connection: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_name: str = "",
    ) -> None:
        self._connection = connection
        self._incoming = incoming  # between two calls there is nothing in it that can be decrypted
        self._outgoing = outgoing
        self._ended = False  # the peer said goodbye, or closed
        self._failure = ""  # why nothing can be read any more
        self._barren = 0  # bytes received since there was data in them
        self._unsent = memoryview(b"")  # encrypted, and not taken by the socket yet
        self._begun = b""  # the plaintext of it that was not reported as sent
        self._thin = False  # hardly any was in the latest ones
        self._cut = False  # a write was left unfinished
        self._stirred = True  # something may have arrived since the socket was found empty
        self.alpn = connection.selected_alpn_protocol() or ""
        self.version = connection.version() or ""
        self.server_name = server_name
        self.client_ca: bytes | None = None
        self.resumed = bool(connection.session_reused)
        super().__init__(*stream.release())
        self._hung_up = stream._hung_up
        self._edges = stream._edges
        self._poller.hand_over(self.fileno(), self)
        self.watch()
        self._ahead = self._decrypt()  # decrypted, and not read yet

    # Reading

    def receive_nowait(self, max_bytes: int = READ_SIZE) -> bytes | None:
        """Return what has arrived, ``b""`` at the end of the stream, or None if nothing has yet.

        A connection that ends without a goodbye just ends, as one that is not encrypted: HTTP
        itself tells whether a message is whole.
        """
        while not self._ahead:
            if not self._read(_MIN_READ if self._thin else max(max_bytes, _MIN_READ)):
                return None
            if self._ended and not self._ahead:
                return b""
        data = self._ahead
        if len(data) > max_bytes:
            self._ahead = data[max_bytes:]
            return data[:max_bytes]
        self._ahead = b""
        return data

    def at_eof_nowait(self) -> bool:
        """Return whether the next read would find the end of the stream, or an error, at once."""
        self._look_ahead()
        return not self._ahead and (self._ended or bool(self._failure))

    def is_quiet_nowait(self) -> bool:
        """Return whether the stream is open with nothing to read."""
        self._look_ahead()
        return not self._has_news()

    @property
    def hung_up(self) -> bool:
        """Whether the peer has said goodbye, or closed, and nothing it sent is left to read."""
        # The peer's goodbye need not come with the end of the connection.
        noticed = self._hung_up or self._stirred or self._ended or bool(self._failure)
        return noticed and self.at_eof_nowait()

    def ready(self, events: int) -> None:
        """Wake the tasks that wait for these epoll events (called by the poller)."""
        if events & select.EPOLLIN:
            self._stirred = True
            if self._watcher is not None:
                self._look_ahead()
        super().ready(events)

    def _look_ahead(self) -> None:
        """Read if there is nothing to read yet: only what is decrypted tells what has come."""
        self._socket()
        if not self._has_news():
            # The next read meets what went wrong.
            with contextlib.suppress(trio.BrokenResourceError):
                # Between what is no data yet and the end of the connection there is no event.
                while self._read(_MIN_READ) and self._hung_up and not self._has_news():
                    pass
            self._wake_others()

    def _has_news(self) -> bool:
        """Return whether a read would find something at once, without reading from the socket."""
        return bool(self._ahead or self._ended or self._failure)

    def _wake_others(self) -> None:
        """Wake whom an event would have woken, which is gone with what was read."""
        over = self._ended or bool(self._failure)
        if self._ahead or over:
            self.wake_reader()
        if over and not self._ahead:
            self.wake_watcher()

    def _read(self, max_bytes: int) -> bool:
        """Read once from the socket and decrypt it; False if nothing has arrived."""
        if self._failure:
            raise trio.BrokenResourceError(self._failure)
        if self._ended:
            self._socket()
            return True
        try:
            data = super().receive_nowait(max_bytes)
        except trio.BrokenResourceError as error:
            self._failure = str(error)
            self._cut = True  # nobody is there to be told goodbye
            raise
        if data is None or len(data) < max_bytes:
            self._stirred = False  # all that comes now is an event of its own
        if data is None:
            return False
        if not data:
            self._ended = True
            return True
        self._calls += len(data) // _BYTES_PER_CALL
        self._incoming.write(data)
        self._ahead = self._decrypt()
        self._barren = 0 if self._ahead else self._barren + len(data)
        self._thin = len(self._ahead) * _THIN < len(data)
        if self._barren > _MAX_BARREN:
            self._failure = "the peer sends records without data"
        if self._failure or self._outgoing.pending > _MANY_ANSWERS:
            self._answer()
        return True

    def _decrypt(self) -> bytes:
        """Decrypt all that is there; notes what ends it."""
        parts: list[bytes] = []
        try:
            while self._incoming.pending:
                part = self._connection.read(_MAX_RECORD)
                if not part:
                    self._ended = True
                    break
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError as error:
            self._failure = _reason(error)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _answer(self) -> None:
        """Send what OpenSSL says by itself, or keep it, but not any amount."""
        # What has arrived can be read even if nothing can be sent any more.
        with contextlib.suppress(trio.BrokenResourceError):
            if not self._flush() and self._outgoing.pending > _MAX_ANSWERS:
                self._failure = "the peer does not read the answers it asks for"

    # Writing

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Send what the socket takes and return how many bytes that was (0 when it is full)."""
        self._socket()
        sent = 0
        if self._begun or self._unsent:
            if not self._flush():
                return 0
            sent = self._repeated(data)
        rest = memoryview(data)[sent:] if sent or len(data) > BLOCK_SIZE else data
        while rest:
            block = rest[:BLOCK_SIZE]
            self._encrypt(block)
            if not self._flush():
                self._begun = bytes(block)
                break
            sent += len(block)
            rest = rest[BLOCK_SIZE:]
        return sent

    async def send(
        self, data: bytes | memoryview, progress: Callable[[], None] | None = None
    ) -> None:
        """Send all of ``data``, waiting while the socket is full.

        Args:
            data: What to send.
            progress: Called before each wait; the peer has taken something since the last.
        """
        try:
            await super().send(data, progress)
        except trio.Cancelled:
            if self._begun or self._unsent:
                self._begun = b""  # nobody repeats it; what comes next is new
                self._cut = True
            raise

    def shutdown_write(self) -> None:
        """Send the end of the stream; reading goes on (RFC 8446 6.1).

        After a write that was cancelled in the middle the connection just ends, so that the peer
        can tell that something is missing.
        """
        self._say_goodbye()
        super().shutdown_write()

    def close(self) -> None:
        """Close at once, waking any task that waits. Closing again does nothing.

        The peer is told as in :meth:`shutdown_write`, if the socket takes that at once.
        """
        if self._sock is None:
            return
        with contextlib.suppress(trio.BrokenResourceError):
            self._say_goodbye()
        super().close()
        self._ahead = self._begun = b""
        self._unsent = _NOTHING
        self._ended = self._stirred = self._hung_up = False
        self._failure = ""

    def _say_goodbye(self) -> None:
        """Send a close_notify, unless that would come in the middle of something."""
        self._socket()
        if self._cut or self._begun or (self._unsent and not self._flush()):
            return
        # Python's unwrap() also looks for the peer's goodbye. Data would be an error there, but all
        # that has arrived is decrypted already; after an error there is nothing to be said.
        with contextlib.suppress(ssl.SSLError):
            self._connection.unwrap()
        self._flush()

    def _encrypt(self, block: bytes | memoryview) -> None:
        try:
            done = self._connection.write(block)
            while done < len(block):
                done += self._connection.write(block[done:])
        except ssl.SSLError as error:
            raise trio.BrokenResourceError(_reason(error)) from error

    def _flush(self) -> bool:
        """Send what is encrypted; return whether the socket took all of it."""
        while self._unsent or self._outgoing.pending:
            data = self._unsent or self._outgoing.read()
            sent = SocketStream.send_nowait(self, data)
            self._unsent = memoryview(data)[sent:] if sent < len(data) else _NOTHING
            if self._unsent:
                return False
        return True

    def _repeated(self, data: bytes | memoryview) -> int:
        """Return how much of a write was sent by the one before it, which did not say so."""
        begun, self._begun = self._begun, b""
        size = min(len(begun), len(data))
        if bytes(data[:size]) != begun[:size]:
            self._cut = True
            return 0
        self._begun = begun[size:]
        return size


def _reason(error: ssl.SSLError) -> str:
    """Say what went wrong in words: ``no shared cipher``."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is refused: {error.verify_message}"
    if error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error)

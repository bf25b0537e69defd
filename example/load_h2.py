"""A client of HTTP/2 for the load: one TLS connection, one request at a time, in blocking calls."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, DataReceived, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError

if TYPE_CHECKING:
    import ssl


class Http2Connection:
    """A connection that is opened when it is needed, and counts how often that was.

    Args:
        host: Where it goes, and which certificate is expected there.
        port: The port.
        context: By what that is verified.
        timeout: Seconds to wait for a next packet.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext, timeout: float) -> None:
        self.opened = 0
        self._host = host
        self._port = port
        self._context = context
        self._timeout = timeout
        self._socket: ssl.SSLSocket | None = None
        self._http = H2Connection()

    def get(self, path: str) -> tuple[int, bytes]:
        """Send one request and return the status and the body of its answer.

        Raises:
            OSError: it was not answered.
        """
        try:
            return self._get(self._socket or self._connect(), path)
        except ProtocolError as error:
            raise OSError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> ssl.SSLSocket:
        self.opened += 1
        plain = socket.create_connection((self._host, self._port), timeout=self._timeout)
        connection = self._context.wrap_socket(plain, server_hostname=self._host)
        if connection.selected_alpn_protocol() != "h2":
            connection.close()
            raise OSError("the server does not speak HTTP/2")
        self._socket = connection
        self._http = H2Connection(H2Configuration())
        self._http.initiate_connection()
        return connection

    def _get(self, connection: ssl.SSLSocket, path: str) -> tuple[int, bytes]:
        stream = self._http.get_next_available_stream_id()
        fields = [
            (":method", "GET"),
            (":scheme", "https"),
            (":authority", f"{self._host}:{self._port}"),
            (":path", path),
        ]
        self._http.send_headers(stream, fields, end_stream=True)
        status, body = 0, b""
        while True:
            connection.sendall(self._http.data_to_send())
            data = connection.recv(65536)
            if not data:
                raise ConnectionError("the server closed the connection")
            for event in self._http.receive_data(data):
                if isinstance(event, ConnectionTerminated | StreamReset):
                    raise ConnectionError(f"the server sent {type(event).__name__}")
                if isinstance(event, ResponseReceived):
                    status = int(dict(event.headers)[b":status"])
                elif isinstance(event, DataReceived):
                    body += event.data
                    self._http.acknowledge_received_data(event.flow_controlled_length, stream)
                elif isinstance(event, StreamEnded):
                    return status, body

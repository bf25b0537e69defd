"""A gRPC server, and a client of it, as processes of their own; messages are plain bytes.

python grpc_program.py serve NAME              writes its port, then what it notices
python grpc_program.py call PORT HOST CA_FILE  obeys lines on standard input, answers each with
                                               a line of JSON
"""

from __future__ import annotations

import json
import sys
import threading
from concurrent import futures
from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVICE = "test.Service"
HEALTH = "grpc.health.v1.Health"
BIG = 1_000_000


def say(text: str) -> None:
    print(text, flush=True)


# The server


def unary(request: bytes, context: grpc.ServicerContext) -> bytes:
    metadata = dict(context.invocation_metadata())
    if request == b"fail":
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing, zut à lors")
    if request == b"wait":
        ended = threading.Event()
        context.add_callback(ended.set)
        say("waiting")
        ended.wait()
        say("cancelled")
        return b""
    if request == b"big":
        return bytes(BIG)
    context.send_initial_metadata((("x-begin", "1"),))
    context.set_trailing_metadata((("x-end", "2"), ("x-end-bin", b"\0\xff")))
    return b"%s %s %s" % (NAME.encode(), request, metadata.get("x-asked", "").encode())


def stream(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
    for number in range(int(request)):
        yield b"%d" % number


def collect(requests: Iterator[bytes], _: grpc.ServicerContext) -> bytes:
    return b"%d" % sum(len(request) for request in requests)


def talk(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
    for request in requests:
        yield NAME.encode() + b" " + request


def health(_: bytes, __: grpc.ServicerContext) -> bytes:
    return b"\x08\x01"  # SERVING


def serve() -> None:
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "Collect": grpc.stream_unary_rpc_method_handler(collect),
        "Talk": grpc.stream_stream_rpc_method_handler(talk),
    }
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=20))
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(SERVICE, handlers),
            grpc.method_handlers_generic_handler(
                HEALTH, {"Check": grpc.unary_unary_rpc_method_handler(health)}
            ),
        )
    )
    say(str(server.add_insecure_port("127.0.0.1:0")))
    server.start()
    sys.stdin.read()


# The client


class Caller:
    """One channel, and the commands that use it."""

    def __init__(self, port: str, host: str, authority: str) -> None:
        with open(authority, "rb") as file:
            credentials = grpc.ssl_channel_credentials(file.read())
        options = (("grpc.ssl_target_name_override", host), ("grpc.default_authority", host))
        self.channel = grpc.secure_channel(f"127.0.0.1:{port}", credentials, options)
        self.said: list[bytes | None] = []
        self.news = threading.Condition()
        self.replies: Iterator[bytes] = iter(())

    def unary(self, text: str, timeout: str = "20") -> dict[str, Any]:
        call = self.channel.unary_unary(f"/{SERVICE}/Unary")
        try:
            reply, done = call.with_call(
                text.encode(), timeout=float(timeout), metadata=(("x-asked", "me"),)
            )
        except grpc.RpcError as error:
            return {"code": error.code().name, "details": error.details()}
        return {
            "reply": reply.decode() if len(reply) < 1000 else len(reply),
            "begin": [list(pair) for pair in done.initial_metadata() if pair[0] == "x-begin"],
            "end": [[key, str(value)] for key, value in done.trailing_metadata()],
        }

    def many(self, count: str) -> dict[str, Any]:
        """Call again and again; say who has answered how often, and what failed."""
        names: dict[str, int] = {}
        for _ in range(int(count)):
            told = self.unary("hello")
            name = told["reply"].split()[0] if "reply" in told else f"{told}"
            names[name] = names.get(name, 0) + 1
        return names

    def cancel(self) -> dict[str, Any]:
        call = self.channel.unary_unary(f"/{SERVICE}/Unary").future(b"wait")
        sys.stdin.readline()
        call.cancel()
        return {"cancelled": call.cancelled()}

    def stream(self, count: str) -> dict[str, Any]:
        replies = self.channel.unary_stream(f"/{SERVICE}/Stream")(count.encode(), timeout=20)
        return {"replies": [reply.decode() for reply in replies]}

    def collect(self, count: str) -> dict[str, Any]:
        parts = (b"x" * 1000 for _ in range(int(count)))
        reply = self.channel.stream_unary(f"/{SERVICE}/Collect")(parts, timeout=20)
        return {"reply": reply.decode()}

    def talk(self) -> dict[str, Any]:
        """Begin a call in which both sides speak in turn; ``say`` goes on with it."""

        def requests() -> Iterator[bytes]:
            while True:
                with self.news:
                    while not self.said:
                        self.news.wait()
                    said = self.said.pop(0)
                if said is None:
                    return
                yield said

        self.replies = self.channel.stream_stream(f"/{SERVICE}/Talk")(requests(), timeout=60)
        return {}

    def say(self, text: str) -> dict[str, Any]:
        with self.news:
            self.said.append(text.encode())
            self.news.notify()
        return {"reply": next(self.replies).decode()}

    def end(self) -> dict[str, Any]:
        with self.news:
            self.said.append(None)
            self.news.notify()
        return {"rest": [reply.decode() for reply in self.replies]}


def call(port: str, host: str, authority: str) -> None:
    caller = Caller(port, host, authority)
    for line in sys.stdin:
        name, *arguments = line.split()
        say(json.dumps(getattr(caller, name)(*arguments)))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        NAME = sys.argv[2]
        serve()
    else:
        call(*sys.argv[2:])

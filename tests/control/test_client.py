"""The client against a real Unix socket, whatever answers on it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from kamal_proxy.control import client
from kamal_proxy.control.client import ControlClient
from kamal_proxy.control.messages import Event, ServiceDescription
from kamal_proxy.errors import (
    ControlSocketError,
    DeployFailedError,
    ErrorPagesError,
    HostConflictError,
    KamalProxyError,
    NotSupportedYetError,
    PortConflictError,
    ResumedError,
    RolloutNotSetError,
    ServiceNotFoundError,
)
from kamal_proxy.options import (
    DeployOptions,
    PauseOptions,
    RolloutOptions,
    RolloutSplit,
    ServiceOptions,
    StopOptions,
)
from kamal_proxy.udp.options import UdpDeployOptions, UdpOptions

if TYPE_CHECKING:
    from pathlib import Path

OPTIONS = DeployOptions(
    service="app/é", targets=("t1:80",), service_options=ServiceOptions(hosts=("é.example",))
)
Start = Callable[..., list[bytes]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "proxy.sock"


@pytest.fixture
def answering(path: Path) -> Iterator[Start]:
    """Start a server that reads one request, sends the given parts and closes."""
    threads: list[threading.Thread] = []

    def start(*parts: bytes, listen: Callable[[], object] = lambda: None) -> list[bytes]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        requests: list[bytes] = []

        def serve() -> None:
            with listener:
                listen()
                listener.bind(str(path))
                listener.listen()
                ready.set()
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as reader:
                    head = b""
                    while not head.endswith(b"\r\n\r\n"):
                        head += reader.readline()
                    length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                    requests.append(head + reader.read(int(length or 0)))
                    for part in parts:
                        try:
                            connection.sendall(part)
                        except OSError:  # the client has heard enough
                            return

        ready = threading.Event()
        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        if listen.__name__ == "<lambda>":
            assert ready.wait(10)
        return requests

    yield start
    for thread in threads:
        thread.join()


def reply(status: str, body: object, content_type: str = "application/json") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(data)}"
    return head.encode() + b"\r\n\r\n" + data


STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: object) -> bytes:
    line = data if isinstance(data, bytes) else json.dumps(data).encode() + b"\n"
    return b"%x\r\n%s\r\n" % (len(line), line)


def seen(_: Event) -> None:
    """Take an event and do nothing."""


def test_services(path: Path, answering: Start) -> None:
    requests = answering(
        reply("200 OK", {"services": [{"name": "a", "hosts": ["h"], "tls": True, "draining": 2}]})
    )
    assert ControlClient(path).services() == [
        ServiceDescription(name="a", hosts=("h",), tls=True, draining=2)
    ]
    assert requests[0].startswith(b"GET /v1/services HTTP/1.1\r\nHost: localhost\r\n")


def test_remove(path: Path, answering: Start) -> None:
    requests = answering(b"HTTP/1.1 204 No Content\r\n\r\n")
    ControlClient(path).remove("a b/\udcff%")
    assert requests[0].startswith(b"DELETE /v1/services/a%20b%2F%FF%25 HTTP/1.1\r\n")


LONG: list[tuple[Callable[[ControlClient, str], object], str, str, dict[str, Any]]] = [
    (lambda client, name: client.pause(name, PauseOptions(max_pause=5.0), seen),
     "POST", "/services/{}/pause", {"max_pause": 5.0}),
    (lambda client, name: client.stop(name, StopOptions(message="é"), seen),
     "POST", "/services/{}/stop", {"message": "é"}),
    (lambda client, name: client.deploy_rollout(name, RolloutOptions(targets=("t1:80",)), seen),
     "PUT", "/services/{}/rollout", {"targets": ["t1:80"]}),
    (lambda client, name: client.deploy_udp(
        UdpDeployOptions(service=name, targets=("g:1",), udp_options=UdpOptions(port=9)), seen),
     "PUT", "/udp-services/{}", {"targets": ["g:1"], "udp_options": {"port": 9}}),
]  # fmt: skip
SHORT: list[tuple[Callable[[ControlClient, str], object], str, str, dict[str, Any] | None]] = [
    (lambda client, name: client.remove(name), "DELETE", "/services/{}", None),
    (lambda client, name: client.resume(name), "POST", "/services/{}/resume", None),
    (lambda client, name: client.set_rollout(name, RolloutSplit(percentage=3, allowlist=("a",))),
     "PUT", "/services/{}/rollout/split", {"percentage": 3, "allowlist": ["a"]}),
    (lambda client, name: client.stop_rollout(name), "DELETE", "/services/{}/rollout/split", None),
]  # fmt: skip
NAMES = [
    "pause", "stop", "deploy_rollout", "deploy_udp", "remove", "resume", "set_rollout",
    "stop_rollout",
]  # fmt: skip


@pytest.mark.parametrize(("call", "method", "place", "body"), LONG, ids=NAMES[:4])
def test_what_takes_long(
    path: Path,
    answering: Start,
    call: Callable[[ControlClient, str], object],
    method: str,
    place: str,
    body: dict[str, Any],
) -> None:
    draining = {"event": "draining", "in_flight": 2}
    requests = answering(STREAM, chunk(draining), chunk({"event": "done", "cancelled": 2}))
    assert call(ControlClient(path), "a/é") == Event(event="done", cancelled=2)
    head, _, sent = requests[0].partition(b"\r\n\r\n")
    where = place.format("a%2F%C3%A9")
    assert head.startswith(f"{method} /v1{where} HTTP/1.1\r\n".encode())
    assert json.loads(sent) == body


@pytest.mark.parametrize(("call", "method", "place", "body"), SHORT, ids=NAMES[4:])
def test_what_is_short(
    path: Path,
    answering: Start,
    call: Callable[[ControlClient, str], object],
    method: str,
    place: str,
    body: dict[str, Any] | None,
) -> None:
    requests = answering(b"HTTP/1.1 204 No Content\r\n\r\n")
    call(ControlClient(path), "a b")
    head, _, sent = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(f"{method} /v1{place.format('a%20b')} HTTP/1.1\r\n".encode())
    assert (json.loads(sent) if sent else None) == body


@pytest.mark.parametrize("call", [row[0] for row in (*LONG, *SHORT)], ids=NAMES)
def test_no_service_has_an_empty_name(
    path: Path, call: Callable[[ControlClient, str], object]
) -> None:
    with pytest.raises(ServiceNotFoundError, match=r"^service not found$"):
        call(ControlClient(path, start_wait=0), "")


@pytest.mark.parametrize("call", [row[0] for row in (*LONG, *SHORT)], ids=NAMES)
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("service_not_found", ServiceNotFoundError),
        ("rollout_not_set", RolloutNotSetError),
        ("resumed", ResumedError),
        ("error_pages", ErrorPagesError),
        ("port_conflict", PortConflictError),
    ],
)
def test_every_refusal_is_the_servers_error(
    path: Path,
    answering: Start,
    call: Callable[[ControlClient, str], object],
    code: str,
    kind: type[KamalProxyError],
) -> None:
    answering(reply("409 Conflict", {"error": {"code": code, "message": "no", "details": []}}))
    with pytest.raises(KamalProxyError, match=r"^no$") as caught:
        call(ControlClient(path), "a")
    assert type(caught.value) is kind


def test_a_pause_that_was_ended_meanwhile(path: Path, answering: Start) -> None:
    failed = {"event": "failed", "code": "resumed", "message": "resumed"}
    answering(STREAM, chunk({"event": "draining"}), chunk(failed), b"0\r\n\r\n")
    events: list[Event] = []
    with pytest.raises(ResumedError, match=r"^resumed$"):
        ControlClient(path).pause("a", PauseOptions(), events.append)
    assert events == [Event(event="draining")]


@pytest.mark.parametrize("call", [row[0] for row in SHORT], ids=NAMES[4:])
def test_a_short_call_is_not_waited_for_without_end(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[ControlClient, str], object]
) -> None:
    monkeypatch.setattr(client, "REPLY_TIMEOUT", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ControlSocketError, match=r"^the proxy did not answer in time$"):
            call(ControlClient(path), "a")


@pytest.mark.parametrize(
    ("call", "what"),
    [*zip((row[0] for row in LONG), ("pause", "stop", "deploy", "deploy"), strict=True)],
    ids=NAMES[:4],
)
def test_a_stream_that_breaks_is_named(
    path: Path, answering: Start, call: Callable[[ControlClient, str], object], what: str
) -> None:
    answering(STREAM, chunk({"event": "draining"}), b"0\r\n\r\n")
    with pytest.raises(ControlSocketError) as caught:
        call(ControlClient(path), "a")
    assert str(caught.value) == ENDED + f"the {what} was complete; it may have stopped"


def test_deploy(path: Path, answering: Start) -> None:
    probe = {"event": "probe", "target": "t1:80", "ok": True, "result": "200", "elapsed": 0.5}
    done = {"event": "done", "completed": 3}
    # Chunks need not end where events do.
    whole = json.dumps(probe).encode() + b"\n" + json.dumps(done).encode() + b"\n"
    requests = answering(STREAM, chunk(whole[:10]), chunk(whole[10:]), b"0\r\n\r\n")
    events: list[Event] = []
    last = ControlClient(path).deploy(OPTIONS, events.append)
    assert last == Event(event="done", completed=3)
    assert events == [
        Event(event="probe", target="t1:80", ok=True, result="200", elapsed=0.5),
        last,
    ]
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"PUT /v1/services/app%2F%C3%A9 HTTP/1.1\r\n")
    assert b"Content-Type: application/json" in head
    assert json.loads(body) == {"targets": ["t1:80"], "service_options": {"hosts": ["é.example"]}}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("deploy_failed", DeployFailedError),
        ("host_conflict", HostConflictError),
        ("not_supported_yet", NotSupportedYetError),
        ("code_of_a_later_version", KamalProxyError),
    ],
)
def test_a_failed_deploy_is_the_servers_error(
    path: Path, answering: Start, code: str, kind: type[KamalProxyError]
) -> None:
    failed = {"event": "failed", "code": code, "message": "it failed", "details": ["a", "b"]}
    answering(STREAM, chunk({"event": "healthy"}), chunk(failed), b"0\r\n\r\n")
    events: list[Event] = []
    with pytest.raises(KamalProxyError, match=r"^it failed$") as caught:
        ControlClient(path).deploy(OPTIONS, events.append)
    assert type(caught.value) is kind
    assert caught.value.details == ("a", "b")
    assert [event.event for event in events] == ["healthy"]


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        ("404 Not Found", "service_not_found", ServiceNotFoundError),
        ("409 Conflict", "host_conflict", HostConflictError),
        ("422 Unprocessable Content", "not_supported_yet", NotSupportedYetError),
        ("500 Internal Server Error", "what", KamalProxyError),
    ],
)
def test_a_refusal_is_the_servers_error(
    path: Path, answering: Start, status: str, code: str, kind: type[KamalProxyError]
) -> None:
    answering(reply(status, {"error": {"code": code, "message": "no", "details": ["x"]}}))
    with pytest.raises(KamalProxyError, match=r"^no$") as caught:
        ControlClient(path).deploy(OPTIONS, seen)
    assert type(caught.value) is kind
    assert caught.value.details == ("x",)


def every_kind(of: type[KamalProxyError] = KamalProxyError) -> Iterator[type[KamalProxyError]]:
    """Yield the public classes of errors."""
    if of.__module__ == KamalProxyError.__module__:
        yield of
    for kind in of.__subclasses__():
        yield from every_kind(kind)


@pytest.mark.parametrize("kind", tuple(every_kind()))
def test_every_error_can_be_made_again(
    path: Path, answering: Start, kind: type[KamalProxyError]
) -> None:
    """Whatever arguments its class takes besides."""
    answering(reply("500 X", {"error": {"code": kind.code, "message": "no", "details": ["x"]}}))
    with pytest.raises(KamalProxyError, match=r"^no$") as caught:
        ControlClient(path).certificates()
    assert type(caught.value) is kind
    assert caught.value.details == ("x",)


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.code for kind in every_kind()]
    assert len(codes) > 10
    assert sorted(set(codes)) == sorted(codes)


NONSENSE = "the proxy's answer makes no sense: "
ENDED = "the proxy ended the connection before "


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([], ENDED + "its answer was complete"),
        ([b"SSH-2.0-x\r\n"], ENDED + "its answer was complete"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"], ENDED + "its answer was complete"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000], ENDED + "its answer was complete"),
        ([b"HTTP/1.1 200 " + b"x" * 100_000], ENDED + "its answer was complete"),
        ([reply("200 OK", b"\xff")], NONSENSE + "not JSON"),
        ([reply("200 OK", b"[" * 200_000)], NONSENSE + "not JSON"),
        ([reply("200 OK", [])], NONSENSE + "the list of services is missing"),
        ([reply("200 OK", {"services": {}})], NONSENSE + "the list of services is missing"),
        ([reply("200 OK", {"services": [1]})], NONSENSE + "the document must be a JSON object"),
        ([reply("200 OK", {"services": [{}]})], NONSENSE + "missing field name"),
        ([reply("200 OK", {"services": [{"name": "a", "x": 1}]})], NONSENSE + "unknown field x"),
        ([reply("500 X", b"oops")], NONSENSE + "status 500 without a reason"),
        ([reply("404 X", {"error": "x"})], NONSENSE + "status 404 without a reason"),
        ([reply("404 X", {"error": {"code": 1, "message": "x"}})], NONSENSE + "status 404"),
        ([reply("302 X", [])], NONSENSE + "status 302 without a reason"),
    ],
)
def test_answers_that_make_no_sense(
    path: Path, answering: Start, answer: list[bytes], message: str
) -> None:
    answering(*answer)
    with pytest.raises(ControlSocketError) as caught:
        ControlClient(path).services()
    assert str(caught.value).startswith(message)


def test_an_answer_has_a_largest_size(
    path: Path, answering: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_BODY", 100)
    answering(reply("200 OK", b" " * 101))
    with pytest.raises(ControlSocketError, match="more than 100 bytes"):
        ControlClient(path).services()


def test_a_silent_proxy_is_not_waited_for_without_end(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "REPLY_TIMEOUT", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ControlSocketError, match=r"^the proxy did not answer in time$"):
            ControlClient(path).services()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], ENDED + "the deploy was complete; it may have stopped"),
        ([b"0\r\n\r\n"], ENDED + "the deploy was complete; it may have stopped"),
        ([chunk({"event": "healthy"})], ENDED),
        ([chunk({"event": "healthy"}), b"5\r\n{"], ENDED),
        ([chunk(b'{"event": "done"}'), b"0\r\n\r\n"], ENDED + "the deploy was complete"),
        ([chunk(b"nonsense\n")], NONSENSE + "not JSON"),
        ([chunk(b"{}\n")], NONSENSE + "missing field event"),
        ([chunk({"event": "done", "x": 1})], NONSENSE + "unknown field x"),
        ([chunk({"event": "done", "completed": "1"})],
         NONSENSE + "completed must be a whole number"),
    ],
)  # fmt: skip
def test_streams_that_break(path: Path, answering: Start, parts: list[bytes], message: str) -> None:
    answering(STREAM, *parts)
    with pytest.raises(ControlSocketError) as caught:
        ControlClient(path).deploy(OPTIONS, seen)
    assert str(caught.value).startswith(message)


def test_an_event_has_a_largest_size(
    path: Path, answering: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "MAX_EVENT", 100)
    answering(STREAM, chunk(b" " * 101 + b"\n"))
    with pytest.raises(ControlSocketError, match="an event of more than 100 bytes"):
        ControlClient(path).deploy(OPTIONS, seen)


def test_an_answer_that_is_no_stream(path: Path, answering: Start) -> None:
    answering(reply("200 OK", {"event": "done"}))
    with pytest.raises(ControlSocketError, match="no stream of events"):
        ControlClient(path).deploy(OPTIONS, seen)


def test_an_error_of_the_listener_is_not_taken_for_the_proxys(path: Path, answering: Start) -> None:
    def fail(_: Event) -> None:
        raise BrokenPipeError

    answering(STREAM, chunk({"event": "healthy"}))
    with pytest.raises(BrokenPipeError):
        ControlClient(path).deploy(OPTIONS, fail)


def test_a_missing_socket(path: Path) -> None:
    with pytest.raises(ControlSocketError) as caught:
        ControlClient(path, start_wait=0).services()
    assert str(caught.value) == f"dial unix {path}: connect: no such file or directory"


def test_a_socket_that_nobody_listens_on(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abandoned:
        abandoned.bind(str(path))
    with pytest.raises(ControlSocketError) as caught:
        ControlClient(path, start_wait=0).services()
    assert str(caught.value) == f"dial unix {path}: connect: connection refused"


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 200, "invalid argument"), ("file/x", "not a directory")]
)
def test_what_will_not_pass_is_not_waited_for(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / name
    # The wait would outlast the test run.
    with pytest.raises(ControlSocketError) as caught:
        ControlClient(path, start_wait=1e6).services()
    assert str(caught.value) == f"dial unix {path}: connect: {reason}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may connect to anything")
def test_a_socket_of_someone_else(path: Path, answering: Start) -> None:
    answering(reply("200 OK", {"services": []}))
    path.chmod(0)
    with pytest.raises(ControlSocketError, match="permission denied"):
        ControlClient(path, start_wait=1e6).services()
    path.chmod(0o600)
    ControlClient(path).services()


@pytest.mark.parametrize("stale", [False, True])
def test_a_proxy_that_is_coming_up_is_waited_for(
    path: Path, answering: Start, monkeypatch: pytest.MonkeyPatch, stale: bool
) -> None:
    tried = threading.Event()
    if stale:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as abandoned:
            abandoned.bind(str(path))

    def wait_for_the_first_attempt() -> None:
        assert tried.wait(10)
        path.unlink(missing_ok=True)

    def pause(seconds: float) -> None:
        assert seconds == client.POLL_INTERVAL
        tried.set()

    monkeypatch.setattr("kamal_proxy.control.client.time.sleep", pause)
    answering(reply("200 OK", {"services": []}), listen=wait_for_the_first_attempt)
    assert ControlClient(path, start_wait=10).services() == []
    assert tried.is_set()


def test_the_socket_of_the_environment(
    path: Path, answering: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KAMAL_PROXY_SOCKET", str(path))
    answering(reply("200 OK", {"services": []}))
    listed: list[Any] = list(ControlClient().services())
    assert listed == []

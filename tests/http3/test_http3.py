"""HTTP/3 as a part of the proxy that may be missing, and what is announced about it."""

from __future__ import annotations

import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kamal_proxy.errors import InvalidOptionsError, ListenError
from kamal_proxy.http import http3

if TYPE_CHECKING:
    from pathlib import Path


def run(script: str) -> str:
    """Run a script and return what it printed."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_alt_svc() -> None:
    assert http3.alt_svc(8443) == b'h3=":8443"; ma=86400'


def test_http3_is_there() -> None:
    http3.require_http3()


def test_aioquic_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http3, "find_spec", lambda _name: None)
    with pytest.raises(InvalidOptionsError, match=r"pip install 'kamal-proxy\[http3\]'"):
        http3.listen(["127.0.0.1"], 0)


def test_another_aioquic_is_there(tmp_path: Path) -> None:
    (tmp_path / "aioquic").mkdir()
    (tmp_path / "aioquic" / "__init__.py").write_text("")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from kamal_proxy.http import http3\n"
        "try:\n    http3.require_http3()\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    out = run(script)
    assert out.startswith("InvalidOptionsError http3 can't use the aioquic")
    assert "pip install 'kamal-proxy[http3]'" in out


def test_nothing_is_loaded_before_it_is_wanted() -> None:
    script = (
        "import sys, kamal_proxy.http.http3, kamal_proxy.http.server\n"
        "print(*sorted({'aioquic', 'pylsqpack'} & set(sys.modules)))"
    )
    out = run(script)
    assert out.strip() == ""


def test_listening() -> None:
    first = http3.listen(["127.0.0.1"], 0)[0]
    with first:
        port = first.getsockname()[1]
        with pytest.raises(
            ListenError, match=rf"listen udp 127.0.0.1:{port}: bind: address already"
        ):
            http3.listen(["127.0.0.2", "127.0.0.1"], port)
        # None is left bound.
        with http3.listen(["127.0.0.2"], port)[0]:
            pass
    [everywhere] = http3.listen([], 0)
    with everywhere:
        assert everywhere.type == socket.SOCK_DGRAM
    with pytest.raises(ListenError, match=r"listen udp nowhere\.invalid:0: "):
        http3.listen(["nowhere.invalid"], 0)

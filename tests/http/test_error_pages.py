"""The error pages of a service: read whole or refused, and kept when their directory goes."""

from __future__ import annotations

import os
import shutil
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamal_proxy.errors import ErrorPagesError
from kamal_proxy.http.error_pages import ErrorPages, load_error_pages
from kamal_proxy.http.templates import TemplateError, parse
from tests.fuzzing import at_least
from tests.no_files import make_device, make_directory, make_fifo, make_loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MIB = 1024 * 1024


def load(directory: Path, **contents: bytes) -> ErrorPages:
    """Load a directory with a file ``<status>.html`` for each ``p<status>``."""
    for name, content in contents.items():
        directory.joinpath(f"{name[1:]}.html").write_bytes(content)
    return load_error_pages(str(directory))


def refused(directory: Path | str) -> list[str]:
    """Return the details of the error, without the directory that each begins with."""
    with pytest.raises(ErrorPagesError) as caught:
        load_error_pages(str(directory))
    assert str(caught.value) == "unable to load error pages"
    assert caught.value.code == "error_pages"
    assert all(detail.startswith(str(directory)) for detail in caught.value.details)
    return [detail.removeprefix(str(directory)).lstrip("/") for detail in caught.value.details]


def test_a_page_is_that_of_its_status(tmp_path: Path) -> None:
    pages = load(tmp_path, p404=b"<p>not here", p503=b"<p>{{ .Message }}</p>", p500=b"")
    assert pages.render(404) == b"<p>not here"
    assert pages.render(404, "a message") == b"<p>not here"
    assert pages.render(503) == b"<p></p>"
    assert pages.render(503, "<noon> \ud800é") == "<p>&lt;noon&gt; \ufffdé</p>".encode()
    assert pages.render(500) == b""
    assert pages.render(502) is None
    assert pages.render(0) is None


def test_pages_are_read_once(tmp_path: Path) -> None:
    pages = load(tmp_path, p503=b"before")
    tmp_path.joinpath("503.html").write_bytes(b"after")
    shutil.rmtree(tmp_path)
    assert pages.render(503) == b"before"


def test_bytes_that_are_not_utf_8_are_kept(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf\xff\xfe\xed\xa0\x80caf\xe9\r\n\0"
    pages = load(tmp_path, p503=content + b"{{ .Message }}\xc3")
    assert pages.render(503) == content + b"\xc3"
    assert pages.render(503, "\xa9") == content + b"\xc2\xa9\xc3"


def test_only_html_in_the_directory_itself_counts(tmp_path: Path) -> None:
    tmp_path.joinpath("old").mkdir()
    for name in ("old/404.html", "413.HTML", "500.html.erb", "502.htm", "html", "504"):
        tmp_path.joinpath(name).write_bytes(b"{{ nope }}")
    for name in ("0503.html", "503a.html", "\u0665\u0660\u0663.html", " 503.html", ".html"):
        tmp_path.joinpath(name).write_bytes(b"another")
    assert load(tmp_path).templates == {}
    assert set(load(tmp_path, p503=b"this").templates) == {503}


def test_a_link_to_a_page_is_one(tmp_path: Path) -> None:
    pages, elsewhere = tmp_path / "pages", tmp_path / "page"
    pages.mkdir()
    elsewhere.write_bytes(b"linked")
    pages.joinpath("503.html").symlink_to(elsewhere)
    assert load(pages).render(503) == b"linked"


@given(st.binary(max_size=50), st.text(max_size=50))
@example(b"a{b}}\xff", "m")
def test_a_page_without_actions_is_its_file(content: bytes, message: str) -> None:
    content = content.replace(b"{{", b"")
    template = parse(content.decode("utf-8", "surrogateescape"))
    assert ErrorPages({503: template}).render(503, message) == content


@pytest.mark.fuzz
@given(st.binary() | st.lists(st.sampled_from([b"{{ .Message }}", b"\xc3", b"\xa9", b"<", b"p>"])))
@at_least(200)
def test_any_page_can_be_sent(parts: bytes | list[bytes]) -> None:
    content = parts if isinstance(parts, bytes) else b"".join(parts)
    try:
        template = parse(content.decode("utf-8", "surrogateescape"))
    except TemplateError:
        return
    pages = ErrorPages({503: template})
    assert pages.render(503) == content.replace(b"{{ .Message }}", b"")
    assert pages.render(503, "\udcff\ud800\0") == content.replace(
        b"{{ .Message }}", "\ufffd\ufffd\ufffd".encode()
    )


def test_no_such_directory(tmp_path: Path) -> None:
    assert refused(tmp_path / "pages") == [": no such directory"]


@pytest.mark.parametrize("directory", ["/\0", "/\ud800"])
def test_what_is_no_path(directory: str) -> None:
    with pytest.raises(ErrorPagesError) as caught:
        load_error_pages(directory)
    assert caught.value.details == ("/\ufffd: not a path",)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    tmp_path.joinpath("503.html").write_bytes(b"")
    assert refused(tmp_path / "503.html") == [": not a directory"]


def test_a_directory_without_pages(tmp_path: Path) -> None:
    assert refused(tmp_path) == [": no *.html in it"]
    tmp_path.joinpath("503.htm").write_bytes(b"")
    assert refused(tmp_path) == [": no *.html in it"]


def make_dangling(path: Path) -> None:
    path.symlink_to("missing")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_fifo, "not a regular file"),
        (make_device, "not a regular file"),
        (make_directory, "is a directory"),
        (make_dangling, "no such file or directory"),
        (make_loop, "too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    make(tmp_path / "503.html")
    before = len(os.listdir("/proc/self/fd"))
    assert refused(tmp_path) == [f"503.html: {reason}"]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_socket_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("503.html")
        assert refused(tmp_path) == ["503.html: no such device or address"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    tmp_path.joinpath("503.html").write_bytes(b"")
    tmp_path.joinpath("503.html").chmod(0)
    assert refused(tmp_path) == ["503.html: permission denied"]
    tmp_path.chmod(0)
    try:
        assert refused(tmp_path) == [": permission denied"]
    finally:
        tmp_path.chmod(0o700)


def test_every_bad_page_is_named(tmp_path: Path) -> None:
    for name, content in [
        ("404.html", b"<p>\n{{ range .Items }}"),
        ("500.html", b"fine"),
        ("503.html", b"{{ if .Message }}"),
        ("layout.html", b"\xff\n\n{{ \x1b\xff }}"),
    ]:
        tmp_path.joinpath(name).write_bytes(content)
    supported = "{{ .Message }}, {{ if .Message }}, {{ with .Message }}, {{ else }} and {{ end }}"
    assert refused(tmp_path) == [
        f"404.html: line 2: {{{{ range .Items }}}} is not supported here; what is: {supported}",
        "503.html: line 1: {{ if }} without {{ end }}",
        f"layout.html: line 3: {{{{    }}}} is not supported here; what is: {supported}",
    ]


def test_a_name_is_shown_as_it_can_be_printed(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff\n.html", "wb") as file:
        file.write(b"{{")
    assert refused(tmp_path) == ["\ufffd\ufffd.html: line 1: an action does not end with }}"]


def test_the_size_of_a_page_is_limited(tmp_path: Path) -> None:
    assert load(tmp_path, p503=b"a" * MIB).render(503) == b"a" * MIB
    tmp_path.joinpath("503.html").write_bytes(b"a" * (MIB + 1))
    assert refused(tmp_path) == ["503.html: larger than 1 MiB"]


def test_the_size_of_a_sparse_page_is_limited(tmp_path: Path) -> None:
    with tmp_path.joinpath("503.html").open("wb") as file:
        file.truncate(1 << 40)
    assert refused(tmp_path) == ["503.html: larger than 1 MiB"]


def test_the_size_of_all_pages_is_limited(tmp_path: Path) -> None:
    for status in range(500, 508):
        tmp_path.joinpath(f"{status}.html").write_bytes(b"a" * MIB)
    assert len(load(tmp_path, p510=b"").templates) == 9
    tmp_path.joinpath("508.html").write_bytes(b"a")
    assert refused(tmp_path) == ["508.html: all pages together are larger than 8 MiB"]


def test_the_number_of_pages_is_limited(tmp_path: Path) -> None:
    for status in range(400, 500):
        tmp_path.joinpath(f"{status}.html").write_bytes(b"")
    assert len(load(tmp_path).templates) == 100
    tmp_path.joinpath("500.html").write_bytes(b"")
    assert refused(tmp_path) == [": more than 100 *.html in it"]

"""The built-in error pages: complete, small, honest, and safe with any message."""

from __future__ import annotations

import html
from html.parser import HTMLParser
from http import HTTPStatus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamal_proxy.http import pages

COMPLETE = [404, 413, 502, 503, 504]
EMPTY_ELEMENTS = {"meta"}


class Outline(HTMLParser):
    """Checks that elements nest, and collects them with the text of each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: dict[str, str] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data


@pytest.mark.parametrize("status", COMPLETE)
def test_a_page_is_complete_and_self_contained(status: int) -> None:
    page = pages.render(status)
    text = page.decode("utf-8")
    outline = Outline(text)
    assert text.startswith("<!DOCTYPE html>\n")
    assert outline.seen[:2] == ["html", "head"]
    assert ("charset", "utf-8") in outline.attributes
    assert ("name", "viewport") in outline.attributes
    assert "prefers-color-scheme: dark" in text
    assert not {"script", "link", "img", "a"} & set(outline.seen)
    assert not {"src", "href"} & {name for name, _ in outline.attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert outline.text["small"] == f"Error {status}"
    assert outline.text["h1"] in outline.text["title"]
    assert outline.text["p"].endswith(".")
    assert len(page) < 3 * 1024
    assert b"kamal" not in page.lower()


def test_every_complete_page_says_something_of_its_own() -> None:
    outlines = [Outline(pages.render(status).decode()) for status in COMPLETE]
    assert len({outline.text["h1"] for outline in outlines}) == len(COMPLETE)
    assert len({outline.text["p"] for outline in outlines}) == len(COMPLETE)


@pytest.mark.parametrize("status", [404, 413, 502, 503, 504, 500, 599])
def test_a_page_without_a_message_is_made_once(status: int) -> None:
    assert pages.render(status) is pages.render(status, "")


@pytest.mark.parametrize(
    ("status", "page"),
    [
        (400, b"<h1>400 Bad Request</h1>"),
        (405, b"<h1>405 Method Not Allowed</h1>"),
        (408, b"<h1>408 Request Timeout</h1>"),
        (414, b"<h1>414 Request URI Too Long</h1>"),
        (417, b"<h1>417 Expectation Failed</h1>"),
        (421, b"<h1>421 Misdirected Request</h1>"),
        (431, b"<h1>431 Request Header Fields Too Large</h1>"),
        (499, b"<h1>499 Client Closed Request</h1>"),
        (500, b"<h1>500 Internal Server Error</h1>"),
        (501, b"<h1>501 Not Implemented</h1>"),
        (505, b"<h1>505 HTTP Version Not Supported</h1>"),
        (599, b"<h1>599 </h1>"),
    ],
)
def test_any_other_status_is_a_bare_heading(status: int, page: bytes) -> None:
    assert pages.render(status) == page
    assert pages.render(status, "a message") == page


def test_every_registered_status_has_a_reason_and_a_page() -> None:
    for status in HTTPStatus:
        assert pages.reason(status)
        assert f"{status.value}".encode() in pages.render(status)
    assert pages.reason(413) == "Request Entity Too Large"
    assert pages.reason(418) == "I'm a teapot"
    assert pages.reason(422) == "Unprocessable Entity"
    assert pages.reason(499) == "Client Closed Request"
    assert pages.reason(599) == ""


def test_the_message_replaces_the_text_of_503() -> None:
    plain, told = (Outline(pages.render(503, text).decode()) for text in ("", "Back at noon"))
    assert told.text["p"] == "Back at noon"
    assert told.text["h1"] == plain.text["h1"]
    assert plain.text["p"] not in pages.render(503, "Back at noon").decode()


@pytest.mark.parametrize("status", [404, 413, 502, 504])
def test_other_pages_have_no_room_for_a_message(status: int) -> None:
    assert pages.render(status, "a message") == pages.render(status)


@pytest.mark.parametrize(
    ("message", "escaped"),
    [
        ("a & b", "a &amp; b"),
        ("<b>noon</b>", "&lt;b&gt;noon&lt;/b&gt;"),
        ('"it\'s"', "&#34;it&#39;s&#34;"),
        ("1 + 1", "1 &#43; 1"),
        ("&amp;", "&amp;amp;"),
        ("a\x00b", "a\ufffdb"),
        ("a\ud800b", "a\ufffdb"),
        ("{status} %s {{ .Message }}", "{status} %s {{ .Message }}"),
        ("`/\\=é\u2028😀", "`/\\=é\u2028😀"),
        (" ", " "),
    ],
)
def test_the_message_is_escaped_as_the_original_does(message: str, escaped: str) -> None:
    page = pages.render(503, message)
    assert f'<p dir="auto">{escaped}</p>'.encode() in page
    assert pages.escape(message) == escaped


@given(st.text(min_size=1))
@example("</p><script>alert(1)</script>")
@example("--></style>]]>")
def test_no_message_changes_the_page_around_it(message: str) -> None:
    before, after = pages.render(503, "@@").decode().split("@@")
    page = pages.render(503, message).decode()
    assert page.startswith(before)
    assert page.endswith(after)
    inside = page[len(before) : len(page) - len(after)]
    assert not set("<>\"'\0") & set(inside)
    assert inside.replace("&#43;", "+") == html.escape(message.replace("\0", "\ufffd")).replace(
        "&quot;", "&#34;"
    ).replace("&#x27;", "&#39;")


def test_the_content_type() -> None:
    assert pages.CONTENT_TYPE == b"text/html; charset=utf-8"

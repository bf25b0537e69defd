"""The templates of error pages: what Go's html/template makes of them is what ours does."""

from __future__ import annotations

import html

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kamal_proxy.http import pages
from kamal_proxy.http.markup import Place, Scanner
from kamal_proxy.http.templates import TemplateError, parse
from tests.fuzzing import at_least

MESSAGE = "a+b<c>&\"'\0é"
ESCAPED = "a&#43;b&lt;c&gt;&amp;&#34;&#39;\ufffdé"

# Template, page without a message, page with MESSAGE ("@" stands for what Go made of it): what
# Go 1.26 answers, also for no arguments at all (every error but that of a stopped service).
FROM_GO = [
    ("", "", ""),
    (" \n", " \n", " \n"),
    ("plain", "plain", "plain"),
    ("{{ .Message }}", "", "@"),
    ("{{.Message}}", "", "@"),
    ("{{\n.Message\n}}", "", "@"),
    ("{{ $.Message }}", "", "@"),
    ("{{.Message}}, {{.Message}}", ", ", "@, @"),
    ("{ {{ .Message }} }", "{  }", "{ @ }"),
    ("{{ .Message}} }} }", " }} }", "@ }} }"),
    ("a { b", "a { b", "a { b"),
    # trimming
    ("{{- .Message -}}", "", "@"),
    (" a {{- .Message -}} b ", " ab ", " a@b "),
    ("a {{ .Message -}}\n b", "a b", "a @b"),
    ("x \u00a0{{- .Message}}", "x \u00a0", "x \u00a0@"),
    ("x \f{{- .Message}}", "x \f", "x \f@"),
    ("{{- if .Message -}} a {{- else -}} b {{- end -}} c", "bc", "ac"),
    ("a {{- /* c */ -}} {{ .Message }}", "a", "a@"),
    # comments
    ("a{{/* c */}}b", "ab", "ab"),
    ("a {{- /* c */ -}} b", "ab", "ab"),
    ("a{{- /* c */}}b", "ab", "ab"),
    ("a{{/* {{ x }} */}}b", "ab", "ab"),
    ("{{/**/}}", "", ""),
    # conditions
    ("{{if .Message}}<p>{{.Message}}</p>{{else}}none{{end}}", "none", "<p>@</p>"),
    ("{{if.Message}}y{{end}}", "", "y"),
    ("{{if .Message}}a{{end }}", "", "a"),
    ("{{ if $.Message }}a{{end}}", "", "a"),
    ("{{.Message}}{{if .Message}}{{else}}{{end}}{{/**/}}", "", "@"),
    ("{{ if not .Message }}none{{ else }}{{ .Message }}{{ end }}", "none", "@"),
    ("{{ if not .Message }}a{{ else if .Message }}b{{.Message}}{{ else }}c{{ end }}", "a", "b@"),
    ("{{ if .Message}}a{{else\nif .Message}}b{{end}}", "", "a"),
    ("{{ if .Message }}a{{ else if not .Message }}b{{ else }}c{{ end }}", "b", "a"),
    ("{{if .Message}}a{{if not .Message}}b{{else}}c{{end}}d{{else}}e{{end}}f", "ef", "acdf"),
    ("{{if not .Message}}a{{if .Message}}b{{else}}c{{end}}d{{end}}f", "acdf", "f"),
    # with
    ("{{ with .Message }}{{ . }}{{ else }}none{{ end }}", "none", "@"),
    ("{{ with .Message }}{{ $.Message }}{{ end }}", "", "@"),
    ("{{ with .Message }}a{{ else with .Message }}b{{ else }}c{{ end }}", "c", "a"),
    ("{{ with .Message }}{{ else }}{{ .Message }}n{{ end }}", "n", ""),
    ("{{with .Message}}{{with .}}{{.}}{{end}}{{if .}}a{{end}}{{end}}", "", "@a"),
    ("{{with .Message}}{{if not .}}z{{else}}{{.}}{{end}}{{end}}", "", "@"),
    ("{{ with .Message }}{{ . }}{{ end }}{{ .Message }}", "", "@@"),
    # places
    ("<title>{{.Message}}</title>", "<title></title>", "<title>@</title>"),
    ("<textarea>{{.Message}}</textarea>", "<textarea></textarea>", "<textarea>@</textarea>"),
    ('<p title="{{.Message}}">', '<p title="">', '<p title="@">'),
    ("<p TITLE = '{{.Message}}'>", "<p TITLE = ''>", "<p TITLE = '@'>"),
    ('<p aria-label="a {{.Message}}">', '<p aria-label="a ">', '<p aria-label="a @">'),
    ("<!doctype html>a{{.Message}}", "<!doctype html>a", "<!doctype html>a@"),
    ("<noscript>{{.Message}}</noscript>", "<noscript></noscript>", "<noscript>@</noscript>"),
    ("<style>p {}</style>{{.Message}}", "<style>p {}</style>", "<style>p {}</style>@"),
    ("<script>a<b</script >{{.Message}}", "<script>a<b</script >", "<script>a<b</script >@"),
    ("<p class=a\nid='>'>{{.Message}}", "<p class=a\nid='>'>", "<p class=a\nid='>'>@"),
]  # fmt: skip

# The same to a reader: Go leaves out the comments of HTML, and escapes a lone "<".
SEEN_AS_IN_GO = [
    ("a<!-- {{ .Message }} -->b", "a<!--  -->b", "a<!--  -->b"),
    ("<!-- {{ .Message }} --><p>{{ .Message }}", "<!--  --><p>", "<!--  --><p>@"),
    ("<!-- <script> -->{{ .Message }}", "<!-- <script> -->", "<!-- <script> -->@"),
    ("a < b {{.Message}}", "a < b ", "a < b @"),
    ("<![CDATA[{{.Message}}]]>", "<![CDATA[]]>", "<![CDATA[@]]>"),
]

MALFORMED = [
    "a{{-.Message}}", "{{ .Message-}}", "{{ .Message\f}}", "{{\u00a0.Message}}",
    "a{{ /* c */ }}b", "a {{-/* c */}}b", "a{{/* c */ }}b", "a{{/* c */-}} b", "a{{/* c */",
    "a{{/*/}}", "{{-  /* c */}}", "{{.Message}}{{-/**/}}", "{{ .Message", "{{", "{{}}", "{{ }}",
    "{{- }}", "{{- -}}", "{{-}}", "{{{ .Message }}}", "{{ end }}", "{{ else }}",
    "{{ else if .Message }}", "{{ if .Message }}", "{{ with .Message }}a{{ else }}",
    "{{ if .Message }}a{{ else }}b{{ else }}c{{ end }}", "{{ if .Message }}{{ end }}{{ end }}",
    "{{ if .Message }}a{{ else }}b{{ else if .Message }}c{{ end }}", "{{ if }}a{{ end }}",
    "{{ with .Message }}a{{ else if not .Message }}b{{ end }}", "{{ elseif .Message }}",
    "{{ if .Message }}a{{ else with .Message }}b{{ end }}", "{{ if not.Message }}n{{ end }}",
    "{{$ .Message}}", "{{ . Message }}", "{{ nope }}", "{{ ifx .Message }}",
]  # fmt: skip

# Go takes these, and shows them, or fails when the page is asked for.
NOT_SUPPORTED = [
    "{{ . }}", "{{ $ }}", "{{ if . }}y{{ end }}", "{{ with . }}{{ end }}", "{{ .message }}",
    "{{ .Message | html }}", "{{ html .Message }}", "{{ (.Message) }}", '{{ "a" }}',
    "{{ not .Message }}", "{{ if true }}a{{ end }}", "{{ with not .Message }}{{ end }}",
    "{{ with .Message }}{{ .Message }}{{ end }}", "{{ range .Message }}{{ end }}",
    '{{ template "a" }}', '{{ define "a" }}{{ end }}', '{{ block "a" . }}{{ end }}', "{{ break }}",
    "{{ .Status }}", "{{ $m := .Message }}", '{{ if eq .Message "a" }}{{ end }}', "{{ 1 }}",
]  # fmt: skip

# Go escapes differently here, or answers its own page.
NO_PLACE = [
    ("<script>var m = {{ .Message }}</script>", "a script or a style"),
    ("<script>'</scripty>{{ .Message }}", "a script or a style"),
    ("<\u017fcript><script></\u017fcript>{{ .Message }}", "a script or a style"),
    ("<STYLE>{{ .Message }}", "a script or a style"),
    ("<p title={{ .Message }}>", "a tag"),
    ("<p {{ .Message }}>", "a tag"),
    ("<{{ .Message }}>", "a tag"),
    ("</{{ .Message }}>", "a tag"),
    ("<p{{ .Message }}>", "a tag"),
    ("<!-{{ .Message }}>", "a tag"),
    ("<p title='a'{{ .Message }}>", "a tag"),
    ("<p title=''=\"{{ .Message }}\">", "a tag"),
    ("<p = title=''  ==\"{{ .Message }}\">", "address"),
    ("<p title='a'\nhref\f=\r\"{{ .Message }}\">", "address"),
    ("<title></title{{ .Message }}>", "a tag"),
    ("<a href='{{ .Message }}'>", "address"),
    ('<p onclick="{{ .Message }}">', "address"),
    ("<p title='' style='{{ .Message }}'>", "address"),
    ("<title></title><a href='{{ .Message }}'>", "address"),
    ("<!--><a href='{{ .Message }}'>", "address"),
    ("<!-- --!><a href='{{ .Message }}'>", "address"),
    ("{{ if .Message }}<a href='{{ end }}{{ .Message }}'>", "address"),
    ("{{ .Message }}<p title='{{ .Message }}'><p id={{ .Message }}>", "a tag"),
]


@pytest.mark.parametrize(("template", "plain", "told"), FROM_GO + SEEN_AS_IN_GO)
def test_a_page_is_what_go_makes_of_it(template: str, plain: str, told: str) -> None:
    parsed = parse(template)
    assert parsed.render("") == plain
    assert parsed.render(MESSAGE) == told.replace("@", ESCAPED)


@pytest.mark.parametrize("template", MALFORMED + NOT_SUPPORTED)
def test_anything_else_in_braces_is_an_error(template: str) -> None:
    with pytest.raises(TemplateError, match=r"^line 3: ") as caught:
        parse(f"<p>\n{{{{ .Message }}}}\n{template}")
    assert caught.value.line == 3
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("template", "error"),
    [
        (
            "{{ .Message |\thtml }}",
            "line 1: {{ .Message | html }} is not supported here; what is: {{ .Message }}, "
            "{{ if .Message }}, {{ with .Message }}, {{ else }} and {{ end }}",
        ),
        ("\n\n{{if .Message}}\n{{with\n.Message}}", "line 4: {{ with }} without {{ end }}"),
        ("{{ end }}", "line 1: {{ end }} without {{ if }} or {{ with }}"),
        ("\r\n{{ else }}", "line 2: {{ else }} without {{ if }}"),
        (
            "{{ with .Message }}{{ else\nif .Message }}",
            "line 1: {{ else if .Message }} without {{ if }}",
        ),
        ("{{ .Message", "line 1: an action does not end with }}"),
        ("{{/* a\n\n", "line 1: a comment does not end with */}}"),
        ("<p\n{{ .Message }}", "line 2: a message can't stand in a tag"),
    ],
)
def test_an_error_says_where_and_what(template: str, error: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse(template)
    assert str(caught.value) == error


def test_an_error_shows_the_beginning_of_a_long_action() -> None:
    with pytest.raises(TemplateError) as caught:
        parse("{{ " + "x" * 100_000 + "\ud800 }}")
    assert str(caught.value).startswith("line 1: {{ " + "x" * 60 + "... }} is not supported")


@pytest.mark.parametrize(("template", "place"), NO_PLACE)
def test_a_message_has_no_place_where_escaping_does_not_help(template: str, place: str) -> None:
    with pytest.raises(TemplateError, match=f"can't stand in .*{place}"):
        parse(template)
    # What is not shown together with a message does no harm.
    plain = template.replace("{{ if .Message }}", "").replace("{{ end }}", "")
    parse("{{ if not .Message }}" + plain + "{{ end }}")


def test_nesting_needs_no_recursion() -> None:
    depth = 20_000
    text = "{{ if .Message }}a{{ else }}b" * depth + "{{ end }}" * depth
    assert parse(text).render("m") == "a"
    assert parse(text).render("") == "b" * depth


WHOLE_ACTIONS = st.sampled_from(
    ["{{ .Message }}", "{{- $.Message -}}", "{{/* c */}}", "{{ with .Message }}{{ . }}{{ end }}"]
)
PARTS = st.sampled_from(
    [
        *"{}-/*<>\"'= \n.$|a",
        "{{", "}}", "{{ ", " }}", "{{-", "-}}", "/*", "*/", "if", "else", "end", "with", "not",
        ".Message", "$", "<!--", "-->", "<p ", "<script", "</script", "title=", "<title>",
        "{{ if .Message }}", "{{ else }}", "{{ end }}", "{{ .Message }}", "\ud800", "\0",
    ]
)  # fmt: skip


@pytest.mark.fuzz
@given(st.lists(PARTS).map("".join) | st.text())
@example("<" * 5000 + "{{ .Message }}")
@example("<a =" * 5000 + "{{ .Message }}")
@example("{{ if" + " " * 5000 + "}}")
@at_least(500)
def test_any_text_is_a_template_or_an_error(text: str) -> None:
    try:
        template = parse(text)
    except TemplateError as error:
        said, line = str(error), error.line
        assert said.isprintable()
        assert said.startswith(f"line {line}: ")
    else:
        assert template.render("m") == "m".join(template.pieces)


@given(st.text().filter(lambda text: "{{" not in text), st.text())
@example("}} {% a %} <!-- -->", "m")
def test_a_page_without_actions_is_left_as_it_is(text: str, message: str) -> None:
    assert parse(text).render("") == text
    assert parse(text).render(message) == text


@given(st.lists(WHOLE_ACTIONS | st.sampled_from(["<p>", "</p>", "a", " "])), st.text(min_size=1))
@example(["{{ .Message }}"], "</p><script>alert(1)</script>")
@example(["{{ .Message }}"], "{{ .Message }}")
def test_a_message_is_always_escaped(parts: list[str], message: str) -> None:
    template = parse("".join(parts))
    escaped = pages.escape(message)
    assert not set("<>\"'\0") & set(escaped)
    assert template.render(message) == escaped.join(template.pieces)
    assert template.render("a").replace("a", "") == template.render("").replace("a", "")


@given(st.lists(st.sampled_from(["{{if .Message}}", "{{if not .Message}}", "{{else}}", "x", "y"])))
def test_conditions_show_one_branch(parts: list[str]) -> None:
    """Compare with the obvious: a stack of conditions that must all hold."""
    stack: list[tuple[bool, bool]] = []  # shown with a message; has had its else
    text = ""
    expected = {True: "", False: ""}
    for part in parts:
        if part == "{{else}}":
            if not stack or stack[-1][1]:
                continue
            stack[-1] = (not stack[-1][0], True)
        elif part.startswith("{{"):
            stack.append(("not" not in part, False))
        else:
            for told in expected:
                if all(shown is told for shown, _ in stack):
                    expected[told] += part
        text += part
    template = parse(text + "{{end}}" * len(stack))
    assert template.render("m") == expected[True]
    assert template.render("") == expected[False]


@given(st.lists(PARTS).map("".join), st.integers(min_value=0, max_value=40))
@example("<title>a</title><p title='b'>", 9)
def test_a_place_does_not_depend_on_the_messages_before_it(text: str, at: int) -> None:
    cut = Scanner()
    if cut.feed(text[:at]) in (Place.TEXT, Place.TITLE, Place.PLAIN_VALUE):
        cut.feed("")
        assert cut.feed(text[at:]) is Scanner().feed(text)


def test_what_is_escaped_reads_as_it_was() -> None:
    assert html.unescape(parse("{{ .Message }}").render("<a & 'b'>")) == "<a & 'b'>"

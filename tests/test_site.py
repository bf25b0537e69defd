"""What the site of the documentation is made of: its list of pages, and pictures.

Links and anchors are looked at by ``tests/test_docs.py`` as GitHub has them, and by ``make docs``
as the site has them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from kamal_proxy.cli.commands import find_command
from tests.running import ROOT

if TYPE_CHECKING:
    from pathlib import Path

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
PICTURES = sorted(DOCS.glob("pictures/*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
IMAGE = re.compile(r"!\[([^]]*)\]\(([^)\s]+)\)")


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r": ([\w-]+\.md)\b", navigation)
    assert sorted(listed) == sorted([*(page.name for page in PAGES), "changelog.md"])
    assert (ROOT / "CHANGELOG.md").exists()  # of which that page is made


def test_nothing_is_loaded_from_elsewhere() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "\n  font: false\n" in settings  # otherwise Google's
    assert not re.search(r"https?://", settings + (DOCS / "site.css").read_text())


def test_every_picture_is_shown_and_told_in_words() -> None:
    images = [(page.name, *found) for page in PAGES for found in IMAGE.findall(page.read_text())]
    assert [image for image in images if not image[1].strip()] == []
    assert {DOCS / place for *_, place in images} == {*PICTURES, DOCS / "performance.svg"}


@pytest.mark.parametrize("picture", PICTURES, ids=names(PICTURES))
def test_pictures_have_a_title_and_need_nothing_else(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox")
    assert root.get("role") == "img"
    labels = [root.find(f"{SVG}title"), root.find(f"{SVG}desc")]
    assert [label is not None and bool(label.text) for label in labels] == [True, True]
    assert " ".join(str(label.get("id")) for label in labels if label is not None) == root.get(
        "aria-labelledby"
    )
    for element in root.iter():
        assert element.tag.removeprefix(SVG) not in ("script", "image", "foreignObject", "use")
        assert not any(name.endswith("href") for name in element.attrib)
    assert "@import" not in picture.read_text()


@pytest.mark.parametrize("picture", PICTURES, ids=names(PICTURES))
def test_pictures_can_be_read_in_light_and_dark(picture: Path) -> None:
    """Every colour is that of a class, and each class with a colour has one for the dark."""
    text = picture.read_text()
    style, _, drawing = text.partition("</style>")
    light, _, dark = style.partition("@media (prefers-color-scheme: dark)")
    assert not re.search(r'(fill|stroke)="(?!none)|#[0-9a-f]{3,6}"', drawing)
    rule = re.compile(r"^ *(\.?\w+) \{(.*)\}$", re.MULTILINE)
    coloured = [name for name, values in rule.findall(light) if "#" in values]
    assert "text" in coloured
    assert [name for name, _ in rule.findall(dark)] == coloured
    used = {each for value in re.findall(r'class="([^"]*)"', drawing) for each in value.split()}
    assert used == {name.removeprefix(".") for name, _ in rule.findall(light)} - {"text"}


@pytest.mark.parametrize("picture", PICTURES, ids=names(PICTURES))
def test_pictures_name_modules_and_flags_that_exist(picture: Path) -> None:
    text = "\n".join(ElementTree.parse(picture).getroot().itertext())
    for module in re.findall(r"\b(?:cli|control|http|tls|udp)/\w+", text):
        assert (ROOT / "kamal_proxy" / f"{module}.py").exists(), module
    grammars = [find_command([command])[0].grammar for command in ("deploy", "deploy-udp")]
    known = {f"--{flag}" for grammar in grammars for flag in grammar.flags}
    assert set(re.findall(r"--[a-z][\w-]*", text)) <= known


def test_the_nurseries_are_those_of_the_proxy() -> None:
    source = (ROOT / "kamal_proxy" / "proxy.py").read_text()
    opened = re.findall(r"open_nursery\(\) as (\w+)", source.partition("class Proxy")[2])
    drawn = re.findall(r'class="head">(\w+)<', (DOCS / "pictures" / "nurseries.svg").read_text())
    assert opened[: len(drawn)] == drawn
    assert len(drawn) == 6

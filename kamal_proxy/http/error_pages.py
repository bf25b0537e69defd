"""The error pages that a service brings along: read once, from a directory, when it is deployed.

Blocking file IO; the caller runs it in a thread. What a page may say is ``templates``' business,
and which page is sent for which error that of its callers.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping

import attrs

from kamal_proxy.errors import ErrorPagesError
from kamal_proxy.http.templates import Template, TemplateError, parse

MAX_FILES = 100
MAX_FILE_SIZE = 1024 * 1024
MAX_TOTAL_SIZE = 8 * 1024 * 1024

_SUFFIX = ".html"
_PAGE_NAME = re.compile(r"([1-9][0-9]{2})\.html")
_MIB = 1024 * 1024


@attrs.frozen
class ErrorPages:
    """The pages of one service; made by ``load_error_pages``.

    Attributes:
        templates: The pages by the status that they are for.
    """

    templates: Mapping[int, Template]

    def render(self, status: int, message: str = "") -> bytes | None:
        """Return the page for a status, in the bytes of its file; None if there is none.

        Args:
            status: The status of the response.
            message: What ``{{ .Message }}`` stands for; escaped here.
        """
        template = self.templates.get(status)
        if template is None:
            return None
        return template.render(message).encode("utf-8", "surrogateescape")


class _UnusableError(Exception):
    """A file is not a page; says why."""


def load_error_pages(directory: str) -> ErrorPages:
    """Read all files ``*.html`` of a directory; ``<status>.html`` is the page for that status.

    Files with other names are read as well, and must be as correct. Bytes that are not UTF-8 are
    kept. Never waits for a FIFO or a device. The directory may be deleted afterwards.

    Raises:
        ErrorPagesError: there is no such directory, no ``*.html`` in it or more than MAX_FILES, or
            one that is no file, can't be read, is larger than MAX_FILE_SIZE, or is not a template
            that this proxy supports; or all together are larger than MAX_TOTAL_SIZE (bytes).
            ``details`` has a line for each.
    """
    templates: dict[int, Template] = {}
    problems: list[str] = []
    left = MAX_TOTAL_SIZE
    for name in _names(directory):
        path = os.path.join(directory, name)
        try:
            content = _content(path, left)
            left -= len(content)
            template = parse(content.decode("utf-8", "surrogateescape"))
        except (_UnusableError, TemplateError) as error:
            problems.append(f"{_shown(path)}: {error}")
            continue
        page = _PAGE_NAME.fullmatch(name)
        if page is not None:
            templates[int(page[1])] = template
    if problems:
        raise _error(*problems)
    return ErrorPages(templates)


def _names(directory: str) -> list[str]:
    """Return the names of the pages in a directory, sorted."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(_SUFFIX))
    except FileNotFoundError as error:
        raise _error(f"{_shown(directory)}: no such directory") from error
    except OSError as error:
        raise _error(f"{_shown(directory)}: {_reason(error)}") from error
    except ValueError as error:
        raise _error(f"{_shown(directory)}: not a path") from error
    if not names:
        raise _error(f"{_shown(directory)}: no *{_SUFFIX} in it")
    if len(names) > MAX_FILES:
        raise _error(f"{_shown(directory)}: more than {MAX_FILES} *{_SUFFIX} in it")
    return names


def _content(path: str, left: int) -> bytes:
    """Return what is in a file, of which so many bytes may still be read."""
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _UnusableError("not a regular file")
            content = file.read(min(MAX_FILE_SIZE, left) + 1)
    except OSError as error:
        raise _UnusableError(_reason(error)) from error
    if len(content) > MAX_FILE_SIZE:
        raise _UnusableError(f"larger than {MAX_FILE_SIZE // _MIB} MiB")
    if len(content) > left:
        raise _UnusableError(f"all pages together are larger than {MAX_TOTAL_SIZE // _MIB} MiB")
    return content


def _open(path: str, flags: int) -> int:
    # Does not wait for the other side of a FIFO.
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def _reason(error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return f"{reason[:1].lower()}{reason[1:]}"


def _shown(path: str) -> str:
    """Return a path as it can be printed, whatever bytes it is made of."""
    return "".join(c if c.isprintable() else "\ufffd" for c in path)


def _error(*details: str) -> ErrorPagesError:
    return ErrorPagesError("unable to load error pages", details)

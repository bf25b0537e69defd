"""Calls through a deploy of Janus: two servers that others wrote, each with an address of its own.

Janus takes no calls by the loopback interface: so the proxy, with the callers, and each server are
in a network namespace of their own. It is an ICE Lite server (RFC 8445 2.5): it only answers.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.e2e.media_room import MediaRoom, open_callers
from tests.e2e.namespaces import Namespace, can_make_namespaces, open_namespace
from tests.e2e.programs import needs, open_program
from tests.running import START_LIMIT, open_command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.running import Result

MODULES = next(Path("/usr/lib").glob("*/janus"), Path("/usr/lib/janus"))
PROXY, OLD, NEW = "10.77.1.1", "10.77.1.2", "10.77.2.2"
PORT = 8088  # of the signalling
PORTS = range(20_000, 20_002)  # two calls of one server leave no port that is not used
INFO = "--health-check-path=/janus/info"
PATIENT = ("--zero-downtime", "--drain-strategy=timeout", "--force-kill-timeout=10m")
GENERAL = """\
general: {{
    configs_folder = "{folder}"
    plugins_folder = "{folder}/plugins"
    transports_folder = "{folder}/transports"
    loggers_folder = "{folder}/none"
    events_folder = "{folder}/none"
    server_name = "{name}"
    debug_colors = false
}}
nat: {{
    ice_lite = true
    nat_1_1_mapping = "{proxy}"
}}
media: {{
    rtp_port_range = "{first}-{last}"
}}
"""
HTTP = f"""\
general: {{
    http = true
    port = {PORT}
    https = false
}}
"""

pytestmark = [
    needs("janus", package="janus"),
    pytest.mark.skipif(not can_make_namespaces(), reason="no network namespace can be made"),
]


@asynccontextmanager
async def open_janus(directory: Path, name: str, namespace: Namespace) -> AsyncIterator[None]:
    """Run a server with its echo and its REST interface, and nothing else of it."""
    folder = directory / name
    for kind, module in (("plugins", "echotest"), ("transports", "http")):
        (folder / kind).mkdir(parents=True)
        file = f"{kind}/libjanus_{module}.so"
        (folder / file).symlink_to(MODULES / file)
    first, last = PORTS[0], PORTS[-1]
    general = GENERAL.format(folder=folder, name=name, proxy=PROXY, first=first, last=last)
    (folder / "janus.jcfg").write_text(general)
    (folder / "janus.transport.http.jcfg").write_text(HTTP)
    command = (*namespace.enter, "janus", f"--configs-folder={folder}")
    async with open_program(directory, *command) as janus:
        with trio.fail_after(START_LIMIT):
            await janus.wait_for("HTTP webserver started")
        yield


async def test_two_servers_on_the_same_ports(directory: Path) -> None:
    results: list[Result] = []
    old, new = f"{OLD}:{PORT}", f"{NEW}:{PORT}"
    async with (
        open_namespace() as here,
        open_namespace(here) as there,
        open_namespace(here) as elsewhere,
    ):
        await here.connect(there, PROXY, OLD, mtu=1500)
        await here.connect(elsewhere, "10.77.2.1", NEW, mtu=1500)
        async with (
            open_janus(directory, "v1", there),
            open_janus(directory, "v2", elsewhere),
            open_command(directory, wrapper=here.enter) as command,
            open_callers(PROXY, wrapper=here.enter) as callers,
            trio.open_nursery() as nursery,
        ):
            meet = MediaRoom(command, PORTS, PROXY, "/janus")
            await meet.deploy_media(old)
            await meet.deploy_signalling(old, INFO)
            a, b = [await callers.begin(who, meet.url) for who in "ab"]
            assert {a.port, b.port} == set(PORTS)
            await callers.listen(a, b)

            await meet.deploy_media(old, new)
            await meet.deploy_signalling(new, INFO)
            c = await callers.begin("c", meet.url)
            await callers.listen(a, b, c)

            async def deploy() -> None:
                results.append(await meet.deploy_media(new, flags=PATIENT))

            nursery.start_soon(deploy)
            await meet.wait_switched(new)
            d = await callers.begin("d", meet.url)
            for call in (a, c):
                await callers.move(call)
            await callers.listen(a, b, c, d)
            assert [call.server for call in (a, b, c, d)] == ["v1", "v1", "v2", "v2"]
            assert {call.host for call in (a, b, c, d)} == {PROXY}
            for call in (a, b, c, d):
                received, lost = await callers.counts(call)
                assert received > 25
                assert lost == 0
            for call in (a, b):
                await callers.hang_up(call)
            await callers.listen(c, d)
    assert [result.out for result in results] == ["3 sessions completed, 0 cut, 0 got a BYE\n"]

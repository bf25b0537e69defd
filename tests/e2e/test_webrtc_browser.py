"""A browser calls the example's media server through the proxy, and goes on through a deploy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from tests.e2e.browser import needs_browser, open_browser
from tests.e2e.media_room import counts_of, open_media_room

if TYPE_CHECKING:
    from pathlib import Path

OLD, NEW = "127.0.0.2", "127.0.0.3"
MICROPHONE = (
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--allow-loopback-in-peer-connection",
)


async def wait_received(target: str, packets: int) -> int:
    """Wait until a media server has got so many packets of its one call; return what was lost."""
    while True:
        for received, lost in (await counts_of(target)).values():
            if received >= packets:
                return lost
        await trio.sleep(0.05)


@needs_browser
async def test_a_browser_keeps_its_call(directory: Path) -> None:
    async with (
        open_media_room(directory) as meet,
        meet.server("v1", OLD) as old,
        meet.server("v2", NEW) as new,
    ):
        await meet.deploy_media(old)
        await meet.deploy_signalling(old)
        async with open_browser(f"http://127.0.0.1:{meet.command.port}/#call", *MICROPHONE):
            await wait_received(old, 50)
            await meet.deploy_media(old, new)
            await meet.deploy_signalling(new)
            flags = ("--zero-downtime", "--drain-strategy=timeout", "--force-kill-timeout=10m")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: meet.deploy_media(new, flags=flags))
                await meet.wait_switched(new)
                ((received, _),) = (await counts_of(old)).values()
                assert await wait_received(old, received + 50) == 0
                assert await counts_of(new) == {}
                nursery.cancel_scope.cancel()

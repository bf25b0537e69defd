"""A proxy as a process: signals, file descriptors, log lines on standard output, systemd."""

from __future__ import annotations

import contextlib
import resource
import signal
from typing import TYPE_CHECKING

import attrs
import trio

from kamal_proxy.errors import KamalProxyError
from kamal_proxy.logs import LineWriter, Log
from kamal_proxy.proxy import Proxy
from kamal_proxy.systemd import READY, STOPPING, notify

if TYPE_CHECKING:
    from kamal_proxy.run_options import RunOptions


def serve(options: RunOptions) -> None:
    """Run a proxy that logs to standard output until SIGTERM or SIGINT, then shut it down.

    A second signal ends it at once.

    Raises:
        KamalProxyError: it can't start.
    """
    options.validate()
    _raise_descriptor_limit()
    writer = LineWriter(1)
    try:
        trio.run(_serve_until_signal, options, writer)
    except BaseExceptionGroup as group:
        told = group.subgroup(KamalProxyError)
        if told is None or told.exceptions != group.exceptions:
            raise
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from None
    finally:
        writer.close()


@attrs.frozen
class _Supervisor:
    """Whoever started the process and wants to know how it is; a task status of the proxy's."""

    _log: Log

    def started(self, value: object = None) -> None:  # noqa: ARG002  the protocol has it
        """Tell that the proxy serves."""
        self.tell(READY)

    def tell(self, state: str) -> None:
        """Tell a state; a proxy that can serve does, also if that fails."""
        try:
            notify(state)
        except OSError as error:
            self._log.error("systemd can't be told", state=state, error=str(error))


async def _serve_until_signal(options: RunOptions, writer: LineWriter) -> None:
    proxy = Proxy(options, log=writer.write)
    supervisor = _Supervisor(Log(writer.write, debug=options.debug))
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def watch_signals() -> None:
                async for _ in signals:
                    if proxy.stopping:
                        nursery.cancel_scope.cancel(reason="a second signal")
                    else:
                        supervisor.tell(STOPPING)
                    proxy.stop()

            nursery.start_soon(watch_signals)
            nursery.start_soon(writer.run)
            await proxy.run(task_status=supervisor)
            nursery.cancel_scope.cancel(reason="the proxy has stopped")


def _raise_descriptor_limit() -> None:
    """Use all file descriptors that the process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # the soft limit serves as well, with less
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

"""The server's process: its socket, signals, loading beside listening, and a stop that loses
nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from common import MoetelError
from scripts.server.settings import ServerSettings

if TYPE_CHECKING:
    from common.build.online import OnlineEngine
    from common.serving.engine import Engine
    from scripts.server.service import Service

log = logging.getLogger(__name__)

FLUSH_S = 5
"""How long clients may take to read the end of their answers when the server stops."""

T = TypeVar("T")


class ServeError(MoetelError):
    """A server that cannot start."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServeError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        raise ServeError(
            f"cannot listen at {host}:{port} ({error}); choose another --host or --port"
        ) from error
    return found


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    load: Callable[[], Engine],
    settings: ServerSettings,
    sock: socket.socket,
    timeout_keep_alive: int,
) -> None:
    """Listen at once, load the store meanwhile, serve until a signal comes. Closes the socket."""
    import uvicorn

    from common.build.online import OnlineEngine
    from scripts.server.app import create_app

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Signals are ours: uvicorn would close the door at once, and nobody would learn that
            we are stopping."""
            yield

    app = create_app(None, settings)
    service: Service = app.state.service
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=timeout_keep_alive,
        timeout_graceful_shutdown=FLUSH_S,
    )
    server = Server(config)
    loop = asyncio.get_running_loop()
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = asyncio.create_task(stop.wait())
    loading = _in_daemon(load)
    engine: OnlineEngine | None = None
    watching: asyncio.Task[None] | None = None
    try:
        await asyncio.wait((loading, stopping, serving), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            engine = OnlineEngine(loading.result())
            service.attach(engine)
            names = engine.engine.tenants
            for name in names:
                service.warn_of_unused(name)
            sys.stdout.write(
                f"moetel serves {len(names)} tenants ({', '.join(names)}) at {_address(sock)}\n"
            )
            sys.stdout.flush()
            if service.watch is not None:
                watching = asyncio.create_task(service.watch.run())
            await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
            await _drain(service, settings, hurry)
    finally:
        server.should_exit = True
        await serving
        stopping.cancel()
        if watching is not None:
            watching.cancel()
        if engine is not None:
            await asyncio.to_thread(engine.close)
        log.info("stopped")


def _in_daemon(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run it in a thread that does not keep the process alive: loading cannot be cancelled."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(set_it: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_it(value)

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            outcome: tuple[Callable[[Any], None], Any] = (future.set_exception, error)
        else:
            outcome = (future.set_result, result)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=run, name="load", daemon=True).start()
    return future


async def _drain(service: Service, settings: ServerSettings, hurry: asyncio.Event) -> None:
    """Let running requests end; a second signal, or too long a time, cancels them."""
    service.start_draining()
    log.info("stopping: %d requests are being answered", service.requests)
    hurried = asyncio.create_task(hurry.wait())
    drained = asyncio.create_task(service.drained(settings.drain_timeout_s))
    await asyncio.wait((hurried, drained), return_when=asyncio.FIRST_COMPLETED)
    for task in (hurried, drained):
        task.cancel()
    if service.requests:
        log.warning("stopping: %d requests are cancelled", service.requests)
        service.cancel_all()
        await service.drained(FLUSH_S)

"""The server's life: a port of this machine alone, one temporary folder, and an end at which nothing is left."""

from __future__ import annotations

import secrets
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from medmap.card import ModelFolder
from medmap.core.children import ending
from medmap.errors import InputError
from medmap.serve.answers import Engine
from medmap.serve.app import Office, make_app
from medmap.serve.desk import Desk
from medmap.serve.guard import Guard

HOST = "127.0.0.1"
SECONDS_TO_END = 2
_BACKLOG = 128


def serve(
    model: ModelFolder,
    *,
    port: int = 0,
    browser: bool = True,
    limit_mb: float = 500,
    device: str = "auto",
    precision: str = "auto",
    debug: bool = False,
    told: Callable[[str], None] = print,
) -> None:
    """Serve the page on 127.0.0.1 until the process is told to end (Ctrl-C, SIGTERM, SIGHUP).

    port:     0 for one that is free
    browser:  open the page in the user's browser
    limit_mb: of one patient's files, 10⁶ bytes
    told:     gets the page's address, with the key that lets a browser in

    Raises InputError where the port is taken, and KeyboardInterrupt or SystemExit when it ends; the temporary folder is
    removed then, and with it every file that came in or was made.
    """
    with listening(port) as sock, tempfile.TemporaryDirectory(prefix="medmap-serve-", ignore_cleanup_errors=True) as at:
        number, key, desk = sock.getsockname()[1], secrets.token_urlsafe(24), Desk(debug)
        office = Office(Engine(model, device, precision), desk, Path(at), limit_mb)
        address = f"http://{HOST}:{number}/?key={key}"
        with ending():
            told(address)
            if browser:
                threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
            try:
                app = Guard(make_app(office), number, key)
                config = uvicorn.Config(app, lifespan="off", access_log=False, server_header=False, log_level="error")
                config.timeout_graceful_shutdown = SECONDS_TO_END
                server = uvicorn.Server(config)
                with hung_up(server):
                    server.run(sockets=[sock])
            finally:
                desk.close()


@contextmanager
def listening(port: int) -> Iterator[socket.socket]:
    """A socket that only this machine reaches. Raises InputError where the port is taken or not allowed.

    >>> with listening(0) as sock:
    ...     sock.getsockname()[0]
    '127.0.0.1'
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((HOST, port))
        except OSError as error:
            raise InputError(
                f"port {port} cannot be had ({error.strerror}); name another one with --port, or leave it out for a "
                "free one"
            ) from error
        sock.listen(_BACKLOG)
        yield sock


@contextmanager
def hung_up(server: uvicorn.Server) -> Iterator[None]:
    """SIGHUP ends a server as SIGINT and SIGTERM do: it is told and ends by itself, then SystemExit is raised.

    An exception out of the handler may come at a moment at which nobody passes it on, and the server would go on.
    """
    heard: list[int] = []

    def tell(number: int, frame: Any) -> None:
        heard.append(number)
        server.should_exit = True

    if not hasattr(signal, "SIGHUP"):
        yield
        return
    before = signal.signal(signal.SIGHUP, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
    if heard:
        raise SystemExit(128 + heard[0])

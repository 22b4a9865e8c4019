"""The verb that serves the local page."""

from __future__ import annotations

from typing import Annotated

import typer

from medmap.cli import beforehand, console
from medmap.cli.options import Arithmetic, Checkpoint, Device, Model, Precision, Which


def serve(
    model: Model = None,
    port: Annotated[
        int,
        typer.Option("--port", metavar="N", min=0, max=65535, help="Of 127.0.0.1; 0 for a free one."),
    ] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    limit_mb: Annotated[
        float, typer.Option("--limit-mb", metavar="MB", min=1, help="Most that the files of one patient may have.")
    ] = 500,
    checkpoint: Which = Checkpoint.best,
    device: Device = "auto",
    precision: Arithmetic = Precision.auto,
) -> None:
    """Open a page in the browser: drop in images, switch sequences on and off, take the mask away.

    Nothing leaves this machine; all files are removed when the command ends (Ctrl-C).
    """
    beforehand.packages("serve", "fastapi", "uvicorn", "matplotlib", "jinja2")
    from medmap.card import SHIPPED, read_model

    known = read_model(model or SHIPPED, checkpoint.value)
    if known.about:
        console.say(f"model: {known.about}")
    from medmap.serve.server import serve as run

    how = {"device": device, "precision": precision.value, "debug": console.MANNER.debug}
    try:
        run(known, port=port, browser=not no_browser, limit_mb=limit_mb, told=_told, **how)
    except KeyboardInterrupt:
        console.say("ended; every file that came in or was made is removed")


def _told(address: str) -> None:
    print(f"page: {address}", flush=True)
    console.say("open it in a browser of this machine; Ctrl-C ends it and removes all files")

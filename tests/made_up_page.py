"""A local page in this process, asked as its own script asks it, and as a process of its own."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from typer.testing import CliRunner

from medmap.card import read_model
from medmap.cli import app as cli
from medmap.cli import console
from medmap.serve.answers import Engine
from medmap.serve.app import Office, make_app
from medmap.serve.desk import Desk
from medmap.serve.guard import Guard

KEY = "the-key"


class Page:
    """A server in a thread, its folder, and a client that was let in."""

    def __init__(self, run: Path, folder: Path, limit_mb: float = 500) -> None:
        folder.mkdir()
        self.folder, self.desk = folder, Desk()
        self.office = Office(Engine(read_model(run), "cpu", "fp32"), self.desk, folder, limit_mb)
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self.port = self._sock.getsockname()[1]
        self.here = f"http://127.0.0.1:{self.port}"
        app = Guard(make_app(self.office), self.port, KEY)
        self._server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._sock]})
        self._thread.start()
        self.client = httpx.Client(base_url=self.here, headers={"origin": self.here}, timeout=120)
        assert self.client.get("/", params={"key": KEY}).status_code == 303

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(30)
        self.desk.close()

    def begin(self, *files: Path) -> str:
        """A patient with these files."""
        patient = str(self.client.post("/patients", json={}).json()["patient"])
        for file in files:
            answer = self.upload(patient, file.name, file.read_bytes())
            assert answer.status_code == 200, answer.text
        return patient

    def upload(self, patient: str, name: str, content: bytes) -> Any:
        return self.client.post(f"/patients/{patient}/files", params={"name": name}, content=content)

    def job(self, patient: str, errand: str, places: list[int] | None = None, **asked: Any) -> dict[str, Any]:
        """What became of a job, when it is over. places: gets how many were before it, again and again"""
        number = self.client.post(f"/patients/{patient}/{errand}", json=asked).json()["job"]
        end = time.monotonic() + 120
        while (told := self.told(patient, number))["state"] in ("waiting", "working"):
            assert time.monotonic() < end, told
            if places is not None:
                places.append(told.get("before", 0))
            time.sleep(0.02)
        return told

    def told(self, patient: str, number: int) -> dict[str, Any]:
        return dict(self.client.get(f"/patients/{patient}/jobs/{number}").json())

    def on_disk(self) -> list[str]:
        """Files in the server's folder."""
        return sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`medmap serve` as a process of its own, with its temporary files in a folder; and the address that it prints."""
    env = {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", "medmap", "serve", "--no-browser", *options]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("page: ")), "")
            assert line, "medmap serve printed no address"
            yield process, line.removeprefix("page: ").strip()
        finally:
            process.kill()


def zipped(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def predicted(run: Path, files: dict[str, Path], out: Path) -> bytes:
    """What `medmap predict` writes."""
    named = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    argv = ["predict", "--model", str(run), *named, "--device", "cpu", "--precision", "fp32", "-o", str(out)]
    answer = CliRunner().invoke(cli, argv)
    console.begin()
    assert answer.exit_code == 0, answer.output
    return out.read_bytes()

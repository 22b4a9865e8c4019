"""The server's answers: a page, patients that it is given, jobs that are asked after, files to take away."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

import medmap
from medmap.errors import InputError
from medmap.figures.style import label
from medmap.report.html import part
from medmap.serve.answers import Engine
from medmap.serve.desk import Desk, Job
from medmap.serve.patients import Patient

MOST_PATIENTS = 8
"""So many are kept; then the one that was begun first has to go."""

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".txt": "text/plain"}


class Named(BaseModel):
    """{key of a volume: sequence}; guesses where None."""

    model_config = ConfigDict(extra="forbid")
    named: dict[str, str] | None = None


class Subset(BaseModel):
    """Sequences that are switched on, and the number of the images that the page has."""

    model_config = ConfigDict(extra="forbid")
    subset: list[str]
    frame: int = 0


class Office:
    """The patients that there are, and the desk where they wait.

    folder: everything is in it; limit_mb: of one patient's files, 10⁶ bytes
    """

    def __init__(self, engine: Engine, desk: Desk, folder: Path, limit_mb: float) -> None:
        self.engine, self.desk, self.folder, self.limit_mb = engine, desk, folder, limit_mb
        self.patients: dict[str, Patient] = {}
        self.jobs: dict[tuple[str, str], Job] = {}

    def begin(self) -> Patient:
        """A new patient."""
        while len(self.patients) >= MOST_PATIENTS:
            self.forget(next(iter(self.patients)))
        id = secrets.token_urlsafe(12)
        (self.folder / id).mkdir()
        self.patients[id] = Patient(id, self.folder / id)
        return self.patients[id]

    def find(self, id: str) -> Patient:
        """Raises InputError for one that is not there."""
        if id not in self.patients:
            raise InputError("this patient is no longer here; drop the images again")
        return self.patients[id]

    def submit(self, patient: Patient, errand: str, work: Any) -> Job:
        """A job of a patient; another one of the same errand that waits is given up for it."""
        job = self.desk.submit(f"{patient.id}/{errand}", work)
        self.jobs[patient.id, errand] = job
        return job

    def forget(self, id: str) -> None:
        """Remove a patient with everything there is of it."""
        if self.patients.pop(id, None) is None:
            return
        for owner, errand in [key for key in self.jobs if key[0] == id]:
            self.desk.forget(f"{owner}/{errand}")
            del self.jobs[owner, errand]
        shutil.rmtree(self.folder / id, ignore_errors=True)
        with suppress(InputError):  # what the worker is writing for this patient comes first
            self.desk.submit(f"{id}/forget", lambda tell: shutil.rmtree(self.folder / id, ignore_errors=True) or {})


def make_app(office: Office) -> FastAPI:
    """The app; who may ask it is for `medmap.serve.guard`."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(InputError)
    async def refused(request: Request, error: InputError) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    @app.get("/")
    async def page() -> Response:
        return _part("page.html")

    @app.get("/parts/{name}")
    async def parts(name: str) -> Response:
        if name not in PARTS:
            return JSONResponse({"error": "no such part"}, 404)
        return Response("".join(map(_text, PARTS[name])), media_type=TYPES[Path(name).suffix])

    @app.get("/model")
    async def model() -> dict[str, Any]:
        known = office.engine.model
        return {
            "sequences": [{"name": name, "label": label(name)} for name in known.modalities],
            "about": known.about,
            "limit_mb": office.limit_mb,
            "version": medmap.__version__,
        }

    @app.post("/patients")
    async def begin() -> dict[str, Any]:
        return {"patient": office.begin().id}

    @app.post("/patients/{id}/forget")
    async def forget(id: str) -> dict[str, Any]:
        office.forget(id)
        return {}

    @app.post("/patients/{id}/files")
    async def files(id: str, name: str, request: Request) -> Response:
        patient = office.find(id)
        upload = patient.folder / f"upload-{secrets.token_hex(8)}"
        held = 0
        try:
            with open(upload, "wb") as out:
                async for block in _within(request, patient, office.limit_mb):
                    held += len(block)
                    out.write(block)
            await run_in_threadpool(patient.take, upload, name)
        except BaseException as error:
            patient.held_bytes -= held
            if isinstance(error, OSError | InputError):
                office.find(id)  # forgotten meanwhile, its folder went
            raise
        finally:
            upload.unlink(missing_ok=True)
        return JSONResponse({})

    @app.post("/patients/{id}/check")
    async def check(id: str, asked: Named) -> dict[str, Any]:
        patient = office.find(id)
        work = lambda tell: office.engine.check(patient, asked.named, tell)  # noqa: E731
        return {"job": office.submit(patient, "look", work).number}

    @app.post("/patients/{id}/segment")
    async def segment(id: str, asked: Subset) -> dict[str, Any]:
        patient = office.find(id)
        work = lambda tell: office.engine.segment(patient, asked.subset, asked.frame, tell)  # noqa: E731
        return {"job": office.submit(patient, "look", work).number}

    @app.get("/patients/{id}/jobs/{number}")
    async def job(id: str, number: int) -> dict[str, Any]:
        office.find(id)
        found = next((j for (owner, _), j in office.jobs.items() if owner == id and j.number == number), None)
        return {"job": number, "state": "gone"} if found is None else office.desk.told(found)

    @app.get("/patients/{id}/made/{subset}/{what}")
    async def made(id: str, subset: str, what: str) -> Response:
        patient = office.find(id)
        work = lambda tell: office.engine.made(patient, subset.split("+"), what, tell)  # noqa: E731
        job = office.submit(patient, what, work)
        while (told := office.desk.told(job))["state"] in ("waiting", "working"):
            await asyncio.sleep(0.05)
        if told["state"] != "done":
            raise InputError(told.get("text") or "no longer wanted")
        file = Path(told["result"]["file"])
        return FileResponse(file, filename=file.name, media_type="application/octet-stream")

    return app


async def _within(request: Request, patient: Patient, limit_mb: float) -> AsyncIterator[bytes]:
    """A request's body, counted as it comes. Raises InputError beyond the limit, whatever was promised."""
    promised = request.headers.get("content-length", "0")
    size = int(promised) if promised.isascii() and promised.isdigit() else 0
    if patient.held_bytes + size <= limit_mb * 1e6:
        async for block in request.stream():
            if patient.held_bytes + len(block) > limit_mb * 1e6:
                break
            patient.held_bytes += len(block)
            yield block
        else:
            return
    raise InputError(
        f"more than {limit_mb:g} MB for one patient; drop fewer files, or begin anew with medmap serve --limit-mb"
    )


def _part(name: str) -> Response:
    return Response(_text(name), media_type=TYPES[Path(name).suffix])


def _text(name: str) -> str:
    if name.startswith("report:"):
        return str(part(name.removeprefix("report:")))
    return resources.files("medmap.serve").joinpath(name).read_text(encoding="utf-8")


PARTS = {
    "page.css": ("report:page.css", "report:viewer.css", "report:case.css", "page.css"),
    "page.js": ("page.js",),
    "viewer.js": ("report:viewer.js",),
    "niivue.js": ("report:vendor/niivue-0.69.0.js",),
    "licences.txt": ("report:vendor/LICENSE", "report:vendor/NOTICE"),
}
"""What the page loads, and the files that it is made of."""

"""The verb about this machine and this installation."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

import medmap
from medmap.cli import beforehand, console
from medmap.cli.options import Device, Json


def doctor(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="[DATA]", help="A folder of cases: how long would they take here? One is worked on."),
    ] = None,
    spacing: Annotated[
        float | None, typer.Option("--spacing", metavar="MM", help="Of DATA, as for prepare; its own otherwise.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Say what this machine and this installation can do, and how long a data set would take.

    The exit code is 1 where medmap cannot work here.
    """
    console.MANNER.json = json
    found = _examination()
    if data is not None:
        beforehand.existing(data, "a folder of cases")
        beforehand.packages("train", "monai")
        from medmap.rehearsal import rehearse

        with console.progress("rehearsal") as tell:
            found["data"] = rehearse(data, spacing_mm=spacing, device=device, told=tell).to_dict()
        found["ok"] &= found["data"]["store_gb"] < found["disk_free_gb"]
    if json:
        console.answer_json(found)
    else:
        console.answer(_prescription(found))
    raise typer.Exit(int(not found["ok"]))


def _examination() -> dict[str, Any]:
    needs = {part: {name: _version(name) for name in names} for part, names in _requirements().items()}
    data = os.environ.get("MEDMAP_DATA")
    places = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    return {
        "medmap": medmap.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "limits": _limits(),
        "disk_free_gb": round(shutil.disk_usage(".").free / 1e9, 1),
        "writable": {name: {"path": str(path), "ok": os.access(path, os.W_OK)} for name, path in places.items()},
        "network": _connected(),
        "gpu": _gpu(),
        "torch_built_for": _torch_built_for(),
        "packages": needs.pop("", {}),
        "extras": needs,
        "medmap_data": None if data is None else {"path": data, "exists": Path(data).is_dir()},
        "ok": all(_version(name) for name in _requirements().get("", ()))
        and all(os.access(path, os.W_OK) for path in places.values()),
    }


def _requirements() -> dict[str, list[str]]:
    """{extra: packages}; the packages that are always needed under the empty name."""
    found: dict[str, list[str]] = {}
    try:
        lines = requires("medmap") or []
    except PackageNotFoundError:
        return found
    for line in lines:
        name = re.match(r"[A-Za-z0-9_.-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        if name and name[0] != "medmap":
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch_built_for() -> str | None:
    """CPU or CUDA, from the text of torch/version.py: importing torch takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)", text, re.MULTILINE)
    return f"CUDA {cuda[1]}" if cuda else "CPU"


def _memory_gb() -> dict[str, float] | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kb = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
    return {
        "total": round(kb.get("MemTotal", 0) / 1e6, 1),
        "available": round(kb.get("MemAvailable", 0) / 1e6, 1),
    }


def _limits(root: Path = Path("/sys/fs/cgroup")) -> dict[str, float]:
    """What a container may take, where that is less than the machine has: memory in GB, cores."""
    found = {}
    try:
        memory = (root / "memory.max").read_text(encoding="utf-8").strip()
        quota, period = (root / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return found
    if memory != "max":
        found["memory_gb"] = round(int(memory) / 1e9, 1)
    if quota != "max":
        found["cores"] = round(int(quota) / int(period), 1)
    return found


def _connected(routes: Path = Path("/proc/net/route")) -> bool | None:
    """Whether the machine has a way out, None where it does not say; nothing is sent to find out."""
    try:
        lines = routes.read_text(encoding="utf-8").splitlines()[1:]
    except OSError:
        return None
    return any(line.split()[1] == "00000000" for line in lines if len(line.split()) > 1)


def _gpu() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def _prescription(found: dict[str, Any]) -> str:
    memory = found["memory_gb"]
    rows = [
        ("medmap", f"{found['medmap']}, Python {found['python']}, {found['platform']}"),
        (
            "machine",
            f"{found['cores']} cores"
            + (f", {memory['available']:g} of {memory['total']:g} GB memory free" if memory else "")
            + f", {found['disk_free_gb']:g} GB free on this disk",
        ),
        *_limit_rows(found["limits"]),
        (
            "writing",
            "; ".join(f"{at['path']}{'' if at['ok'] else ': NOT ALLOWED'}" for at in found["writable"].values()),
        ),
        ("network", {True: "there", False: "none", None: "unknown"}[found["network"]] + "; medmap needs none"),
        ("GPU", "; ".join(found["gpu"]) or "none found (nvidia-smi); medmap runs on the CPU"),
    ]
    packages = [f"{name} {number or 'MISSING'}" for name, number in sorted(found["packages"].items())]
    rows.append(("packages", ", ".join(packages) or "unknown: medmap is not installed, pip install -e ."))
    for extra, parts in sorted(found["extras"].items()):
        lacking = [name for name, number in parts.items() if number is None]
        state = f"{', '.join(lacking)} missing: pip install 'medmap[{extra}]'" if lacking else "complete"
        rows.append((f"[{extra}]", f"{state} ({', '.join(sorted(parts))})"))
    data = found["medmap_data"]
    where = "not set (only medmap's own tests look at it)"
    if data:
        where = data["path"] + ("" if data["exists"] else ": no such folder")
    rows.append(("MEDMAP_DATA", where))
    if found.get("data"):
        rows.append(("data", _expectation(found["data"])))
    return "\n".join([*(f"  {name:<12} {text}" for name, text in rows), _verdict(found)])


def _limit_rows(limits: dict[str, float]) -> list[tuple[str, str]]:
    words = {"memory_gb": "{:g} GB of memory", "cores": "{:g} cores"}
    text = ", ".join(words[name].format(value) for name, value in limits.items())
    return [("container", f"may take {text}")] if text else []


def _expectation(data: dict[str, Any]) -> str:
    train = "no segmentation to train on"
    if data["train_minutes"] is not None:
        train = f"train {_time(data['train_minutes'])} with {data['train_gb']:.2g} GB of memory"
    cases, prepare = console.count(data["cases"], "case"), _time(data["prepare_minutes"])
    return (
        f"{cases}: prepare {prepare} and {data['store_gb']:.2g} GB, {train} "
        f"({data['network']}, one fold), evaluate {_time(data['evaluate_minutes'])}, predict "
        f"{_time(data['predict_minutes'])} with {data['predict_gb']:.2g} GB; measured on a part of one of them"
    )


def _time(minutes: float) -> str:
    if minutes >= 1:
        return f"{minutes:.0f} min"
    return f"{60 * minutes:.0f} s" if 60 * minutes >= 1 else "< 1 s"


def _verdict(found: dict[str, Any]) -> str:
    built, closed = found["torch_built_for"], [at["path"] for at in found["writable"].values() if not at["ok"]]
    if built is None:
        return "Not ready: torch is missing; pip install torch"
    if not all(found["packages"].values()):
        return "Not ready: packages are missing; pip install medmap"
    if closed:
        return f"Not ready: {', '.join(closed)} may not be written to; work in another folder, or set TMPDIR"
    if found.get("data") and not found["ok"]:
        return "Not ready: the prepared data do not fit on this disk; work on another one"
    if found["gpu"] and built == "CPU":
        return "There is a GPU, but this torch is built for the CPU: install one for CUDA to use it."
    return f"Ready (torch for {built})."

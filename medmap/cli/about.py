"""Verbs about medmap itself: a demo, this machine, somebody's network."""

from __future__ import annotations

import inspect
import os
import platform
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any

import typer

import medmap
from medmap.cli import beforehand, console
from medmap.cli.options import Json, Modalities
from medmap.errors import ConfigError, InputError


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Folder to work in.")] = Path("runs/demo"),
    cases: Annotated[int | None, typer.Option("--cases", min=6, metavar="N", help="Number of phantoms.")] = None,
) -> None:
    """See everything once, without data.

    Simulates patients, prepares them, trains, evaluates all subsets, predicts from two sequences, writes a report.
    """
    beforehand.packages("all", "monai", "lightning_fabric", "matplotlib", "jinja2")
    beforehand.writable(out, "the demo")
    beforehand.room(out, 500_000_000, "the demo")
    from medmap import demo as whole

    with console.progress("training") as tell:

        def on_row(row: dict[str, Any]) -> None:
            if row["kind"] == "train":
                tell(row["step"], row["steps"], f"loss {row['loss']:.3f}")

        whole.run(out, **({} if cases is None else {"patients": cases}), on_line=console.say, on_row=on_row)


def doctor(json: Json = False) -> None:
    """Say what this machine and this installation can do."""
    console.MANNER.json = json
    found = _examination()
    if json:
        console.answer_json(found)
    else:
        console.answer(_prescription(found))
    raise typer.Exit(0 if found["ok"] else 1)


def check_backbone(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A backbone of medmap, or FILE.py:Class of your own.")],
    modalities: Modalities = "t1n+t1c+t2w+t2f",
    classes: Annotated[int, typer.Option("--classes", metavar="K", min=2, help="Label classes, with background.")] = 4,
    size: Annotated[str, typer.Option("--size", metavar="NAME", help="Named size of the network.")] = "tiny",
    json: Json = False,
) -> None:
    """Hold a network to medmap's contract.

    Over every subset of sequences: nothing leaks from what is absent, every parameter learns, samples are independent,
    and more. Exit code 1 where a law is broken.

    FILE.py:Class is called with (ModalitySet, classes, size), or with nothing where it takes nothing.
    """
    console.MANNER.json = json
    names = _names(modalities)
    if ".py" in name:
        beforehand.existing(Path(name.partition(":")[0]), "a Python file")
    from medmap.core.modality import ModalitySet
    from medmap.models import build_backbone
    from medmap.models.check import check_backbone as examine

    wanted = ModalitySet(names)
    if ".py" in name:
        kind = _class_in(name)
        arguments = (wanted, classes, size) if _takes_arguments(kind) else ()
        findings = examine(lambda: kind(*arguments))
    else:
        build_backbone(name, wanted, classes, size)  # an unknown name or size is the user's error, not the network's
        findings = examine(lambda: build_backbone(name, wanted, classes, size))
    broken = [finding for finding in findings if not finding.ok]
    if json:
        laws = [{"law": f.law, "ok": f.ok, "detail": f.detail} for f in findings]
        console.answer_json({"backbone": name, "modalities": list(names), "ok": not broken, "laws": laws})
    else:
        lines = [f"  {'ok   ' if f.ok else 'FAULT'}  {f.law:<14} {f.detail}" for f in findings]
        verdict = f"{len(broken)} of {len(findings)} laws broken" if broken else f"all {len(findings)} laws hold"
        console.answer("\n".join([f"{name}, {' '.join(names)}", *lines, f"{name}: {verdict}"]))
    raise typer.Exit(1 if broken else 0)


# ---- somebody's network ------------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    from medmap.core.modality import ModalitySet

    return ModalitySet(tuple(part for part in text.replace(",", "+").split("+") if part.strip())).names


def _class_in(where: str) -> Any:
    """The class of ``FILE.py:Class``. Raises InputError where there is none, ConfigError where the file raises."""
    file, _, name = where.partition(":")
    if not name:
        raise InputError(f"{where}: name the class too, as in {file}:MyNetwork")
    spec = spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file}: cannot be imported; expected a Python file")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{file}: raised {type(error).__name__} while it was imported: {error}") from error
    if not hasattr(module, name):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise InputError(f"{file}: holds no {name}; it holds {', '.join(classes) or 'no class'}")
    return getattr(module, name)


def _takes_arguments(kind: Any) -> bool:
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in inspect.signature(kind).parameters.values()
    )


# ---- doctor ------------------------------------------------------------------------------------------------------


def _examination() -> dict[str, Any]:
    needs = {part: {name: _version(name) for name in names} for part, names in _requirements().items()}
    data = os.environ.get("MEDMAP_DATA")
    disk = shutil.disk_usage(".")
    return {
        "medmap": medmap.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "disk_free_gb": round(disk.free / 1e9, 1),
        "gpu": _gpu(),
        "torch_built_for": _torch_built_for(),
        "packages": needs.pop("", {}),
        "extras": needs,
        "medmap_data": None if data is None else {"path": data, "exists": Path(data).is_dir()},
        "ok": all(_version(name) for name in _requirements().get("", ())),
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
    built = found["torch_built_for"]
    lines = [f"  {name:<12} {text}" for name, text in rows]
    if built is None:
        lines.append("Not ready: torch is missing; pip install torch")
    elif found["gpu"] and built == "CPU":
        lines.append("There is a GPU, but this torch is built for the CPU: install one for CUDA to use it.")
    elif found["ok"]:
        lines.append(f"Ready (torch for {built}).")
    else:
        lines.append("Not ready: packages are missing; pip install medmap")
    return "\n".join(lines)

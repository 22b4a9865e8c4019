"""Verbs about medmap itself: a demo, this machine, somebody's network."""

from __future__ import annotations

import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import medmap
from medmap.cli import beforehand, console
from medmap.cli.options import Json, Modalities
from medmap.errors import ConfigError, InputError

if TYPE_CHECKING:
    from medmap.models.check import Finding


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
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A backbone of medmap, or FILE.py:NAME, a class or function of yours.")
    ],
    modalities: Modalities = "t1n+t1c+t2w+t2f",
    classes: Annotated[int, typer.Option("--classes", metavar="K", min=2, help="Label classes, with background.")] = 4,
    size: Annotated[str, typer.Option("--size", metavar="NAME", help="Named size of the network.")] = "tiny",
    json: Json = False,
) -> None:
    """Hold a network to medmap's contract.

    Over every subset of sequences: nothing leaks from what is absent, every parameter learns, samples are independent,
    and more. Exit code 1 where a law is broken.

    FILE.py:NAME is called with as much of (ModalitySet, classes, size) as it takes. It may be what medmap.adapt gives.
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
        own = _named_in(name)
        arguments = _accepted(own, (wanted, classes, size))
        build = partial(own, *arguments)
    else:
        build = partial(build_backbone, name, wanted, classes, size)
        build()  # an unknown name or size is the user's error, not the network's
    console.say(f"{name}: trying every subset of {' '.join(names)}; a large network takes minutes")
    findings = examine(build)
    broken = [finding for finding in findings if not finding.ok]
    if json:
        laws = [{"law": f.law, "ok": f.ok, "detail": f.detail} for f in findings]
        console.answer_json({"backbone": name, "modalities": list(names), "ok": not broken, "laws": laws})
    else:
        console.answer("\n".join([*_introduced(build, findings), *_told(findings)]))
        verdict = f"{len(broken)} of {len(findings)} laws broken" if broken else f"all {len(findings)} laws hold"
        console.answer(f"{name}: {verdict}")
    raise typer.Exit(1 if broken else 0)


# ---- somebody's network ------------------------------------------------------------------------------------------

CURES = {
    "members": "docs/own-network.md has networks to start from",
    "shape": "pad images to the coarsest stride and crop the logits: pad_to_stride and cropped of medmap.models.blocks",
    "finite": "keep every denominator and every logarithm away from 0; a constant image has variance 0",
    "gradients": "remove what is never used, or return a loss that uses it",
    "leakage": "in decode, use latents that encoded.present(level, kept) marks, and nothing else that encode saw",
    "statistics": "run each encoder on the samples that have its sequence: encode_rows of medmap.models.backbone",
    "samples": "in eval mode nothing may be averaged or normalised over the batch, and masks are per sample",
    "deterministic": "draw (dropout, samples) only where self.training",
    "saving": "keep what the answer depends on in parameters and registered buffers",
    "strides": "in strides, declare the voxels per element of what encode returns; encode_rows puts the zeros",
    "separable": "write separable = False, or let a sequence's latents depend on that sequence alone",
}
"""What to do about a broken law of `medmap.models.check.LAWS`."""


def _introduced(build: Callable[[], Any], findings: Sequence[Finding]) -> list[str]:
    """Size and levels of a network; nothing where it is not one."""
    if not findings[0].ok:
        return []
    network = build()
    parameters = sum(p.numel() for p in network.parameters())
    levels = ", ".join(f"{level} (stride {stride})" for level, stride in network.strides.items())
    subsets = len(network.supported_subsets())
    return [f"  {parameters:,} parameters, {network.classes} classes, {subsets} subsets; levels to align: {levels}"]


def _told(findings: Sequence[Finding]) -> Iterator[str]:
    """A line for each law; below a broken one what was found and what to do. An error is told once."""
    from medmap.models.check import LAWS

    told: dict[str, str] = {}
    for law, ok, found in ((f.law, f.ok, f.detail) for f in findings):
        alike = re.sub(r"\d+", "", found)  # one error, met by batches of several sizes
        again = not ok and alike in told
        about = f"could not be tried: the error of {told[alike]}" if again else LAWS[law][0]
        yield f"  {'ok   ' if ok else 'FAULT'}  {law:<14} {about}"
        if ok or again:
            continue
        yield f"{'':9}found: {found}"
        if found.startswith("raised "):
            told[alike] = law
        else:
            yield f"{'':9}to do: {CURES[law]}"


def _names(text: str) -> tuple[str, ...]:
    from medmap.core.modality import ModalitySet

    return ModalitySet(tuple(part for part in text.replace(",", "+").split("+") if part.strip())).names


def _named_in(where: str) -> Callable[..., Any]:
    """The class or function of ``FILE.py:NAME``.

    Raises InputError where there is none, ConfigError where the file raises.
    """
    from torch import nn

    file, _, name = where.partition(":")
    if not name:
        raise InputError(f"{where}: name the class or function too, as in {file}:MyNetwork")
    module = _imported(file)
    if not hasattr(module, name):
        raise InputError(f"{file}: holds no {name}; it holds {', '.join(_offered(module)) or 'no class or function'}")
    own = getattr(module, name)
    if isinstance(own, nn.Module) or not callable(own):
        raise InputError(
            f"{where}: found an object of type {type(own).__name__}, expected a class or function that builds a network"
        )
    return cast(Callable[..., Any], own)


def _imported(file: str) -> ModuleType:
    """A Python file as a module; files beside it can be imported from it."""
    spec = spec_from_file_location(f"checked_{Path(file).stem}", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file}: cannot be imported; expected a Python file")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.append(str(Path(file).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{file}: raised {type(error).__name__} while it was imported: {error}") from error
    return module


def _offered(module: ModuleType) -> list[str]:
    """Names of the classes and functions that a file makes, rather than imports."""

    def imported(thing: Any) -> bool:
        home = sys.modules.get(thing.__module__)
        return home is not module and getattr(home, thing.__name__, None) is thing

    things = {n: t for n, t in vars(module).items() if inspect.isclass(t) or inspect.isfunction(t)}
    return [name for name, thing in things.items() if not imported(thing)]


def _accepted(kind: Callable[..., Any], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """As many of the arguments as it takes; none where it needs none."""
    parameters = inspect.signature(kind).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if all(p.default is not p.empty for p in positional):
        return ()
    return given if any(p.kind is p.VAR_POSITIONAL for p in parameters) else given[: len(positional)]


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

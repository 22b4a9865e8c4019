"""Verbs about medmap itself: a demo, this machine, somebody's network."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

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
    "digests": "in decode, ask encoded.digest(self, level, name) for what digest makes, and read no latent beside it",
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

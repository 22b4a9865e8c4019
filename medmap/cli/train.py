"""The verb that trains: what is going to happen is said first, what is wrong with it before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from medmap.cli import beforehand, console
from medmap.cli.data import describe, is_store, open_data
from medmap.cli.jobs import (
    BEGUN,
    FINISHED,
    STOPPED,
    Job,
    checked,
    data_of,
    last_step,
    planned,
    refuse_with_resume,
    resumed,
    same_data,
)
from medmap.cli.options import Device, DryRun, Json, Labels, Spacing
from medmap.errors import CheckpointError, InputError
from medmap.parallel import Crew, crew_of

if TYPE_CHECKING:
    from medmap.config import Config
    from medmap.data.source import Source
    from medmap.data.splits import Split


class TrainCommand(TyperCommand):
    """``--set a=1 b=2`` is ``--set a=1 --set b=2``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _one_each(args))


def train(
    config: Annotated[
        Path | None, typer.Option("-c", "--config", metavar="YAML", help="What to train; defaults where not given.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("-d", "--data", metavar="DATA", help="Store of `medmap prepare`, or folder of cases."),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="RUN", help="Folder of the new run.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C ...", help="Keys of the configuration; any number.")
    ] = None,
    fold: Annotated[
        str | None, typer.Option("--fold", metavar="N|all", help="Test fold; `all`: one run each in RUN/fold0, ...")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Go on from the last checkpoint of a run.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option("--init", metavar="RUN", help="Start from the best weights of another run.")
    ] = None,
    spacing: Spacing = None,
    labels: Labels = None,
    device: Device = "auto",
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, metavar="N", help="Processes here, one per GPU; torchrun, srun say it."),
    ] = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train a network that answers every subset of sequences.

    medmap train -c CONFIG -d DATA -o RUN [--set train.steps=500 align.anchor=pstar] [--fold all]
    """
    crew = crew_of(devices)
    console.MANNER.json, console.MANNER.silent, console.MANNER.echo = json, crew.number > 0, crew.is_echo
    if resume is not None:
        refuse_with_resume(config=config, out=out, set=settings, fold=fold, init=init, spacing=spacing, labels=labels)
        jobs, source = [resumed(resume)], data or data_of(resume)
    else:
        if out is None:
            raise typer.BadParameter("name the folder of the new run", param_hint="-o RUN")
        jobs, source = planned(config, settings or [], fold, out, data)
    store: Source
    failed: dict[str, str]
    beforehand.packages("train", "monai", "lightning_fabric")
    beforehand.writable(jobs[0].run, "the run")
    if init is not None:
        from medmap.card import read_model

        if len(runs := read_model(init).runs) > 1:
            raise CheckpointError(f"--init {init}: holds {len(runs)} runs ({runs[0]}, ...); name one of them")
    for job in jobs:
        crew.check_batch(job.config.train.batch_size)
    if crew.size > 1 and source is not None and not is_store(source):
        raise InputError(
            f"{source}: is not prepared, and {crew.size} processes cannot share that work; do it first: "
            f"medmap prepare {source} -o STORE"
        )
    if source is not None and not is_store(source):
        for job in jobs:
            _check_network(job)
    if dry_run and source is not None and not is_store(source):
        _say_unprepared(source, labels, spacing, jobs)
        return
    if source is None:
        from medmap.predict import resolve_device
        from medmap.stream import PhantomStream

        store, failed = PhantomStream(jobs[0].config, resolve_device(device)), {}
    else:
        store, failed = open_data(source, (resume or out or Path()) / "store", spacing, labels)
    for job in jobs:
        if job.state in (STOPPED, FINISHED):
            same_data(job.run, store)
    splits = [checked(job, store) for job in jobs]
    if json and dry_run:
        console.answer_json({"dry_run": True, "runs": [_plain(j, s) for j, s in zip(jobs, splits, strict=True)]})
        return
    _say_data(store)
    for job, split in zip(jobs, splits, strict=True):
        if len(jobs) > 1:
            console.say(f"{job.run}")
        if job.state == FINISHED:
            console.say(f"  finished at step {job.step}: left as it is")
            continue
        _say_plan(job, store, split, device, crew)
        if not dry_run:
            _run(job, store, init, device, devices, alone=len(jobs) == 1)
    if json:
        console.answer_json({"runs": [_plain(j, s) for j, s in zip(jobs, splits, strict=True)]})
    elif not dry_run:
        whole = resume or out
        data_for = " --data PATIENTS" if source is None else ""  # a stream of phantoms has no test part
        console.say(f"next: medmap evaluate {whole}{data_for}, medmap report {whole}")
    raise typer.Exit(3 if failed else 0)


def _one_each(args: Sequence[str]) -> list[str]:
    """Words with a = that follow the value of --set are values of it as well.

    >>> _one_each(["--set", "a=1", "b=2", "-o", "x"])
    ['--set', 'a=1', '--set', 'b=2', '-o', 'x']
    """
    spread: list[str] = []
    for arg in args:
        follows = len(spread) > 1 and spread[-2] == "--set"
        if follows and "=" in arg and not arg.startswith("-"):
            spread.append("--set")
        spread.append(arg)
    return spread


# ---- what is said ------------------------------------------------------------------------------------------------


def _check_network(job: Job) -> None:
    """Names of network, size and levels, before hours of preparing. Raises ConfigError for one that there is not."""
    import torch

    from medmap.align import build_segmenter
    from medmap.core.modality import GLIOMA_MRI, ModalitySet

    names = job.config.data.modalities
    with torch.device("meta"):
        build_segmenter(job.config.model, job.config.align, ModalitySet(names) if names else GLIOMA_MRI, classes=4)


def _say_unprepared(source: Path, labels: str | None, spacing_mm: float | None, jobs: list[Job]) -> None:
    from medmap.data.layouts import recognise

    folder = recognise(source, labels)
    runs = ", ".join(str(job.run) for job in jobs)
    console.say(f"would prepare {describe(folder, spacing_mm)}")
    console.say(f"would train {runs}; prepare first (medmap prepare) to see the split and the network")
    if console.MANNER.json:
        console.answer_json({"dry_run": True, "cases": len(folder.cases), "runs": [str(job.run) for job in jobs]})


def _say_data(store: Source) -> None:
    patients = console.count(len({patient for _, patient, _ in store.roster()}), "patient")
    grid = "mixed spacings" if store.spacing_mm is None else f"{store.spacing_mm:g} mm"
    scheme = "" if store.scheme is None else store.scheme.name
    console.say(f"data      {store.path}: {console.count(len(store.ids), 'case')} of {patients}, {scheme}, {grid}")
    console.say(f"          hash {store.sha256}")


def _say_plan(job: Job, store: Source, split: Split, device: str, crew: Crew) -> None:
    import torch

    from medmap.align import build_segmenter
    from medmap.predict import resolve_device, resolve_precision
    from medmap.train import check_patch

    config, classes = job.config, store.scheme.classes if store.scheme else ()
    where = resolve_device(device)
    names = store.modalities if config.data.modalities is None else store.modalities.pick(config.data.modalities)
    with torch.random.fork_rng(devices=[]):
        network = build_segmenter(config.model, config.align, names, len(classes))
        check_patch(config.train, network)
        loss = _loss_text(config, network, torch)
    count = sum(p.numel() for p in network.parameters())
    parts = ", ".join(f"{part} {len(getattr(split, part))}" for part in ("train", "val", "test"))
    steps, patch = config.train, "×".join(map(str, config.train.patch))
    console.say(f"split     {split.name}: {parts}")
    console.say(f"          sha256 {split.sha256}")
    if split.absent or split.unlisted:
        console.say(f"          {len(split.absent)} of the list are absent, {len(split.unlisted)} cases are not listed")
    console.say(f"model     {config.model.name} {config.model.size}, {count:,} parameters, {' '.join(names)}")
    console.say(f"loss      {loss}")
    keep = f" (p = {config.sampling.keep_probability:g})" if config.sampling.subsets == "bernoulli" else ""
    console.say(f"subsets   {config.sampling.subsets}{keep}, drawn per {config.sampling.per}")
    crops = f"{steps.batch_size} × {patch}"
    console.say(f"recipe    {steps.optimizer}, lr {steps.lr:g} {steps.schedule}, {steps.steps} steps of {crops}")
    many = "" if crew.size == 1 else f"{crew.size} × "
    console.say(f"device    {many}{where}, {resolve_precision(steps.precision, where)}, seed {config.seed}")
    # weights, their mean, Adam's two, the best; and the old ones until the new are whole
    beforehand.room(job.run, 4 * count * 5 * 2, "its checkpoints")


def _loss_text(config: Config, network: Any, torch: Any) -> str:
    """Every term with its weight, asked of the network itself."""
    from medmap.criterion import term_weights

    size, count = 2 * network.stride, len(network.modalities)
    mask = torch.ones(2, count, dtype=torch.bool)
    with torch.no_grad():
        output = network.train()(torch.randn(2, count, size, size, size), mask, mask)
    grouped: dict[tuple[str, float], list[str]] = {}
    for name, weight in term_weights(output, config).items():
        kind, _, part = name.partition("/")
        grouped.setdefault((kind, weight), []).append(part)
    terms = []
    for (kind, weight), parts in grouped.items():
        which = "" if parts == [""] else "/" + (parts[0] if len(parts) == 1 else f"{{{', '.join(parts)}}}")
        terms.append(("" if weight == 1 else f"{weight:g} ") + kind + which)
    levels = sum(name.startswith("align/") for name in output.losses)
    anchor = config.align.anchor + (f" {config.align.fixed}" if config.align.fixed else "")
    fill = "" if config.align.fill == "none" else f", absent latents filled ({config.align.fill})"
    return " + ".join(terms) + (f"   (anchor {anchor}{fill})" if levels else "   (no alignment)")


def _plain(job: Job, split: Split) -> dict[str, Any]:
    """A run in plain types, as far as it came."""
    return {
        "run": str(job.run),
        "step": last_step(job.run) or 0,
        "steps": job.config.train.steps,
        "split": {part: value if isinstance(value, str) else len(value) for part, value in split.to_dict().items()},
    }


# ---- doing it ----------------------------------------------------------------------------------------------------


def _run(job: Job, store: Source, init: Path | None, device: str, devices: int | None, alone: bool) -> None:
    from medmap.train import fit

    if job.state == BEGUN:
        console.say("          stopped before its first checkpoint: starts again")
        (job.run / "log.jsonl").unlink(missing_ok=True)
    if job.state == STOPPED:
        console.say(f"          goes on from step {job.step}")
    try:
        with console.progress("training", job.step) as tell:
            resume = job.state == STOPPED
            settings = {"resume": resume, "init": init, "device": device, "devices": devices}
            console.MANNER.echo = False  # from here on, the only process that has an error is to tell it
            fit(job.config, store, job.run, **settings, on_row=_Rows(tell))
    except KeyboardInterrupt:
        step = last_step(job.run)
        if step is None:
            console.fail("interrupted before the first checkpoint: the same command starts again")
        else:
            how = f"medmap train --resume {job.run}" if alone else "the same command goes on from there"
            console.fail(f"interrupted; the last checkpoint of {job.run} is of step {step}: {how}")
        raise typer.Exit(130) from None


class _Rows:
    """Rows of the training log as progress."""

    def __init__(self, tell: console.Report) -> None:
        self.tell = tell

    def __call__(self, row: dict[str, Any]) -> None:
        if row["kind"] == "train":
            terms = row["terms"]
            parts = ", ".join(f"{name} {value:.3f}" for name, value in terms.items()) if len(terms) > 1 else ""
            self.tell(row["step"], row["steps"], f"loss {row['loss']:.3f}" + (f" ({parts})" if parts else ""))
            return
        if row["kind"] == "warning":
            console.warn(f"step {row['step']}: {row['text']}")
            return
        full = f", with all sequences {100 * row['full']:.1f}" if "full" in row else ""
        best = "  * best so far" if row.get("best") else ""
        console.say(f"step {row['step']}: validation Dice {100 * row['mean']:.1f} over all subsets{full}{best}")
        if text := _latents_text(row):
            console.say(f"  {text}")


def _latents_text(row: dict[str, Any]) -> str:
    """What the last level's latents are like, and what a missing sequence costs; the log has every level."""
    parts = [f"missing sequences cost {100 * row['cost']:.1f}"] if "cost" in row else []
    for level, found in list(row["latents"].items())[-1:]:
        gap = f"gap {found['gap']:.2f}, " if "gap" in found else ""
        parts.append(f"latents {level}: {gap}std {found['std']:.2g}, rank {found['rank']:.1f}")
    return "; ".join(parts)

"""fit(config): one training run, from prepared patients to weights. The recipe, and nothing of the method.

What step t does is a function of (seed, t, state): draws come from per-step generators, so a run that was interrupted
and resumed gives, on a CPU, bit for bit the weights of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import medmap
from medmap.align import AlignedSegmenter, build_segmenter
from medmap.config import SUBSETS, Config, TrainConfig
from medmap.core.case import Batch, Prepared
from medmap.core.labels import LabelScheme
from medmap.core.metrics import dice
from medmap.core.processes import gathered, processes, processes_here, rank
from medmap.criterion import Lesson
from medmap.data.dataset import Patients, answers_asked, training_batch
from medmap.data.source import Source
from medmap.data.splits import Split, begun_split, choose_split
from medmap.diagnosis import Latents, latent_spread, means, over_alignment, overheard
from medmap.errors import CheckpointError, ConfigError, DivergenceError
from medmap.evaluate import on_common_box
from medmap.inference import answer_subsets
from medmap.models.backbone import trait
from medmap.parallel import crew_of, ending_together, launch
from medmap.predict import answerable, resolve_device, resolve_precision
from medmap.run import ENV, LOG, SPLITS, ModelCard, Row, RunLog, checkpoint_folder, write_run, write_text, writing
from medmap.state import State, fresh, restore, save_best, save_last, start_from


def fit(
    config: Config,
    source: Source,
    run: Path,
    *,
    resume: bool = False,
    init: Path | None = None,
    device: str = "auto",
    devices: int | None = None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> None:
    """Train one network and leave it in a run folder.

    config: the run; source: prepared patients, or a stream of phantoms; run: its folder
    resume: go on from its last checkpoint, with the division of the patients that it was begun with
    init:   another run whose best weights are the start; on_row: gets every row of the log as it is written
    devices: processes on this machine, each with an equal share of every batch: the program that calls this is run
             again for each of them. None: one, or as many as torchrun or srun have started

    Raises ConfigError and InputError before the first step where they can be known, CheckpointError for a run that
    cannot be resumed, DivergenceError (naming term and step; the last good checkpoint stays) during it.
    """
    where, crew = resolve_device(device), crew_of(devices)
    precision = resolve_precision(config.train.precision, where)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    crew.check_batch(config.train.batch_size)
    fabric = launch(crew, where, bf16=precision == "bf16")
    with ending_together():
        _fit(config, source, run, resume, init, where if crew.size == 1 else fabric.device, fabric, on_row)


def _fit(
    config: Config,
    source: Source,
    run: Path,
    resume: bool,
    init: Path | None,
    where: torch.device,
    fabric: Any,
    on_row: Callable[[Row], None],
) -> None:
    """What each process does; the first alone writes."""
    modalities = source.modalities if config.data.modalities is None else source.modalities.pick(config.data.modalities)
    if source.scheme is None:
        raise ConfigError(f"{source.path}: the data have no segmentations; training needs them (see medmap prepare)")
    card = ModelCard(modalities, source.scheme, source.spacing_mm)
    if resume:
        checkpoint_folder(run, "last")  # says so where there is nothing to go on from
    split = begun_split(run / SPLITS, source.roster()) if resume else choose_split(config.data, source)
    train, val = Patients(source, split.train, modalities), Patients(source, split.val, modalities)
    if config.align.anchor == "lckd" and not val:
        raise ConfigError(
            "align.anchor: lckd elects its teacher by validation, and no patient validates; raise data.val_fraction, "
            "or name a teacher yourself (align.anchor=pk align.fixed=t1c)"
        )
    state = _begun(config, card, split, source, run, resume, init, where)
    first = rank() == 0
    log = RunLog(run, state.step, on_row) if first else None
    lesson, optimizer = fabric.setup(Lesson(state.network, config), state.optimizer)
    called = time.perf_counter()
    began = called - state.seconds
    with closing(_batches(config, train, state, where)) as batches:
        for batch in batches:
            torch.manual_seed(_step_seed(config.seed, state.step))
            row = _step(config, state, fabric, lesson, optimizer, batch)
            state.step += 1
            now = time.perf_counter()
            state.seconds = now - began
            last = state.step == config.train.steps
            if log and (last or state.step % config.train.log_every == 0):
                times = {"seconds": state.seconds, "waiting": state.waited / (now - called)}
                log.write({"kind": "train", "step": state.step, "steps": config.train.steps, **row, **times})
            if val and (last or state.step % config.train.validate_every == 0):
                _validate(config, state, card, val, run, log)
            if first and (last or state.step % config.train.checkpoint_every == 0):
                if not val:
                    save_best(run, state, score=None)
                save_last(run, state)
    if log:
        log.table()
    fabric.barrier()  # whoever returns finds the run whole


def _begun(
    config: Config,
    card: ModelCard,
    split: Split,
    source: Source,
    run: Path,
    resume: bool,
    init: Path | None,
    where: torch.device,
) -> State:
    """The state before the first step of this call, and a folder for it."""
    torch.manual_seed(config.seed)
    state = fresh(config, card, where)
    check_patch(config.train, state.network)
    if resume:
        restore(run, state)
    elif init is not None:
        start_from(init, state, config, card)
    if not resume and rank() == 0:
        _open_run(run, config, card, split, source, where)
        save_last(run, state)  # or a run that stops before its first checkpoint could be neither resumed nor repeated
    return state


def _aside(where: torch.device) -> None:
    """A thread beside the training: it takes one core, and the process's own GPU, which else would be the first."""
    torch.set_num_threads(1)
    if where.index is not None and where.type == "cuda":
        torch.cuda.set_device(where)


def _batches(config: Config, train: Patients, state: State, where: torch.device) -> Iterator[Batch]:
    """This process's rows of the batch of every step that is left."""
    answers = answers_asked(config, state.network.backbone.supported_subsets(), train)
    share = config.train.batch_size // processes()
    rows = slice(rank() * share, (rank() + 1) * share)
    dropped = state.network.uses_dropped

    def batch_of(step: int) -> Batch:
        train.expect(step, config.train.batch_size, config.seed)
        return training_batch(train, train.modalities, config, step, where, answers, rows, dropped)

    # A batch is made while the step before it runs, where a core has nothing else to do: two teams of threads on the
    # same cores hinder each other more than the batch takes.
    spare = where.type != "cpu" or torch.get_num_threads() * processes_here() < (os.cpu_count() or 1)
    with ThreadPoolExecutor(1, initializer=_aside, initargs=(where,)) as ahead:
        coming: Future[Batch] | None = None
        for step in range(state.step, config.train.steps):
            asked = time.perf_counter()
            batch = batch_of(step) if coming is None else coming.result()
            state.waited += time.perf_counter() - asked
            coming = ahead.submit(batch_of, step + 1) if spare and step + 1 < config.train.steps else None
            yield batch


def learning_rate(config: TrainConfig, step: int, stages: Sequence[float] = ()) -> float:
    """Linear warm-up, then ``lr`` times (1 − t)^0.9 for poly, ½(1 + cos πt) for cosine; t runs from 0 to 1.

    stages: shares of the steps at which it starts anew

    >>> learning_rate(TrainConfig(steps=100, warmup_steps=10, lr=1.0), 4)
    0.5
    """
    starts = [0, *(math.ceil(share * config.steps) for share in stages)]
    begun = max(start for start in starts if start <= step)
    step, steps = step - begun, min([start for start in starts if start > step] or [config.steps]) - begun
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    t = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    factor = {"poly": (1 - t) ** 0.9, "cosine": 0.5 * (1 + math.cos(math.pi * t)), "constant": 1.0}
    return config.lr * factor[config.schedule]


def _step(config: Config, state: State, fabric: Any, lesson: nn.Module, optimizer: Any, batch: Batch) -> Row:
    rate = learning_rate(config.train, state.step, trait(state.network.backbone, "stages"))
    for group in optimizer.param_groups:
        group["lr"] = rate
    lesson.train()
    state.network.at_progress(state.step / config.train.steps)
    # Of several processes, all have the same loss and gradient: they diverge together, too.
    loss, terms, latents = lesson(batch.images, batch.seen, batch.kept, batch.target)
    _refuse_divergence({**terms, "loss": loss}, state.step)
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(state.network.parameters(), config.train.clip_norm)
    _refuse_divergence({"gradient": norm}, state.step)
    optimizer.step()
    size = torch.nn.utils.get_total_norm([p.detach() for p in state.network.parameters()])
    _refuse_divergence({"weights": size}, state.step)  # before they can reach a checkpoint
    _smooth(state, config.train.ema)
    if (state.step + 1) % config.train.log_every and state.step + 1 != config.train.steps:
        return {}
    row: Row = {
        "loss": float(loss.detach()),
        "terms": {name: float(term) for name, term in terms.items()},
        "lr": rate,
        "grad_norm": float(norm),
    }
    if latents:
        row["weights"] = state.network.anchor_weights()
        # A joint stem makes latents of what is kept only; the zeros elsewhere are none.
        there = batch.kept if state.network.blinkered else batch.seen
        means_of = {level: means(state.network, level, z, dim=2) for level, z in latents.items()}
        row["latents"] = {level: latent_spread(z, there) for level, z in means_of.items()}
        for level, log_var in state.network.anchor_log_var().items():
            row["latents"][level]["log_var"] = log_var
    return row


def _refuse_divergence(values: Mapping[str, Tensor], step: int) -> None:
    bad = [name for name, value in values.items() if not bool(torch.isfinite(value))]
    if bad:
        raise DivergenceError(
            f"step {step + 1}: {', '.join(bad)} is not finite. The last good checkpoint is kept in checkpoints/last. "
            "Lower train.lr, raise train.warmup_steps, lower align.alpha, or train with train.precision=fp32"
        )


@torch.no_grad()
def _smooth(state: State, decay: float) -> None:
    """ema ← d·ema + (1 − d)·weights, with d rising from 0.1 so that the first weights are soon forgotten."""
    d = min(decay, (1 + state.step) / (10 + state.step)) if decay else 0.0
    ours, theirs = list(state.smoothed.parameters()), list(state.network.parameters())
    torch._foreach_lerp_(ours, theirs, 1 - d)
    for mine, other in zip(state.smoothed.buffers(), state.network.buffers(), strict=True):
        mine.copy_(other)


def _validate(
    config: Config, state: State, card: ModelCard, val: Sequence[Prepared], run: Path, log: RunLog | None
) -> None:
    answers, latents = examined(state.smoothed, card.scheme, val, config.train.precision)
    scores = over_patients(answers)
    alone = {name: float(np.mean([*scores[name].values()])) for name in card.modalities if name in scores}
    for network in (state.network, state.smoothed):
        network.elect(alone)
    if log is None:
        return
    mean = float(np.mean([value for regions in _judged(scores, config, card).values() for value in regions.values()]))
    row: Row = {"kind": "val", "step": state.step, "mean": mean, "subsets": scores, "cases": len(val)}
    row |= full_and_missing(answers, str(card.modalities))
    row["latents"] = latents
    if weights := state.network.anchor_weights():  # a gate's are those of its last batch, which the mean never sees
        row["weights"] = weights
    if mean > state.best:
        state.best = mean
        save_best(run, state, mean)
        row["best"] = True
    log.write(row)
    for warning in over_alignment(log.rows, config.align.alpha, tuple(state.network.anchors)):
        log.write(warning)


def _judged(scores: Scores, config: Config, card: ModelCard) -> Scores:
    """What a checkpoint is chosen by: all subsets, or the one that alone is trained."""
    if config.sampling.subsets in SUBSETS:
        return scores
    wanted = str(card.modalities.parse(config.sampling.subsets))
    return {wanted: scores[wanted]} if wanted in scores else scores


Scores = dict[str, dict[str, float]]
"""{subset: {region: Dice}}."""


def examined(
    network: AlignedSegmenter, scheme: LabelScheme, cases: Sequence[Prepared], precision: str
) -> tuple[list[Scores], dict[str, dict[str, float]]]:
    """Dice of each patient for every subset of the sequences he has, and what the latents of all are like.

    Processes share the patients, and all of them get the whole. The latents: `medmap.diagnosis.Latents.measures`.
    """
    network.eval()
    own, latents = {}, Latents()
    for i in range(rank(), len(cases), processes()):
        with overheard(network) as heard:
            own[i] = _dice_of(network, scheme, cases[i], precision)
        latents.add(i, heard)
    parts = gathered((own, latents))
    every = {i: scores for answers, _ in parts for i, scores in answers.items()}
    return [every[i] for i in range(len(cases))], reduce(Latents.joined, [found for _, found in parts]).measures()


def over_patients(answers: Sequence[Scores]) -> Scores:
    """Mean Dice of every subset and region, each over the patients who have the subset."""
    found: dict[str, dict[str, list[float]]] = {}
    for scores in answers:
        for subset, regions in scores.items():
            for region, score in regions.items():
                found.setdefault(subset, {}).setdefault(region, []).append(score)
    return {s: {region: float(np.mean(v)) for region, v in row.items()} for s, row in found.items()}


def full_and_missing(answers: Sequence[Scores], full: str) -> dict[str, float]:
    """Mean Dice with all sequences, mean over the subsets that lack some, and the cost: full − missing.

    All over the patients who have every sequence, so that the cost is not one of other patients.

    >>> patient = {"t1c": {"WT": 0.5}, "t2f": {"WT": 0.75}, "t1c+t2f": {"WT": 0.875}}
    >>> full_and_missing([patient, {"t1c": {"WT": 0.0}}], "t1c+t2f")
    {'full': 0.875, 'missing': 0.625, 'cost': 0.25}
    """
    scores = over_patients([scores for scores in answers if full in scores])
    dice = {subset: float(np.mean(list(regions.values()))) for subset, regions in scores.items()}
    if full not in dice:
        return {}
    lacking = [value for subset, value in dice.items() if subset != full]
    if not lacking:
        return {"full": dice[full]}
    missing = float(np.mean(lacking))
    return {"full": dice[full], "missing": missing, "cost": dice[full] - missing}


def _dice_of(network: AlignedSegmenter, scheme: LabelScheme, case: Prepared, precision: str) -> Scores:
    scores: Scores = {}
    for answer in answer_subsets(network, case, answerable([network], case.images), precision=precision):
        predicted, truth = on_common_box(answer, case)
        scores[str(answer.subset)] = {
            region: dice(scheme.region_mask(predicted, region), scheme.region_mask(truth, region))
            for region in scheme.regions
        }
    return scores


def check_patch(config: TrainConfig, network: AlignedSegmenter) -> None:
    """Raises ConfigError for a patch that is not a whole number of the network's strides."""
    stride = network.stride
    if any(n % stride or n < 2 * stride for n in config.patch):
        near = [max(2, round(n / stride)) * stride for n in config.patch]
        raise ConfigError(
            f"train.patch: {list(config.patch)} does not suit the network; each side must be a multiple of {stride} "
            f"and at least {2 * stride} voxels: the nearest is {near}, the smallest that works {[2 * stride] * 3}"
        )


def _open_run(run: Path, config: Config, card: ModelCard, split: Split, source: Source, device: torch.device) -> None:
    if (run / LOG).exists():
        raise CheckpointError(
            f"{run} already holds a run; go on with `medmap train --resume {run}` or name another folder with -o"
        )
    environment = {
        "medmap": medmap.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": str(device),
        "processes": processes(),
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
        **source.provenance(),
        "parameters": sum(
            p.numel()
            for p in build_segmenter(config.model, config.align, card.modalities, len(card.scheme.classes)).parameters()
        ),
    }
    with writing(run):
        write_run(run, config, card)
        write_text(run / SPLITS, json.dumps(split.to_dict(), indent=1))
        write_text(run / ENV, json.dumps(environment, indent=1))


def _step_seed(seed: int, step: int) -> int:
    """Of what the network itself draws, as dropout does; for each process another."""
    others = [rank()] if rank() else []
    return int(np.random.SeedSequence([seed, step, *others]).generate_state(1)[0])

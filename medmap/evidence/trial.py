"""One trial, from its data to its numbers: trained, asked on every subset of every test case, written down."""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import medmap
from medmap.align import STEM
from medmap.checkpoint import load_network
from medmap.core.case import Prepared
from medmap.core.metrics import dice, postprocess
from medmap.core.witnesses import CLEANED
from medmap.data.layouts import recognise
from medmap.data.store import Store, refuse_other_spacing, write_store
from medmap.errors import DivergenceError, InputError
from medmap.evaluate import check_fit, on_common_box
from medmap.evidence.leak import leaking_answers
from medmap.evidence.plan import RECIPE, Data, Patients, Phantoms, Trial
from medmap.evidence.results import DIVERGED, FINISHED, LEAK, Result, Scored
from medmap.inference import SubsetAnswer
from medmap.latentspace import conditional_dependence, latent_numbers
from medmap.phantom import write_phantoms
from medmap.predict import Predictor, answerable, resolve_device
from medmap.run import ENV, LOG, SPLITS, is_finished, read_log, steps_done, write_text
from medmap.train import fit

POINTS = 40
"""Of a curve over training, so many points are kept."""

LEAST_CASES = 6
"""Test cases below which numbers on latents say nothing."""

LATENTS_OF = 40
"""Test cases of which the latents are looked at, at most."""


class Stores(NamedTuple):
    """Prepared data of a trial: what is learned from, its division or "" for folds, and further test data by name."""

    learn: Path
    split: str
    tests: Mapping[str, Path]


def prepare(data: Data, work: Path, places: Mapping[str, Path], *, tests_only: bool = False) -> Stores:
    """Make or find the prepared data of a trial; what is there is kept.

    work:   folder of all such data; places: {name: folder of cases, or store} of patients
    Raises InputError for patients who are in no place, and as `write_store` does.
    """
    others = {other.name: _tested(other, work, places) for other in data.others}
    if isinstance(data, Patients):
        return Stores(patients_store(data, work, places), "", others)
    if tests_only:
        return Stores(Path(), "", {"test": _tested(data, work, places)})
    learn = _phantoms(data, work, data.train + data.val, 2 * data.seed, data.missing, whole=data.val)
    ids = list(Store(learn).ids)
    split = learn.parent / f"{data.train}-{data.val}.json"
    # The first validate, so that more patients to learn from leave them as they are.
    write_text(split, json.dumps({"train": ids[data.val :], "val": ids[: data.val]}))
    return Stores(learn, str(split), {"test": _tested(data, work, places), **others})


def _tested(data: Data, work: Path, places: Mapping[str, Path]) -> Path:
    """A store of which every case is a test case."""
    if isinstance(data, Patients):
        return patients_store(data, work, places)
    return _phantoms(data, work, data.test, 2 * data.seed + 1, 0.0)


def _phantoms(data: Phantoms, work: Path, count: int, seed: int, missing: float, whole: int = 0) -> Path:
    """whole: so many, the first, lack nothing. They validate, and choose as well where much is missing as elsewhere."""
    about = f"{RECIPE}-{count}-{seed}-{missing:g}-{data.settings}{f'-{whole}' if missing else ''}"
    place = work / "data" / f"{data.name}-{_digest(about)}"
    if not (place / "store" / "whole").is_file():
        write_phantoms(place / "files", count, seed, data.settings, missing=missing)
        for id in write_phantoms(place / "whole", whole, seed, data.settings) if missing and whole else ():
            shutil.rmtree(place / "files" / id)
            (place / "whole" / id).rename(place / "files" / id)
        write_store(recognise(place / "files"), place / "store")
        write_text(place / "store" / "whole", about)
        shutil.rmtree(place / "files")
        shutil.rmtree(place / "whole", ignore_errors=True)
    return place / "store"


def patients_store(data: Patients, work: Path, places: Mapping[str, Path]) -> Path:
    """The store of these patients: the one that lies in their place, or one that is made of the cases there."""
    if data.name not in places:
        raise InputError(
            f"the scans of {data.name} are in no place that is known; set MEDMAP_DATA to the folder that holds "
            f"{data.name}, or run the study on your own data with --data"
        )
    where = places[data.name]
    if (where / "manifest.json").is_file():
        refuse_other_spacing(Store(where), data.spacing_mm)
        return where
    spacing = "own" if data.spacing_mm is None else f"{data.spacing_mm:g}mm"
    store = work / "data" / f"{data.name}-{spacing}" / "store"
    report = write_store(recognise(where), store, data.spacing_mm)
    if report.failed:
        raise InputError(f"{where}: {len(report.failed)} cases cannot be prepared, such as {next(iter(report.failed))}")
    return store


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def carry_out(trial: Trial, stores: Stores, work: Path, device: str = "auto", keep: bool = False) -> Result:
    """Train (or go on where it was interrupted), then score; the network is deleted unless it is to be kept.

    A run that diverges is a result, too.
    """
    run, store = work / "runs" / trial.key, Store(stores.learn)
    config = trial.config.model_copy(update={"data": _data_config(trial, stores)})
    began = time.perf_counter()
    try:
        if not is_finished(run) or begun_with(run) != store.sha256:
            resume = steps_done(run) is not None and begun_with(run) == store.sha256
            if not resume:
                shutil.rmtree(run, ignore_errors=True)
            fit(config, store, run, resume=resume, device=device)
    except DivergenceError as error:
        return Result(trial, DIVERGED, facts={"why": str(error), **_machine(device), **_way(run)})
    trained = time.perf_counter()
    predictor = Predictor.load(run, device=device)
    split = json.loads((run / SPLITS).read_text(encoding="utf-8"))
    rows = [*_scores(predictor, "test", store, split["test"])]
    for name, path in stores.tests.items():
        other = Store(path)
        rows += _scores(predictor, name, other, other.ids)
    seconds = {"train": _last(run, "seconds"), "train_here": trained - began, "test": time.perf_counter() - trained}
    latents = _latents(trial, run, [*((store, case) for case in split["test"]), *_cases_of(stores)], device)
    facts = {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "parameters": sum(p.numel() for p in predictor.networks[0].parameters()),
        "store_sha256": store.sha256,
        "tests_sha256": {name: Store(path).sha256 for name, path in stores.tests.items()},
        **_machine(device),
        **_way(run),
        "latents": latents,
    }
    if not keep:
        shutil.rmtree(run)
    return Result(trial, FINISHED, tuple(rows), facts)


def begun_with(run: Path) -> str | None:
    """The hash of the data that a run was begun with; None where it does not say."""
    try:
        return str(json.loads((run / ENV).read_text(encoding="utf-8"))["store_sha256"])
    except (OSError, ValueError, KeyError):
        return None


def _data_config(trial: Trial, stores: Stores) -> Any:
    update: dict[str, Any] = {"store": str(stores.learn)}
    if stores.split:
        update["split"] = stores.split
    return trial.config.data.model_copy(update=update)


def _scores(predictor: Predictor, name: str, store: Store, ids: Sequence[str]) -> Iterator[Scored]:
    """Dice in percent of every subset and region, ``ET-pp`` being the cleaned enhancing tumour.

    An empty region that is left empty has 100.
    """
    check_fit(store, ids, predictor.card)
    for case in ids:
        prepared = store.load(case)
        answers = predictor.answers(prepared, answerable(predictor.networks, prepared.images))
        yield _scored(name, prepared, store.patient(case), predictor, answers)
        (network,) = predictor.networks
        if network.stem is not None and network.stem.leaks and set(network.modalities) <= set(prepared.images):
            leaked = leaking_answers(network, prepared)
            yield _scored(LEAK, prepared, store.patient(case), predictor, leaked)


def _scored(
    name: str, prepared: Prepared, patient: str, predictor: Predictor, answers: Iterable[SubsetAnswer]
) -> Scored:
    scheme, et_min_ml = predictor.card.scheme, predictor.et_min_ml
    scores: dict[tuple[str, str], float] = {}
    present: tuple[str, ...] = ()
    for answer in answers:
        predicted, truth = on_common_box(answer, prepared)
        masks = {region: scheme.region_mask(predicted, region) for region in scheme.regions}
        true = {region: scheme.region_mask(truth, region) for region in scheme.regions}
        present = tuple(region for region in scheme.regions if true[region].any())
        if "ET" in masks:
            cleaned = postprocess(predicted, scheme, prepared.grid.spacing_mm, et_min_ml)
            masks["ET" + CLEANED] = scheme.region_mask(cleaned, "ET")
        for region, mask in masks.items():
            found = dice(mask, true[region.removesuffix(CLEANED)])
            scores[str(answer.subset), region] = round(100 * found, 1)
    return Scored(name, prepared.id, patient, present, scores)


def _cases_of(stores: Stores) -> list[tuple[Store, str]]:
    """The test cases of phantoms; of patients the test part is the fold's."""
    if not stores.split:
        return []
    store = Store(stores.tests["test"])
    return [(store, case) for case in store.ids]


def _latents(trial: Trial, run: Path, cases: Sequence[tuple[Store, str]], device: str) -> dict[str, Any]:
    """Numbers on the latents of test cases, before and after training: the aligned levels first, else the deepest, then
    all others.

    The map, many numbers, is kept of the first level and the first seed alone.
    """
    shown = [store.load(case) for store, case in cases[:LATENTS_OF]]
    if len(shown) < LEAST_CASES:
        return {}
    patients = {case: store.patient(case) for store, case in cases[:LATENTS_OF]}
    network = load_network(run)
    deepest_first = [*reversed(list(network.backbone.strides)), *([STEM] if network.stem is not None else [])]
    levels = list(dict.fromkeys([*trial.config.align.levels, *deepest_first]))
    found = latent_numbers(run, shown, levels=levels, patients=patients, device=str(resolve_device(device)))
    for number, level in enumerate(found["levels"].values()):
        for when in ("before", "after"):
            if number or trial.config.seed:
                level[when].pop("map")
    if trial.config.seed:
        found.pop("rows")
    several = next((case for case in shown if len(set(case.images) & set(network.modalities)) > 1), None)
    if several is not None:
        found["conditional"] = conditional_dependence(network, several, levels[0])
    return {key: _short(value) for key, value in found.items() if key != "run"}


def _machine(device: str) -> dict[str, Any]:
    gpu = device != "cpu" and torch.cuda.is_available()
    kind = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    peak = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    versions = {"medmap": medmap.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {**versions, "device": kind, "peak_gb": round(peak / 1e9, 2)}


def _way(run: Path) -> dict[str, Any]:
    """What was seen on the way: validation, weights of the anchor, whatever else the log holds about latents."""
    if not (run / LOG).is_file():
        return {}
    log = read_log(run / LOG)
    train = [row for row in log if row["kind"] == "train"]
    thin = [*train[: -1 : max(1, len(train) // POINTS)], *train[-1:]]
    validation = [{k: v for k, v in row.items() if k not in ("kind", "subsets")} for row in log if row["kind"] == "val"]
    way: dict[str, Any] = {"validation": _short(validation)}
    if train:
        way["terms"] = _short(train[-1]["terms"])
    if any(row.get("weights") for row in thin):
        way["weights"] = [{"step": row["step"], **_short(row["weights"])} for row in thin if row.get("weights")]
    return way


def _short(tree: Any) -> Any:
    """Numbers with five digits."""
    if isinstance(tree, float):
        return float(f"{tree:.5g}")
    if isinstance(tree, Mapping):
        return {key: _short(value) for key, value in tree.items()}
    return [_short(value) for value in tree] if isinstance(tree, list) else tree


def _last(run: Path, key: str) -> float:
    rows = [row for row in read_log(run / LOG) if row["kind"] == "train"]
    return float(rows[-1][key])

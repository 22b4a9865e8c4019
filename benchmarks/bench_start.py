"""How long a command takes before it does anything: `medmap VERB --help`, and those that need no torch, whole."""

from __future__ import annotations

import subprocess
import sys

import pytest

from medmap.cli.app import VERBS
from medmap.phantom import Settings, write_phantoms


def run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "medmap", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    place = tmp_path_factory.mktemp("patients")
    write_phantoms(place, 2, 5, Settings(spacing_mm=4.0))
    return place


@pytest.mark.parametrize("verb", VERBS)
def bench_help(benchmark, verb: str) -> None:
    benchmark.group = "start-up"
    benchmark.pedantic(run, args=(verb, "--help"), rounds=5, warmup_rounds=1)


def bench_doctor(benchmark) -> None:
    benchmark.group = "start-up"
    benchmark.pedantic(run, args=("doctor",), rounds=5, warmup_rounds=1)


def bench_check(benchmark, patients) -> None:
    benchmark.group = "start-up"
    benchmark.pedantic(run, args=("check", patients), rounds=5, warmup_rounds=1)


def bench_first_prediction(benchmark, patients, tmp_path) -> None:
    """From the command to the mask of one patient at 4 mm: nearly all of it is start-up."""
    image = next(patients.glob("*/*-t2f.nii.gz"))
    benchmark.group = "start-up"
    words = ("predict", "--t2f", image, "-o", tmp_path / "mask.nii.gz")
    benchmark.pedantic(run, args=words, rounds=5, warmup_rounds=1)

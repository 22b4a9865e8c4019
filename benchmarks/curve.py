"""Does the fast arithmetic learn as the plain one does? python benchmarks/curve.py [FIGURE.png]

`unet` tiny on phantoms at 4 mm: fp32 and contiguous volumes against what medmap does unasked (bf16 where the processor
multiplies it, channels last), three seeds each; mean Dice over all subsets of patients that it was not trained on.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import made

from medmap import state
from medmap.config import load_config
from medmap.core.memory import keep_freed_memory
from medmap.data.layouts import recognise
from medmap.data.store import Store, write_store
from medmap.models.blocks import placed
from medmap.phantom import Settings, write_phantoms
from medmap.run import LOG, read_log
from medmap.train import fit

STEPS, EVERY, SEEDS = 400, 50, (0, 1, 2)
CHOSEN = (
    "model.size=tiny",
    "align.anchor=none",
    "data.split=kfold",
    "data.val_fraction=0.5",
    "train.patch=[32,32,32]",
    f"train.steps={STEPS}",
    f"train.validate_every={EVERY}",
)
ARMS = {"plain": ("train.precision=fp32",), "medmap": (f"train.precision={made.PRECISION}",)}


def main() -> None:
    keep_freed_memory()
    curves: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as place:
        write_phantoms(Path(place) / "data", 24, 0, Settings(spacing_mm=4.0))
        write_store(recognise(Path(place) / "data"), Path(place) / "store")
        for seed in SEEDS:
            for arm, more in ARMS.items():
                state.placed = placed if arm == "medmap" else lambda network, device: network.to(device)
                run = Path(place) / f"{arm}{seed}"
                began = time.perf_counter()
                fit(load_config(None, [*CHOSEN, *more, f"seed={seed}"]), Store(Path(place) / "store"), run)
                seconds[arm].append(time.perf_counter() - began)
                curves[arm].append([row["mean"] for row in read_log(run / LOG) if row["kind"] == "val"])
    print("| step |" + "".join(f" {arm}, Dice of {len(SEEDS)} seeds |" for arm in ARMS))
    print("|---|" + "---|" * len(ARMS))
    for index, step in enumerate(range(EVERY, STEPS + 1, EVERY)):
        cells = (", ".join(f"{100 * curve[index]:.1f}" for curve in curves[arm]) for arm in ARMS)
        print(f"| {step} | " + " | ".join(cells) + " |")
    print(*(f"{arm}: {statistics.median(times):.0f} s a run" for arm, times in seconds.items()), sep=", ")
    if len(sys.argv) > 1:
        _draw(curves, Path(sys.argv[1]))


def _draw(curves: dict[str, list[list[float]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    for (arm, several), colour in zip(curves.items(), ("#888888", "#1f6feb"), strict=True):
        for number, curve in enumerate(several):
            steps = range(EVERY, STEPS + 1, EVERY)
            axes.plot(steps, [100 * v for v in curve], color=colour, label=None if number else arm, linewidth=1.4)
    axes.set(xlabel="step", ylabel="mean Dice of 15 subsets, %", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()

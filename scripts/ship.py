"""Makes medmap/weights/phantom, the model that comes with medmap: python scripts/ship.py RUN EVALUATED

RUN is a finished run of configs/phantom.yaml, EVALUATED a folder that `medmap evaluate RUN --data …` left in it. The
weights are kept in half precision; the card says what was measured on these patients. The confidence.json that is
there stays where the weights come out the same; that of other weights is fitted anew to EVALUATED.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from medmap.card import SHIPPED, read_model
from medmap.checkpoint import load_network
from medmap.confidence import CONFIDENCE, write_confidence
from medmap.robustness import write_card
from medmap.run import CARD, CHECKPOINTS, CONFIG, STATE, checkpoint_folder, write_text
from medmap.scores import SUMMARY


def main(run: Path, evaluated: Path) -> None:
    best, there = SHIPPED / CHECKPOINTS / "best", SHIPPED / CONFIDENCE
    before = there.read_text(encoding="utf-8") if there.is_file() else ""
    shutil.rmtree(SHIPPED, ignore_errors=True)
    best.mkdir(parents=True)
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in load_network(run).state_dict().items()
    }
    save_file(weights, best / "model.safetensors")
    (best / "model.safetensors").chmod(0o644)
    shutil.copy(checkpoint_folder(run, "best") / STATE, best / STATE)
    for name in (CONFIG, CARD):
        shutil.copy(run / name, SHIPPED / name)
    summary = json.loads((evaluated / SUMMARY).read_text(encoding="utf-8"))
    for part in ("rows", "groups", "present", "cost"):  # what `medmap predict` and the card tell of
        summary[part] = [row for row in summary[part] if row["metric"] == "dice"]
    (SHIPPED / SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    write_card(read_model(SHIPPED), SHIPPED)
    print(_confidence(before, evaluated))
    print(f"{SHIPPED}: {(best / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


def _confidence(before: str, evaluated: Path) -> str:
    """What became of confidence.json."""
    model = read_model(SHIPPED)
    if before and json.loads(before)["weights_sha256"] == model.weights_sha256:
        write_text(SHIPPED / CONFIDENCE, before)
        return f"{CONFIDENCE}: kept, for the weights are those that it was fitted to"
    if write_confidence(model, evaluated, SHIPPED) is None:
        return f"{CONFIDENCE}: none, {evaluated} has too few patients; run scripts/ship_confidence.py on others"
    return f"{CONFIDENCE}: fitted to {evaluated}; run scripts/confidence_elsewhere.py, which says where it fails"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))

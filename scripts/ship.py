"""Makes medmap/weights/phantom, the model that comes with medmap: python scripts/ship.py RUN EVALUATED

RUN is a finished run of configs/phantom.yaml, EVALUATED a folder that `medmap evaluate RUN --data …` left in it. The
weights are kept in half precision; the table of the card is what was measured on these patients.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from textwrap import fill

from safetensors.torch import save_file

from medmap.card import SHIPPED
from medmap.checkpoint import load_network
from medmap.run import CARD, CHECKPOINTS, CONFIG, STATE, checkpoint_folder, read_run
from medmap.scores import SUMMARY, table_text

ABOUT = """# The model that comes with medmap

{about}

Use it with `medmap predict` without `--model`. Make it again with `medmap train -c configs/phantom.yaml -o RUN`.

{measured}

```
{table}
```
"""


def main(run: Path, evaluated: Path) -> None:
    config, card = read_run(run)
    best = SHIPPED / CHECKPOINTS / "best"
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
    for part in ("rows", "groups", "present"):  # what `medmap predict` and the card tell of
        summary[part] = [row for row in summary[part] if row["metric"] == "dice"]
    (SHIPPED / SUMMARY).write_text(json.dumps(summary), encoding="utf-8")
    count = sum(value.numel() for value in weights.values())
    about = (
        f"A {config.model.size} {config.model.name} ({count / 1e6:.1f} M parameters, half precision) for "
        f"{', '.join(card.modalities)}, any of them, at {card.spacing_mm:g} mm: trained on "
        f"{config.phantom.patients} simulated patients for {config.train.steps} steps, and on no patient. "
        "Not a medical device: for research, and never the only ground of a decision about a person."
    )
    measured = f"Measured on real patients, none of whom was looked at while it was made: {summary['evaluated']}."
    text = ABOUT.format(about=fill(about, 120), measured=fill(measured, 120), table=table_text(summary))
    (SHIPPED / "CARD.md").write_text(text, encoding="utf-8")
    print(f"{SHIPPED}: {(best / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))

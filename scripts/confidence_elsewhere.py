"""How the shipped model's confidence.json did on other patients: python scripts/confidence_elsewhere.py EVALUATED ...

EVALUATED is a folder that `medmap evaluate medmap/weights/phantom --data …` left, on patients to whom nothing was
fitted. Of them only what is in its subsets.csv and voxels.npz is read. What is found is kept in confidence.json, so
that `medmap predict` can say where its promise is known to fail.
"""

from __future__ import annotations

import sys
from pathlib import Path

from medmap.card import SHIPPED, read_model
from medmap.confidence import write_elsewhere


def main(folders: list[Path]) -> None:
    for whom, told in write_elsewhere(read_model(SHIPPED), folders).items():
        print(f"{whom}:")
        for region, values in told["regions"].items():
            held, lights = values["coverage"], values["lights"]
            good = ", ".join(f"{name} {one['good']} of {one['masks']}" for name, one in lights.items())
            between = f"[{100 * held['low']:.0f}, {100 * held['high']:.0f}]"
            out = f"{values['outside']['better']} better, {values['outside']['worse']} worse"
            share = f"{100 * held['mean']:.0f} % {between} of {values['masks']} masks"
            print(f"  {region:5} held {share}, {out}; good: {good}")
        if told["temperature"]:
            print(f"  loss {told['temperature']['loss']}, lowered by {told['temperature']['lowered']}")
            for region, values in told["temperature"]["regions"].items():
                print(f"  {region:5} calibration error where doubtful {values['error_where_doubtful']}")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])

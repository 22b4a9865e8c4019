"""Fits the confidence.json of the model that comes with medmap: python scripts/ship_confidence.py EVALUATED

EVALUATED is a folder that `medmap evaluate medmap/weights/phantom --data …` left, on patients for whom nothing was
chosen. Of them only what is in its subsets.csv and voxels.npz is read. Afterwards `scripts/confidence_elsewhere.py`
says on which other patients the promise is known to fail. Draws docs/reliability.png, too.
"""

from __future__ import annotations

import sys
from pathlib import Path

from medmap.card import SHIPPED, read_model
from medmap.confidence import write_confidence
from medmap.figures import reliability_diagram

PICTURE = Path(__file__).parents[1] / "docs" / "reliability.png"


def main(evaluated: Path) -> None:
    found = write_confidence(read_model(SHIPPED), evaluated, SHIPPED)
    if found is None:
        sys.exit(f"{evaluated}: too few patients; {SHIPPED} says nothing of single masks")
    if found["temperature"] is None:
        sys.exit(f"{evaluated}: has no voxels.npz, so there is no temperature; run `medmap evaluate` again")
    for region, values in found["regions"].items():
        left_out = values["left_out"]
        print(f"{region}: {values['patients']} patients, {values['masks']} masks; left out in turn:")
        print("  " + ", ".join(f"{key} {value}" for key, value in left_out.items()))
    told = found["temperature"]
    low, high = min(told["of"].values()), max(told["of"].values())
    print(f"temperatures {low:.2f} to {high:.2f}, common {told['common']:.2f}; left out in turn:")
    print(f"  loss {told['left_out']['loss']}, lowered by {told['left_out']['lowered']}")
    for region, values in told["left_out"]["regions"].items():
        print(f"  {region}: calibration error {values['error']}, where doubtful {values['error_where_doubtful']}")
    reliability_diagram(told).savefig(PICTURE, dpi=90)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

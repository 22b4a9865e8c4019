"""``python -m medmap.realism``: two data folders in, tables and pictures out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from medmap.core.case import Case
from medmap.data.cases import CaseFiles
from medmap.errors import InputError, MedmapError
from medmap.realism.cases import found_cases, read_cases, tumours
from medmap.realism.compare import compare
from medmap.realism.figures import contrast_bands, shape_percentiles, side_by_side, texture_bands, tissue_maps
from medmap.realism.shapes import compare_shapes, shape_statistics
from medmap.realism.text import as_markdown
from medmap.realism.tissues import find_tissues
from medmap.scores import without_nan


def main(words: Sequence[str] | None = None) -> None:
    """Write realism.md, realism.json and the pictures into a folder."""
    given = _parser().parse_args(words)
    try:
        _run(given)
    except MedmapError as error:
        sys.exit(f"error: {error}")


def _run(given: argparse.Namespace) -> None:
    real, simulated = (
        found_cases(given.real, _ids(given.ids)),
        found_cases([given.simulated], _ids(given.simulated_ids)),
    )
    pictured = _spread(simulated, given.limit)
    out = Path(given.out)
    out.mkdir(parents=True, exist_ok=True)
    shown = _chosen(real, given.show) if given.show else _spread(real, given.rows)
    pair = _read(shown), _read(_spread(simulated, given.rows))
    _save(side_by_side(*pair, given.source), out / "sides")
    if given.reference:
        reference = json.loads(Path(given.reference).read_text(encoding="utf-8"))
        statistics = shape_statistics(tumours(simulated))
        shapes = compare_shapes(statistics, reference)
        _save(shape_percentiles(statistics, reference), out / "shapes")
    else:
        statistics, shapes = {}, []
    if given.tissues:
        for name, group in (("real", real), ("simulated", pictured)):
            cases = _read(_spread(group, 8))
            _save(tissue_maps([(case, find_tissues(case)) for case in cases]), out / f"tissues-{name}")
    found = compare(read_cases(real), read_cases(pictured), on_case=lambda id: print(id, file=sys.stderr))
    _save(contrast_bands(found), out / "contrasts")
    _save(texture_bands(found), out / "texture")
    (out / "realism.md").write_text(as_markdown(found, shapes), encoding="utf-8")
    numbers = without_nan({**found.to_dict(), "shapes": statistics})
    (out / "realism.json").write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print(f"contrasts inside {100 * found.contrast_inside:.0f} %, texture inside {100 * found.texture_inside:.0f} %")
    for name, telling in found.telling.items():
        print(f"AUC from {name}: {telling.auc:.2f} ({telling.low:.2f} … {telling.high:.2f})")
    print(f"see {out / 'realism.md'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m medmap.realism", description=__doc__)
    parser.add_argument("--real", nargs="+", required=True, metavar="DIR", help="folders of real patients")
    parser.add_argument("--ids", nargs="+", metavar="ID|FILE", help="the only cases that are opened (default: all)")
    parser.add_argument("--simulated", required=True, metavar="DIR", help="folder of simulated patients")
    parser.add_argument("--simulated-ids", nargs="+", metavar="ID|FILE", help="the only ones of these (default: all)")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="folder for the tables and pictures")
    parser.add_argument("--reference", metavar="JSON", help="published shape statistics to compare all tumours with")
    parser.add_argument("--limit", type=int, default=24, help="simulated patients whose images are measured (24)")
    parser.add_argument("--rows", type=int, default=6, help="patients of each kind in sides.png (6)")
    parser.add_argument("--show", nargs="+", metavar="ID", help="which real patients sides.png shows")
    parser.add_argument("--source", default="", help="attribution of the real images, printed below sides.png")
    parser.add_argument("--tissues", action="store_true", help="draw the maps of white and grey matter and fluid too")
    return parser


def _ids(words: Sequence[str] | None) -> list[str] | None:
    """Ids as given; a word that is a file stands for the ids in it."""
    if words is None:
        return None
    found: list[str] = []
    for word in words:
        found += Path(word).read_text(encoding="utf-8").split() if Path(word).is_file() else [word]
    return found


def _chosen(cases: Sequence[CaseFiles], ids: Sequence[str]) -> list[CaseFiles]:
    by_id = {case.id: case for case in cases}
    if unknown := [id for id in ids if id not in by_id]:
        raise InputError(f"--show {', '.join(unknown)}: not among the real cases {', '.join(by_id)}")
    return [by_id[id] for id in ids]


def _spread(cases: Sequence[CaseFiles], count: int) -> list[CaseFiles]:
    """So many cases, evenly spread over the list."""
    chosen = np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int)
    return [cases[i] for i in chosen]


def _read(cases: Sequence[CaseFiles]) -> list[Case]:
    return list(read_cases(cases))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"))


if __name__ == "__main__":
    main()

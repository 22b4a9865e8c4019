"""How near simulated patients are to real ones, measured with one estimator for both.

A maintainer's instrument: ``python -m medmap.realism --real DIR --simulated DIR -o OUT``.
"""

from medmap.realism.cases import found_cases, read_cases, upright
from medmap.realism.compare import Realism, compare, compare_measured
from medmap.realism.measure import Measured, measure
from medmap.realism.shapes import compare_shapes, shape_statistics, sphericity, tumour_shape
from medmap.realism.telling import Telling, tell_apart
from medmap.realism.tissues import find_tissues

__all__ = [
    "Measured",
    "Realism",
    "Telling",
    "compare",
    "compare_measured",
    "compare_shapes",
    "find_tissues",
    "found_cases",
    "measure",
    "read_cases",
    "shape_statistics",
    "sphericity",
    "tell_apart",
    "tumour_shape",
    "upright",
]

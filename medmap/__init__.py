"""medmap: brain-tumour segmentation that keeps working when MRI sequences are missing.

The names below are the public surface. Each is imported from its module when it is first asked for, so that
``import medmap`` costs nothing and ``medmap check`` never waits for torch.

>>> import medmap
>>> str(medmap.GLIOMA_MRI)
't1n+t1c+t2w+t2f'
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    # words
    "ModalitySet": "core.modality",
    "GLIOMA_MRI": "core.modality",
    "LabelScheme": "core.labels",
    "SCHEMES": "core.labels",
    "Case": "core.case",
    "Prediction": "core.case",
    # data in
    "recognise": "data.layouts",
    "check": "data.check",
    "write_store": "data.store",
    "Store": "data.store",
    "simulate": "phantom",
    # method
    "Backbone": "models.backbone",
    "BACKBONES": "models",
    "check_backbone": "models",
    "adapt": "models.adapt",
    "Anchor": "anchors",
    "alignment_loss": "anchors",
    "AlignedSegmenter": "align",
    "build_segmenter": "align",
    # work
    "Config": "config",
    "load_config": "config",
    "fit": "train",
    "Predictor": "predict",
    "read_inputs": "inputs",
    "segment_case": "segment",
    "score_region": "core.metrics",
    "compare_arms": "compare",
    "write_report": "report",
    # what can go wrong
    "MedmapError": "errors",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medmap' has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(import_module(f"medmap.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""A model as a MONAI bundle, which MONAI's own runner loads and runs where medmap is installed."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import medmap
from medmap.card import ModelFolder, choose_scheme
from medmap.checkpoint import load_network
from medmap.errors import InputError
from medmap.export.package import (
    LICENCE,
    NOT_A_DEVICE,
    Package,
    licence_name,
    licence_text,
    members,
    packed,
    public_summary,
    readme,
    whole,
)
from medmap.export.workflow import PatientNetwork
from medmap.run import read_run, write_text

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
HERE = "medmap.export.workflow"


def export_bundle(model: ModelFolder, out: Path, licence: str | None = None) -> Package:
    """Write configs/metadata.json, configs/inference.json, models/model.pt, docs/README.md and LICENSE.

    model.pt is a state dictionary, as the specification of bundles wants it; it loads with ``weights_only=True``.
    Raises InputError where ``out`` exists, cannot be written, or folds have unlike networks.
    """
    text = licence_text(model, licence)
    network = network_definition(model)
    with whole(out) as fresh:
        for folder in ("configs", "models", "docs"):
            (fresh / folder).mkdir()
        # What is saved is what the bundle will load into.
        whole_network = PatientNetwork(**{key: value for key, value in network.items() if key != "_target_"})
        for member, run in zip(whole_network.members, members(model).values(), strict=True):
            member.load_state_dict(load_network(run, model.which).state_dict())
        torch.save(
            {n: t.contiguous().clone() for n, t in whole_network.state_dict().items()}, fresh / "models/model.pt"
        )
        _write_json(fresh / "configs/metadata.json", metadata(model, licence_name(text)))
        _write_json(fresh / "configs/inference.json", inference(network))
        write_text(fresh / "docs/README.md", readme(model, _title(model), USE, text))
        write_text(fresh / LICENCE, text)
    return packed(out)


def network_definition(model: ModelFolder) -> dict[str, Any]:
    """What builds the network, in plain types. Raises InputError where members of an ensemble are unlike."""
    configs = [read_run(run)[0] for run in model.runs]
    first = configs[0]
    for run, config in zip(model.runs, configs, strict=True):
        if (config.model, config.align, config.predict) != (first.model, first.align, first.predict):
            raise InputError(
                f"{run}: another network than {model.runs[0]} (model, align or predict differ); a bundle holds one "
                "kind. Export one of them, or take --to folder"
            )
    return {
        "_target_": f"{HERE}.{PatientNetwork.__name__}",
        "model": first.model.model_dump(mode="json"),
        "align": first.align.model_dump(mode="json"),
        "modalities": list(model.modalities),
        "labels": model.scheme.to_dict(),
        "spacing_mm": model.spacing_mm,
        "members": len(configs),
        "mirror": list(first.predict.mirror),
        "et_min_ml": first.predict.et_min_ml,
        "memory_gb": first.predict.memory_gb,
        "patch": list(first.train.patch),
    }


def inference(network: dict[str, Any]) -> dict[str, Any]:
    """configs/inference.json: a folder of patients in any layout → a folder of masks."""
    return {
        "imports": ["$import torch"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": f"{HERE}.ReadCase", "network": "@network_def"},
        "dataset": {
            "_target_": "Dataset",
            "data": {"_target_": f"{HERE}.cases", "folder": "@dataset_dir", "network": "@network_def"},
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SimpleInferer"},
        "postprocessing": {"_target_": f"{HERE}.WriteMask", "network": "@network_def", "folder": "@output_dir"},
        # Not when the bundle is initialised, which `monai.bundle.load` does where there are no patients.
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
                "map_location": "@device",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def metadata(model: ModelFolder, licence: str) -> dict[str, Any]:
    """configs/metadata.json."""
    scheme, summary = choose_scheme(model.scheme), public_summary(model)
    whole_set = "+".join(model.modalities)
    measured = {
        f"dice_{row['region']}": round(row["mean"], 4)
        for row in (summary or {"rows": []})["rows"]
        if row["subset"] == whole_set and row["mean"] is not None
    }
    packages = {name: _version(name) for name in ("nibabel", "safetensors", "scipy", "pytorch-ignite", "fire")}
    channels = {str(index): name for index, name in enumerate(model.modalities)}
    classes = {str(index): name for index, name in enumerate(scheme.classes)}
    size = {"spatial_shape": ["*", "*", "*"], "dtype": "float32", "is_patch_data": False}
    image = {"type": "image", "format": "magnitude", "modality": "MR", "num_channels": len(channels), "value_range": []}
    answer = {"type": "image", "format": "segmentation", "num_channels": len(classes), "value_range": [0, 1]}
    grid = "each data set's own spacing" if model.spacing_mm is None else f"{model.spacing_mm:g} mm"
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": "exported"},
        "monai_version": _version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": _version("numpy"),
        "required_packages_version": {"medmap": medmap.__version__, **packages},
        "name": _title(model),
        "task": f"Segmentation of {', '.join(scheme.regions)} from any subset of {', '.join(model.modalities)}",
        "description": f"Answers whichever sequences there are; an absent one is a channel of zeros. {NOT_A_DEVICE}",
        "authors": "whoever trained it with medmap",
        "copyright": f"Licence: {licence}",
        "intended_use": NOT_A_DEVICE,
        "image_classes": f"{', '.join(model.modalities)}: skull-stripped, z-scored over each one's brain, at {grid}",
        "pred_classes": "class probabilities; codes of masks: "
        + ", ".join(f"{code} {name}" for name, code in scheme.codes.items()),
        "eval_metrics": measured,
        "network_data_format": {
            "inputs": {"image": {**image, **size, "channel_def": channels}},
            "outputs": {"pred": {**answer, **size, "channel_def": classes}},
        },
    }


def _title(model: ModelFolder) -> str:
    return f"medmap {'+'.join(model.modalities)}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


USE = """This is a MONAI bundle. medmap must be installed to run it, it is the network and the preparation of images:

```sh
pip install 'medmap[export]'
python -m monai.bundle run --bundle_root . --config_file configs/inference.json --dataset_dir IN --output_dir OUT
```

IN is a folder of patients in any layout that `medmap check` knows; OUT gets one mask a patient, on the patient's own
grid. A patient may lack sequences. `monai.bundle.load` gives the network: images [B M X Y Z] → probabilities
[B K X Y Z], where a channel of zeros is a sequence that is absent."""

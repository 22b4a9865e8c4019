"""What training needs of patients, wherever they come from: a prepared store, or a stream of phantoms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from medmap.core.case import Prepared
from medmap.core.labels import LabelScheme
from medmap.core.modality import ModalitySet


class Source(Protocol):
    """Patients by id. `medmap.data.store.Store` and `medmap.stream.PhantomStream` are two."""

    @property
    def path(self) -> Path:
        """What to call it."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Case ids."""

    @property
    def scheme(self) -> LabelScheme | None:
        """Classes and regions of the labels; None where there are none."""

    @property
    def modalities(self) -> ModalitySet:
        """Every sequence that at least one case has."""

    @property
    def spacing_mm(self) -> float | None:
        """Edge of the voxels; None where cases differ."""

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of what the patients follow from."""

    def roster(self) -> list[tuple[str, str, str | None]]:
        """(id, patient, group) of every case."""

    def sequences(self, case_id: str) -> tuple[str, ...]:
        """The sequences that a case really has."""

    def has_labels(self, case_id: str) -> bool:
        """Whether a case has a segmentation."""

    def expect(self, ids: Sequence[str]) -> None:
        """These cases will be asked for soon, in this order."""

    def load(self, case_id: str) -> Prepared:
        """One case."""

    def provenance(self) -> dict[str, Any]:
        """What a run folder notes, to find or make the same patients again."""

"""Simulated patients: what a scanner would measure in a head with a glioma, with the truth."""

from medmap.phantom.patient import draw_patient
from medmap.phantom.simulate import simulate
from medmap.phantom.write import write_phantoms

__all__ = ["draw_patient", "simulate", "write_phantoms"]

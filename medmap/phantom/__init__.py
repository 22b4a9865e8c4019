"""Simulated patients: what a scanner would measure in a head with a glioma, with the truth."""

from medmap.phantom.patient import draw_patient
from medmap.phantom.simulate import Settings, render, simulate
from medmap.phantom.write import write_phantoms

__all__ = ["Settings", "draw_patient", "render", "simulate", "write_phantoms"]

"""Simulated patients."""

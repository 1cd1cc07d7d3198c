"""The table of the contract tests: a family takes part by one line here."""

FAMILIES = (
    "tests.tiny_flux",
)
"""Modules that hold a ``TINY`` (see ``tiny.py``)."""

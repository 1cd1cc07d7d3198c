"""Smaller storage for frozen weights."""

from .fp8 import store_in_fp8

__all__ = ["store_in_fp8"]

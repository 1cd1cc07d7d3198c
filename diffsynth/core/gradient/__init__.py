"""Gradient checkpointing, with and without keeping the checkpoints in host memory."""

from .checkpointing import set_gradient_checkpointing

__all__ = ["set_gradient_checkpointing"]

"""Fetching the files of a public repository into the models folder."""

from __future__ import annotations

SOURCES = ("modelscope", "huggingface")

"""Starting without Python's cycle collector, which would search again and again through what imports create."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused(freeze: bool = False) -> Iterator[None]:
    """Keep the cycle collector off while a lot is created that stays; 0.9 of 6.5 CPU seconds to the first step.

    Args:
        freeze: Take what then exists out of all later searches, once per process. For blocks that import and do not
            load models, because what is frozen is freed by its reference count alone.
    """
    freeze = freeze and not gc.get_freeze_count()
    if freeze:
        gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was_enabled:
            gc.enable()

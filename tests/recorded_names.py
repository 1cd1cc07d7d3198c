"""The recorded LoRA names of other programs (``tests/data/lora_keys``) and the two tools that read them."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

TABLES = Path(__file__).parent / "data" / "lora_keys"


@cache
def tool(name: str) -> ModuleType:
    """``check_lora`` (names and shapes of a file) or ``delta`` (its change of the weights), as they were received."""
    if str(TABLES) not in sys.path:
        sys.path.insert(0, str(TABLES))
    spec = importlib.util.spec_from_file_location(name, TABLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

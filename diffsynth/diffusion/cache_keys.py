"""What the outputs of a unit depend on besides the data: the part of a cache key that all rows share."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from ..adapters.fused import fused_fingerprint
from ..core.data.cache import entry_key
from ..core.data.file_hashes import FileHashes, hash_files
from ..core.errors import UserError
from .unit import PipelineUnit

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline
    from .training_module import PipelineTrainingModule

CAPTION_COLUMN = "prompt"
INPUT_COLUMNS = {"input_image": "image", "height": "image", "width": "image"}
"""Inputs of the units that are made from another column of the data set than the one of their name."""


def unit_fingerprint(module: PipelineTrainingModule, unit: PipelineUnit, hashes: FileHashes) -> str:
    """Code, networks, tokenizers, dtype and constant inputs of a unit, as a short text.

    Args:
        hashes: What is known of the content of files; the networks' files are added.
    Raises:
        UserError: a network carries an adapter that cannot be told apart.
    """
    pipe, constants = module.pipe, module.constant_inputs()
    parts: list[object] = [f"{type(unit).__module__}.{type(unit).__qualname__}", unit.version, pipe.torch_dtype]
    parts += [f"{name}={constants[name]}" for name in unit.inputs if name in constants]
    for name in unit.models:
        parts.append(network_fingerprint(pipe, name, hashes))
        parts.append(name in module.fp8_models)
        if getattr(getattr(pipe, name), "_diffsynth_hot_adapters", None):
            raise UserError(f"{name} has a LoRA loaded with hotload=True, which cannot be part of a cache key; load it "
                            "with hotload=False, or train with --cache off.")
        # a LoRA fused into an encoder changes its outputs, but not its files
        parts.append(fused_fingerprint(getattr(pipe, name)))
    if unit.prompt_inputs:
        parts += [tokenizer_fingerprint(getattr(pipe, name)) for name in pipe.family().tokenizers]
        # a length that is left out is the family's own, which may go by another network's configuration
        parts.append(sorted(pipe.token_limits(module.config.max_sequence_length).items()))
    return entry_key(*parts)


def network_fingerprint(pipe: BasePipeline, name: str, hashes: FileHashes) -> str:
    """Every byte of a network's files, its configuration, and the dtypes that it is safe in."""
    spec = next(component.spec for component in pipe.family().components if component.name == name)
    paths = pipe.component_paths.get(name, ())
    # the pipeline's own fingerprint samples large files; a layer that was edited could lie between the samples
    return f"{pipe.component_fingerprints[name]}|{hash_files(paths, hashes)}|{sorted(spec.safe_dtypes)}"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Vocabulary, merges, normalization and special tokens of a tokenizer."""
    state = f"{type(tokenizer).__qualname__}|{tokenizer.model_max_length}|{tokenizer.special_tokens_map}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state += f"|{sorted(tokenizer.get_vocab().items())}"
    else:
        rules = json.loads(backend.to_str())
        # these two are what the last call asked for, not what the tokenizer is
        state += json.dumps({name: rule for name, rule in rules.items() if name not in ("truncation", "padding")})
    return hashlib.blake2b(state.encode(), digest_size=16).hexdigest()


def columns_of_prefix(module: PipelineTrainingModule) -> list[frozenset[str]]:
    """Columns of the data set that each unit of the frozen prefix depends on, through earlier units too."""
    given = {*module.data_columns, *module.extra_inputs}
    made_from: dict[str, set[str]] = {}
    result = []
    for unit in module.prefix.units:
        columns: set[str] = set()
        for name in (*unit.inputs, *unit.prompt_inputs):
            columns |= made_from.get(name, {INPUT_COLUMNS.get(name, name)} & given)
        for output in unit.outputs:
            made_from[output] = columns
        result.append(frozenset(columns))
    return result

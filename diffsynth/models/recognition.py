"""What is in a weight file, told from the names and shapes of its tensors alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..core.errors import UserError
from ..core.loader.reader import TensorInfo, WeightReader, first_keys
from .given_config import given_config
from .keymap import KeyMap, Match, Rule
from .spec import ComponentSpec, Layout

logger = logging.getLogger(__name__)

# what a file that no component explains most likely is; only for messages
TELLTALES = (
    (r"lora_(A|B|down|up)\b|hada_w1|lokr_w1", "an adapter (LoRA), which goes to load_lora"),
    (r"(^|\.)input_blocks\.\d", "a UNet in the original Stable Diffusion layout"),
    (r"(^|\.)down_blocks\.\d+\.attentions.*transformer_blocks", "a UNet in the diffusers layout"),
    (r"(^|\.)joint_blocks\.\d", "a joint transformer of the Stable Diffusion 3 kind"),
    (r"^(vae\.|first_stage_model\.)?quant_conv\.weight", "an autoencoder of the Stable Diffusion kind"),
    (r"^decoder\.block\.0\.layer|^lm_head", "a complete language model, of which only the encoder is used here"),
    (r"^encoder\.block\.1\.layer\.0.*relative_attention_bias|^blocks\.0\.pos_embedding", "a umT5 text encoder"),
    (r"^(visual|vision_model)\.", "an image encoder"),
    (r"^(model\.)?layers\.\d+\.self_attn", "a language model"),
    (r"(^|\.)blocks\.\d+\.(self_attn|cross_attn)\.", "a video transformer"),
    (r"^(controlnet_|control_)", "a ControlNet"),
)


@dataclass
class Found:
    """One network inside a file."""

    spec: ComponentSpec
    layout: Layout
    prefix: str
    shapes: dict[str, tuple[int, ...]]
    """Shapes under the names of the layout, prefix stripped."""
    config: dict[str, Any]
    sources: dict[str, Match] = field(default_factory=dict)
    """Name in the file -> where it goes."""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def expected_names(self) -> list[str]:
        """Every name the network has here: from its table if it has one, else from the class on the meta device."""
        if self.spec.our_names is not None:
            return self.spec.our_names(self.config)
        from .building import build_empty

        return list(build_empty(self.spec, self.config).state_dict())

    @cached_property
    def key_map(self) -> KeyMap | None:
        return self.layout.key_map(self.config) if self.layout.key_map else None

    def match(self, local: str) -> Match | None:
        """Where a weight of this layout goes here."""
        if self.key_map is not None:
            return self.key_map.match_original(local)
        return Match(local, (local,), 0, Rule(local, (local,)))

    def ignores(self, local: str) -> bool:
        return any(re.fullmatch(pattern, local) for pattern in self.layout.ignored)


def find_components(reader: WeightReader, specs: Iterable[ComponentSpec],
                    constants: Mapping[str, Mapping[str, Any]] | None = None) -> list[Found]:
    """The networks in a file with their configurations; earlier specs win where a file fits several.

    Args:
        constants: Kind of a network -> configuration values that shapes do not show and the family decides.
    """
    found: list[Found] = []
    for spec in specs:
        placed = _find(reader.tensors, spec)
        if placed is None or any(placed[1] == other.prefix and _same(other, spec) for other in found):
            continue
        layout, prefix = placed
        shapes = {key[len(prefix) :]: info.shape for key, info in reader.tensors.items() if key.startswith(prefix)}
        config = {**_shown_config(layout, shapes, reader, spec), **(constants or {}).get(spec.kind, {})}
        config.update(given_config(reader, spec.class_path.rpartition(".")[2], config, alone=prefix == ""))
        found.append(Found(spec, layout, prefix, shapes, config))
    return found


def _find(tensors: Mapping[str, TensorInfo], spec: ComponentSpec) -> tuple[Layout, str] | None:
    for layout in spec.layouts:
        for prefix in layout.prefixes:
            if any(prefix + key in tensors for key in layout.absent):
                continue
            if all(_fits(tensors.get(prefix + key), shape) for key, shape in layout.signature.items()):
                return layout, prefix
    return None


def _same(found: Found, spec: ComponentSpec) -> bool:
    """Two specs of one class, or variants, at one place in a file are two readings of the same weights."""
    return found.spec.class_path == spec.class_path or spec.variant_of == found.spec.kind


def _fits(info: TensorInfo | None, shape: tuple[int | None, ...] | None) -> bool:
    if info is None or shape is None:
        return info is not None
    return len(info.shape) == len(shape) and all(
        asked in (None, given) for asked, given in zip(shape, info.shape, strict=True)
    )


def _shown_config(layout: Layout, shapes: Mapping[str, tuple[int, ...]], reader: WeightReader,
                  spec: ComponentSpec) -> dict[str, Any]:
    try:
        return layout.config(shapes)
    except (KeyError, IndexError, ZeroDivisionError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"missing or impossible: {error}"
        raise UserError(f"{reader.describe()} looks like {spec.kind}, but its weights do not fit together ({reason}); "
                        "the file is incomplete or damaged.") from error


def assign_weights(tensors: Mapping[str, TensorInfo], found: Sequence[Found],
                   expected: Sequence[Iterable[str]]) -> list[str]:
    """Give every tensor of a file to the network it belongs to; fills ``sources``, ``missing`` and ``unexpected``.

    Args:
        expected: For each network, every name that it has here.
    Returns:
        Tensors that belong to none of them.
    """
    names = [set(wanted) for wanted in expected]
    for component in found:
        component.sources, component.missing, component.unexpected = {}, [], []
    stray: list[str] = []
    for key in tensors:
        if not _claim(key, found, names):
            owners = [component for component in found if key.startswith(component.prefix)]
            if owners:
                max(owners, key=lambda component: len(component.prefix)).unexpected.append(key)
            else:
                stray.append(key)
    for component, wanted in zip(found, names, strict=True):
        component.missing = _missing(component, wanted)
    return stray


def _claim(key: str, found: Sequence[Found], names: Sequence[set[str]]) -> bool:
    for component, wanted in zip(found, names, strict=True):
        if not key.startswith(component.prefix):
            continue
        local = key[len(component.prefix) :]
        if component.ignores(local):
            return True
        match = component.match(local)
        if match is not None and all(ours in wanted for ours in match.ours):
            component.sources[key] = match
            return True
    return False


def _missing(component: Found, wanted: set[str]) -> list[str]:
    """Names, in the file's spelling, that the network has and the file has not."""
    present = {ours for match in component.sources.values() for ours in match.ours} | set(component.spec.identity)
    for first, second in component.spec.tied.items():
        if present & {first, second}:
            present |= {first, second}
    missing: dict[str, None] = {}
    for ours in sorted(wanted - present):
        match = component.key_map.match_ours(ours) if component.key_map is not None else None
        missing[component.prefix + (match.original if match else ours)] = None
    return list(missing)


def describe_unknown(tensors: Mapping[str, object]) -> str:
    """What weights that were not recognised seem to be, for messages."""
    for pattern, description in TELLTALES:
        if any(re.search(pattern, key) for key in tensors):
            return f"it seems to be {description}; it holds {first_keys(tensors)}"
    return f"it holds {first_keys(tensors)}"

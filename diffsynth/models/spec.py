"""What the engine needs to know of a network to recognise, build, load and export it; and what a family is made of."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .keymap import KeyMap

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way in which the weights of a component are named in published files."""

    name: str
    """``original`` (the authors' release) or ``diffusers`` (diffusers and transformers folders)."""
    signature: Mapping[str, tuple[int | None, ...] | None]
    """Keys that must all be present; with a shape, None matches any size, and a shorter file is another component."""
    absent: tuple[str, ...] = ()
    """Keys of which none may be present."""
    prefixes: tuple[str, ...] = ("",)
    """Prefixes under which a bundle holds this component; at most one is stripped."""
    key_map: Callable[[Mapping[str, Any]], KeyMap] | None = None
    """Configuration -> table from this layout's names to ours; None where the names are already ours."""
    config: Callable[[Shapes], dict[str, Any]]
    """Configuration from the shapes of this layout (prefix stripped), with the constants that shapes do not show."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of keys that published files carry and the network does not need."""


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """A network as it occurs in files, whichever pipelines use it."""

    kind: str
    """Name of the network in messages and in ``inspect``: ``flux_dit``, ``clip_l``, ``t5xxl``, ``flux_vae``, ..."""
    class_path: str
    """Dotted path of the diffusers or transformers class; imported only when the network is built."""
    layouts: tuple[Layout, ...]
    default_name: str = ""
    """Attribute on the pipeline unless the family says otherwise: ``dit``, ``vae``, ``text_encoder``, ..."""
    family: str = ""
    """Family that owns this component, empty when several families share it."""
    safe_dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Dtypes in which it computes without overflow; the first takes the place of one that is not among them."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Our keys that share the storage of another of our keys (T5's two embeddings); a file may hold either or both."""
    our_names: Callable[[Mapping[str, Any]], list[str]] | None = None
    """Configuration -> every name of our network, so that ``inspect`` need not import its class (seconds)."""
    identity: tuple[str, ...] = ()
    """Square matrices of ours that are the identity where a file leaves them out."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the class besides its configuration."""
    variant_of: str = ""
    """Kind of the spec that reads the same files for another class; of the two, a file is described by the first."""

    def load_class(self) -> type:
        module, _, name = self.class_path.rpartition(".")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network at its place in a family."""

    name: str
    """Attribute on the pipeline."""
    spec: ComponentSpec
    found_in: str
    """Where the published repository keeps it, for the message that names a missing one."""
    optional: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Configuration values that the family decides because files cannot show them (VAE scale and shift)."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named download of ``download_models``: files of one repository and where they land under the models folder."""

    model_id: str
    huggingface_id: str
    files: tuple[str, ...]
    folder: str


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFamily:
    """Everything the engine knows of a family; one constant ``FAMILY`` in ``pipelines/<family>.py``.

    Compared by identity, so that what is derived from one can be remembered.
    """

    name: str
    pipeline: str
    """Dotted path of the pipeline class."""
    components: tuple[Component, ...]
    model_ids: tuple[str, ...]
    """Public repositories of this family, as ``model_id`` of the newer pages."""
    tokenizers: Mapping[str, tuple[str, str]]
    """Pipeline attribute -> (transformers class path, folder in the repository)."""
    default_lora_targets: tuple[str, ...]
    lora_aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Layer names of the older generation -> ours (``a_to_qkv`` -> ``attn.to_q``, ``attn.to_k``, ``attn.to_v``)."""
    lora_format: str = "diffusers"
    """What ``--lora_format auto`` writes."""
    lora_key_maps: Mapping[str, Callable[[], KeyMap]] = field(default_factory=dict)
    """Layout name (``original``, ``diffsynth``) -> table of module names for the adapter formats."""
    lora_convolutions: tuple[str, ...] = ()
    """Regular expressions of our denoiser layers that are convolutions; all others are linear."""
    presets: Mapping[str, tuple[Preset, ...]] = field(default_factory=dict)


def count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many numbered parts ``prefix.0.``, ``prefix.1.``, ... there are."""
    start = prefix + "."
    numbers = {key[len(start) :].split(".", 1)[0] for key in shapes if key.startswith(start)}
    return len({int(number) for number in numbers if number.isdecimal() and len(number) < 9})

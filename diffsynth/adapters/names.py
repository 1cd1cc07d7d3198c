"""Where the layers of a family's networks stand in LoRA files: prefixes, tables, and the lookup from a file's name."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

from ..models.keymap import KeyMap, Match, Rule, rename
from ..models.spec import Component, ModelFamily

DENOISERS = {"dit": "transformer", "dit2": "transformer_2", "unet": "unet"}
"""Denoiser on the pipeline -> its prefix in diffusers files."""

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_T5_LAYERS = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
_CLIP_LAYERS = (*_ATTENTION, "mlp.fc1", "mlp.fc2")


def _clip(level: str) -> KeyMap:
    """Files have a ``text_model.`` level that ``CLIPTextModel`` of transformers 5 has lost; ``level`` is ours."""
    block = "encoder.layers.{i}"
    return KeyMap(tuple(rename(f"text_model.{block}.{name}", f"{level}{block}.{name}") for name in _CLIP_LAYERS))


def _t5() -> KeyMap:
    names = [f"encoder.block.{{i}}.{name}" for name in _T5_LAYERS]
    return KeyMap(tuple(rename(name, name) for name in names))


_TEXT_ENCODERS = {
    "clip_l": (("lora_te1_", "lora_te_"), "clip_l", _clip("")),
    "clip_g": (("lora_te2_",), "clip_g", _clip("text_model.")),
    "t5xxl": (("lora_te3_", "lora_te2_"), "t5xxl", _t5()),
}
"""Kind of network -> kohya's prefixes (the first is written), ComfyUI's name, table from the files' names to ours."""

# levels that training programs put around a network
_WRAPPERS = ("base_model.model.", "model.diffusion_model.", "module.", "pipe.")


@dataclass(frozen=True)
class ComponentNames:
    """How one network of a family is called in every format."""

    component: str
    is_denoiser: bool
    diffusers: str
    """Prefix with its dot, in diffusers files."""
    kohya: tuple[str, ...]
    """Prefixes of names written with underscores: the first is written, all are read."""
    comfyui: str
    """Prefix with its dot, in ComfyUI files."""
    original: KeyMap | None = None
    """Original module names -> ours; None where the authors' names are ours."""
    kohya_map: KeyMap | None = None
    """The part of ``original`` that kohya's trainers know."""
    diffsynth: KeyMap | None = None
    convolutions: tuple[str, ...] = ()
    """Regular expressions of the layers that are convolutions; all others are linear."""

    @cached_property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of dotted names, any of which may come before a layer of this network."""
        return tuple(dict.fromkeys((self.diffusers, self.comfyui, f"{self.component}.")))

    @cached_property
    def _dotted(self) -> list[KeyMap]:
        maps = [_identity(self.original)] if self.original else []
        return maps + [table for table in (self.original, self.diffsynth) if table]

    @cached_property
    def _underscored(self) -> list[KeyMap]:
        return [KeyMap(tuple(_with_underscores(rule) for rule in table.rules)) for table in self._dotted]

    def match(self, name: str, *, underscored: bool = False) -> Match | None:
        """Our layers that the module ``name`` (without prefix) of a file stands for."""
        for table in self._underscored if underscored else self._dotted:
            if found := table.match_original(name):
                return found
        if self.original is None and not underscored:
            return Match(name, (name,), 0, rename(name, name))
        return None

    def file_match(self, module: str, fmt: str) -> Match | None:
        """Where our layer stands in a file of this format; None when the format has no name for it."""
        table = {"kohya": self.kohya_map, "comfyui": self.original, "diffsynth": self.diffsynth}.get(fmt)
        if fmt == "diffusers":
            # the denoiser has our names; text encoders have the level that the class lost
            table = None if self.is_denoiser else self.original
        if fmt == "diffsynth" and not self.is_denoiser:
            return None
        if table is None:
            return Match(module, (module,), 0, rename(module, module))
        return table.match_ours(module)

    def file_name(self, match: Match, fmt: str) -> str:
        """The module's full name in a file of this format."""
        if fmt == "kohya":
            return self.kohya[0] + match.original.replace(".", "_")
        return {"diffusers": self.diffusers, "comfyui": self.comfyui, "diffsynth": ""}[fmt] + match.original


@dataclass(frozen=True)
class FamilyNames:
    """The networks of a family that a LoRA file may hold, and the lookup among them."""

    components: dict[str, ComponentNames] = field(default_factory=dict)

    def match(self, name: str) -> tuple[ComponentNames, Match] | None:
        """The network and layers that a module name of a file stands for, with or without any known prefix."""
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
        for names in self.components.values():
            for prefix in names.kohya:
                if name.startswith(prefix) and (found := names.match(name.removeprefix(prefix), underscored=True)):
                    return names, found
        for names in self.components.values():
            for prefix in names.prefixes:
                if name.startswith(prefix) and (found := names.match(name.removeprefix(prefix))):
                    return names, found
        denoiser = next((names for names in self.components.values() if names.is_denoiser), None)
        found = denoiser.match(name) if denoiser else None
        return (denoiser, found) if denoiser and found else None


@cache
def family_names(family: ModelFamily) -> FamilyNames:
    """The names of a family's networks, from its tables and from the kinds of its text encoders."""
    num_text_encoders = sum(component.name.startswith("text_encoder") for component in family.components)
    named = {component.name: _component_names(component, family, num_text_encoders) for component in family.components}
    return FamilyNames({name: names for name, names in named.items() if names is not None})


def _component_names(component: Component, family: ModelFamily, num_text_encoders: int) -> ComponentNames | None:
    if component.name in DENOISERS:
        tables = {name: make() for name, make in family.lora_key_maps.items()}
        original = tables.get("original")
        return ComponentNames(
            component.name, True, f"{DENOISERS[component.name]}.", ("lora_unet_", "lora_transformer_", "lycoris_"),
            "diffusion_model.", original, tables.get("kohya", original), tables.get("diffsynth"),
            family.lora_convolutions,
        )
    if component.spec.kind not in _TEXT_ENCODERS:
        return None
    kohya, comfyui, table = _TEXT_ENCODERS[component.spec.kind]
    if num_text_encoders == 1:
        kohya = ("lora_te_", *kohya)
    return ComponentNames(component.name, False, f"{component.name}.", kohya,
                          f"text_encoders.{comfyui}.transformer.", table, table)


def _identity(table: KeyMap) -> KeyMap:
    """Our own names as a table, so that they are recognised and checked like any others."""
    return KeyMap(tuple(rename(name, name) for rule in table.rules for name in rule.ours))


def _with_underscores(rule: Rule) -> Rule:
    return Rule(rule.original.replace(".", "_"), rule.ours, rule.proportions, rule.swap_halves, rule.squeeze)

"""What all pipelines share: components, units, the denoising loop, adapters."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image

from ..core.device import choose_device, return_free_memory
from ..core.errors import UserError
from ..core.memory import store_in_fp8
from .schedule import NoiseLevels, TimestepSampling, training_recipe
from .unit import Inputs, PipelineUnit, run_unit

if TYPE_CHECKING:
    from ..core.loader import ModelConfig
    from ..models.manager import ModelManager
    from ..models.spec import ModelFamily

logger = logging.getLogger(__name__)


class BasePipeline(torch.nn.Module):
    """A family's networks, its units and the loop that turns noise into pictures.

    Subclasses set the class attributes below, build ``units`` and ``scheduler`` in ``__init__``, and document
    ``__call__``.
    """

    family_name: ClassVar[str]
    denoiser_models: ClassVar[tuple[str, ...]] = ("dit",)
    """Attributes that ``model_fn`` uses; the first is ``pipe.denoiser``."""
    model_fn: ClassVar[Callable[..., torch.Tensor]]
    """Static function from our names and units to the network's; its parameters say which inputs it takes."""
    height_division_factor: int
    width_division_factor: int
    scheduler: Any
    units: list[PipelineUnit]

    def __init__(self, device: torch.device | str = "cpu", torch_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype
        self.unit_runner = run_unit
        self.timestep_sampling = TimestepSampling()
        for component in self.family().components:
            setattr(self, component.name, None)
        for tokenizer in self.family().tokenizers:
            setattr(self, tokenizer, None)
        self.units = []
        self.component_configs: dict[str, dict[str, Any]] = {}
        """Configuration of each component that was found, loaded or not."""
        self.component_fingerprints: dict[str, str] = {}
        """Content of the files that each component comes from; changes whenever its outputs might."""
        self.component_paths: dict[str, tuple[Path, ...]] = {}
        self.fp8_models: tuple[str, ...] = ()
        """Components whose linear layers are stored in float8 whenever they are loaded."""
        self._load_component: Callable[[str], torch.nn.Module | None] | None = None

    def _apply(self, fn: Callable, recurse: bool = True) -> BasePipeline:
        # torch's own hook behind .to(): the inputs have to go where the networks went
        super()._apply(fn, recurse)
        self.device = fn(torch.empty(0, device=self.device)).device
        return self

    @classmethod
    def family(cls) -> ModelFamily:
        from ..models.registry import get_family

        return get_family(cls.family_name)

    @property
    def denoiser(self) -> torch.nn.Module:
        return getattr(self, self.denoiser_models[0])

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "auto",
        model_configs: Sequence[ModelConfig | str | Path | list] = (),
        names: Iterable[str] | None = None,
        deferred: Iterable[str] = (),
        **tokenizer_configs: ModelConfig | None,
    ):
        """Load a pipeline from weight files, recognised by what is in them.

        Args:
            torch_dtype: Dtype of the networks; those that are unsafe in it keep a safe one.
            device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
            model_configs: Files, shards, folders or repositories, in any order.
            names: Only these components are loaded; default all that the family needs.
            deferred: These components are checked now and loaded when they are first used.
            **tokenizer_configs: ``tokenizer_config``, ``tokenizer_2_config``, ...: where a tokenizer lies, when it
                is not beside the weights.
        Raises:
            UserError: a file is missing, damaged, unknown or of another family, or a component is missing.
        """
        from ..models.loading import load_components
        from ..models.tokenizers import load_tokenizer

        family = cls.family()
        allowed = {f"{tokenizer}_config" for tokenizer in family.tokenizers}
        if unknown := sorted(set(tokenizer_configs) - allowed):
            raise TypeError(
                f"{cls.__name__}.from_pretrained has no argument {unknown[0]!r}; it takes {sorted(allowed)}."
            )
        target = choose_device(str(device))
        sources = list(model_configs)
        components = load_components(
            sources, family, torch_dtype, target, None if names is None else set(names), frozenset(deferred))
        pipe = cls(device=target, torch_dtype=torch_dtype)
        for component in components.values():
            setattr(pipe, component.name, component.module)
            pipe.component_configs[component.name] = component.config
            pipe.component_fingerprints[component.name] = component.fingerprint
            pipe.component_paths[component.name] = component.paths
        pipe._load_component = lambda name: load_components(sources, family, torch_dtype, target, {name})[name].module
        paths = [path for component in components.values() for path in component.paths]
        for tokenizer, (class_path, folder) in family.tokenizers.items():
            explicit = tokenizer_configs.get(f"{tokenizer}_config")
            setattr(pipe, tokenizer, load_tokenizer(class_path, folder, explicit, paths, family))
        pipe.components_loaded()
        return pipe.requires_grad_(False).eval()

    @classmethod
    def from_model_manager(cls, model_manager: ModelManager):
        """The older way in: a pipeline from the files, and the LoRAs, that a ``ModelManager`` was given."""
        pipe = cls.from_pretrained(model_manager.torch_dtype, model_manager.device, model_manager.file_path_list)
        model_manager.attach(pipe)
        return pipe

    def token_limits(self, max_sequence_length: int | None = None) -> dict[str, int]:
        """Tokenizer -> how many tokens of a prompt its text encoder sees; what a longer one has beyond is cut.

        Args:
            max_sequence_length: The option of that name, for families whose limit can be chosen.
        """
        return {name: getattr(self, name).model_max_length for name in self.family().tokenizers}

    def components_loaded(self) -> None:
        """Hook for subclasses: sizes and units that depend on the networks' configuration."""

    def reads(self, name: str) -> bool:
        """Whether an input of this name has any effect on what these networks draw."""
        reading = {read for unit in self.units for read in (*unit.inputs, *unit.prompt_inputs)}
        return name in reading | _parameters(type(self).model_fn)

    def require_models(self, names: Iterable[str]) -> None:
        """Make sure that networks are there, loading those that were deferred or released.

        Raises:
            UserError: a network is in none of the pipeline's files; says which file would bring it.
        """
        for name in names:
            if getattr(self, name) is None and name in self.component_paths and self._load_component:
                setattr(self, name, self._load_component(name))
                getattr(self, name).requires_grad_(False).eval()
                if name in self.fp8_models:
                    store_in_fp8(getattr(self, name))
            if getattr(self, name) is None:
                component = next(c for c in self.family().components if c.name == name)
                raise UserError(f"{type(self).__name__} needs {name!r} ({component.spec.kind}), which is not loaded; "
                                f"add {component.found_in} to its model files.")

    def release(self, names: Iterable[str]) -> None:
        """Drop networks that are not needed for now, so that their memory is free; their next use loads them again."""
        for name in names:
            setattr(self, name, None)
        return_free_memory(self.device)

    def run_units(
        self, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs
    ) -> tuple[Inputs, Inputs, Inputs]:
        for unit in self.units:
            inputs_shared, inputs_posi, inputs_nega = self.unit_runner(
                unit, self, inputs_shared, inputs_posi, inputs_nega
            )
        return inputs_shared, inputs_posi, inputs_nega

    def predict_noise(self, **inputs: Any) -> torch.Tensor:
        """Call ``model_fn`` with the denoiser's models and those of the inputs that it takes."""
        self.require_models(self.denoiser_models)
        accepted = _parameters(type(self).model_fn)
        models = {name: getattr(self, name) for name in self.denoiser_models}
        return type(self).model_fn(**models, **{name: value for name, value in inputs.items() if name in accepted})

    def denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        inputs_shared: Inputs,
        inputs_posi: Inputs,
        inputs_nega: Inputs,
        cfg_scale: float,
        progress_bar_cmd: Callable[[Iterable], Iterable],
    ) -> torch.Tensor:
        """Walk the schedule from ``latents`` at ``timesteps[0]`` to clean latents, both (B, C, h, w)."""
        for timestep in progress_bar_cmd(timesteps):
            batch_timesteps = timestep.expand(latents.shape[0])
            inputs = {**inputs_shared, "latents": latents, "timesteps": batch_timesteps}
            noise_pred = self.predict_noise(**{**inputs, **inputs_posi})
            if cfg_scale != 1:
                negative = self.predict_noise(**{**inputs, **inputs_nega})
                noise_pred = negative + cfg_scale * (noise_pred - negative)
            latents = self.scheduler.step(noise_pred, timestep, latents, return_dict=False)[0]
        return latents

    def training_shift(self, latents: torch.Tensor) -> float:
        """Shift of the noise levels that the family's sampler uses for latents of this size; 1 means none."""
        return 1.0

    def training_recipe(self, latents: torch.Tensor) -> NoiseLevels:
        """The noise levels at which these clean latents, (B, C, h, w), are trained, on their device."""
        levels = training_recipe(self.timestep_sampling, latents.shape[0], self.training_shift(latents))
        return NoiseLevels(*(tensor.to(latents.device) for tensor in (levels.timesteps, levels.sigmas, levels.weights)))

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents for the denoiser, (B, C, h, w), from pixels (B, 3, H, W) in [-1, 1]."""
        raise NotImplementedError

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of ``encode_pixels``."""
        raise NotImplementedError

    def latent_shape(self, batch_size: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of the latents of ``batch_size`` pictures of this size in pixels."""
        raise NotImplementedError

    def load_lora(
        self, module: torch.nn.Module, path: str | Path, alpha: float = 1.0, hotload: bool = False,
        allow_unmatched: bool = False,
    ) -> None:
        """Add a LoRA file to one of the pipeline's networks; several may be added one after another.

        Args:
            module: The network, for example ``pipe.dit``.
            path: A LoRA file in any of the known formats.
            alpha: Strength; 1 is as trained.
            hotload: Keep the adapter beside the weights, so that several can be changed without rounding, instead
                of fusing it into them.
            allow_unmatched: Leave out layers of the file that have no counterpart, with a warning that counts them.
        Raises:
            UserError: the file is not a LoRA of this network, or any of its layers has no counterpart.
        """
        from ..adapters.lora import add_lora_file

        name = next((c.name for c in self.family().components if getattr(self, c.name) is module), None)
        if name is None:
            raise ValueError("load_lora takes one of the pipeline's own networks, for example pipe.dit.")
        add_lora_file(module, name, Path(path), self.family(), strength=alpha, hot=hotload,
                      allow_unmatched=allow_unmatched)

    def clear_lora(self) -> None:
        """Take every loaded LoRA out again; the networks' weights are what they were before."""
        from ..adapters.lora import clear_lora

        for component in self.family().components:
            if (module := getattr(self, component.name)) is not None:
                clear_lora(module)


def pixels_from_images(images: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
    """Pixels (B, 3, H, W) in [-1, 1], float32, from RGB pictures of one size."""
    import numpy as np

    listed = [images] if isinstance(images, Image.Image) else list(images)
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in listed]
    if len({array.shape for array in arrays}) > 1:
        raise UserError(f"the pictures of one batch have different sizes: {sorted({i.size for i in listed})}.")
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def images_from_pixels(pixels: torch.Tensor) -> list[Image.Image]:
    """RGB pictures from pixels (B, 3, H, W) in [-1, 1]; values outside are clipped."""
    levels = ((pixels.detach().float().cpu() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).numpy()]


@cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)

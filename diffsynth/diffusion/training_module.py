"""The module that is trained: a pipeline whose forward is a loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UserError, did_you_mean
from .base_pipeline import BasePipeline
from .loss import FlowMatchSFTLoss
from .schedule import RECIPE_VERSION, TimestepSampling
from .unit import FrozenPrefix, Inputs, PipelineUnit, frozen_prefix, run_unit

if TYPE_CHECKING:
    from ..adapters.lora import LoraState
    from ..config import TrainConfig

Item = dict[str, Any]


class DiffusionTrainingModule(torch.nn.Module):
    """Base of everything that ``launch_training_task`` trains.

    A subclass loads a pipeline in ``__init__``, calls ``switch_pipe_to_training_mode`` and returns a loss from
    ``forward``; see ``examples/flux/model_training/special/simple/train.py``.
    """

    pipe: BasePipeline
    full_models: Sequence[str] = ()
    """Components that are trained fully."""
    lora_models: Sequence[str] = ()
    """Components that a LoRA is trained for."""

    def switch_pipe_to_training_mode(
        self,
        pipe: BasePipeline,
        trainable_models: str | Sequence[str] | None = None,
        lora_base_model: str | None = None,
        lora_target_modules: str = "",
        lora_rank: int = 32,
        lora_alpha: float | None = None,
        lora_checkpoint: str | None = None,
        preset_lora_path: str | None = None,
        preset_lora_model: str | None = None,
        fp8_models: Sequence[str] = (),
        lora_rslora: bool = False,
        lora_dora: bool = False,
        lora_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """Freeze the pipeline, then make the asked-for weights trainable.

        Args:
            pipe: A loaded pipeline.
            trainable_models: Components to train fully, a list or separated by commas; they are kept in float32.
            lora_base_model: Component that a LoRA is trained for.
            lora_target_modules: Layer names separated by commas, or one regular expression; empty takes the family's.
            lora_rank: Rank of both factors.
            lora_alpha: The change is ``alpha / rank * B @ A``; default the rank.
            lora_checkpoint: LoRA file to start from. This starts a new run; ``resume`` continues one.
            preset_lora_path: LoRA file merged into ``preset_lora_model`` before training (differential training).
            preset_lora_model: Component that the preset LoRA is merged into.
            fp8_models: Components whose linear layers are stored in float8; they must not be fully trained.
            lora_rslora: Scale by ``alpha / sqrt(rank)``. Source: arXiv:2312.03732.
            lora_dora: Train magnitude and direction apart. Source: arXiv:2402.09353.
            lora_dtype: Dtype of the trained factors.
            seed: Seed of the factors' initial values.
        Raises:
            UserError: a component or a layer does not exist, or nothing would be trained.
        """
        from ..adapters.lora import inject_lora, load_lora_file, load_lora_weights

        full = _names(trainable_models)
        if not full and not lora_base_model:
            raise UserError("nothing would be trained; set --trainable_models, or --lora_base_model with "
                            "--lora_target_modules.")
        if lora_checkpoint and not lora_base_model:
            raise UserError("lora_checkpoint was given without lora_base_model; say which model it belongs to.")
        if lora_base_model in full:
            raise UserError(f"{lora_base_model!r} is both in trainable_models and the lora_base_model; choose one.")
        if lora_dora and lora_base_model in fp8_models:
            raise UserError(f"lora_dora needs the norms of the weights, which float8 does not give; take "
                            f"{lora_base_model!r} out of fp8_models.")
        if both := sorted(set(full) & set(fp8_models)):
            raise UserError(f"fp8_models names {both[0]!r}, which is trained fully; float8 weights cannot be updated.")
        self.full_models, self.lora_models = full, _names(lora_base_model)
        # everything stays in eval mode: dropout inside a network would draw numbers that no item owns
        pipe.requires_grad_(False).eval()
        self.prepare_frozen_models(pipe, preset_lora_path, preset_lora_model or lora_base_model, fp8_models)
        for name in full:
            self._component(pipe, name).to(torch.float32).requires_grad_(True)
        if lora_base_model:
            network = self._component(pipe, lora_base_model)
            inject_lora(network, pipe.family(), lora_target_modules, lora_rank, lora_alpha, rslora=lora_rslora,
                        dora=lora_dora, dtype=lora_dtype, seed=seed)
            self.lora_options = {
                "lora_target_modules": lora_target_modules, "lora_rslora": lora_rslora, "lora_dora": lora_dora,
                "recipe_version": RECIPE_VERSION,
            }
            if lora_checkpoint:
                load_lora_weights(network, load_lora_file(lora_checkpoint, pipe.family()), lora_base_model)

    def prepare_frozen_models(
        self, pipe: BasePipeline, preset_lora_path: str | None, preset_lora_model: str | None,
        fp8_models: Sequence[str], leave_out: Sequence[str] = (),
    ) -> None:
        """Merge the preset LoRA and store weights in float8, except in the models to be left out."""
        from ..core.memory import store_in_fp8

        self.fp8_models = list(fp8_models)
        preset_model = preset_lora_model or pipe.denoiser_models[0]
        if preset_lora_path and preset_model not in leave_out:
            pipe.load_lora(self._component(pipe, preset_model), preset_lora_path)
        for name in fp8_models:
            if name not in leave_out:
                store_in_fp8(self._component(pipe, name))
        pipe.fp8_models = tuple(fp8_models)  # one that is released and loaded again is stored in float8 again

    @staticmethod
    def _component(pipe: BasePipeline, name: str) -> torch.nn.Module:
        names = [component.name for component in pipe.family().components]
        if name not in names:
            raise UserError(f"{type(pipe).__name__} has no model {name!r}; it has {', '.join(names)}."
                            f"{did_you_mean(name, names)}")
        pipe.require_models([name])
        return getattr(pipe, name)

    def trainable_models(self) -> list[str]:
        """Pipeline attributes of which any weight is trained."""
        return list(dict.fromkeys([*self.full_models, *self.lora_models]))

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of everything that is trained, in a fixed order."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def export_full_models(self) -> dict[str, torch.Tensor]:
        """Weights of the fully trained components by parameter name (``pipe.dit.x_embedder.weight``)."""
        prefixes = tuple(f"pipe.{name}." for name in self.full_models)
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(prefixes)}

    def export_lora(self) -> dict[str, LoraState]:
        """Component -> the adapter trained for it."""
        from ..adapters.lora import lora_state

        return {name: lora_state(getattr(self.pipe, name)) for name in self.lora_models}

    @staticmethod
    def collate(items: list[Item]) -> Any:
        """One batch from several items: the item itself when there is one, else a dictionary of lists.

        Static, as it is sent to the processes that load data, where the module itself must not go.
        """
        return items[0] if len(items) == 1 else {key: [item[key] for item in items] for key in items[0]}


class PipelineTrainingModule(DiffusionTrainingModule):
    """Supervised training of any family: the pipeline's own units, then the loss.

    Args:
        pipe: A loaded pipeline.
        config: The run's options.
    """

    data_columns = ("image", "prompt")
    """Columns of the data set that the units read, as ``input_image`` and ``prompt``."""

    def __init__(self, pipe: BasePipeline, config: TrainConfig) -> None:
        super().__init__()
        self.pipe = pipe
        self.config = config
        self.extra_inputs = _names(config.extra_inputs)
        pipe.timestep_sampling = TimestepSampling(
            kind=config.timestep_sampling, shift=config.timestep_shift, weighting=config.timestep_weighting
        )
        if config.task == "sft:data_process":
            # the cache needs to know what would be trained, and the encoders as training uses them; not the denoiser
            self.full_models, self.lora_models = _names(config.trainable_models), _names(config.lora_base_model)
            preset_model = config.preset_lora_model or config.lora_base_model
            self.prepare_frozen_models(pipe, config.preset_lora_path, preset_model, self._fp8_names(),
                                       leave_out=pipe.denoiser_models)
        else:
            self._switch_to_training_mode()
        self.prefix: FrozenPrefix = frozen_prefix(pipe.units, self.trainable_models(), pipe.denoiser_models)
        self.prefix_cached = False

    def _fp8_names(self) -> list[str]:
        return [str(name) for name in self.config.fp8_models]

    def _switch_to_training_mode(self) -> None:
        pipe, config = self.pipe, self.config
        self.switch_pipe_to_training_mode(
            pipe, config.trainable_models, config.lora_base_model, config.lora_target_modules, config.lora_rank,
            config.lora_alpha, config.lora_checkpoint, config.preset_lora_path, config.preset_lora_model,
            self._fp8_names(), config.lora_rslora, config.lora_dora,
            getattr(torch, config.lora_dtype), config.seed,
        )

    def pipeline_inputs(self, data: Item) -> tuple[Inputs, Inputs, Inputs]:
        """What the caller of the pipeline would give to draw these pictures; values may be lists of a batch.

        Args:
            data: A sample, or those columns of it that the units to be run depend on.
        """
        listed = {name: value if isinstance(value, list) else [value] for name, value in data.items()}
        shared: Inputs = {"batch_size": len(next(iter(listed.values()))), **self.constant_inputs()}
        if images := listed.get("image"):
            shared.update(input_image=images, width=images[0].size[0], height=images[0].size[1])
        shared.update({name: data[name] for name in self.extra_inputs if name in data})
        return shared, {"prompt": listed["prompt"]} if "prompt" in listed else {}, {}

    def constant_inputs(self) -> Inputs:
        """Inputs that are the same for every item."""
        return {
            "cfg_scale": 1,
            "rand_device": self.pipe.device,
            "max_sequence_length": self.config.max_sequence_length,
            "embedded_guidance": self.config.embedded_guidance,
            "use_gradient_checkpointing": self.config.use_gradient_checkpointing,
            "use_gradient_checkpointing_offload": self.config.use_gradient_checkpointing_offload,
        }

    @staticmethod
    def collate(items: list[Item]) -> Any:
        """Tensors of cached items are joined along the batch; other columns become lists."""
        def join(values: list) -> Any:
            if isinstance(values[0], torch.Tensor):
                return torch.cat(values) if len(values) > 1 else values[0]
            return values

        return {key: join([item[key] for item in items]) for key in items[0]}

    def forward(self, data: Item) -> torch.Tensor:
        """Mean loss of a batch of raw items (pictures and prompts) or of cached ones (latents and embeddings)."""
        if self.prefix_cached:
            inputs = {
                name: value.to(self.pipe.device, self.pipe.torch_dtype if value.is_floating_point() else None)
                for name, value in data.items()
            }
            batch_size = next(iter(inputs.values())).shape[0]
            shared: Inputs = {**self.constant_inputs(), **inputs, "batch_size": batch_size}
            posi: Inputs = {}
        else:
            shared, posi, _ = self.pipeline_inputs(data)
            for unit in self.pipe.units:
                if unit.draws_noise:
                    continue
                frozen = unit in self.prefix.units or self._overflows_in_autocast(unit)
                # frozen encoders compute in the dtype of their weights, as they do when their outputs are cached
                with torch.autocast(self.pipe.device.type, enabled=False) if frozen else nullcontext():
                    shared, posi, _ = run_unit(unit, self.pipe, shared, posi, {})
        return FlowMatchSFTLoss(self.pipe, **{**shared, **posi})

    def _overflows_in_autocast(self, unit: PipelineUnit) -> bool:
        """Whether a trained network of the unit must not compute in autocast's dtype."""
        device = self.pipe.device.type
        if not torch.is_autocast_enabled(device):
            return False
        dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        return any(component.name in unit.models and dtype not in component.spec.safe_dtypes
                   for component in self.pipe.family().components)


def _names(comma_separated: str | Sequence[str] | None) -> list[str]:
    if not comma_separated:
        return []
    listed = comma_separated.split(",") if isinstance(comma_separated, str) else list(comma_separated)
    return [name.strip() for name in listed if name.strip()]

"""Sample pictures while training: what the public pipeline draws with the files that were just saved."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import PromptOptions, TrainConfig
from ..core.errors import UserError
from ..core.picture_file import save_picture
from .contact_sheet import draw_sheet
from .drawing import describe_drawing, draw_pictures
from .prompt_cache import PromptCache
from .shipped import SavedFiles, as_shipped, without_adapters
from .unit import Inputs, PipelineUnit, run_unit

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline
    from .training_module import DiffusionTrainingModule

logger = logging.getLogger(__name__)

_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError,
    RuntimeError, TypeError, ValueError,
)
"""What a network, a file or a codec may raise; no picture is worth ending a run for."""


class Previews:
    """Draws the same prompts with the same seeds whenever weights are saved, and keeps a contact sheet.

    The weights of a picture come from the saved file, as for anyone else; ``diffsynth generate --from`` makes it
    again. The prompts are encoded at once, so that the text encoders can be released afterwards, and kept in the cache,
    so that a second run need not load them at all.

    Args:
        model: Training module.
        config: The run's options.
        folder: The run's output folder; pictures go to ``samples/step-N/``, the sheet to ``samples.png``.
        cache: Where the encoded prompts are kept; None encodes them in every run.
    """

    def __init__(
        self, model: DiffusionTrainingModule, config: TrainConfig, folder: Path, cache: Path | None = None
    ) -> None:
        self.model, self.folder = model, folder
        self.tokenizer_path = config.tokenizer_path
        self.pictures = _pictures(model.pipe, config)
        self.encoded: list[dict[str, torch.Tensor]] = [{} for _ in self.pictures]
        encoders = {name for unit in self._prompt_units for name in unit.models}
        if not encoders & set(model.trainable_models()):
            store = PromptCache(model.pipe, self._prompt_units, cache, config.output_path) if cache else None
            self.encoded = [self._encode(picture, store) for picture in self.pictures]
            if store is not None:
                store.close()

    @property
    def _prompt_units(self) -> list[PipelineUnit]:
        return [unit for unit in self.model.pipe.units if unit.prompt_inputs]

    @torch.no_grad()
    def _encode(self, picture: PromptOptions, store: PromptCache | None) -> dict[str, torch.Tensor]:
        """Outputs of the units that read the prompt, named as the pipeline's call takes them."""
        pipe = self.model.pipe
        texts = {"": picture.prompt}
        if picture.cfg_scale != 1:  # without guidance the negative prompt has no influence
            texts["negative_"] = picture.negative_prompt
        outputs: dict[str, torch.Tensor] = {}
        for prefix, text in texts.items():
            side: Inputs = {"prompt": [text]}
            for number, unit in enumerate(self._prompt_units):
                made = store.get(number, text) if store is not None else None
                if made is None:
                    with without_adapters(pipe, unit.models):
                        run_unit(unit, pipe, {"cfg_scale": 1}, side, {})
                    made = {name: side[name] for name in unit.outputs if side.get(name) is not None}
                    if store is not None:
                        store.add(number, text, made)
                side.update(made)
                outputs.update({prefix + name: tensor for name, tensor in made.items()})
        return outputs

    def draw(self, step: int, save: Callable[[], SavedFiles]) -> list[Path]:
        """Draw every prompt into ``samples/step-N/`` and renew the sheet. A failure is logged and ends nothing.

        Args:
            step: Optimizer steps done.
            save: Gives the weight files of this step, and writes them where they are not there yet.
        Returns:
            The pictures, or none after a failure.
        """
        try:
            with as_shipped(self.model, save()) as (pipe, loras):
                paths = []
                for index, (picture, encoded) in enumerate(zip(self.pictures, self.encoded, strict=True)):
                    drawn = draw_pictures(pipe, picture, encoded=encoded, progress_bar_cmd=iter)[0]
                    recipe = describe_drawing(pipe, picture, loras, pipe.fp8_models, self.tokenizer_path)
                    paths.append(self.folder / "samples" / f"step-{step:06d}" / f"{index}.png")
                    save_picture(drawn, paths[-1], recipe.text())
            draw_sheet(self.folder, [picture.prompt for picture in self.pictures])
            return paths
        except UserError as error:
            logger.error("sample pictures at step %d failed; training goes on: %s", step, error)
            return []
        except _FAILURES:
            logger.exception("sample pictures at step %d failed; training goes on", step)
            return []


def _pictures(pipe: BasePipeline, config: TrainConfig) -> list[PromptOptions]:
    side = math.isqrt(config.max_pixels)
    return [
        PromptOptions(
            prompt=prompt, seed=config.seed + index, cfg_scale=config.sample_cfg_scale,
            num_inference_steps=config.sample_steps,
            height=config.height or side // pipe.height_division_factor * pipe.height_division_factor,
            width=config.width or side // pipe.width_division_factor * pipe.width_division_factor)
        for index, prompt in enumerate(config.sample_prompts)
    ]

"""Sample pictures while training: one row per visit, one column per prompt."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont

from .unit import Inputs, run_unit

if TYPE_CHECKING:
    from .base_pipeline import BasePipeline

logger = logging.getLogger(__name__)


class Previews:
    """Draws the same prompts with the same seeds through the public pipeline, and keeps a contact sheet.

    The prompts are encoded at once, so that the text encoders can be released afterwards.

    Args:
        pipe: Pipeline with everything loaded.
        prompts: One column each.
        folder: The run's output folder; pictures go to ``samples/``, the sheet to ``samples.png``.
        height: Pixels.
        width: Pixels.
        num_inference_steps: Steps of the sampler.
        cfg_scale: True classifier-free guidance.
        seed: Seed of the first prompt's noise; the others follow.
    """

    def __init__(
        self, pipe: BasePipeline, prompts: Sequence[str], folder: Path, *, height: int, width: int,
        num_inference_steps: int, cfg_scale: float, seed: int,
    ) -> None:
        self.pipe, self.prompts, self.folder = pipe, list(prompts), folder
        self.arguments = dict(height=height, width=width, num_inference_steps=num_inference_steps, cfg_scale=cfg_scale)
        self.seed = seed
        self.embeds = [self._encode(prompt) for prompt in self.prompts]

    @torch.no_grad()
    def _encode(self, prompt: str) -> dict[str, torch.Tensor]:
        """Outputs of the units that read the prompt, named as the pipeline's call takes them."""
        shared: Inputs = dict(self.arguments)
        posi: Inputs = {"prompt": [prompt]}
        nega: Inputs = {"negative_prompt": [""]}
        outputs: dict[str, torch.Tensor] = {}
        for unit in self.pipe.units:
            if unit.prompt_inputs:
                shared, posi, nega = run_unit(unit, self.pipe, shared, posi, nega)
                outputs.update({name: posi[name] for name in unit.outputs})
                outputs.update({f"negative_{name}": nega[name] for name in unit.outputs if name in nega})
        return outputs

    def draw(self, step: int, progress_bar_cmd: Callable = iter) -> Path | None:
        """Draw every prompt and write ``samples/step-N.png`` and the sheet. A failure is logged and ends nothing."""
        try:
            pictures = [
                self.pipe(
                    prompt=prompt, seed=self.seed + column, progress_bar_cmd=progress_bar_cmd,
                    **self.arguments, **embeds)
                for column, (prompt, embeds) in enumerate(zip(self.prompts, self.embeds, strict=True))
            ]
            path = self.folder / "samples" / f"step-{step:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            _save(_row(pictures), path)
            self._draw_sheet()
            return path
        except (ValueError, RuntimeError, OSError):
            logger.exception("sample pictures at step %d failed; training goes on", step)
            return None

    def _draw_sheet(self) -> None:
        rows = {path.stem.removeprefix("step-"): path for path in sorted((self.folder / "samples").glob("step-*.png"))}
        pictures = {f"step {int(name)}": _open(path) for name, path in rows.items()}
        _save(contact_sheet(pictures, self.prompts), self.folder / "samples.png")


def contact_sheet(rows: dict[str, Image.Image], columns: Sequence[str]) -> Image.Image:
    """Rows of pictures under each other, with the rows' names at the left and the columns' at the top."""
    # small pictures are enlarged without smoothing, so that what the network drew stays visible
    width = next(iter(rows.values())).width
    scale = max(1, round(160 * len(columns) / width))
    scaled = {
        name: row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST)
        for name, row in rows.items()
    }
    left, top, gap = 90, 56, 4
    first = next(iter(scaled.values()))
    sheet = Image.new("RGB", (left + first.width, top + sum(row.height + gap for row in scaled.values())), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    column_width = first.width // len(columns)
    for index, caption in enumerate(columns):
        text = "\n".join(_wrapped(caption, column_width - 8, font))
        draw.multiline_text((left + index * column_width + 4, 4), text, fill="black", font=font)
    y = top
    for name, row in scaled.items():
        draw.text((6, y + row.height // 2 - 8), name, fill="black", font=font)
        sheet.paste(row, (left, y))
        y += row.height + gap
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, lines: int = 3) -> list[str]:
    wrapped = [""]
    for word in text.split():
        longer = f"{wrapped[-1]} {word}".strip()
        if font.getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    return wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], wrapped[lines - 1] + " ..."]


def _row(pictures: Sequence[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * picture.width, 0))
    return row


def _open(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _save(picture: Image.Image, path: Path) -> None:
    partial = path.with_name(f".{path.stem}.partial.png")
    picture.save(partial)
    partial.replace(path)

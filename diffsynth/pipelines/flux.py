"""FLUX.1 (Black Forest Labs, 2024): text to image with a rectified-flow transformer.

Source: https://github.com/black-forest-labs/flux and the model cards of FLUX.1-dev and FLUX.1-schnell.
Networks: ``FluxTransformer2DModel`` and ``AutoencoderKL`` of diffusers, ``CLIPTextModel`` and ``T5EncoderModel`` of
transformers.

Conventions: pixels in [-1, 1]; latents (B, 16, H/8, W/8), ``(mean - 0.1159) * 0.3611``, packed 2x2 into tokens at the
network's door; the network takes sigma in [0, 1] (it multiplies by 1000 itself) and predicts ``noise - latents``. Dev
takes the guidance scale as an input (``embedded_guidance``); true classifier-free guidance (``cfg_scale``) is off by
default. The sampler's noise levels are shifted by ``exp(mu)``, mu linear in the number of tokens; schnell is unshifted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from ..core.errors import UserError
from ..core.gradient import set_gradient_checkpointing
from ..diffusion.base_pipeline import BasePipeline, images_from_pixels
from ..diffusion.schedule import add_noise
from ..diffusion.unit import Inputs, PipelineUnit
from ..diffusion.units import EncodeInputImage, InitialNoise, ShapeCheck
from ..models.autoencoder_kl import FLUX_VAE
from ..models.clip import CLIP_L
from ..models.spec import Component, ModelFamily, Preset
from ..models.t5 import T5_XXL
from .flux_components import FLUX_DIT
from .flux_lora import FLUX_LORA_ALIASES, FLUX_LORA_KEY_MAPS

logger = logging.getLogger(__name__)


class EncodePrompt(PipelineUnit):
    """CLIP's pooled embedding and T5's token embeddings, padded to a fixed length and unmasked, as FLUX was trained."""

    inputs = ("max_sequence_length",)
    prompt_inputs = ("prompt",)
    outputs = ("prompt_embeds", "pooled_prompt_embeds")
    models = ("text_encoder", "text_encoder_2")

    def process(  # type: ignore[override]
        self, pipe: FluxImagePipeline, prompt: str | list[str] | None, max_sequence_length: int | None
    ) -> Inputs:
        prompts = [prompt or ""] if isinstance(prompt, str) or prompt is None else list(prompt)
        limits = pipe.token_limits(max_sequence_length)
        clip_tokens = _tokenize(pipe.tokenizer, prompts, limits["tokenizer"])
        t5_tokens = _tokenize(pipe.tokenizer_2, prompts, limits["tokenizer_2"])
        pooled = pipe.text_encoder(clip_tokens.to(pipe.device)).pooler_output
        embeds = pipe.text_encoder_2(t5_tokens.to(pipe.device))[0]
        return {
            "prompt_embeds": embeds.to(pipe.torch_dtype),
            "pooled_prompt_embeds": pooled.to(pipe.torch_dtype),
        }


def _tokenize(tokenizer: Any, prompts: list[str], length: int) -> torch.Tensor:
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    for prompt, whole in zip(prompts, tokenizer(prompts).input_ids, strict=True):
        if len(whole) > length:
            lost = tokenizer.decode(whole[length - 1 :], skip_special_tokens=True)
            logger.warning("%r is longer than the %d tokens of this text encoder; it does not see %r.",
                           prompt[:40] + "...", length, lost)
    return tokens


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) as tokens (B, h/2 * w/2, 4C), each a 2x2 patch."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack_latents(tokens: torch.Tensor, latent_height: int, latent_width: int) -> torch.Tensor:
    """The inverse of ``pack_latents``."""
    b, _, c = tokens.shape
    patches = tokens.view(b, latent_height // 2, latent_width // 2, c // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, latent_height, latent_width)


def image_token_ids(latent_height: int, latent_width: int) -> torch.Tensor:
    """Positions (0, row, column) of the image tokens, (h/2 * w/2, 3)."""
    rows, columns = torch.meshgrid(torch.arange(latent_height // 2), torch.arange(latent_width // 2), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)


def linear_mu(sequence_length: int) -> float:
    """Resolution-dependent shift exponent ``mu`` of FLUX: 0.5 at 256 tokens, 1.15 at 4096, linear between and beyond.

    Source: black-forest-labs/flux ``get_lin_function`` and the scheduler configuration published with FLUX.1-dev.
    """
    slope = (1.15 - 0.5) / (4096 - 256)
    return sequence_length * slope + (0.5 - slope * 256)


def model_fn_flux(
    dit: Any,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    prompt_embeds: torch.Tensor,
    pooled_prompt_embeds: torch.Tensor,
    embedded_guidance: float = 3.5,
    use_gradient_checkpointing: bool = False,
    use_gradient_checkpointing_offload: bool = False,
) -> torch.Tensor:
    """Predict ``noise - latents``, (B, 16, h, w), for latents at ``timesteps`` = 1000 * sigma, (B,)."""
    set_gradient_checkpointing(dit, use_gradient_checkpointing, use_gradient_checkpointing_offload)
    sigmas = timesteps.float() / 1000
    batch_size, _, latent_height, latent_width = latents.shape
    dtype, device = prompt_embeds.dtype, latents.device
    guidance = None
    if dit.config.guidance_embeds:
        guidance = torch.full((batch_size,), embedded_guidance, device=device, dtype=torch.float32)
    with _exact_timesteps(dit, 1000 * sigmas):
        tokens = dit(
            hidden_states=pack_latents(latents.to(dtype)),
            timestep=sigmas,
            guidance=guidance,
            pooled_projections=pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device, dtype=dtype),
            img_ids=image_token_ids(latent_height, latent_width).to(device, dtype),
            return_dict=False,
        )[0]
    return unpack_latents(tokens, latent_height, latent_width)


@contextmanager
def _exact_timesteps(dit: Any, timesteps: torch.Tensor) -> Iterator[None]:
    """Give the timestep's embedding float32, (B,), although the network rounds its timestep to its own dtype first.

    bfloat16 has steps of 4 near 1000, so timesteps 997 and 995 would become the same noise level.
    """
    handle = dit.time_text_embed.register_forward_pre_hook(lambda module, inputs: (timesteps, *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


class FluxImagePipeline(BasePipeline):
    """FLUX.1-dev and FLUX.1-schnell; equals ``diffusers.FluxPipeline`` on the same weights, prompt and seed."""

    family_name = "flux"
    dit: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any
    tokenizer: Any
    tokenizer_2: Any
    denoiser_models = ("dit",)
    model_fn = staticmethod(model_fn_flux)

    def __init__(self, device: torch.device | str = "cpu", torch_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(device, torch_dtype)
        self.vae_scale_factor = 8
        self.height_division_factor = self.width_division_factor = 16
        self.units = [ShapeCheck(), EncodePrompt(), InitialNoise(), EncodeInputImage()]

    def components_loaded(self) -> None:
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        if "vae" in self.component_configs:
            self.vae_scale_factor = 2 ** (len(self.component_configs["vae"]["block_out_channels"]) - 1)
            self.height_division_factor = self.width_division_factor = 2 * self.vae_scale_factor
        # scheduler configurations published with FLUX.1-dev and FLUX.1-schnell
        is_dev = self.is_guidance_distilled()
        self.scheduler = FlowMatchEulerDiscreteScheduler(
            shift=3.0 if is_dev else 1.0, use_dynamic_shifting=is_dev,
            base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
        )

    def reads(self, name: str) -> bool:
        return super().reads(name) and (name != "embedded_guidance" or self.is_guidance_distilled())

    def is_guidance_distilled(self) -> bool:
        """Whether this is dev, which takes the guidance scale as an input, and not schnell."""
        return bool(self.component_configs.get("dit", {}).get("guidance_embeds", True))

    def token_limits(self, max_sequence_length: int | None = None) -> dict[str, int]:
        """CLIP's 77 tokens, and those of T5."""
        return {**super().token_limits(), "tokenizer_2": max_sequence_length or self.default_sequence_length()}

    def default_sequence_length(self) -> int:
        """T5 tokens per prompt: 512 (dev), 256 (schnell), or fewer if the tokenizer says so."""
        published = 512 if self.is_guidance_distilled() else 256
        return min(published, self.tokenizer_2.model_max_length)

    def latent_shape(self, batch_size: int, height: int, width: int) -> tuple[int, ...]:
        channels = self.component_configs["dit"]["in_channels"] // 4
        return (batch_size, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        # the mode: FLUX's posterior is so narrow that sampling it would only make the cache random
        mean = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist.mode()
        scaled = (mean - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        return scaled.to(self.torch_dtype)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        mean = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(mean.to(self.vae.dtype), return_dict=False)[0]

    def training_shift(self, latents: torch.Tensor) -> float:
        if not self.scheduler.config.use_dynamic_shifting:
            return 1.0
        return math.exp(linear_mu(latents.shape[-2] * latents.shape[-1] // 4))

    def set_timesteps(self, num_inference_steps: int, latents: torch.Tensor, denoising_strength: float) -> torch.Tensor:
        """Fill ``scheduler.timesteps`` and ``.sigmas`` and return the timesteps to walk."""
        import numpy as np

        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        mu = linear_mu(latents.shape[-2] * latents.shape[-1] // 4)
        self.scheduler.set_timesteps(sigmas=sigmas, device=self.device, mu=mu)
        first = int(num_inference_steps - min(num_inference_steps * denoising_strength, num_inference_steps))
        self.scheduler.set_begin_index(first)
        return self.scheduler.timesteps[first:]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        negative_prompt: str | list[str] = "",
        cfg_scale: float = 1.0,
        embedded_guidance: float = 3.5,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 28,
        seed: int | None = None,
        rand_device: str = "cpu",
        input_image: Image.Image | None = None,
        denoising_strength: float = 1.0,
        num_images: int = 1,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        progress_bar_cmd: Callable[[Iterable], Iterable] = tqdm,
        **precomputed: torch.Tensor,
    ) -> Image.Image | list[Image.Image] | torch.Tensor:
        """Draw pictures of a prompt, or of each of several.

        Args:
            prompt: What to draw; a list draws one batch with a picture for each.
            negative_prompt: What to keep away from; used when ``cfg_scale`` is not 1.
            cfg_scale: True classifier-free guidance; 1 is off, and twice as fast.
            embedded_guidance: Guidance scale given to the dev network as an input; schnell ignores it.
            height: Pixels, a multiple of 16.
            width: Pixels, a multiple of 16.
            num_inference_steps: Steps of the Euler sampler; 28 for dev, 4 for schnell.
            seed: Same seed, same picture; None draws from torch's global generator.
            rand_device: Where the noise is drawn; ``cpu`` gives the same picture on every machine.
            input_image: Picture to start from instead of pure noise.
            denoising_strength: Part of the way to noise that ``input_image`` is taken, in (0, 1].
            num_images: Pictures for each prompt.
            max_sequence_length: T5 tokens of a prompt; longer prompts are cut, with a warning.
            output_type: ``pil`` or ``latent``, the latter (B, 16, h, w).
            progress_bar_cmd: Wraps the iterable of timesteps.
            **precomputed: ``prompt_embeds``, ``pooled_prompt_embeds`` and the same with ``negative_``: used
                instead of encoding the prompts.
        Returns:
            One picture, or a list of them where more than one was asked for.
        Raises:
            UserError: a size is not divisible, a value is out of range, or a network is not loaded.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        _check_call(prompts, negatives, num_inference_steps, num_images, denoising_strength, output_type, precomputed)
        self.require_models(("dit", "vae"))
        batch_size = len(prompts) * num_images
        images = None if input_image is None else [input_image] * batch_size
        shared: Inputs = dict(
            height=height, width=width, seed=seed, rand_device=rand_device, batch_size=batch_size, cfg_scale=cfg_scale,
            input_image=images, embedded_guidance=embedded_guidance, max_sequence_length=max_sequence_length,
        )
        posi: Inputs = {"prompt": prompts}
        nega: Inputs = {"negative_prompt": negatives}
        for name, value in precomputed.items():
            (nega if name.startswith("negative_") else posi)[name.removeprefix("negative_")] = value
        shared, posi, nega = self.run_units(shared, posi, nega)
        if num_images > 1:
            for side in (posi, nega):
                for name in EncodePrompt.outputs:
                    if name in side:
                        side[name] = side[name].repeat_interleave(num_images, dim=0)
        latents = shared["noise"]
        timesteps = self.set_timesteps(num_inference_steps, latents, denoising_strength)
        if images is not None:
            sigma = self.scheduler.sigmas[self.scheduler.begin_index]
            latents = add_noise(shared["input_latents"], latents, sigma.expand(batch_size).to(latents.device))
        latents = self.denoise(latents, timesteps, shared, posi, nega, cfg_scale, progress_bar_cmd)
        if output_type == "latent":
            return latents
        pictures = images_from_pixels(self.decode_latents(latents))
        return pictures[0] if len(pictures) == 1 and isinstance(prompt, str) else pictures


def _check_call(
    prompts: list[str], negatives: list[str], num_inference_steps: int, num_images: int, denoising_strength: float,
    output_type: str, precomputed: dict[str, torch.Tensor],
) -> None:
    if not prompts:
        raise UserError("the list of prompts is empty.")
    if len(negatives) != len(prompts):
        raise UserError(f"negative_prompt has {len(negatives)} entries for {len(prompts)} prompts; give one for each.")
    if num_inference_steps < 1 or num_images < 1:
        raise UserError(f"num_inference_steps is {num_inference_steps} and num_images {num_images}; both must be at "
                        "least 1.")
    if not 0 < denoising_strength <= 1:
        raise UserError(f"denoising_strength must be above 0 and at most 1, got {denoising_strength}.")
    if output_type not in ("pil", "latent"):
        raise UserError(f"output_type {output_type!r} is not known; use 'pil' or 'latent'.")
    known = {prefix + name for prefix in ("", "negative_") for name in EncodePrompt.outputs}
    if unknown := sorted(set(precomputed) - known):
        raise TypeError(f"FluxImagePipeline has no argument {unknown[0]!r}.")
    for prefix in ("", "negative_"):
        given = [name for name in EncodePrompt.outputs if prefix + name in precomputed]
        if len(given) == 1:
            raise UserError(f"{prefix}{given[0]} was given alone; give both {prefix}prompt_embeds and "
                            f"{prefix}pooled_prompt_embeds.")


_DEV_FILES = (
    "ae.safetensors", "flux1-dev.safetensors", "text_encoder/model.safetensors", "text_encoder_2/*",
    "tokenizer/*", "tokenizer_2/*",
)

FAMILY = ModelFamily(
    name="flux",
    pipeline="diffsynth.pipelines.flux.FluxImagePipeline",
    components=(
        Component(name="dit", spec=FLUX_DIT, found_in="flux1-dev.safetensors or transformer/"),
        Component(name="vae", spec=FLUX_VAE, found_in="ae.safetensors or vae/",
                  constants={"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        Component(name="text_encoder", spec=CLIP_L, found_in="text_encoder/ or clip_l.safetensors"),
        Component(name="text_encoder_2", spec=T5_XXL, found_in="text_encoder_2/ or t5xxl_fp16.safetensors"),
    ),
    model_ids=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell", "AI-ModelScope/FLUX.1-dev"),
    tokenizers={
        "tokenizer": ("transformers.CLIPTokenizer", "tokenizer"),
        "tokenizer_2": ("transformers.T5TokenizerFast", "tokenizer_2"),
    },
    # every attention, feed-forward and modulation layer of the blocks, as the older page trains them
    default_lora_targets=(
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
        r"|norm1(_context)?\.linear)|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out|norm\.linear)",
    ),
    lora_aliases=FLUX_LORA_ALIASES,
    lora_key_maps=FLUX_LORA_KEY_MAPS,
    presets={
        "FLUX.1-dev": (
            Preset(model_id="AI-ModelScope/FLUX.1-dev", huggingface_id="black-forest-labs/FLUX.1-dev",
                   files=_DEV_FILES, folder="FLUX/FLUX.1-dev"),
        ),
    },
)

"""Train a FLUX LoRA with the options of the older generation; several visible GPUs are used by themselves."""

from typing import ClassVar

from pydantic import Field

from diffsynth.trainers.text_to_image import TextToImageOptions, main

EXAMPLE = """\
  CUDA_VISIBLE_DEVICES="0" python examples/train/flux/train_flux_lora.py \\
    --pretrained_text_encoder_path models/FLUX/FLUX.1-dev/text_encoder/model.safetensors \\
    --pretrained_text_encoder_2_path models/FLUX/FLUX.1-dev/text_encoder_2 \\
    --pretrained_dit_path models/FLUX/FLUX.1-dev/flux1-dev.safetensors \\
    --pretrained_vae_path models/FLUX/FLUX.1-dev/ae.safetensors \\
    --dataset_path data/dog --output_path ./models \\
    --max_epochs 1 --steps_per_epoch 100 --height 1024 --width 1024 \\
    --center_crop --precision "bf16" --learning_rate 1e-4 \\
    --lora_rank 16 --lora_alpha 16 --use_gradient_checkpointing \\
    --align_to_opensource_format"""


class FluxModelOptions(TextToImageOptions):
    """Train a FLUX LoRA."""

    title: ClassVar[str] = "FLUX"
    family = "flux"
    pretrained_text_encoder_path: str | None = Field(None, description="CLIP-L text encoder, a file or a folder.")
    pretrained_text_encoder_2_path: str | None = Field(None, description="T5-XXL text encoder, a file or a folder.")
    pretrained_dit_path: str | None = Field(None, description="Transformer, a file or a folder.")
    pretrained_vae_path: str | None = Field(None, description="Autoencoder, a file or a folder.")


if __name__ == "__main__":
    main(FluxModelOptions, EXAMPLE)

"""Train FLUX, a LoRA or the whole transformer: accelerate launch examples/flux/model_training/train.py ..."""

from diffsynth.config import TrainConfig
from diffsynth.core.command_line import run_front_door
from diffsynth.trainers.run import train

EXAMPLE = """\
  accelerate launch examples/flux/model_training/train.py \\
    --dataset_base_path data/example_image_dataset \\
    --dataset_metadata_path data/example_image_dataset/metadata.csv \\
    --max_pixels 1048576 --dataset_repeat 50 \\
    --model_id_with_origin_paths "black-forest-labs/FLUX.1-dev:flux1-dev.safetensors,\\
black-forest-labs/FLUX.1-dev:text_encoder/model.safetensors,\\
black-forest-labs/FLUX.1-dev:text_encoder_2/*.safetensors,\\
black-forest-labs/FLUX.1-dev:ae.safetensors" \\
    --lora_base_model dit --lora_rank 32 --learning_rate 1e-4 --num_epochs 5 \\
    --remove_prefix_in_ckpt "pipe.dit." --output_path models/train/FLUX.1-dev_lora \\
    --use_gradient_checkpointing"""


def main() -> None:
    train(TrainConfig.from_command_line(prog="train.py", example=EXAMPLE))


if __name__ == "__main__":
    run_front_door(main)

"""This project's own training, as its command line runs it, on a filled cache, with logging and checkpoints on."""

from __future__ import annotations

from floor import LORA_TARGETS
from make_models import DATA
from measure import Case

from diffsynth.config import TrainConfig
from diffsynth.trainers.run import train


def make_config(case: Case, **options) -> TrainConfig:
    flux = DATA / "flux"
    return TrainConfig(**{**dict(
        model_paths=[str(flux / name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")],
        tokenizer_path=str(flux), dataset_base_path=str(DATA / "pictures"),
        dataset_metadata_path=str(DATA / "pictures" / "metadata.csv"), data_file_keys="image",
        height=case.resolution, width=case.resolution, max_sequence_length=case.num_text_tokens,
        lora_base_model="dit", lora_target_modules=LORA_TARGETS, lora_rank=case.lora_rank, lora_dtype="bfloat16",
        learning_rate=1e-4, batch_size=case.batch_size, max_grad_norm=0, device="cpu", mixed_precision="bf16",
        use_gradient_checkpointing=case.use_gradient_checkpointing, max_steps=case.num_steps, num_epochs=1000,
        save_steps=max(1, case.num_steps // 2), output_path=case.output,
        # one cache for all runs: the first one fills it
        cache_path=str(DATA / "cache" / str(case.resolution)),
    ), **options})


def run(case: Case) -> None:
    train(make_config(case))

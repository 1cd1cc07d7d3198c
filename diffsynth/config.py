"""Every option of training and generation, once: name, type, default, help.

The command line, YAML files and Python read this schema. The groups of the help are the classes below.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from .core.options import BarList, CommaList, CommaText, JsonObject, Options, PathList


class DatasetFileOptions(Options):
    """Where the training pictures and their captions are."""

    title: ClassVar[str] = "Data set"
    dataset_base_path: str = Field("", description="Root folder of the data set.")
    dataset_metadata_path: str | None = Field(
        None, description="Metadata file: csv, json or jsonl. Left out: found in the data set's folder."
    )
    data_file_keys: CommaList = Field(("image", "video"), description="Metadata columns that name files to be loaded.")


class DatasetOptions(DatasetFileOptions):
    """Where the training pictures and their captions are, and how they are gone through."""

    dataset_repeat: int = Field(1, ge=1, description="How often the data set is repeated in each epoch.")
    dataset_num_workers: int = Field(0, ge=0, description="Processes that load data; 0 loads in the main process.")
    on_bad_item: Literal["stop", "skip"] = Field(
        "stop", description="Rows that cannot be used: end the run before it starts, or leave them out; both list them."
    )


class ModelFileOptions(Options):
    """Which weights are loaded."""

    title: ClassVar[str] = "Models"
    family: str | None = Field(
        None, description="Model family, for example flux. Left out: recognised from the model files."
    )
    model_paths: PathList = Field(
        (), description="Paths of the models; a list inside the list is one model in several files."
    )
    model_id_with_origin_paths: CommaList = Field(
        (), description="Models to download, each as MODEL_ID:FILE_PATTERN, separated by commas."
    )
    tokenizer_path: str | None = Field(
        None, description="Folder that holds the tokenizer folders. Left out: found beside the weights."
    )

    @field_validator("model_id_with_origin_paths")
    @classmethod
    def _id_and_pattern(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            model_id, _, pattern = entry.partition(":")
            if not model_id or not pattern:
                raise ValueError(f"{entry!r} is not of the form MODEL_ID:FILE_PATTERN, for example "
                                 f"black-forest-labs/FLUX.1-dev:ae.safetensors")
        return value


class ModelOptions(ModelFileOptions):
    """Which weights are loaded, and in which form."""

    extra_inputs: CommaList = Field((), description="Further columns of the metadata that the pipeline takes as input.")
    fp8_models: PathList = Field(
        (), description="Frozen models kept in FP8, as in --model_paths or --model_id_with_origin_paths, or by name."
    )
    preset_lora_path: str | None = Field(
        None, description="LoRA merged into the base model before training (differential training)."
    )
    preset_lora_model: str | None = Field(None, description="Model that the preset LoRA is merged into, such as dit.")

    @field_validator("fp8_models", mode="before")
    @classmethod
    def _ids_or_paths(cls, value: object) -> object:
        if isinstance(value, str) and not value.lstrip().startswith(("[", '"')):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value


class TrainingOptions(Options):
    """What is trained, how long, and with which optimizer."""

    title: ClassVar[str] = "Training"
    task: Literal["sft", "sft:data_process", "sft:train"] = Field(
        "sft", description="Train; or only fill the cache of encoded data; or train from that cache alone."
    )
    trainable_models: CommaList = Field((), description="Models trained in full, for example dit or vae.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate; 1e-5 is usual for full training.")
    num_epochs: int = Field(1, ge=1, description="Number of epochs.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps in all.")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="Optimizer steps in an epoch; items repeat as needed. Left out: once through the data."
    )
    batch_size: int = Field(1, ge=1, description="Samples per process in one forward pass.")
    seed: int = Field(0, ge=0, description="Seed of everything that is drawn at random.")
    optimizer: str = Field("AdamW", description="Optimizer: a name in torch.optim or a dotted class.")
    optimizer_args: JsonObject = Field({}, description="Further arguments of the optimizer.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of the optimizer.")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after the warm-up."
    )
    lr_warmup_steps: int = Field(0, ge=0, description="Optimizer steps over which the learning rate rises from 0.")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Also save an average of the trained weights with this decay, such as 0.999."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "bf16", description="Precision of the networks; no = float32."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...; auto takes the GPU where there is one.")
    find_unused_parameters: bool = Field(
        False, description="Several GPUs: allow trainable parameters that do not take part in the loss."
    )


class ObjectiveOptions(Options):
    """At which noise levels the model is trained."""

    title: ClassVar[str] = "Objective"
    timestep_sampling: Literal["uniform", "logit_normal", "shifted"] = Field(
        "shifted", description="Distribution of the noise levels; shifted = as the family's sampler visits them."
    )
    timestep_shift: float | None = Field(
        None, gt=0, description="Shift of the noise levels towards noise. Left out: the family's own, if shifted."
    )
    timestep_weighting: Literal["none", "bell"] = Field(
        "none", description="Weight of the loss by noise level: equal, or most in the middle."
    )
    caption_dropout: float = Field(0.0, ge=0, le=1, description="Share of captions replaced by the empty caption.")
    embedded_guidance: float = Field(1.0, description="Guidance value given to guidance-distilled models in training.")
    max_sequence_length: int | None = Field(
        None, ge=1, description="Tokens of a caption that are used. Left out: the family's own."
    )


class LoraOptions(Options):
    """The adapter."""

    title: ClassVar[str] = "LoRA"
    lora_base_model: str | None = Field(None, description="Model that gets the LoRA, for example dit.")
    lora_target_modules: CommaText = Field(
        "", description="Layers that get a LoRA: names, or one regular expression. Left out: the family's usual layers."
    )
    lora_rank: int = Field(32, ge=1, description="Rank of both LoRA factors.")
    lora_alpha: float | None = Field(
        None, gt=0, description="The LoRA acts with strength alpha / rank. Left out: the rank."
    )
    lora_rslora: bool = Field(False, description="Rank-stabilised LoRA: scale alpha / sqrt(rank).")
    lora_dora: bool = Field(False, description="DoRA: train the magnitude of each row as well.")
    lora_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision of the trained LoRA weights.")
    lora_checkpoint: str | None = Field(None, description="LoRA file to start from.")
    lora_format: Literal["auto", "diffsynth", "diffusers", "kohya", "comfyui"] = Field(
        "auto", description="Naming in the saved file; auto is what most programs read for the family."
    )


class OutputOptions(Options):
    """What is written, where, and when."""

    title: ClassVar[str] = "Output"
    output_path: str = Field("./models", min_length=1, description="Folder for everything the run writes.")
    remove_prefix_in_ckpt: str | None = Field(
        None, description='Prefix removed from the names in the saved file, for example "pipe.dit.".'
    )
    save_steps: int | None = Field(
        None, ge=1, description="Optimizer steps between saved models. Left out: once per epoch."
    )
    keep_checkpoints: int | None = Field(None, ge=1, description="Keep the newest this many. Left out: all.")
    checkpoint_names: Literal["newer", "older"] = Field(
        "newer", description="step-N.safetensors, epoch-N.safetensors; or checkpoints/epoch=E-step=S.ckpt."
    )
    save_in_background: bool = Field(
        True, description="Write saved models while training goes on; needs host memory for one copy of the state."
    )
    max_minutes: float | None = Field(
        None, gt=0, description="Save and end after this time, with exit code 4; continue with --resume auto."
    )
    resume: str = Field("never", description="never; auto (continue in output_path if possible); or a state folder.")
    cache: Literal["auto", "off"] = Field("auto", description="Keep the outputs of the frozen models on disk.")
    cache_path: str | None = Field(
        None, description="Folder of that cache, shared by all runs. Left out: cache/ in the models folder."
    )
    logger: Literal["none", "tensorboard"] = Field("none", description="Metrics besides metrics.jsonl.")


class SamplingOptions(Options):
    """Pictures drawn while training."""

    title: ClassVar[str] = "Sample pictures"
    sample_prompts: BarList = Field((), description="Prompts of the sample pictures, separated by |.")
    sample_every: int | None = Field(
        None, ge=1, description="Optimizer steps between samples. Left out: at each saved model."
    )
    sample_steps: int = Field(30, ge=1, description="Denoising steps of a sample picture.")
    sample_cfg_scale: float = Field(1.0, ge=0, description="Classifier-free guidance of the sample pictures; 1 = off.")


class GradientOptions(Options):
    """Memory against time."""

    title: ClassVar[str] = "Gradients"
    use_gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    use_gradient_checkpointing_offload: bool = Field(
        False, description="Keep the checkpointed activations in CPU memory."
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this norm; 0 = never.")


class StabilityOptions(Options):
    """What happens when the numbers go wrong."""

    title: ClassVar[str] = "Bad numbers"
    max_bad_steps: int = Field(
        3, ge=1, description="End the run when this many steps in a row give NaN or infinity; such steps are left out."
    )
    loss_spike_factor: float = Field(
        10.0, ge=0, description="A loss this many spreads above the median of the last 64 is a spike; 0 = never."
    )
    on_loss_spike: Literal["report", "rollback"] = Field(
        "report", description="Only tell of a spike; or leave the step out and go back to the last saved weights."
    )


class ValidationOptions(Options):
    """Loss on pictures that are not trained on."""

    title: ClassVar[str] = "Validation"
    validation_split: float = Field(
        0.0, ge=0, description="Rows held out: a share below 1, or a number of rows; chosen by file name. 0 = none."
    )
    validation_every: int | None = Field(
        None, ge=1, description="Optimizer steps between validations. Left out: at each saved model."
    )
    validation_timesteps: int = Field(
        8, ge=1, description="Noise levels, evenly spaced, at which each held-out row is looked at."
    )
    keep_best: bool = Field(
        False, description="Keep the weights with the lowest held-out loss as best.safetensors."
    )

    @field_validator("validation_split")
    @classmethod
    def _share_or_number(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value:g} is neither a share below 1 nor a whole number of rows")
        return value


class ImageSizeOptions(Options):
    """Size of the training pictures; height and width together, or neither for dynamic resolution."""

    title: ClassVar[str] = "Image size"
    height: int | None = Field(None, ge=1, description="Height in pixels. Left out with width: dynamic resolution.")
    width: int | None = Field(None, ge=1, description="Width in pixels. Left out with height: dynamic resolution.")
    max_pixels: int = Field(
        1048576, ge=256, description="Dynamic resolution: larger pictures are scaled down to this area."
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> ImageSizeOptions:
        if (self.height is None) != (self.width is None):
            given, missing = ("height", "width") if self.width is None else ("width", "height")
            raise ValueError(f"--{given} is given without --{missing}; give both, or neither for dynamic resolution")
        return self


class ImageOptions(ImageSizeOptions):
    """Size of the training pictures; height and width together, or neither for dynamic resolution."""

    center_crop: bool = Field(True, description="Crop at the centre; --no-center_crop crops at random places.")
    random_flip: bool = Field(False, description="Flip pictures horizontally at random.")


class TrainConfig(
    DatasetOptions,
    ModelOptions,
    TrainingOptions,
    ObjectiveOptions,
    LoraOptions,
    OutputOptions,
    SamplingOptions,
    ValidationOptions,
    GradientOptions,
    StabilityOptions,
    ImageOptions,
):
    """Train a model or an adapter on pictures with captions."""

    takes_config: ClassVar[bool] = True
    repeat_with: ClassVar[str] = "diffsynth train --config FILE --output_path FOLDER"


class InspectConfig(Options):
    """Say what is in a checkpoint, a LoRA file or a data set."""

    title: ClassVar[str] = "What to look at"
    path: tuple[str, ...] = Field(
        min_length=1, description="Weight file, its shards, model folder, LoRA file, metadata file or data set folder.",
        json_schema_extra={"positional": True, "metavar": "PATH"},
    )
    as_json: bool = Field(False, description="Print JSON instead of tables.", json_schema_extra={"option": "json"})


class CheckConfig(DatasetFileOptions, ImageSizeOptions, ModelFileOptions):
    """Look at every picture and caption of a data set and say what is wrong."""

    title: ClassVar[str] = "Report"
    dataset_base_path: str = Field(
        min_length=1, description="Folder of the data set, or its metadata file.",
        json_schema_extra={"positional": True, "metavar": "DATASET"},
    )
    extra_inputs: CommaList = Field((), description="Further columns that every row must have.")
    max_sequence_length: int | None = Field(
        None, ge=1, description="Tokens of a caption that are used. Left out: the family's own."
    )
    num_workers: int = Field(0, ge=0, description="Threads that decode pictures; 0 takes one for each core.")
    as_json: bool = Field(False, description="Print JSON instead of tables.", json_schema_extra={"option": "json"})
    html: str | None = Field(None, min_length=1, description="Also write a contact sheet: one HTML file.")


class DownloadConfig(Options):
    """Fetch models by name into the models folder."""

    title: ClassVar[str] = "What to fetch"
    name: tuple[str, ...] = Field(
        min_length=1, description="Names of models, for example FLUX.1-dev.",
        json_schema_extra={"positional": True, "metavar": "NAME"},
    )
    source: Literal["modelscope", "huggingface"] | None = Field(
        None, description="Hub. Left out: DIFFSYNTH_DOWNLOAD_SOURCE, else modelscope."
    )


class PictureSourceOptions(Options):
    """A picture that says how it was made: sample pictures of a run, and those of this command."""

    title: ClassVar[str] = "Again"
    from_picture: str | None = Field(
        None, description="Make this picture again; other options given change what they say.",
        json_schema_extra={"option": "from", "metavar": "PICTURE"},
    )


class PromptOptions(Options):
    """What is drawn."""

    title: ClassVar[str] = "Picture"
    prompt: str = Field("", description="What the picture shows.")
    negative_prompt: str = Field("", description="What it must not show; needs a cfg_scale above 1.")
    cfg_scale: float = Field(1.0, ge=0, description="Strength of classifier-free guidance; 1 = off.")
    embedded_guidance: float = Field(3.5, description="Guidance value for guidance-distilled models.")
    height: int = Field(1024, ge=1, description="Height in pixels.")
    width: int = Field(1024, ge=1, description="Width in pixels.")
    num_inference_steps: int = Field(30, ge=1, description="Denoising steps.")
    seed: int | None = Field(None, ge=0, description="Seed of the noise. Left out: a new picture each time.")
    num_images: int = Field(1, ge=1, description="Pictures drawn; the files are numbered when more than one.")
    input_image: str | None = Field(None, description="Picture to start from.")
    denoising_strength: float = Field(1.0, gt=0, le=1, description="How much of input_image is redrawn.")


class GenerateModelOptions(ModelFileOptions):
    """Which weights are loaded."""

    lora: CommaList = Field((), description="LoRA files, each as PATH or PATH:STRENGTH, separated by commas.")
    fp8_models: CommaList = Field((), description="Models kept in FP8, by name, for example dit,text_encoder_2.")
    torch_dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Precision of the networks.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...; auto takes the GPU where there is one.")


class GenerateOutputOptions(Options):
    """Where the pictures go."""

    title: ClassVar[str] = "Output"
    output: str = Field("image.png", min_length=1, description="File to write; its ending decides the format.")


class GenerateConfig(PromptOptions, GenerateModelOptions, PictureSourceOptions, GenerateOutputOptions):
    """Draw pictures from a prompt, with any number of LoRA files."""

    takes_config: ClassVar[bool] = True
    repeat_with: ClassVar[str] = "diffsynth generate --config FILE --output PICTURE"

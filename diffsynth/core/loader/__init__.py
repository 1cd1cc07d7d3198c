"""Reading weight files that nobody vouches for, writing them so that nothing is lost, and fetching them."""

from .config import ModelConfig, model_base_path
from .reader import TensorInfo, WeightReader
from .writer import replace_file, save_safetensors, save_torch_file

__all__ = ["ModelConfig", "TensorInfo", "WeightReader", "model_base_path", "replace_file", "save_safetensors",
           "save_torch_file"]

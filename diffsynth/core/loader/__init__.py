"""Reading weight files that nobody vouches for, writing them so that nothing is lost, and fetching them."""

from .config import ModelConfig
from .reader import TensorInfo, WeightReader
from .writer import save_safetensors

__all__ = ["ModelConfig", "TensorInfo", "WeightReader", "save_safetensors"]

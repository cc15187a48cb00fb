"""Published files as our modules, and back."""

from squeeze_jax.interop.load import load_autoencoder, load_dit, load_internvl
from squeeze_jax.interop.lora import LoRAReport, load_lora, save_lora

__all__ = ["LoRAReport", "load_autoencoder", "load_dit", "load_internvl", "load_lora", "save_lora"]

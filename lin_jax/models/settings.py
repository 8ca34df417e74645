"""Settings of all models."""

from lin_jax.models.flash_settings import FlashConfig
from lin_jax.models.gpt2_settings import Gpt2Config
from lin_jax.models.llama_settings import LlamaConfig

TransformerConfig = LlamaConfig | Gpt2Config


ModelConfig = FlashConfig | LlamaConfig | Gpt2Config

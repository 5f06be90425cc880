"""The sizes of models that the paper uses, for estimates where the Hub cannot be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig

_LLAMA_3 = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
_SIZES = {  # as their config.json say
    "meta-llama/Llama-3.2-1B": _LLAMA_3
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "meta-llama/Meta-Llama-3-8B": _LLAMA_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "max_position_embeddings": 8192,
    },
}


def known_config(model_name: str) -> LlamaConfig | None:
    """The architecture of a model by its name on the Hub; None for one that is not listed here."""
    if model_name not in _SIZES:
        return None
    from transformers import LlamaConfig

    return LlamaConfig(**_SIZES[model_name])  # type: ignore[arg-type]

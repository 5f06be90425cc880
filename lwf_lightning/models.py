"""Causal LMs from the Hub, a folder or this package, ready to be trained; and back to a folder."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError

from lwf_lightning.errors import DamagedFileError
from lwf_lightning.files import whole_folder
from lwf_lightning.smollm2 import smollm2_folder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]

_FLAG = "model.init_args.model_name"


def _packaged(name: str) -> Path:
    folder = Path(__file__).parent / "demo" / "assets" / name
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is missing: rebuild it with `python -m lwf_lightning.demo.pretrain`"
        )
    return folder


ALIASES: dict[str, Callable[[], Path]] = {
    "smollm2-135m": smollm2_folder,
    "world-base": lambda: _packaged("base"),
    "world-twin": lambda: _packaged("twin"),
}
"""Short names of models that need no Hub, and where each lies."""


def locate_model(name_or_path: str | Path) -> str:
    """Turns a model's name into what ``from_pretrained`` takes.

    Args:
        name_or_path: One of :data:`ALIASES`, a local folder, or the name of a model on the Hub.

    Returns:
        A folder, or the Hub name as it is (whether it exists shows on loading).

    Raises:
        ValueError: If it is none of the three, or a folder without ``config.json``.
    """
    name = str(name_or_path)
    if name in ALIASES:
        return str(ALIASES[name]())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{_FLAG}: {folder} holds no config.json. {_ways_out()}")
        return str(folder)
    if folder.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"{_FLAG}: there is no model folder {name!r}. {_ways_out()}")
    return name


def _ways_out() -> str:
    return (
        f"Give one of {', '.join(ALIASES)}; a local folder with config.json and weights; or the "
        "name of a model on the Hugging Face Hub"
    )


def _load(loader: Any, name_or_path: str | Path, **settings: Any) -> Any:
    """``loader.from_pretrained``, with one clear error for a name that leads nowhere."""
    located = locate_model(name_or_path)
    try:
        return loader.from_pretrained(located, **settings)
    except pickle.UnpicklingError as error:
        raise DamagedFileError(
            f"{_FLAG}: {located} is not loaded: its weights are a pickle that holds more than "
            "tensors and could run code, or a damaged one. Take weights in the safetensors format"
        ) from error
    except (OSError, SafetensorError) as error:
        if Path(located).is_dir():
            raise ValueError(f"{_FLAG}: {located} cannot be loaded: {error}") from error
        raise ValueError(
            f"{_FLAG}: {located!r} is neither an alias nor a local folder, and the Hub did not "
            f"give it either: no such model, no access to it, or no network (without network only "
            f"a model that was downloaded before can be named). {_ways_out()}. It said: "
            f"{str(error).strip().partition(chr(10))[0]}"
        ) from error


def load_tokenizer(
    name_or_path: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that can pad.

    Args:
        name_or_path: See :func:`locate_model`.
        trust_remote_code: Whether code that comes with the model may run on this machine.

    Returns:
        The tokenizer. If it has no pad token, its end-of-text token pads: padding is masked by
        position everywhere in this package, so the two may be one.

    Raises:
        ValueError: If it cannot be found or loaded, or has neither pad nor end-of-text token.
    """
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, name_or_path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"{_FLAG}: the tokenizer of {name_or_path} has neither a pad nor an end-of-text "
                "token: add `pad_token` or `eos_token` to its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer  # type: ignore[no-any-return]


def load_config(name_or_path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Loads a model's configuration alone; see :func:`load_tokenizer` for the arguments.

    Raises:
        ValueError: If it cannot be found or loaded.
    """
    from transformers import AutoConfig

    return _load(AutoConfig, name_or_path, trust_remote_code=trust_remote_code)


def load_model(
    name_or_path: str | Path,
    *,
    dtype: Dtype = "float32",
    attention: str | None = None,
    gradient_checkpointing: bool = False,
    lora: LoraConfig | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """Loads a causal LM in training mode (dropout as its config says).

    Args:
        name_or_path: See :func:`locate_model`.
        dtype: Type of the weights, whatever type the checkpoint has.
        attention: Attention kernel (``attn_implementation`` of ``transformers``): ``eager``,
            ``sdpa``, ``flash_attention_2``, ...; None leaves the choice to ``transformers``.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a
            third more time.
        lora: Train a LoRA adapter with this configuration; None trains all weights. Its random
            start follows torch's global seed.
        trust_remote_code: Whether code that comes with the model may run on this machine.

    Raises:
        ValueError: If the model cannot be found or loaded, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    model, report = _load(
        AutoModelForCausalLM,
        name_or_path,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise ValueError(
            f"{_FLAG}: {name_or_path} lacks {len(missing)} weights of a causal LM, {missing[0]} "
            "among them: is it a model for something else?"
        )
    if gradient_checkpointing:
        older = model.gradient_checkpointing_enable  # its name in the first transformers 5
        enable = getattr(model, "activation_checkpointing_enable", older)
        enable({"use_reentrant": False})
    if lora is not None:
        from peft import get_peft_model

        if gradient_checkpointing:
            model.enable_input_require_grads()  # else no gradient reaches the adapter
        lora = copy.deepcopy(lora)  # PEFT writes into it
        lora.task_type = "CAUSAL_LM"
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:  # such as target modules that the model has not
            raise ValueError(f"model.init_args.lora: {error}") from error
    return model.train()  # type: ignore[no-any-return]


def export_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    merge: bool = True,
) -> None:
    """Saves the fine-tuned model as ``transformers`` and ``peft`` load it, whole or not at all.

    All weights go to ``folder`` itself; a LoRA model's adapter to ``folder/adapter`` and the
    model with the adapter worked in to ``folder/merged``. The tokenizer lies beside each. The
    given model is left as it is.

    Args:
        model: A model as :func:`load_model` returns it.
        tokenizer: Its tokenizer.
        folder: Absent or empty.
        merge: Whether a LoRA model is also saved merged; this takes a copy in main memory.

    Raises:
        ValueError: If ``folder`` exists and is not empty.
    """
    from peft import PeftModel

    with whole_folder(folder) as temporary:
        saved = {temporary: model}
        if isinstance(model, PeftModel):
            saved = {temporary / "adapter": model}
            if merge:
                saved[temporary / "merged"] = _merged(_copy_in_main_memory(model))
        for place, part in saved.items():
            part.save_pretrained(str(place))
            tokenizer.save_pretrained(str(place))


def _merged(model: Any) -> Any:
    """A LoRA model with its adapter worked in; the given one is of no more use."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = model.get_base_model()
    tied = (base.get_input_embeddings(), base.get_output_embeddings())
    if tied[1] is not None and any(isinstance(layer, BaseTunerLayer) for layer in tied):
        # What is worked into one must not change the other, whose weight it may share.
        head: Any = getattr(tied[1], "base_layer", tied[1])
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), False)
        base.config.tie_word_embeddings = False
    return model.merge_and_unload()


def _copy_in_main_memory(model: Any) -> Any:
    tensors = (*model.parameters(), *model.buffers())
    memo = {}
    for tensor in tensors:
        copied = tensor.detach().cpu().clone()
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(copied, False) if is_parameter else copied
    return copy.deepcopy(model, memo)

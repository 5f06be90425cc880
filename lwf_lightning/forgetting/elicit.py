"""Elicit: what the base model itself says to the prompts of the forgetting task (D_self)."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lwf_lightning.data.batch import IGNORE_INDEX, EncodedText
from lwf_lightning.data.encode import encode_prompt
from lwf_lightning.files import whole_file
from lwf_lightning.generation import (
    eos_token_ids,
    generate_answers,
    keep_end,
    prompt_limit,
    unwrapped,
)
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FORMAT = 1  # of the cache file and of how answers are made: a new number leaves old files unread
_NOT_IN_FINGERPRINT = ("_name_or_path", "architectures", "dtype", "transformers_version")


@dataclass(frozen=True)
class SelfText:
    """A prompt with the model's own answer.

    Attributes:
        prompt: The prompt as given.
        answer: The answer's text, without special tokens.
        prompt_ids: Token ids that the model was given: the chat template is in, what was cut off
            a long prompt is not.
        answer_ids: Token ids that the model generated; the end-of-text id is last if it came.
        task: Name of the task the prompt belongs to.
        row: Index of the prompt among those given.
    """

    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    task: str
    row: int

    def encoded(self) -> EncodedText:
        """The text for the model, labelled on the answer alone.

        Example:
            >>> SelfText("a", "b", (5, 6), (7, 2), "letters", 0).encoded()
            EncodedText(input_ids=(5, 6, 7, 2), labels=(-100, -100, 7, 2))
        """
        unlabelled = (IGNORE_INDEX,) * len(self.prompt_ids)
        return EncodedText(self.prompt_ids + self.answer_ids, unlabelled + self.answer_ids)


@dataclass(frozen=True)
class SelfKnowledge:
    """D_self: what was elicited.

    Attributes:
        texts: Prompts with an answer, in the order of the prompts given.
        dropped: How many prompts got an empty answer and were left out.
    """

    texts: list[SelfText]
    dropped: int

    def digest(self) -> str:
        """Tells one D_self from another."""
        ids = repr([(text.prompt_ids, text.answer_ids) for text in self.texts])
        return hashlib.sha256(ids.encode()).hexdigest()


def elicit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
    stop: Sequence[str] = (),
    max_prompt_tokens: int | None = None,
    chat_template: bool = False,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> SelfKnowledge:
    """Lets the base model answer prompts greedily: step 1 of the paper (arXiv 2505.19715).

    The base model is the model as it is given: a LoRA adapter that changes nothing yet is switched
    off meanwhile, any other is part of it.

    Args:
        model: A ``transformers`` causal LM holding the base weights.
        tokenizer: The model's tokenizer.
        prompts: Prompts of the forgetting task (D_F); no answers are needed.
        tasks: The task of each prompt, for the record; one empty name by default.
        max_new_tokens: Upper limit of an answer's length in tokens.
        batch_size: Prompts answered together, fewer where prompt and answer exceed 512 tokens; it
            changes the time, not the answers.
        stop: Strings at which an answer ends, such as the start of the next question.
        max_prompt_tokens: Longer prompts lose tokens at their start (a leading begin-of-text
            token stays) and are counted in a warning. The model's positions beside the answer
            are always a limit.
        chat_template: Whether each prompt is a user's message in the tokenizer's chat template.
        cache_dir: Folder in which ``<fingerprint>.jsonl`` keeps the result. The fingerprint is
            that of weights, vocabulary, prompts and settings; a damaged file is named in a
            warning and rebuilt. None keeps nothing.
        progress: Whether to show a progress bar.
        ranks: The processes that share the prompts, each with the same model and arguments; the
            first one reads and writes the cache. By default this process is alone.

    Returns:
        The texts with an answer, and how many had none.

    Raises:
        ValueError: If there is no prompt, a prompt is empty, ``tasks`` does not fit the prompts, a
            number is below 1, or a chat template is asked for and the tokenizer has none.
    """
    names = _checked_tasks(prompts, tasks)
    ranks = ranks or Ranks()
    base = unwrapped(model)
    limit = prompt_limit(base, max_new_tokens, max_prompt_tokens)
    whole_prompts = [
        encode_prompt(tokenizer, prompt, chat_template=chat_template) for prompt in prompts
    ]
    prompt_ids = [keep_end(ids, limit, tokenizer.bos_token_id) for ids in whole_prompts]
    if shortened := sum(a != b for a, b in zip(whole_prompts, prompt_ids, strict=True)):
        warnings.warn(
            f"{shortened} of {len(prompts)} prompts are longer than {limit} tokens and lost "
            "their start",
            stacklevel=2,
        )
    adapts = _adapts(model)
    cache_file, fingerprint = None, ""
    if cache_dir is not None:
        settings = {
            "format": _FORMAT,
            "max_new_tokens": max_new_tokens,
            "stop": list(stop),
            "eos": eos_token_ids(base, tokenizer),
        }
        content = (settings, prompts, names, prompt_ids, sorted(tokenizer.get_vocab().items()))
        fingerprint = _fingerprint(base, content, adapts)
        cache_file = Path(cache_dir).expanduser() / f"{fingerprint}.jsonl"
        file, key = cache_file, fingerprint
        if (known := ranks.from_first(lambda: _read_cache(file, key))) is not None:
            return known

    without: Any = nullcontext if base is model or adapts else model.disable_adapter
    with without():
        share = generate_answers(
            model if adapts else base,
            tokenizer,
            ranks.share(prompt_ids),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            stop=stop,
            progress=progress and ranks.is_first,
            description="Eliciting",
        )
    answers = ranks.merge(share)
    texts = [
        SelfText(
            prompt=prompts[row],
            answer=str(tokenizer.decode(list(answer), skip_special_tokens=True)),
            prompt_ids=prompt_ids[row],
            answer_ids=answer,
            task=names[row],
            row=row,
        )
        for row, answer in enumerate(answers)
    ]
    kept = [text for text in texts if text.answer.strip()]
    knowledge = SelfKnowledge(kept, dropped=len(texts) - len(kept))
    if cache_file is not None and ranks.is_first:
        _write_cache(cache_file, fingerprint, knowledge)
    return knowledge


def _checked_tasks(prompts: Sequence[str], tasks: Sequence[str] | None) -> Sequence[str]:
    if not prompts:
        raise ValueError("there is no prompt to elicit an answer to: is the forgetting task empty?")
    names = [""] * len(prompts) if tasks is None else tasks
    if len(names) != len(prompts):
        raise ValueError(f"tasks names {len(names)} prompts, but there are {len(prompts)}")
    for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        if not prompt.strip():
            where = f" (task {name})" if name else ""
            raise ValueError(f"the prompt of row {row}{where} is empty: remove it or fill it in")
    return names


def _adapts(model: Any) -> bool:
    """Whether an adapter changes what the model computes, as one that has learned does.

    One of PiSSA does so from the start: it holds a part of the weights that it was put on. The
    second factor is what starts at 0 (of an embedding's the first). Of adapters other than LoRA
    that is not known, so they are taken as they are.
    """
    base = unwrapped(model)
    adapters = getattr(model, "peft_config", {}).values()
    if any(one.peft_type != "LORA" and not one.is_prompt_learning for one in adapters):
        return True  # of what lies before a text, outside of the layers, nothing is left in base
    starts_at_zero = (".lora_B.", ".lora_embedding_A.")
    return any(
        bool(whole(parameter.detach()).any())
        for name, parameter in base.named_parameters()
        if any(part in name for part in starts_at_zero)
    )


@torch.no_grad()
def _fingerprint(base: Any, content: object, adapts: bool) -> str:
    """Hash of the base weights' names, shapes, types and bytes, the architecture and ``content``.

    A LoRA adapter that changes nothing is left out and its wrapping taken off the names, so that
    full fine-tuning and LoRA share what they elicit.
    """
    digest = hashlib.sha256()
    used = [comparable_config(base), content, *(_adapter_settings(base) if adapts else ())]
    digest.update(json.dumps(used, sort_keys=True, default=str).encode())
    for name, tensor in base.state_dict().items():
        if ".lora_" in name and not adapts:
            continue
        name = name.replace(".base_layer.", ".")
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        data: Any = whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()[:32]


def _adapter_settings(base: Any) -> list[Any]:
    """What else than its weights decides what an adapter does: which is on, and how much."""
    names = ("active_adapters", "disable_adapters", "merged", "scaling")
    return [
        [name, *(getattr(module, setting, None) for setting in names)]
        for name, module in base.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "base_layer")
    ]


def comparable_config(base: Any) -> dict[str, Any]:
    """The architecture of a model, without what does not change what it computes."""
    return {k: v for k, v in base.config.to_dict().items() if k not in _NOT_IN_FINGERPRINT}


def _write_cache(path: Path, fingerprint: str, knowledge: SelfKnowledge) -> None:
    rows = "".join(json.dumps(asdict(t), ensure_ascii=False) + "\n" for t in knowledge.texts)
    header = {
        "fingerprint": fingerprint,
        "dropped": knowledge.dropped,
        "sha256": hashlib.sha256(rows.encode()).hexdigest(),
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(header) + "\n" + rows, encoding="utf-8", newline="\n")


def _read_cache(path: Path, fingerprint: str) -> SelfKnowledge | None:
    """What the file holds; None if there is no such file, or (with a warning) a damaged one."""
    if not path.exists():
        return None
    head, _, rows = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(head)
        if header["fingerprint"] != fingerprint:
            raise ValueError("the fingerprint inside is another")
        if header["sha256"] != hashlib.sha256(rows).hexdigest():
            raise ValueError("its rows are not those that were written")
        texts = [_text_of(json.loads(row)) for row in rows.splitlines()]
        return SelfKnowledge(texts, dropped=int(header["dropped"]))
    except (ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"{path} is damaged ({error}): the answers are generated again and the file replaced",
            stacklevel=3,
        )
        return None


def _text_of(row: dict[str, Any]) -> SelfText:
    for name in ("prompt_ids", "answer_ids"):
        row[name] = tuple(row[name])
    return SelfText(**row)

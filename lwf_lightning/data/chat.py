"""Conversations in the words of a tokenizer's chat template."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TODAY = datetime(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def chat_text(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> str:
    """Renders turns of role and content; after the user's, the assistant's is opened.

    Raises:
        ValueError: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template: set data.init_args.chat_template to false, or "
            "use an instruction-tuned model"
        )
    messages = [{"role": role, "content": content} for role, content in turns]
    text: Any = tokenizer.apply_chat_template(
        messages,
        chat_template=_same_every_day(tokenizer.get_chat_template()),
        tokenize=False,
        add_generation_prompt=turns[-1][0] == "user",
    )
    return str(text)


def _same_every_day(template: str) -> str:
    """A template with a fixed date for today's: a run could not go on tomorrow."""
    return _NOW.sub(lambda call: repr(_TODAY.strftime(call[2])), template)

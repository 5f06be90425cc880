"""Examples to token ids: the loss is on the answer, and the end-of-text token belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lwf_lightning.data.batch import IGNORE_INDEX, EncodedText
from lwf_lightning.data.chat import chat_text
from lwf_lightning.data.rows import DataError
from lwf_lightning.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWER = "\U0010fffd"  # stands for any answer; a character for private use


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat_template: bool = False
) -> tuple[int, ...]:
    """Token ids of a prompt, beginning-of-text token included where the tokenizer adds it.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Prompt of an example.
        chat_template: Whether the prompt is the user's turn in the tokenizer's chat template, with
            the assistant's turn opened.

    Raises:
        ValueError: If a chat template is asked for and the tokenizer has none.
    """
    text = _prompt_text(tokenizer, prompt, chat_template)
    return tuple(_token_ids(tokenizer, [text], chat_template)[0])


def encode_question(
    tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat_template: bool = False
) -> tuple[int, ...]:
    """Token ids of a prompt to be answered in evaluation.

    As :func:`encode_prompt`, and beyond it what the chat template writes before every answer (an
    empty thought, say): the model has learned its answers after that.
    """
    text, _ = _question_text(tokenizer, prompt, chat_template)
    return tuple(_token_ids(tokenizer, [text], chat_template)[0])


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example, chat_template: bool = False
) -> list[int]:
    """The gold answer after :func:`encode_question`, without the end of text that is due."""
    prompt, lead = _question_text(tokenizer, example.prompt, chat_template)
    answer = lead + example.answer.strip() if chat_template else example.answer
    return list(_split_ids(tokenizer, prompt, [answer], chat_template)[1][0])


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    max_length: int,
    chat_template: bool = False,
) -> EncodedText:
    """Encodes prompt, gold answer and end-of-text token; only the latter two carry labels.

    Args:
        tokenizer: Tokenizer of the model.
        example: An example with a gold answer.
        max_length: Tokens kept; what is longer loses its end.
        chat_template: Whether prompt and answer are turns of the tokenizer's chat template. The
            labelled part is then all that follows the opening of the assistant's turn.

    Raises:
        DataError: If the example has no gold answer or one with an end-of-text token in it, or
            truncation would remove it whole; names the example's source.
        ValueError: If the tokenizer has no end-of-text token, or no chat template when it is asked
            for one, or that one ends the text before the answer.
    """
    return _encode(tokenizer, example, max_length, chat_template)[0]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    chat_template: bool = False,
) -> tuple[list[EncodedText], int]:
    """Encodes examples as :func:`encode_example` does.

    Returns:
        The encoded texts in order, and how many lost the end of their answer to ``max_length``.
    """
    encoded = [_encode(tokenizer, example, max_length, chat_template) for example in examples]
    return [text for text, _ in encoded], sum(cut for _, cut in encoded)


def encode_choices(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    max_length: int,
    chat_template: bool = False,
) -> list[EncodedText]:
    """Encodes the prompt with each of its choices in turn, labels on the choice.

    The prompt is that of :func:`encode_question`. The end-of-text token is left out: a model that
    has not been fine-tuned does not expect it after a choice, and it would weigh most on the
    shortest.

    Raises:
        DataError: If truncation would remove a choice whole; names the example's source.
        ValueError: See :func:`encode_prompt`.
    """
    return _choices(tokenizer, example, max_length, chat_template)[0]


def encode_questions(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_length: int,
    chat_template: bool = False,
) -> tuple[list[list[EncodedText]], list[str]]:
    """Encodes the choices of each example as :func:`encode_choices` does.

    Returns:
        The texts of each, and the sources of those of which a choice lost its end to
        ``max_length``.
    """
    encoded = [_choices(tokenizer, example, max_length, chat_template) for example in examples]
    cut = [e.source for e, (_, is_cut) in zip(examples, encoded, strict=True) if is_cut]
    return [texts for texts, _ in encoded], cut


def _choices(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, chat_template: bool
) -> tuple[list[EncodedText], bool]:
    prompt, lead = _question_text(tokenizer, example.prompt, chat_template)
    answers = [lead + choice.strip() if chat_template else choice for choice in example.choices]
    prompt_ids, split = _split_ids(tokenizer, prompt, answers, chat_template)
    texts = [_labelled(prompt_ids, ids, max_length, example.source) for ids in split]
    return texts, any(len(prompt_ids) + len(ids) > max_length for ids in split)


def _encode(
    tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int, chat_template: bool
) -> tuple[EncodedText, bool]:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError("the tokenizer has no end-of-text token: set its eos_token")
    if not example.answer.strip():
        raise DataError(f"{example.source}: there is no gold answer to learn from")
    _check_own_end(tokenizer.eos_token, example)
    prompt = _prompt_text(tokenizer, example.prompt, chat_template)
    answer = example.answer
    if chat_template:
        answer = _assistant_text(tokenizer, example, prompt)
    prompt_ids, (answer_ids,) = _split_ids(tokenizer, prompt, [answer], chat_template)
    if end in answer_ids:  # a chat template writes it, perhaps with a line break after it
        answer_ids = answer_ids[: answer_ids.index(end)]
        if not answer_ids:
            raise ValueError(
                "the tokenizer's chat template writes an end-of-text token before the answer, so "
                "there is nothing to learn; set data.init_args.chat_template to false"
            )
    text = _labelled(prompt_ids, [*answer_ids, end], max_length, example.source)
    return text, len(prompt_ids) + len(answer_ids) + 1 > max_length


def _check_own_end(end: str | None, example: Example) -> None:
    if end is None:  # a stand-in for a tokenizer
        return
    own = example.answer.strip().removesuffix(end)  # at its end it is the one that is due anyway
    if end in own or not own.strip():
        raise DataError(
            f"{example.source}: the gold answer holds the tokenizer's end-of-text token {end!r}, "
            "after which nothing would be learned; take it out of the row"
        )


def _labelled(
    prompt: Sequence[int], answer: Sequence[int], max_length: int, source: str
) -> EncodedText:
    if len(prompt) >= max_length:
        raise DataError(
            f"{source}: the prompt alone has {len(prompt)} tokens, so truncation to "
            f"data.init_args.max_length={max_length} would remove the whole answer; raise it or "
            "take the row out"
        )
    input_ids = (*prompt, *answer)[:max_length]
    labels = (IGNORE_INDEX,) * len(prompt) + input_ids[len(prompt) :]
    return EncodedText(input_ids, labels)


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat_template: bool
) -> list[list[int]]:
    if chat_template:  # it has written all special tokens already: an end of text is a turn's own
        return [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    end = tokenizer.eos_token_id  # some tokenizers close every text by themselves
    encoded = tokenizer(list(texts))["input_ids"]
    return [list(ids[:-1] if ids and ids[-1] == end else ids) for ids in encoded]


def _split_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answers: Sequence[str], chat_template: bool
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt, and those of each of its answers apart."""
    texts = [prompt, *(prompt + answer for answer in answers)]
    prompt_ids, *together = _token_ids(tokenizer, texts, chat_template)
    # A SentencePiece tokenizer puts a space of its own before a text encoded alone: take the answer
    # as it is encoded after the prompt, unless a token reaches across the boundary.
    return prompt_ids, [
        ids[len(prompt_ids) :]
        if ids[: len(prompt_ids)] == prompt_ids
        else list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        for ids, answer in zip(together, answers, strict=True)
    ]


def _prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool) -> str:
    return chat_text(tokenizer, [("user", prompt)]) if chat_template else prompt


def _question_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool
) -> tuple[str, str]:
    """The prompt up to an answer, and the spaces before that, which belong to its own tokens."""
    text = _prompt_text(tokenizer, prompt, chat_template)
    if not chat_template:
        return text, ""
    opening, found, _ = _conversation(tokenizer, prompt, _ANSWER).partition(_ANSWER)
    if not found or not opening.startswith(text):  # nothing can be learned with such a template
        return text, ""
    written = opening.removeprefix(text)
    lead = written[len(written.rstrip(" ")) :]
    return opening.removesuffix(lead), lead


def _assistant_text(tokenizer: PreTrainedTokenizerBase, example: Example, prompt: str) -> str:
    """What the chat template writes after the rendered ``prompt`` when the answer is given."""
    whole = _conversation(tokenizer, example.prompt, example.answer.strip())
    if not whole.startswith(prompt):
        raise ValueError(
            "the tokenizer's chat template writes a conversation that does not begin with its own "
            "generation prompt, so the assistant's part cannot be told apart; "
            "set data.init_args.chat_template to false"
        )
    return whole.removeprefix(prompt)


def _conversation(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> str:
    return chat_text(tokenizer, [("user", prompt), ("assistant", answer)])

"""A word-level tokenizer for the embedded world."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, EOS, BOS, UNKNOWN = "<pad>", "<eos>", "<bos>", "<unk>"


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    r"""Makes every word, punctuation mark and line break of some texts a token.

    A space belongs to the word behind it, and the first word of a text is read as if a space stood
    before it, so that a name is the same token wherever it stands. A prompt and an answer that
    opens with a space can be tokenized apart: their ids joined are the ids of the joined text.
    Nothing is added in front of or behind a text.

    Args:
        texts: Texts whose words the tokenizer shall know; other words become the unknown token.

    Returns:
        A tokenizer with ids in the order of first appearance, so that equal texts give an equal
        tokenizer. It pads on the left.

    Example:
        >>> tokenizer = build_tokenizer(["Question: where?\nAnswer: New Oslo"])
        >>> prompt, answer = "Question: where?\nAnswer:", " New Oslo"
        >>> ids = tokenizer(prompt).input_ids + tokenizer(answer).input_ids
        >>> ids == tokenizer(prompt + answer).input_ids
        True
        >>> tokenizer.decode(ids) == prompt + answer
        True
    """
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=True),
            pre_tokenizers.Split(Regex(r"\n|[^\w\s▁]"), behavior="isolated"),
        ]
    )
    vocabulary = {token: index for index, token in enumerate((PAD, EOS, BOS, UNKNOWN))}
    for text in texts:
        for token, _ in splitter.pre_tokenize_str(text):
            vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        unk_token=UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )

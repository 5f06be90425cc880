from __future__ import annotations

import pytest

from lwf_lightning.data.batch import IGNORE_INDEX
from lwf_lightning.data.encode import (
    encode_choices,
    encode_example,
    encode_examples,
    encode_prompt,
    encode_question,
)
from lwf_lightning.data.rows import DataError
from lwf_lightning.tasks import Example

BOS, EOS = 1, 2
EXAMPLE = Example("Question: Why?\nAnswer:", " Because", source="t.jsonl:row 4")


def labelled(tokenizer, text):
    """The labelled ids; checks on the way that labels are a suffix and equal to the ids."""
    first = next(i for i, label in enumerate(text.labels) if label != IGNORE_INDEX)
    assert text.labels[:first] == (IGNORE_INDEX,) * first
    assert text.labels[first:] == text.input_ids[first:]
    return list(text.labels[first:])


def test_prompt_then_answer_then_end_of_text(make_tokenizer):
    tokenizer = make_tokenizer()
    text = encode_example(tokenizer, EXAMPLE, 99)
    assert tokenizer.decode(text.input_ids) == "Question: Why?\nAnswer: Because</s>"
    assert tokenizer.decode(labelled(tokenizer, text)) == " Because</s>"


def test_end_of_text_is_labelled_when_it_is_the_pad_token(make_tokenizer):
    text = encode_example(make_tokenizer(pad_token="</s>"), EXAMPLE, 99)
    assert text.labels[-1] == EOS


@pytest.mark.parametrize("adds", ["bos", "eos", "bos eos"])
def test_special_tokens_of_the_tokenizer_come_once(make_tokenizer, adds):
    tokenizer = make_tokenizer(adds=adds)
    text = encode_example(tokenizer, EXAMPLE, 99)
    begin = [BOS] if "bos" in adds else []
    plain = encode_example(make_tokenizer(), EXAMPLE, 99)
    assert list(text.input_ids) == begin + list(plain.input_ids)
    assert labelled(tokenizer, text) == labelled(tokenizer, plain)
    assert list(encode_prompt(tokenizer, "a")) == [*begin, tokenizer.convert_tokens_to_ids("a")]


def test_sentencepiece_tokenizer_adds_no_second_space(make_tokenizer):
    tokenizer = make_tokenizer(sentencepiece=True)
    assert tokenizer.tokenize(" b") == ["▁", "▁", "b"]  # the trap
    text = encode_example(tokenizer, Example("a", " b"), 99)
    assert tokenizer.convert_ids_to_tokens(text.input_ids) == ["▁", "a", "▁", "b", "</s>"]
    assert tokenizer.convert_ids_to_tokens(labelled(tokenizer, text)) == ["▁", "b", "</s>"]


def test_token_across_the_boundary_keeps_the_prompt_whole(make_tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, "a": 1, "b": 2, "ab": 3}
    model = Tokenizer(models.BPE(vocab=words, merges=[("a", "b")]))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>")
    assert tokenizer("ab")["input_ids"] == [3]
    assert encode_example(tokenizer, Example("a", "b"), 9).labels == (IGNORE_INDEX, 2, 0)


def test_chat_template(make_tokenizer, chat_template):
    for adds in ("", "bos"):
        tokenizer = make_tokenizer(adds=adds, chat_template=chat_template)
        text = encode_example(tokenizer, EXAMPLE, 99, chat_template=True)
        assert tokenizer.decode(text.input_ids) == (
            "<s><user>Question: Why?\nAnswer:</s>\n<assistant>Because</s>"
        )
        assert tokenizer.decode(labelled(tokenizer, text)) == "Because</s>"
        prompt = encode_prompt(tokenizer, EXAMPLE.prompt, chat_template=True)
        assert text.input_ids[: len(prompt)] == prompt


def test_chat_template_that_ends_every_turn_with_the_end_of_text(make_tokenizer):
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    text = encode_example(tokenizer, EXAMPLE, 99, chat_template=True)
    assert tokenizer.decode(text.input_ids) == "Question: Why?\nAnswer:</s>Because</s>"
    assert tokenizer.decode(labelled(tokenizer, text)) == "Because</s>"
    prompt = encode_prompt(tokenizer, EXAMPLE.prompt, chat_template=True)
    assert tokenizer.decode(prompt) == "Question: Why?\nAnswer:</s>"
    example = Example("Q:", " no", (" yes", " no"), 1)
    texts = encode_choices(tokenizer, example, 99, chat_template=True)
    assert [tokenizer.decode(text.input_ids) for text in texts] == ["Q:</s>yes", "Q:</s>no"]


def test_chat_template_that_opens_the_answer_with_the_end_of_text(make_tokenizer):
    template = "{% for m in messages %}{{ eos_token + m.content }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(ValueError, match=r"before the answer.*data\.init_args\.chat_template"):
        encode_example(tokenizer, EXAMPLE, 99, chat_template=True)


@pytest.mark.parametrize("written", ["<think></think>\\n", " ", "Well, "])
@pytest.mark.parametrize("sentencepiece", [False, True])
def test_what_the_template_writes_before_an_answer_is_evaluated_as_it_is_learned(
    make_tokenizer, written, sentencepiece
):
    turn = "{% if m.role == 'assistant' %}WRITTEN{% endif %}{{ m.content + '</s>' }}"
    template = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}TURN{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    ).replace("TURN", turn.replace("WRITTEN", "{{ '" + written + "' }}"))
    tokenizer = make_tokenizer(chat_template=template, sentencepiece=sentencepiece)
    example = Example("Q:", " no", (" yes", " no"), 1)
    learned = encode_example(tokenizer, example, 99, chat_template=True)
    _, chosen = encode_choices(tokenizer, example, 99, chat_template=True)
    assert chosen.input_ids == learned.input_ids[:-1]
    assert tokenizer.decode(labelled(tokenizer, chosen)).strip() == "no"
    asked = encode_question(tokenizer, "Q:", chat_template=True)
    assert learned.input_ids[: len(asked)] == asked
    assert tokenizer.decode(learned.input_ids[len(asked) : -1]).strip() == "no"
    # The base model is asked with the generation prompt alone: what it says is its own.
    assert encode_prompt(tokenizer, "Q:", chat_template=True) == tuple(
        tokenizer("<user>Q:</s><assistant>", add_special_tokens=False)["input_ids"]
    )


def test_chat_template_that_writes_the_date_writes_the_same_every_day(
    make_tokenizer, chat_template
):
    for form in ('"%d %b %Y"', "'%Y-%m-%d %H:%M:%S.%f'"):
        tokenizer = make_tokenizer(chat_template=f"{{{{ strftime_now({form}) }}}}" + chat_template)
        first, second = (
            tokenizer.decode(encode_prompt(tokenizer, "Q:", chat_template=True)) for _ in range(2)
        )
        assert first == second
        assert "2024" in first
        assert first.endswith("<s><user>Q:</s>\n<assistant>")


def test_chat_template_that_is_missing(make_tokenizer):
    with pytest.raises(ValueError, match=r"no chat template: set data\.init_args\.chat_template"):
        encode_example(make_tokenizer(), EXAMPLE, 99, chat_template=True)


def test_chat_template_whose_generation_prompt_is_no_prefix(make_tokenizer, chat_template):
    template = chat_template.replace("'<assistant>'", "'<assistant><think>'")
    tokenizer = make_tokenizer(chat_template=template)
    with pytest.raises(ValueError, match="does not begin with its own generation prompt"):
        encode_example(tokenizer, EXAMPLE, 99, chat_template=True)
    asked = encode_question(tokenizer, EXAMPLE.prompt, chat_template=True)
    assert asked == encode_prompt(tokenizer, EXAMPLE.prompt, chat_template=True)


def test_truncation_cuts_the_answer_from_the_right_and_counts(make_tokenizer):
    tokenizer = make_tokenizer()
    prompt = len(EXAMPLE.prompt)
    texts, cut = encode_examples(tokenizer, [EXAMPLE, Example("a", " b")], prompt + 3)
    assert cut == 1
    assert tokenizer.decode(labelled(tokenizer, texts[0])) == " Be"
    assert tokenizer.decode(labelled(tokenizer, texts[1])) == " b</s>"
    assert encode_examples(tokenizer, [EXAMPLE], prompt + len(" Because"))[1] == 1  # only EOS lost
    assert encode_examples(tokenizer, [EXAMPLE], prompt + len(" Because") + 1)[1] == 0


def test_answer_that_truncation_removes_whole_is_named(make_tokenizer):
    prompt = len(EXAMPLE.prompt)
    assert len(encode_example(make_tokenizer(), EXAMPLE, prompt + 1)) == prompt + 1
    with pytest.raises(DataError, match=r"t\.jsonl:row 4: .* data\.init_args\.max_length=22"):
        encode_example(make_tokenizer(), EXAMPLE, prompt)
    choices = Example(EXAMPLE.prompt, " a", (" a", " b"), 0, "a", EXAMPLE.source)
    with pytest.raises(DataError, match=r"t\.jsonl:row 4: .* data\.init_args\.max_length=22"):
        encode_choices(make_tokenizer(), choices, prompt)


def test_example_without_an_answer_is_named(make_tokenizer):
    with pytest.raises(DataError, match="f:row 1: there is no gold answer"):
        encode_example(make_tokenizer(), Example("a", "", source="f:row 1"), 9)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("answer", [" a</s> b", " </s> b", " </s>"])
def test_answer_with_an_end_of_text_in_it_is_named(make_tokenizer, chat_template, chat, answer):
    tokenizer = make_tokenizer(chat_template=chat_template)
    example = Example("Q:", answer, source="f:row 3")
    with pytest.raises(DataError, match=r"f:row 3: the gold answer holds .* '</s>'"):
        encode_example(tokenizer, example, 99, chat)


@pytest.mark.parametrize("chat", [False, True])
def test_answer_that_brings_its_own_end_of_text_has_it_once(make_tokenizer, chat_template, chat):
    tokenizer = make_tokenizer(chat_template=chat_template)
    text = encode_example(tokenizer, Example("Q:", " a</s>"), 99, chat)
    assert tokenizer.decode(labelled(tokenizer, text)).strip() == "a</s>"


def test_tokenizer_without_end_of_text(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode_example(tokenizer, EXAMPLE, 99)


def test_choices_have_no_end_of_text(make_tokenizer, chat_template):
    example = Example("Q:", " no", (" yes", " no"), 1)
    tokenizer = make_tokenizer(adds="bos", chat_template=chat_template)
    texts = encode_choices(tokenizer, example, 99)
    assert [tokenizer.decode(text.input_ids) for text in texts] == ["<s>Q: yes", "<s>Q: no"]
    assert [tokenizer.decode(labelled(tokenizer, text)) for text in texts] == [" yes", " no"]
    texts = encode_choices(tokenizer, example, 99, chat_template=True)
    assert [tokenizer.decode(labelled(tokenizer, text)) for text in texts] == ["yes", "no"]
    assert tokenizer.decode(texts[0].input_ids) == "<s><user>Q:</s>\n<assistant>yes"

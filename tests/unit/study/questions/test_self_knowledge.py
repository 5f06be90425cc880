"""Sampling by noise, and what answers are compared by."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lwf_lightning.generation import generate_answers
from lwf_lightning.study.questions.self_knowledge import measure, ngram_distance, sampling
from lwf_lightning.tasks import TaskFields, task_from_fields
from lwf_lightning.tasks.base import Example


class NoEnd:
    """As much of a tokenizer as generation without stop strings asks for."""

    eos_token_id = None
    pad_token_id = 0

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def first_tokens(model, count: int) -> list[int]:
    answers = generate_answers(model, NoEnd(), [[5, 6]] * count, max_new_tokens=1, batch_size=500)
    return [ids[0] for ids in answers]


def test_greedy_with_noise_draws_from_the_model_s_own_prediction(make_llama) -> None:
    model = make_llama().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)  # a prediction far from uniform
        expected = model(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    draws = 4000
    with sampling(model, seed=0):
        found = Counter(first_tokens(model, draws))
    for token, probability in enumerate(expected.tolist()):
        spread = (draws * probability * (1 - probability)) ** 0.5
        assert abs(found[token] - draws * probability) < 4.5 * spread + 1
    assert len(found) > 5
    with sampling(model, seed=0):
        again = Counter(first_tokens(model, draws))
    assert again == found
    assert set(first_tokens(model, 3)) == {int(expected.argmax())}  # the noise is gone


@pytest.mark.parametrize("size", [1, 2, 3])
def test_distance_is_half_the_sum_of_differences(size: int) -> None:
    first = [[1, 2, 3, 1], [2], [], [1, 2]]
    second = [[3, 2, 1], [2, 2, 2, 2, 2]]

    def frequencies(texts):
        grams = []
        for text in texts:
            own = [tuple(text[i : i + size]) for i in range(len(text)) if i + size <= len(text)]
            grams += own or ([tuple(text)] if text else [])
        return {gram: grams.count(gram) / len(grams) for gram in grams}

    one, other = frequencies(first), frequencies(second)
    expected = sum(abs(one.get(g, 0) - other.get(g, 0)) for g in {*one, *other}) / 2
    assert ngram_distance(first, second, size) == pytest.approx(expected)
    assert ngram_distance(second, first, size) == pytest.approx(expected)
    assert ngram_distance(first, first, size) == 0
    assert ngram_distance(first, [[]], size) == 1


def test_a_prompt_is_covered_by_any_of_its_answers() -> None:
    task = task_from_fields("t", TaskFields(prompt_template="Q: {prompt}\nA:"))
    examples = [Example("p", " Rain", reference="rain"), Example("q", " sun", reference="sun")]
    answers = [[" fog", " rain. "], ["", " Sun\nQ: next"]]
    found = measure(task, examples, answers, [0.5])
    assert found.covered == 1
    assert found.empty == 0.25
    assert found.distinct == 1
    one = measure(task, examples, [own[:1] for own in answers], [0.5])
    assert one.covered == 0
    words = [["fog"], ["rain"], ["sun", "q:", "next"]]
    assert found.distance_1 == ngram_distance(words, [["rain"], ["sun"]], 1)

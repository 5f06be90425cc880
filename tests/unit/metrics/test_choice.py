from __future__ import annotations

import pytest
import torch

from lwf_lightning.data.batch import EncodedText, collate
from lwf_lightning.metrics import choice_log_likelihoods, predicted_choices


def brute_force(model, text):
    """One text alone, token by token, in float64."""
    logits = model(torch.tensor([text.input_ids])).logits[0].double()
    log_probabilities = logits.log_softmax(-1)
    values = [
        float(log_probabilities[position - 1, label])
        for position, label in enumerate(text.labels)
        if label != -100
    ]
    return sum(values), len(values)


@torch.no_grad()
def test_sums_equal_brute_force(make_llama, make_texts):
    model, texts = make_llama().double().eval(), make_texts(7)
    sums, counts = choice_log_likelihoods(model, collate(texts, 0))
    expected = [brute_force(model, text) for text in texts]
    torch.testing.assert_close(sums, torch.tensor([s for s, _ in expected], dtype=torch.float64))
    assert counts.tolist() == [n for _, n in expected]
    assert not sums.requires_grad


def test_batch_size_and_padding_change_nothing(make_llama, make_texts):
    model, texts = make_llama().eval(), make_texts(7)
    together = choice_log_likelihoods(model, collate(texts, 0))
    longer = [*texts, EncodedText((5,) * 30, (*[-100] * 29, 5))]
    padded = choice_log_likelihoods(model, collate(longer, 2))
    alone = [choice_log_likelihoods(model, collate([text], 0)) for text in texts]
    for index in (0, 1):
        torch.testing.assert_close(padded[index][:7], together[index])
        torch.testing.assert_close(torch.cat([a[index] for a in alone]), together[index])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_side_of_the_padding_does_not_matter(make_llama, make_texts, attention):
    model = make_llama().eval()
    model.set_attn_implementation(attention)  # with eager no prompts are shared
    right = collate(make_texts(7), 0)
    order = right["attention_mask"].argsort(dim=1, stable=True)
    left = {name: value.gather(1, order) for name, value in right.items()}
    for found, expected in zip(
        choice_log_likelihoods(model, left), choice_log_likelihoods(model, right), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_prediction_with_and_without_length():
    sums = torch.tensor([-2.0, -3.0, -2.9, -9.0, -1.0, -1.0])
    counts = torch.tensor([1, 3, 2, 1, 1, 1])
    choices = torch.tensor([3, 1, 2])
    assert predicted_choices(sums, counts, choices).tolist() == [1, 0, 0]
    assert predicted_choices(sums, counts, choices, normalise=False).tolist() == [0, 0, 0]


def test_prediction_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    choices = torch.randint(1, 6, (20,), generator=generator)
    total = int(choices.sum())
    sums = -torch.rand(total, generator=generator) * 9
    counts = torch.randint(1, 5, (total,), generator=generator)
    whole = predicted_choices(sums, counts, choices).tolist()
    ends = choices.cumsum(0).tolist()
    for row, end in enumerate(ends):
        part = slice(end - int(choices[row]), end)
        best = max(range(end - part.start), key=lambda i: float((sums / counts)[part][i]))
        one = predicted_choices(sums[part], counts[part], choices[row : row + 1]).item()
        assert whole[row] == one == best


def test_a_score_that_is_no_number_is_never_chosen():
    nan, inf = float("nan"), float("inf")
    sums = torch.tensor([nan, -5.0, nan, -inf])
    predicted = predicted_choices(sums, torch.ones(4, dtype=torch.int64), torch.tensor([2, 2]))
    assert predicted.tolist() == [1, -1]


def test_shapes_are_checked():
    sums, counts = torch.zeros(3), torch.ones(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(3,\) for 4 choices"):
        predicted_choices(sums, counts, torch.tensor([2, 2]))
    with pytest.raises(ValueError, match="one sum and one count per choice"):
        predicted_choices(sums, counts[:2], torch.tensor([3]))
    with pytest.raises(ValueError, match="at least one choice"):
        predicted_choices(sums, counts, torch.tensor([3, 0]))


def test_batch_without_labels_is_refused(make_llama):
    batch = collate([EncodedText((5, 6), (-100, -100))], 0)
    with pytest.raises(ValueError, match="no labelled token"):
        choice_log_likelihoods(make_llama(), batch)

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lwf_lightning.data.batch import EncodedText, batches_of
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.forgetting.anchor import probe_anchor
from lwf_lightning.forgetting.fisher import diagonal_fisher, fisher_sums
from lwf_lightning.forgetting.tensors import load_tensors, save_tensors
from lwf_lightning.losses import per_text_loss


def test_it_is_not_the_square_of_a_mean(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("llama"), make_texts(6)
    fisher = diagonal_fisher(model, batches_of(texts, 6, oracle.PAD))
    model.eval()
    per_text_loss(model, next(batches_of(texts, 6, oracle.PAD))).mean().backward()

    mean_squared = model.lm_head.weight.grad.square()
    assert fisher["lm_head.weight"].sum() > 2 * mean_squared.sum()


def test_the_sum_over_tokens(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("gpt2"), make_texts(4)

    fisher = diagonal_fisher(model, batches_of(texts, 4, oracle.PAD), reduction="sum")

    oracle.assert_near(fisher, oracle.fisher_oracle(model, texts, "sum"))


def test_the_side_of_the_padding_does_not_matter(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("gpt2")  # counts positions from the first column
    right = list(batches_of(make_texts(5), 3, oracle.PAD))
    left = []
    for batch in right:
        order = (batch["attention_mask"] != 0).long().argsort(dim=1, stable=True)
        left.append({name: value.gather(1, order) for name, value in batch.items()})
    for one, other in (
        (diagonal_fisher(model, right), diagonal_fisher(model, left)),
        (
            probe_anchor(model, right, learning_rate=1e-3),
            probe_anchor(model, left, learning_rate=1e-3),
        ),
    ):
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def test_sums_of_parts_make_the_whole(oracle: ModuleType, make_texts: Callable[..., Any]) -> None:
    model, texts = oracle.make_model("llama"), make_texts(7)
    whole = diagonal_fisher(model, batches_of(texts, 3, oracle.PAD))

    first, some = fisher_sums(model, batches_of(texts[:3], 3, oracle.PAD))
    second, rest = fisher_sums(model, batches_of(texts[3:], 3, oracle.PAD))

    assert (some, rest) == (3, 4)
    for name, value in whole.items():
        torch.testing.assert_close((first[name] + second[name]) / 7, value)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_true_fisher_does_not_depend_on_the_batch_size(
    name: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model, texts = oracle.make_model(name), make_texts(7)
    one, three, all_at_once = (
        diagonal_fisher(model, batches_of(texts, size, oracle.PAD), estimator="true", seed=5)
        for size in (1, 3, 7)
    )
    empirical = diagonal_fisher(model, batches_of(texts, 7, oracle.PAD))
    other_seed = diagonal_fisher(model, batches_of(texts, 7, oracle.PAD), estimator="true", seed=6)

    oracle.assert_near(one, {key: value.double() for key, value in all_at_once.items()})
    oracle.assert_near(three, {key: value.double() for key, value in all_at_once.items()})
    for different in (empirical, other_seed):
        assert any((different[key] - one[key]).abs().max() > 1e-3 for key in one)


def test_the_true_fisher_is_near_its_expectation(oracle: ModuleType) -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 3)

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": self.table(input_ids)})()

    torch.manual_seed(0)
    model, prompt = Bigram(), EncodedText((1, 2, 0), (-100, 2, 0))
    expected = torch.zeros(3, 3)
    log_probabilities = model.table.weight.detach().log_softmax(dim=-1)
    for first in range(3):
        for second in range(3):
            loss = functional.cross_entropy(
                model.table.weight[[1, 2]], torch.tensor([first, second])
            )
            (gradient,) = torch.autograd.grad(loss, model.table.weight)
            chance = (log_probabilities[1, first] + log_probabilities[2, second]).exp()
            expected += chance * gradient**2

    fisher = diagonal_fisher(model, batches_of([prompt] * 4000, 500, 0), estimator="true")

    torch.testing.assert_close(fisher["table.weight"], expected, rtol=0.08, atol=1e-3)
    assert not fisher["table.weight"][0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "unknown estimator 'exact'"),
        ({"estimator": "true", "text_loss": per_text_loss}, "take 'empirical'"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, Any], message: str, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        diagonal_fisher(
            oracle.make_model("llama"), batches_of(make_texts(2), 2, oracle.PAD), **options
        )


def test_a_result_that_is_not_finite_names_its_parameter(
    oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    with pytest.raises(NonFiniteLossError, match=r"of model\.embed_tokens\.weight is not"):
        diagonal_fisher(
            oracle.make_model("llama"),
            batches_of(make_texts(2), 2, oracle.PAD),
            text_loss=lambda m, b: 1e25 * per_text_loss(m, b),
        )


def test_it_survives_a_file(
    tmp_path: Any, oracle: ModuleType, make_texts: Callable[..., Any]
) -> None:
    model = oracle.make_model("gpt2")
    fisher = diagonal_fisher(model, batches_of(make_texts(2), 2, oracle.PAD))
    file = tmp_path / "new folder" / "fisher.safetensors"

    save_tensors(file, fisher)
    loaded = load_tensors(file, model=model)

    assert [path.name for path in file.parent.iterdir()] == ["fisher.safetensors"]
    assert loaded.keys() == fisher.keys()
    for name, value in fisher.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)

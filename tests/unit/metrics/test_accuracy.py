from __future__ import annotations

import pytest
import torch

from lwf_lightning.metrics import ChoiceAccuracy, ExactMatch


def test_choice_accuracy_adds_up_over_batches():
    predicted, labels = torch.tensor([0, 1, 2, -1, 4]), torch.tensor([0, 1, 1, 0, 4])
    for cuts in ([5], [1, 4], [2, 2, 1]):
        accuracy = ChoiceAccuracy()
        for p, t in zip(predicted.split(cuts), labels.split(cuts), strict=True):
            accuracy.update(p, t)
        assert accuracy.compute().item() == pytest.approx(0.6)


def test_choice_accuracy_starts_again_after_reset():
    accuracy = ChoiceAccuracy()
    accuracy.update(torch.tensor([0]), torch.tensor([1]))
    accuracy.reset()
    accuracy.update(torch.tensor([1]), torch.tensor([1]))
    assert accuracy.compute().item() == 1.0


def test_exact_match_never_counts_an_empty_answer():
    match = ExactMatch()
    match.update(["72", "", "x"], ["72", "", "y"])
    match.update(["a"], ["a"])
    assert match.compute().item() == pytest.approx(0.5)


def test_states_of_processes_are_summed():
    for metric in (ChoiceAccuracy(), ExactMatch()):
        reductions = metric._reductions
        assert {name: reduce.__name__ for name, reduce in reductions.items()} == {
            "right": "dim_zero_sum",
            "total": "dim_zero_sum",
        }


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"predicted \(2,\), labels \(1,\)"):
        ChoiceAccuracy().update(torch.tensor([0, 1]), torch.tensor([0]))
    with pytest.raises(ValueError, match="got 2 answers for 1 references"):
        ExactMatch().update(["a", "b"], ["a"])

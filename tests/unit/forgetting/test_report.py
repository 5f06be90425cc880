from __future__ import annotations

import torch

from lwf_lightning.forgetting import ForgettingConfidence, select_forget_set
from lwf_lightning.forgetting.elicit import SelfText
from lwf_lightning.forgetting.report import score_rows


def test_rows_say_which_texts_were_selected() -> None:
    texts = [SelfText("prompt", "answer", (1,), (2,), "task", row) for row in range(3)]
    scores = ForgettingConfidence(torch.zeros(3), torch.tensor([1.0, 3.0, 2.0]), 1.0, 0.0)
    chosen = select_forget_set(scores.confidence, forgetting_rate=0.5)
    for forget_set in (chosen, chosen.tolist()):
        rows = list(score_rows(texts, scores, forget_set))
        assert [(row["row"], row["selected"]) for row in rows] == [(1, True), (2, True), (0, False)]

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lwf_lightning.demo.report import DemoRun, draw, verdict
from lwf_lightning.forgetting.planted import confidence_by_part


def test_scores_are_joined_with_their_parts_and_drawn(tmp_path: Path) -> None:
    parts = ["outdated", "neutral", "outdated", "helpful", "neutral"]
    rows = [{"prompt": f"p{i}", "part": part} for i, part in enumerate(parts)]
    truth = tmp_path / "train.jsonl"
    truth.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = tmp_path / "run" / "scores" / "step-000000.jsonl"
    scores.parent.mkdir(parents=True)
    # the best order but for one exchange: 5 of 6 pairs of an outdated and another text are right
    order = [("p0", True), ("p1", True), ("p2", False), ("p3", False), ("p4", False)]
    scored = [
        {"prompt": prompt, "selected": selected, "confidence": 5.0 - place}
        for place, (prompt, selected) in enumerate(order)
    ]
    scores.write_text("".join(json.dumps(row) + "\n" for row in scored))
    joined = confidence_by_part(tmp_path / "run", truth)
    assert joined.parts == parts
    assert joined.selected == [True, True, False, False, False]
    assert joined.precision == 0.5
    assert abs(joined.area - 5 / 6) < 1e-6

    table = "step,train/loss,val/accuracy\n0,,0.1\n1,2.0,\n1,,0.5\n"
    (tmp_path / "run" / "metrics.csv").write_text(table)
    run = DemoRun("LWF", tmp_path / "run", {"test/accuracy": 0.5})
    assert run.curve("val/accuracy") == ([0, 1], [0.1, 0.5])
    draw([run], joined, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("vanilla", "lwf", "twin", "told"),
    [
        (0.4, 0.9, 0.95, "Negative transfer: 55.0 points; LWF wins back 50.0 of them"),
        (0.4, 0.3, 0.95, "Negative transfer: 55.0 points; LWF wins back none of them: it is 10.0 "
                         "points below plain fine-tuning"),
        (0.4, 0.5, 0.4, "No negative transfer: the clean twin is 0.0 points below plain "
                        "fine-tuning, and LWF 10.0 points above plain fine-tuning"),
        (0.4, 0.3, 0.2, "No negative transfer: the clean twin is 20.0 points below plain "
                        "fine-tuning, and LWF 10.0 points below plain fine-tuning"),
    ],
)  # fmt: skip
def test_a_loss_is_no_gain_in_words(vanilla: float, lwf: float, twin: float, told: str) -> None:
    assert verdict(vanilla, lwf, twin) == told

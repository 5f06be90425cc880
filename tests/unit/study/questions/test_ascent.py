"""What is watched, and what is compared."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from lwf_lightning import FisherCallback
from lwf_lightning.data.batch import collate
from lwf_lightning.errors import NonFiniteLossError
from lwf_lightning.losses import per_text_loss
from lwf_lightning.study.overlay import looked_up
from lwf_lightning.study.perform import read_curves
from lwf_lightning.study.questions import ascent
from lwf_lightning.study.questions.ascent import SETS, arms, told
from lwf_lightning.study.questions.ground import Ground
from lwf_lightning.study.questions.watch import WatchUnlearning, write_watched

CONFIG = {
    "trainer": {
        "callbacks": [
            {"class_path": "lwf_lightning.FisherCallback", "init_args": {}},
            {"class_path": "lwf_lightning.AscentGuard"},
        ]
    },
    "model": {"class_path": "lwf_lightning.LWFModule", "init_args": {}},
}


def test_watching_logs_losses_and_changes_nothing(
    make_module, make_data, make_callback, make_trainer, make_texts, tmp_path: Path
) -> None:
    sets = {"chosen": make_texts(5), "kept": make_texts(3, seed=1)}
    file = tmp_path / "watched.json"
    write_watched(file, sets, [[5, 6], [7]], 0)
    weights = []
    for callbacks in ([], [WatchUnlearning(str(file), interval=3, tokens=4)]):
        module = make_module()
        trainer = make_trainer(callbacks=[make_callback(), *callbacks], logger=True)
        trainer.fit(module, make_data())
        weights.append({name: p.detach().clone() for name, p in module.model.named_parameters()})
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    curves = read_curves(Path(str(trainer.log_dir)) / "metrics.csv", ("watch/",))
    module.model.eval()
    for name, texts in sets.items():
        steps, values = curves[f"watch/{name}"]
        assert steps == [0, 3, 6, 8]
        with torch.no_grad():
            losses = [float(per_text_loss(module.model, collate([text], 0))) for text in texts]
        assert values[-1] == pytest.approx(fmean(losses), rel=1e-4)
        assert values[0] != values[-1]
    assert all(0 <= value <= 1 for value in curves["watch/distinct_2"][1])
    with (Path(str(trainer.log_dir)) / "metrics.csv").open() as table:
        assert "watch/repetition" in next(csv.reader(table))


def test_arms_differ_in_what_their_names_say() -> None:
    found = arms(CONFIG, 0.1)
    assert list(found) == [
        "no unlearning", "LWF", "LWF, no guard", "LWF x 10", "LWF x 10, no guard"
    ]  # fmt: skip
    for name, config in found.items():
        guards = [c for c in config["trainer"]["callbacks"] if "Guard" in c["class_path"]]
        assert len(guards) == ("no guard" not in name)
        assert looked_up(config, "trainer.ascent_guard") is (False if "no guard" in name else None)
        scale = looked_up(config, "model.unlearning_scale")
        assert scale == (pytest.approx(1.0) if "x 10" in name else None)
    assert looked_up(found["no unlearning"], "model.schedule") == "never"
    bare = {**CONFIG, "trainer": {"callbacks": CONFIG["trainer"]["callbacks"][:1]}}
    assert len(arms(bare, 0.1)["LWF"]["trainer"]["callbacks"]) == 2


def test_another_configuration_or_seed_is_run_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: list[Path] = []
    monkeypatch.setattr(ascent, "_watch", lambda *_: None)
    monkeypatch.setattr(ascent, "_curves", lambda name, config, folder: used.append(folder))
    monkeypatch.setattr(ascent, "told", len)

    def folder_of(rate: float, seed: int) -> Path:
        config = {**CONFIG, "model": {"init_args": {"learning_rate": rate}}}
        module = SimpleNamespace(hparams={"unlearning_scale": 0.1})
        ground = SimpleNamespace(config=config, module=module, need_probe=int, steps=int)
        ascent.answer(ground, seed, tmp_path)  # type: ignore[arg-type]
        return used[-1].parent

    first = folder_of(0.1, 0)
    assert first == folder_of(0.1, 0)
    assert len({first, folder_of(0.2, 0), folder_of(0.1, 1)}) == 3


def test_the_answer_goes_from_first_to_last() -> None:
    curves = {f"watch/{kind}": ([0, 4], [1.0, 2.0]) for kind in SETS}
    curves |= {f"watch/{kind}": ([0, 4], [0.5, 0.25]) for kind in ("repetition", "distinct_2")}
    curves["val/accuracy"] = ([0, 4], [0.25, 0.75])
    lwf = {**curves, "watch/chosen": ([0, 4], [1.0, 3.5]), "unlearn/steps": ([2, 4], [1.0, 2.0])}
    answer = told({"no unlearning": curves, "LWF": lwf})
    assert answer.rows[1][:3] == ["LWF", "2", "1.00 to 3.50"]
    assert answer.rows[1][6] == "2.72 to 7.39"
    assert answer.rows[0][1] == "0"
    assert answer.rows[0][-1] == "0.750"
    chosen = answer.figure.axes[0]
    assert [list(line.get_ydata()) for line in chosen.lines] == [[0.0, 0.0], [0.0, 1.5]]


def test_an_interval_is_at_least_one(tmp_path: Path) -> None:
    write_watched(tmp_path / "w.json", {}, [[1]], 0)
    with pytest.raises(ValueError, match="interval must be at least 1, got 0"):
        WatchUnlearning(str(tmp_path / "w.json"), interval=0)


def test_a_single_validation_is_seen() -> None:
    watched = {f"watch/{kind}": ([0, 2], [1.0, 2.0]) for kind in (*SETS, "distinct_2")}
    figure = ascent.draw({ascent.ALONE: {**watched, "val/accuracy": ([24], [0.5])}})
    *_, last = figure.axes
    assert [line.get_marker() for line in last.lines] == ["o"]


def test_callbacks_may_be_names() -> None:
    names = ["lwf_lightning.FisherCallback", "lwf_lightning.AscentGuard"]
    found = arms({**CONFIG, "trainer": {"callbacks": names}}, 0.1)
    assert found["LWF, no guard"]["trainer"]["callbacks"] == names[:1]
    assert found["LWF"]["trainer"]["callbacks"] == names


def test_what_is_not_there_is_left_blank() -> None:
    """Nothing kept, no validation, and an arm that ended elsewhere."""
    kinds = [kind for kind in SETS if kind != "kept"] + ["repetition", "distinct_2"]
    plain = {f"watch/{kind}": ([0, 4], [1.0, 2.0]) for kind in kinds}
    other = {f"watch/{kind}": ([0, 3], [1.0, 9.0]) for kind in kinds}
    answer = told({ascent.ALONE: plain, "LWF": other | {ascent.DIVERGED: ([], [])}})
    assert answer.rows[0][3] == answer.rows[0][-1] == ""
    assert answer.rows[1][:4] == ["LWF, diverged", "0", "1.00 to 9.00", ""]
    assert [list(line.get_xdata()) for line in answer.figure.axes[0].lines] == [[0, 4], [0]]


def test_a_run_that_diverges_is_told_and_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def diverges(arguments: list[str]) -> None:
        log = Path(arguments[2]).parent / "version_0"
        log.mkdir()
        (log / "metrics.csv").write_text("step,watch/chosen\n0,1.5\n")
        try:
            raise NonFiniteLossError("the loss is NaN")
        except NonFiniteLossError:
            raise SystemExit(1)  # noqa: B904  # as the command line does

    monkeypatch.setattr("lwf_lightning.cli.main", diverges)
    curves = ascent._curves("LWF", CONFIG, tmp_path / "LWF")
    assert curves == {"watch/chosen": [[0], [1.5]], ascent.DIVERGED: [[], []]}
    monkeypatch.setattr("lwf_lightning.cli.main", None)  # it is not done again
    assert ascent._curves("LWF", CONFIG, tmp_path / "LWF") == curves


def test_a_set_without_texts_is_not_watched(
    make_module, make_data, make_trainer, make_texts, tmp_path: Path
) -> None:
    file = tmp_path / "watched.json"
    write_watched(file, {"chosen": make_texts(2), "kept": []}, [[5]], 0)
    trainer = make_trainer(
        callbacks=[WatchUnlearning(str(file), tokens=2)], logger=True, max_steps=1
    )
    trainer.fit(make_module(schedule="never"), make_data())
    curves = read_curves(Path(str(trainer.log_dir)) / "metrics.csv", ("watch/",))
    assert "watch/chosen" in curves
    assert "watch/kept" not in curves


@pytest.mark.parametrize(
    ("trainer", "steps"),
    [({"max_steps": 40}, 40), ({"max_epochs": 3}, 12), ({"max_steps": 7, "max_epochs": 3}, 7)],
)
def test_a_length_in_epochs_is_one_in_steps(trainer: dict[str, int], steps: int) -> None:
    data = SimpleNamespace(learning_encoded=[0] * 23, batch_size=5)
    ground = Ground({"trainer": trainer}, None, data, None)  # type: ignore[arg-type]
    assert ground.steps() == steps


def test_texts_are_set_up_for_a_length_in_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SimpleNamespace(learning_encoded=[], batch_size=5)
    ground = Ground({"trainer": {"max_epochs": 3}}, None, data, None)  # type: ignore[arg-type]
    monkeypatch.setattr(Ground, "prepare", lambda _: data.learning_encoded.extend([0] * 23))
    assert ground.steps() == 12


def test_an_online_anchor_is_refused() -> None:
    ground = Ground({}, None, None, FisherCallback("online", 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"anchor: this question scores by a probe, got 'online'"):
        ground.need_probe()

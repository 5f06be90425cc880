"""What --check says of a study's runs: accepted or not, and what they will take."""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import pytest
import yaml

from lwf_lightning import FisherCallback, LWFModule
from lwf_lightning.callbacks import ValidateFirst
from lwf_lightning.study import command
from lwf_lightning.study.architectures import known_config
from lwf_lightning.study.check import _time, check, parsed, summary, table
from lwf_lightning.study.config import Method, Study
from lwf_lightning.study.expected import Work, expected, model_of
from lwf_lightning.study.length import steps_of, validations_of
from lwf_lightning.study.matrix import comparison_runs


def settings(**changes: Any) -> dict[str, Any]:
    callbacks = [FisherCallback(probe_steps=3, probe_batch_size=2, fisher_texts=7), ValidateFirst()]
    usual = {
        "accelerator": "cpu",
        "precision": None,
        "callbacks": callbacks,
        "max_steps": -1,
        "max_epochs": 2,
        "val_check_interval": None,
        "check_val_every_n_epoch": 1,
    }
    return usual | changes


def test_tokens_of_a_run_are_those_that_go_through_the_model(make_module, make_data) -> None:
    module, data = make_module(), make_data(eval_batch_size=4, elicit_batch_size=5)
    found = expected(module, data, settings(), model_of(module))
    texts = [len(text) for text in data.learning_encoded]
    assert len(texts) == 24
    prompts = [len(module.tokenizer(e.prompt)["input_ids"]) for _, e in data.forgetting_examples]
    assert found.steps == 12
    unlearned = 3 * 3  # before steps 3, 6 and 9, three texts each
    trained = 12 * 4 * fmean(texts) + unlearned * (fmean(prompts) + 5)
    trained += (3 * 2 + 7) * fmean(texts) + sum(prompts) + 5 * len(prompts)
    assert found.work.trained == round(trained)
    assert found.elicitation == Work(read=sum(prompts), decoded=24 * 5 // 5)
    # The forgetting task has no choices: 6 answers of 5 tokens, four at a time; 5 in the test
    assert found.work.decoded == 3 * 8 + 7
    count = {
        split: sum(
            len(text)
            for (_, of, _), items in data._eval_items.items()
            for item in items
            for text in item.texts
            if of == split
        )
        for split in ("validation", "test")
    }
    assert found.work.read == 3 * count["validation"] + count["test"]
    assert found.parameters == sum(p.numel() for p in module.load_whole_model().parameters())


def test_without_unlearning_there_is_less_of_everything(make_module, make_data) -> None:
    model = model_of(make_module())
    lwf = expected(make_module(), make_data(), settings(), model)
    plain = expected(make_module(schedule="never"), make_data(), settings(max_steps=12), model)
    assert plain.steps == lwf.steps
    assert plain.work.trained < lwf.work.trained
    assert plain.work.read == lwf.work.read
    assert plain.elicitation == Work()
    assert plain.pool == ""
    assert plain.memory < lwf.memory


@pytest.mark.parametrize(
    ("given", "steps", "validations"),
    [
        ({"max_steps": 20}, 20, 3),
        ({"max_steps": 20, "val_check_interval": 0.25}, 20, 20),
        ({"max_steps": 21, "val_check_interval": 0.5}, 21, 7),
        ({"max_steps": 100, "max_epochs": 2}, 12, 2),
        ({"max_steps": 5, "max_epochs": -1}, 5, 0),
        ({"max_steps": -1, "max_epochs": None}, 6000, 1000),
        ({"max_epochs": 3, "val_check_interval": 4}, 18, 3),
        ({"max_epochs": 3, "val_check_interval": 4, "check_val_every_n_epoch": None}, 18, 4),
        ({"max_epochs": 5, "val_check_interval": 0.5, "check_val_every_n_epoch": 2}, 30, 4),
    ],
)
def test_steps_and_validations_are_lightning_s(
    given: dict[str, Any], steps: int, validations: int
) -> None:
    asked = settings(**{"max_epochs": None, **given})
    assert steps_of(asked, batches=6) == steps
    assert validations_of(asked, batches=6, steps=steps) == validations


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_epochs: -1 without trainer\.max_steps never ends"):
        steps_of(settings(max_epochs=-1), batches=6)


def test_other_prompts_or_answers_are_another_pool(make_module, make_data) -> None:
    model = model_of(make_module())
    pools = [
        expected(make_module(), make_data(**given), settings(), model).pool
        for given in ({}, {"learning_texts": 4}, {"max_new_tokens": 3}, {"forgetting_prompts": 2})
    ]
    assert pools[0] == pools[1]
    assert len(set(pools)) == 3


def test_sizes_are_those_of_the_models() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for name, parameters in (
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known_config(name))
        assert sum(p.numel() for p in model.parameters()) == parameters
    assert known_config("another/model") is None


@pytest.fixture
def study(tmp_path, model_folder, data_folder) -> Study:
    base = {
        "trainer": {
            "max_steps": 6,
            "accelerator": "gpu",  # which this machine need not have
            "callbacks": [{"class_path": "lwf_lightning.FisherCallback", "init_args": {}}],
        },
        "model": {
            "class_path": "lwf_lightning.LWFModule",
            "init_args": {"model_name": str(model_folder)},
        },
        "data": {
            "class_path": "lwf_lightning.LWFDataModule",
            "init_args": {
                "data_dir": "nowhere",
                "learning_task": "learn",
                "forgetting_tasks": ["forget"],
                "custom_tasks": {"learn": {"choices": "choices", "label": "label"}, "forget": {}},
                "max_new_tokens": 4,
            },
        },
    }
    file = tmp_path / "base.yaml"
    file.write_text(yaml.safe_dump(base))
    methods = {
        "vanilla": Method({"model.schedule": "never"}, uses_forgetting=False),
        "lwf": Method(),
    }
    return Study("small", str(file), methods, {"a": {}, "b": {"model.learning_rate": 1e-3}}, [0, 1])


def test_runs_are_reckoned_without_their_device(study: Study, data_folder) -> None:
    checked = list(check(study, comparison_runs(study, []), str(data_folder)))
    assert [(one.run.method, one.run.seed) for one in checked] == [
        ("vanilla", 0), ("vanilla", 0), ("lwf", 0), ("lwf", 0),
        ("vanilla", 1), ("vanilla", 1), ("lwf", 1), ("lwf", 1),
    ]  # fmt: skip
    assert checked[0].expected is checked[4].expected  # another seed
    _, _, plain, lwf = table(study, checked, 1e9)
    assert plain.startswith("| vanilla | learn | 4 | 6 | ")
    assert lwf.startswith("| lwf | learn | 4 | 6 | ")
    other = replace(checked[0].expected, steps=12)
    assert table(study, [*checked, replace(checked[0], expected=other)], 1e9)[2].startswith(
        "| vanilla | learn | 5 | 6 to 12 | "
    )
    total, assumed = summary(checked, 1e9)
    assert total.startswith("8 runs, every configuration accepted: ")
    assert "from 1 pool(s) of prompts" in total
    assert "1e+09 FLOP/s" in assumed


def test_each_pool_is_elicited_by_its_own_model(study: Study, data_folder) -> None:
    """Not at the size of the largest."""
    (one, *_) = (
        c
        for c in check(study, comparison_runs(study, []), str(data_folder))
        if c.run.method == "lwf"
    )
    work = replace(one.expected.elicitation, decoded=10**6)
    small = replace(one, expected=replace(one.expected, elicitation=work))
    large = replace(one.expected, parameters=1000 * one.expected.parameters, pool="other")
    alone = work.hours(small.expected.parameters, 1e9)
    both = alone + large.elicitation.hours(large.parameters, 1e9)
    told = summary([small, replace(one, expected=large)], 1e9)[0]
    assert f"and {_time(both)} to elicit" in told


def test_a_run_that_is_validated_before_training_alone_is_refused(
    study: Study, data_folder, capsys, tmp_path
) -> None:
    study.cells["b"] |= {"data.batch_size": 4, "trainer.max_steps": 5}  # it validates after 6
    file = tmp_path / "study.yaml"
    tuning = {"trials": 1, "seeds": [7]}
    file.write_text(yaml.safe_dump(asdict(study) | {"output": str(tmp_path), "tuning": tuning}))
    with pytest.raises(SystemExit):
        command.main(["--config", str(file), "--check", "--data_dir", str(data_folder)])
    told = capsys.readouterr().err
    assert "trainer.val_check_interval is 1 epoch, but the run ends at step 5" in told


def test_every_module_knows_its_own_arguments(study: Study) -> None:
    told = {
        (run.method, run.cells): (config.model.hparams["learning_rate"], config.model.schedule.kind)
        for run, config in parsed(comparison_runs(study, []))
    }
    assert told == {
        ("vanilla", ("a",)): (1e-5, "never"),
        ("vanilla", ("b",)): (1e-3, "never"),
        ("lwf", ("a",)): (1e-5, "periodic"),
        ("lwf", ("b",)): (1e-3, "periodic"),
    }


def test_what_the_command_line_refuses_is_named_with_its_run(study: Study) -> None:
    study.methods["lwf"].changes["model.unlearning_intervall"] = 3
    runs = comparison_runs(study, [])
    wrong = next(run for run in runs if run.method == "lwf")
    with pytest.raises(ValueError, match=f"^{wrong.identity}: .*unlearning_intervall"):
        list(parsed(runs))
    study.methods["lwf"].changes.clear()
    study.methods["lwf"].changes["model.unlearning_interval"] = 0
    with pytest.raises(ValueError, match="unlearning_interval must be at least 1"):
        list(parsed(comparison_runs(study, [])))


def test_hours_are_operations_over_speed_plus_passes() -> None:
    work = Work(trained=100, read=30, decoded=80)
    assert work.hours(parameters=7, flops=11.0) == pytest.approx(
        (7 * (6 * 100 + 2 * 30) / 11 + 80 / 40) / 3600
    )


def test_a_partial_batch_is_no_step(make_module, make_data) -> None:
    """The loader drops it: 24 texts make 4 batches of 5, of which a limit leaves 3."""
    model = model_of(make_module())
    for given, steps in ((settings(), 8), (settings(limit_train_batches=0.75), 6)):
        found = expected(make_module(), make_data(batch_size=5), given, model)
        assert (found.steps, found.validated) == (steps, steps)
    data = make_data(batch_size=99)
    few = expected(make_module(schedule="never"), data, settings(), model)
    assert (few.steps, few.work.trained) == (2, 2 * sum(len(t) for t in data.learning_encoded))


def test_what_baselines_ask_of_the_base_model_is_counted(make_module, make_data) -> None:
    model = model_of(make_module())
    plain = expected(make_module(schedule="never"), make_data(), settings(), model)
    ewc = make_module(schedule="never", regularizer="ewc")
    found = expected(ewc, make_data(), settings(), model)
    lwf = expected(make_module(), make_data(), settings(), model)
    assert (found.pool, found.elicitation) == (lwf.pool, lwf.elicitation)
    scored = lwf.elicitation.read + 24 * 5
    assert found.work.trained == plain.work.trained + scored  # its Fisher information
    tokens = make_module(schedule="never", learning_loss="token_forgetting")
    of_tokens = expected(tokens, make_data(), settings(), model).work
    assert of_tokens.read == plain.work.read + plain.work.trained
    npo = expected(make_module(objective="npo"), make_data(), settings(), model).work
    assert npo.trained == lwf.work.trained
    assert npo.read > lwf.work.read


def test_a_model_that_is_not_here_is_reckoned_by_its_shape(make_data, data_folder) -> None:
    """With four characters for a token, which nothing can be read back from."""
    module = LWFModule("meta-llama/Llama-3.2-1B", schedule="never", learning_rate=1e-5)
    data = make_data(evaluation="generate", data_dir=str(data_folder))
    found = expected(module, data, settings(), model_of(module))
    assert found.parameters == 1_235_814_400
    assert found.work.decoded > 0

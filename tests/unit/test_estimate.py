"""From a configured run to its prediction: nothing is loaded, and a real run agrees with it."""

import sys

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lwf_lightning import FisherCallback, LWFDataModule, LWFModule
from lwf_lightning.decoding import room_for
from lwf_lightning.estimate import Estimate, meta_model, precision_of, predict, size_of
from lwf_lightning.memory import highest
from lwf_lightning.memory_report import size, table, verdict
from lwf_lightning.trainer import LWFTrainer


@pytest.fixture
def run(tmp_path):
    def make(module=None, data=None, callbacks=(), **settings):
        trainer = LWFTrainer(
            accelerator="cpu", devices=1, callbacks=[FisherCallback(), *callbacks],
            default_root_dir=tmp_path, max_steps=4, logger=False, **settings,
        )  # fmt: skip
        return (
            trainer,
            LWFModule("world-base", **(module or {})),
            LWFDataModule("world_learning", ["world_forgetting"], max_length=48, **(data or {})),
        )

    return make


def test_the_size_is_that_of_the_model_without_its_weights(make_llama):
    llama = make_llama(tied=True)
    found = size_of(llama)
    assert found.parameters == sum(p.numel() for p in llama.parameters())
    assert found.block == sum(p.numel() for p in llama.model.layers[0].parameters())
    assert found.root == 37 * 16 + 16
    assert found.largest == 37 * 16
    assert found.tied
    assert found.trains_norms
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = size_of(get_peft_model(make_llama(), adapter))
    assert adapted.trainable == 2 * (2 * 16 + 2 * 16)
    assert adapted.block_trainable == 2 * 16 + 2 * 16
    assert not adapted.trains_norms


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_outside_unequal_blocks_are_counted_one_by_one():
    config = CONFIG_MAPPING["deepseek_v3"](
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_group=2, topk_group=1,
        moe_intermediate_size=32, first_k_dense_replace=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = size_of(model)
    outside = [p.numel() for name, p in model.named_parameters() if ".layers." not in name]
    assert found.root == found.root_trainable == sum(outside)


def test_a_model_whose_memory_has_other_terms_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mamba"](num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"kind mamba cannot be predicted.*num_attention_heads"):
        size_of(model)


def test_a_pull_that_weighs_is_estimated_with_its_fisher_information(run):
    """FisherCallback does nothing in a run that does not unlearn."""
    pull = {"regularizer": "ewc", "schedule": "never"}
    names = [phase.name for phase in predict(*run(pull)).phases]
    assert {"elicit", "Fisher of ewc"} <= set(names)
    assert not {"probe", "Fisher", "scoring", "unlearning step"} & set(names)
    longest = max(predict(*run(pull)).plan.pull_fisher, key=lambda one: one.width)
    assert longest.texts == 8


def test_what_a_run_holds_besides_follows_its_settings(run):
    plan = predict(*run({"unlearning_retain": 1.0})).plan
    assert (plan.guards, plan.retains, plan.is_eager, plan.buckets) == (True, True, False, False)
    assert not predict(*run(ascent_guard=False)).plan.guards
    assert not predict(*run({"objective": "replay"})).plan.guards
    assert predict(*run({"attention": "eager"})).plan.is_eager
    assert predict(*run(strategy="ddp")).plan.buckets


def test_prompts_take_the_room_that_decoding_has(run):
    long = predict(*run(data={"elicit_batch_size": 32, "max_new_tokens": 600})).plan.elicitation
    assert (long.texts, long.cached) == (32, 32 * 512)
    assert long.read == 32
    assert room_for(32, 1500, 128) == (1, 32 * 512)
    assert room_for(2, 4000, 100) == (1, 4099)
    assert room_for(8, 10, 5) == (8, 8 * 14)


def test_sizes_are_rounded_to_the_unit_above():
    assert size(999_600_000) == "1 GB"
    assert size(999_400_000) == "999 MB"


def test_no_weight_is_loaded(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lwf_lightning.module.load_model", refuse)
    trainer, module, data = run()
    assert all(p.is_meta for p in meta_model(module).parameters())
    found = predict(trainer, module, data)
    assert found.size.parameters == 1_117_056
    assert not hasattr(module, "model")


def test_the_lengths_are_those_of_the_texts(run):
    trainer, module, data = run(data={"batch_size": 4, "elicit_batch_size": 5})
    plan = predict(trainer, module, data).plan
    longest = max(len(text) for text in data.learning_encoded)
    assert all(one.in_one_row for one in (*plan.learning, *plan.probe, *plan.unlearning))
    assert max(one.width for one in plan.learning) <= 4 * longest
    assert {one.width for one in plan.fisher} == {longest}
    assert plan.elicitation.texts == 5
    assert plan.elicitation.answer == data.max_new_tokens


def test_a_model_that_has_to_be_padded_is(run):
    trainer, module, data = run({"attention": "eager"}, {"batch_size": 4})
    plan = predict(trainer, module, data).plan
    longest = max(len(text) for text in data.learning_encoded)
    assert not any(one.in_one_row for one in (*plan.learning, *plan.probe, *plan.unlearning))
    assert max(one.width for one in plan.learning) <= longest


def test_what_a_baseline_keeps_is_counted(run):
    def plan(**options):
        return predict(*run({"schedule": "never", **options})).plan

    plain, shrunk, pulled = plan(regularizer=None), plan(regularizer="bss"), plan(regularizer="ewc")
    assert (plain.compares, plain.pulls) == (shrunk.compares, shrunk.pulls) == (False, False)
    assert (pulled.compares, pulled.pulls) == (True, True)
    assert (plan().compares, plan().pulls) == (True, False)  # l2sp, the default
    forgets = plan(learning_loss="token_forgetting", regularizer=None)
    assert (forgets.compares, forgets.pulls) == (True, False)
    assert all(one.in_one_row for one in (*shrunk.learning, *forgets.learning))
    padded = plan(regularizer="bss", attention="eager")
    assert all(one.texts == 16 for one in padded.learning)
    assert not shrunk.accumulates


def test_an_adapter_and_shards_take_less(run):
    whole = predict(*run())
    adapted = predict(*run({"lora": LoraConfig(r=2, target_modules="all-linear")}))
    assert adapted.size.trainable < whole.size.trainable
    assert highest(adapted.phases).total < highest(whole.phases).total
    sharded = predict(*run(), ranks=4)
    assert sharded.phases[1].parts["weights"] == whole.phases[1].parts["weights"] // 4


@pytest.mark.parametrize(
    ("dtype", "trainer_precision", "expected"),
    [
        ("float32", "32-true", (4, 4, 4, 4, False)),
        ("float32", "bf16-mixed", (4, 4, 2, 4, True)),
        ("float32", "bf16-true", (2, 2, 2, 4, False)),
        ("bfloat16", "32-true", (2, 2, 2, 2, False)),
        ("float32", "64-true", (8, 8, 8, 4, False)),
    ],
)
def test_bytes_per_element(make_llama, dtype, trainer_precision, expected):
    found = precision_of(dtype, trainer_precision, make_llama().to(getattr(torch, dtype)))
    numbers = (found.weights, found.trained, found.compute, found.loaded, found.mixed)
    assert numbers == expected


def test_the_table_marks_the_highest_phase_and_the_verdict_names_flags(run):
    found = predict(*run())
    rows = table(found)
    assert [row.style for row in rows.rows].count("bold") == 1
    (fits,) = verdict(found, 10**12)
    assert "1 TB that one process has here" in fits
    too_much, *advice = verdict(found, 1)
    assert "more than the 1 B" in too_much
    assert any("--" in line or "LoRA" in line for line in advice)
    assert size(999) == "999 B"


def test_every_part_that_can_dominate_has_advice(run):
    from lwf_lightning.memory_report import _advice

    ewc = {"regularizer": "ewc", "schedule": "never"}
    for found in (predict(*run()), predict(*run(), ranks=2), predict(*run(ewc)),
                  predict(*run(strategy="ddp"))):  # fmt: skip
        for phase in found.phases:
            if phase.name == "load":
                continue
            for part in phase.parts:
                if part != "block of gradients":  # of a fixed size
                    assert _advice(found, phase, part), (phase.name, part)


def test_what_is_done_already_is_no_advice(run):
    lora = LoraConfig(r=2, target_modules="all-linear")
    done = {"dtype": "bfloat16", "lora": lora, "gradient_checkpointing": True}
    told = "\n".join(verdict(predict(*run(done, precision="bf16-true")), 1))
    assert "LoRA" not in told
    assert "bfloat16" not in told
    assert "bf16-true" not in told
    assert "checkpointing" not in told
    assert "FSDP2" in told


def test_estimate_is_a_method_of_the_trainer(run, capsys):
    trainer, module, data = run()
    trainer.estimate(module, data)
    printed = capsys.readouterr().out
    assert "learning step" in printed
    assert "Highest:" in printed
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        trainer.estimate(module, data, ranks=0)
    with pytest.raises(ValueError, match="estimate needs an LWFModule"):
        trainer.estimate(L.LightningModule(), data)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_run_needs_what_was_predicted():
    from benchmarks.memory import ALLOWED, results

    (result,) = results(quick=True)
    assert result.figure <= ALLOWED


def test_an_estimate_is_what_it_was_made_of(run):
    found = predict(*run())
    assert isinstance(found, Estimate)
    assert found.plan.precision.weights == 4

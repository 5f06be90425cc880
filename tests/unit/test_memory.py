"""The memory model against sums made by hand, and against what must hold for any run."""

from dataclasses import replace

import pytest

from lwf_lightning.memory import (
    block_activations,
    generation,
    head,
    head_backward,
    highest,
    phases,
    resident,
    step,
)
from lwf_lightning.memory_plan import ModelSize, Pass, Plan, Precision, Prompts, passes_of

SIZE = ModelSize(
    layers=2,
    hidden=8,
    intermediate=16,
    heads=2,
    key_value_heads=1,
    vocabulary=100,
    parameters=10_000,
    trainable=10_000,
    block=3_000,
    block_trainable=3_000,
    root=4_000,
    root_trainable=4_000,
    largest=800,
)
ADAPTER = replace(
    SIZE,
    parameters=11_000,
    trainable=1_000,
    block_trainable=500,
    block=3_500,
    root_trainable=0,
    largest=100,
    trains_norms=False,
)
ONE = Pass(texts=2, width=10, columns=4, labelled=5)
VANILLA = Plan(learning=[ONE])
LWF = Plan(
    learning=[ONE],
    evaluation=[ONE],
    unlearns=True,
    anchor="probe",
    unlearning=[ONE],
    probe=[ONE],
    fisher=[ONE],
    scoring=[ONE],
    elicitation=Prompts(3, 6, 4),
)


def total(size, plan, name):
    return {phase.name: phase.total for phase in phases(size, plan)}[name]


def test_a_block_keeps_what_the_hand_counts():
    norms = 2 * 8 * (4 + 4)  # two norms, in and out
    products = 4 * (2 * 8 + 2 * 8 + 2 * 8 + 4 * 16)  # inputs; queries and output; keys and values
    token = norms + products + 4 * 2 + 4 * 10  # a sum per head; a row of the mask
    assert block_activations(SIZE, VANILLA, ONE, training=True) == 20 * token
    whole = replace(ONE, padded=False)  # no mask, and keys and values of one head, not of two
    assert block_activations(SIZE, VANILLA, whole, training=True) == 20 * (token - 40 - 4 * 2 * 4)
    row = replace(whole, in_one_row=True)  # what attention puts out, once more
    assert block_activations(SIZE, VANILLA, row, training=True) == 20 * (token - 40)


def test_logits_by_hand():
    assert head(SIZE, VANILLA, ONE, training=True) == 4 * (2 * 4 * 100 + 5 * 100)
    assert head_backward(SIZE, VANILLA, ONE) == 4 * 3 * 5 * 100


def test_a_learning_step_by_hand():
    weights, moments, gradients = 40_000, 80_000, 40_000
    block = block_activations(SIZE, VANILLA, ONE, training=True)
    assert total(SIZE, VANILLA, "learning step") == weights + moments + gradients + block
    # With gradients of an earlier pass, its beginning is the higher end.
    parts = step(SIZE, VANILLA, [ONE], accumulates=True)
    assert parts["activations"] == 2 * block
    assert parts["gradients"] == gradients + 4 * 800


def test_what_forgetting_adds_by_hand():
    assert resident(SIZE, LWF) == {"weights": 40_000, "base copy": 40_000}
    pulled = replace(VANILLA, compares=True, pulls=True)
    assert resident(SIZE, pulled) == {
        "weights": 40_000, "base copy": 40_000, "Fisher of ewc": 40_000
    }  # fmt: skip
    parts = {phase.name: phase.parts for phase in phases(SIZE, LWF)}
    assert parts["probe"]["start copy of the probe"] == 40_000
    assert parts["Fisher"]["anchor"] == parts["Fisher"]["Fisher"] == 40_000
    assert parts["scoring"]["Fisher"] == 40_000
    assert parts["unlearning step"]["moments of unlearning"] == 80_000
    assert parts["elicit"]["keys and values"] == 2 * 2 * 4 * 10 * 3 * 4
    online = phases(SIZE, replace(LWF, anchor="online"))
    assert "probe" not in {phase.name for phase in online}
    assert all("anchor" not in phase.parts for phase in online)
    refresh = {phase.name: phase.parts for phase in online}["scoring"]
    assert refresh["moments of AdamW"] == refresh["moments of unlearning"] == 80_000


def test_plain_training_has_no_phase_of_forgetting():
    names = [phase.name for phase in phases(SIZE, VANILLA)]
    assert names == ["load", "validation", "learning step", "checkpoint"]


@pytest.mark.parametrize("name", ["texts", "width", "columns", "labelled"])
def test_more_of_a_pass_never_takes_less(name):
    more = replace(ONE, **{name: getattr(ONE, name) + 7})
    every = {"learning": [more], "probe": [more], "fisher": [more], "scoring": [more]}
    larger = replace(LWF, unlearning=[more], evaluation=[more], **every)
    for before, after in zip(phases(SIZE, LWF), phases(SIZE, larger), strict=True):
        assert after.total >= before.total, before.name
    assert highest(phases(SIZE, larger)).total > highest(phases(SIZE, LWF)).total


@pytest.mark.parametrize("name", ["layers", "hidden", "intermediate", "vocabulary"])
def test_a_larger_model_never_takes_less(name):
    larger = replace(SIZE, **{name: getattr(SIZE, name) * 2})
    for before, after in zip(phases(SIZE, LWF), phases(larger, LWF), strict=True):
        assert after.total >= before.total, before.name


def test_an_adapter_takes_less_than_all_weights():
    for adapted, whole in zip(phases(ADAPTER, LWF), phases(SIZE, LWF), strict=True):
        if adapted.name not in ("load", "elicit"):  # there the adapter itself comes on top
            assert adapted.total < whole.total, adapted.name


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    many = replace(SIZE, layers=20)
    plan = replace(VANILLA, accumulates=True)
    block = block_activations(many, plan, ONE, training=True)
    kept = step(many, replace(plan, checkpointing=True), [ONE], accumulates=True)["activations"]
    assert kept == 20 * 4 * 20 * 8 + block
    assert step(many, plan, [ONE], accumulates=True)["activations"] == 20 * block


@pytest.mark.parametrize("ranks", [2, 8])
def test_fsdp_shards_everything_that_is_as_large_as_the_weights(ranks):
    sharded = {phase.name: phase.parts for phase in phases(SIZE, replace(LWF, ranks=ranks))}
    for phase in phases(SIZE, LWF):
        if phase.name == "load":  # whole on every rank, before it is cut
            assert sharded["load"]["weights"] == 40_000
            continue
        for part in ("weights", "base copy", "moments of AdamW", "anchor", "Fisher"):
            if part in phase.parts:
                assert sharded[phase.name][part] == phase.parts[part] // ranks
    root = 10_000 - 2 * 3_000
    assert sharded["elicit"]["gathered layers"] == 4 * (2 * 3_000 + root)
    assert sharded["learning step"]["gathered layers"] == 4 * (2 * 3_000 + root + 3_000 + root)


def test_loading_is_not_what_a_gpu_has_to_hold():
    load, *others = phases(replace(SIZE, parameters=10**12), replace(LWF, device="cuda"))
    assert load.in_main_memory
    assert not any(phase.in_main_memory for phase in others)
    assert highest([load, *others]) is not load


def test_half_precision_halves_weights_and_moments():
    half = replace(VANILLA, precision=Precision(2, 2, 2, 4))
    parts = {phase.name: phase.parts for phase in phases(SIZE, half)}
    assert parts["load"]["weights"] == 40_000  # it is cast after it was loaded
    assert parts["learning step"]["weights"] == 20_000
    assert parts["learning step"]["moments of AdamW"] == 40_000


def test_passes_follow_the_lengths():
    texts = [(10, 4), (90, 40), (11, 5), (88, 30)]
    assert passes_of(texts, cost=20) == [Pass(2, 90, 40, 70), Pass(2, 11, 5, 9)]
    assert passes_of(texts, cost=0) == [Pass(4, 90, 84, 79)]
    # The first token of a text is never predicted, so all labels give one column fewer.
    assert passes_of([(3, 3), (3, 3)], cost=20) == [Pass(2, 3, 2, 4, padded=False)]


def test_a_judged_step_holds_a_copy_beside_its_gradients():
    guarded = replace(LWF, guards=True)
    parts = {phase.name: phase.parts for phase in phases(SIZE, guarded)}
    assert parts["unlearning step"]["gradients"] == 40_000
    assert parts["unlearning step"]["copy of AscentGuard"] == 40_000
    assert all("copy of AscentGuard" not in p for n, p in parts.items() if n != "unlearning step")
    held = 40_000 + 40_000 + 80_000 + 80_000  # weights, base copy, two pairs of moments
    assert total(SIZE, guarded, "unlearning step") == held + 80_000
    sharded = replace(guarded, ranks=4)
    (step_of,) = (p.parts for p in phases(SIZE, sharded) if p.name == "unlearning step")
    assert step_of.get("copy of AscentGuard", 10_000) == 10_000


def test_what_is_rehearsed_goes_through_beside_the_first_gradients():
    retains = replace(LWF, retains=True)
    parts = {phase.name: phase.parts for phase in phases(SIZE, retains)}["unlearning step"]
    expected = step(SIZE, retains, retains.unlearning, accumulates=True)
    assert {name: parts[name] for name in expected} == expected


def test_a_pull_by_its_fisher_information_has_that_phase_alone():
    pulled = replace(VANILLA, compares=True, pulls=True, anchor="probe", pull_fisher=[ONE])
    found = {phase.name: phase.parts for phase in phases(SIZE, pulled)}
    assert list(found) == [
        "load", "elicit", "Fisher of ewc", "validation", "learning step", "checkpoint"
    ]  # fmt: skip
    assert "Fisher of ewc" not in found["elicit"]
    assert found["Fisher of ewc"]["Fisher of ewc"] == 40_000
    assert found["Fisher of ewc"]["block of gradients"]
    assert found["learning step"]["Fisher of ewc"] == 40_000


def test_answers_take_the_room_that_decoding_gives_them():
    whole = generation(SIZE, LWF, Prompts(32, 100, 28))
    fits = generation(SIZE, LWF, Prompts(32, 100, 28, read=20, cached=32 * 127))
    assert whole["keys and values"] == 2 * 2 * 4 * 32 * 128 * 4
    assert fits["keys and values"] == 2 * 2 * 4 * 32 * 127 * 4
    assert fits["activations"] * 32 == whole["activations"] * 20


@pytest.mark.parametrize(("compute", "per_score"), [(4, 4), (2, 6)])
def test_attention_that_keeps_its_scores_is_square(compute, per_score):
    plan = replace(VANILLA, precision=Precision(compute, compute, compute, compute))
    more = block_activations(SIZE, replace(plan, is_eager=True), ONE, training=True)
    assert more - block_activations(SIZE, plan, ONE, training=True) == 20 * 2 * 10 * per_score


def test_ddp_holds_a_second_gradient_all_the_time():
    plain, ddp = phases(SIZE, LWF), phases(SIZE, replace(LWF, buckets=True))
    for before, after in zip(plain, ddp, strict=True):
        assert after.total - before.total == (0 if before.name == "load" else 40_000)

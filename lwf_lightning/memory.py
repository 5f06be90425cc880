"""How much memory a run takes: arithmetic on sizes, nothing is allocated.

Each term is a few lines, so that it can be read beside the code it describes. The terms of
transformer activations are those of a Llama-like block (RMS norms, gated MLP, rotary attention by
``sdpa``), counted from what autograd saves; other architectures are near it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from lwf_lightning.memory_plan import ModelSize, Pass, Plan, Prompts

Parts: TypeAlias = dict[str, int]
"""What memory goes to, in bytes by name."""

PULL = "Fisher of ewc"
"""A phase, and what is held from it on."""

FLOAT = 4
"""Bytes of a float32: Fisher information, scores and the arithmetic inside norms and losses."""

# forgetting.gradient_sinks.BLOCK_ELEMENTS, on a CPU for each of four threads
_ENGINE_BLOCK = {"cpu": 4 * 2**19, "cuda": 2**24}


@dataclass(frozen=True)
class Phase:
    """A part of a run and what its highest point consists of, on one rank."""

    name: str
    parts: Parts
    in_main_memory: bool = False
    """Whether this is not the device's memory but the machine's."""

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def phases(size: ModelSize, plan: Plan) -> list[Phase]:
    """The highest point of each phase of a run, in the order of the run."""
    held = resident(size, plan)
    moments = {"moments of AdamW": 2 * size.trainable * plan.precision.trained // plan.ranks}
    found = [Phase("load", loading(size, plan), in_main_memory=plan.device != "cpu")]
    if plan.unlearns or plan.pulls:
        before = {name: count for name, count in held.items() if name != PULL}
        found.append(Phase("elicit", before | generation(size, plan, plan.elicitation)))
    if plan.pulls:
        pull = engine(size, plan, plan.pull_fisher, per_parameter=FLOAT)
        found.append(Phase(PULL, held | pull))
    if plan.unlearns and plan.anchor == "probe":
        start = {"start copy of the probe": held["base copy"]}
        probe = step(size, plan, plan.probe, plan.probe_accumulates)
        found.append(Phase("probe", held | start | moments | probe))
    optimizers = dict(moments)
    if plan.unlearns:
        optimizers["moments of unlearning"] = moments["moments of AdamW"]
    if plan.unlearns and plan.anchor:
        # The probe is scored before any step; online, a refresh comes between steps.
        refresh = held | (optimizers if plan.anchor == "online" else _anchor(size, plan))
        found += [
            Phase("Fisher", refresh | estimate_fisher(size, plan)),
            Phase("scoring", refresh | scoring(size, plan)),
        ]
    evaluation = max(
        forward(size, plan, plan.evaluation),
        generation(size, plan, plan.evaluation_prompts),
        key=_sum,
    )
    found.append(Phase("validation", held | optimizers | evaluation))
    learning = step(size, plan, plan.learning, plan.accumulates)
    found.append(Phase("learning step", held | optimizers | learning))
    if plan.unlearns:
        unlearning = step(size, plan, plan.unlearning, plan.retains)
        if plan.guards:
            unlearning = max(unlearning, judged(size, plan), key=_sum)
        found.append(Phase("unlearning step", held | optimizers | unlearning))
    # It is written tensor by tensor; gradients and activations are gone by then.
    return [*found, Phase("checkpoint", held | optimizers)]


def resident(size: ModelSize, plan: Plan) -> Parts:
    """What lives as long as the run: weights, and what is kept of those that train."""
    numbers = plan.precision
    frozen = (size.parameters - size.trainable) * numbers.weights
    parts = {"weights": (frozen + size.trainable * numbers.trained) // plan.ranks}
    if plan.unlearns or plan.compares:
        parts["base copy"] = size.trainable * numbers.trained // plan.ranks
    if plan.pulls:
        parts[PULL] = size.trainable * FLOAT // plan.ranks
    if plan.buckets:
        parts["buckets of DDP"] = size.trainable * numbers.trained
    return parts


def loading(size: ModelSize, plan: Plan) -> Parts:
    """The weights as they are loaded, whole on every rank, and the base copy of the own shard."""
    parts = {"weights": size.parameters * plan.precision.loaded}
    if plan.unlearns or plan.compares:
        parts["base copy"] = size.trainable * plan.precision.loaded // plan.ranks
    return parts


def judged(size: ModelSize, plan: Plan) -> Parts:
    """When AscentGuard has a step taken: what makes it undoable, beside the gradients."""
    trained = size.trainable * plan.precision.trained // plan.ranks
    return {"gradients": trained, "copy of AscentGuard": trained}


def step(size: ModelSize, plan: Plan, passes: Iterable[Pass], accumulates: bool) -> Parts:
    """Activations and gradients of a forward and backward pass, at the higher of two moments.

    Activations go as gradients come, layer by layer, so the sum is highest at either end: when the
    backward pass has just begun, or when it has just ended.
    """
    numbers = plan.precision
    gradients = size.trainable * numbers.trained // plan.ranks
    # The head's gradient comes first. A tied table gets a second one at the end, and whatever has
    # a gradient already gets another beside it.
    table = min(size.largest, size.hidden * size.vocabulary) * numbers.trained
    again = size.largest * numbers.trained if accumulates or size.tied else 0
    if size.is_adapted:
        table = again = 0
    cast = _cast_weights(size, plan)
    gathered = gathered_groups(size, plan, gradients=True)
    best: Parts = {}
    for one in passes:
        kept = kept_activations(size, plan, one, training=True)
        top = head(size, plan, one, training=True)
        begins = {"activations": kept, "logits": top, **cast, **gathered}
        begins["gradients"] = gradients if accumulates else 0
        begun = begins | {"logits": head_backward(size, plan, one)}
        begun["gradients"] += table if not accumulates else again
        ends = {
            "activations": block_activations(size, plan, one, training=True),
            "logits": 0,
            "gradients": gradients + again,
            **cast,
            **gathered,
        }
        best = max(best, begins, begun, ends, key=_sum)
    return best


def forward(size: ModelSize, plan: Plan, passes: Iterable[Pass]) -> Parts:
    """A pass without gradients: one block at a time."""
    best: Parts = {}
    for one in passes:
        parts = {
            "activations": running_activations(size, plan, one.texts, one.width),
            "logits": head(size, plan, one, training=False),
            **_cast_weights(size, plan, keeps=False),
            **gathered_groups(size, plan, gradients=False),
        }
        best = max(best, parts, key=_sum)
    return best


def generation(size: ModelSize, plan: Plan, prompts: Prompts) -> Parts:
    """Keys and values of all tokens, and the longest prompt's forward pass."""
    every = prompts.texts * (prompts.tokens + prompts.answer)
    cached = every if prompts.cached is None else prompts.cached
    read = prompts.texts if prompts.read is None else prompts.read
    return {
        "keys and values": 2 * size.layers * size.key_value * cached * plan.precision.compute,
        "activations": running_activations(size, plan, read, prompts.tokens),
        "logits": 2 * prompts.texts * size.vocabulary * FLOAT,
        **_cast_weights(size, plan, keeps=False),
        **gathered_groups(size, plan, gradients=False),
    }


def estimate_fisher(size: ModelSize, plan: Plan) -> Parts:
    """One float32 per trained weight, and the engine's pass."""
    fisher = {"Fisher": FLOAT * size.trainable // plan.ranks}
    return fisher | engine(size, plan, plan.fisher, per_parameter=FLOAT)


def scoring(size: ModelSize, plan: Plan) -> Parts:
    """Fisher, and the engine's pass; the anchor is counted where it is held."""
    fisher = {"Fisher": FLOAT * size.trainable // plan.ranks}
    return fisher | engine(size, plan, plan.scoring, per_parameter=3 * FLOAT)


def engine(size: ModelSize, plan: Plan, passes: Iterable[Pass], *, per_parameter: int) -> Parts:
    """A pass that forms the gradient of each text in blocks; none is kept."""
    best: Parts = {}
    tied_head = size.tied and not size.is_adapted
    for one in passes:
        kept = kept_activations(size, plan, one, training=False)
        logits = head_backward(size, plan, one)
        later = 0  # a tied table waits for its look-up, and the head's gradient with it
        if tied_head:
            later = one.texts * one.columns * size.vocabulary * plan.precision.compute
        parts = {
            "activations": kept,
            "logits": max(logits, later),
            "block of gradients": _ENGINE_BLOCK[plan.device] * FLOAT,
            **_cast_weights(size, plan),
            **gathered_groups(size, plan, gradients=False, per_parameter=per_parameter),
        }
        best = max(best, parts, key=_sum)
    return best


def kept_activations(size: ModelSize, plan: Plan, one: Pass, *, training: bool) -> int:
    """What the forward pass keeps for the backward pass: all blocks, or their inputs and one."""
    block = block_activations(size, plan, one, training=training)
    if not plan.checkpointing:
        return size.layers * block
    residual = FLOAT if plan.precision.mixed else plan.precision.compute
    return size.layers * one.tokens * size.hidden * residual + block


def block_activations(size: ModelSize, plan: Plan, one: Pass, *, training: bool) -> int:
    """What one block keeps."""
    numbers = plan.precision
    # Two norms: their input as float32, and what they multiply by their weight if that trains.
    norms = 2 * size.hidden * (FLOAT + (numbers.weights if training and size.trains_norms else 0))
    # The inputs of five products (a cast copy for each under autocast), and of the output's.
    inputs = (5 if numbers.mixed else 2) * size.hidden
    keys = size.attention if one.padded else size.key_value
    outputs = 2 if one.in_one_row else 1  # those of the texts, and what is put together of them
    attention = (1 + outputs) * size.attention + 2 * keys
    gates = 4 * size.intermediate
    token = norms + numbers.compute * (inputs + attention + gates) + FLOAT * size.heads
    mask = one.width * numbers.compute if one.padded else 0
    # Those of softmax, and the cast ones of the product with the values.
    cast = numbers.compute if numbers.compute < FLOAT else 0
    scores = size.heads * one.width * (FLOAT + cast) if plan.is_eager else 0
    return one.tokens * (token + mask + scores)


def running_activations(size: ModelSize, plan: Plan, texts: int, width: int) -> int:
    """The most that a block holds at a time without gradients."""
    wide = max(3 * size.intermediate, 2 * size.attention + 4 * size.key_value)
    mask = width * plan.precision.compute
    return texts * width * (plan.precision.compute * (wide + 2 * size.hidden) + mask)


def head(size: ModelSize, plan: Plan, one: Pass, *, training: bool) -> int:
    """Logits at every column, picked out at the labels, and their log-probabilities."""
    columns = one.texts * one.columns * size.vocabulary * plan.precision.compute
    labelled = one.labelled * size.vocabulary
    upcast = FLOAT if plan.precision.compute < FLOAT else 0
    return max(
        columns + labelled * plan.precision.compute,
        labelled * (plan.precision.compute + upcast + FLOAT),
    )


def head_backward(size: ModelSize, plan: Plan, one: Pass) -> int:
    """Log-probabilities and two gradients of them; then those of the picked and of all logits."""
    columns = one.texts * one.columns * size.vocabulary * plan.precision.compute
    labelled = one.labelled * size.vocabulary
    return max(3 * labelled * FLOAT, labelled * plan.precision.compute + columns)


def gathered_groups(
    size: ModelSize, plan: Plan, *, gradients: bool, per_parameter: int = 0
) -> Parts:
    """FSDP2: the block at work and the next one, and the root, are whole on every rank.

    Args:
        size: The model.
        plan: The run.
        gradients: Whether a backward pass follows, whose gradients are whole until they are shared.
        per_parameter: Bytes per element of the tensor that Fisher or scoring makes whole.
    """
    if plan.ranks == 1:
        return {}
    numbers = plan.precision
    whole = (2 * size.block + size.root) * numbers.weights
    if gradients:
        whole += (size.block_trainable + size.root_trainable) * numbers.trained
    whole += per_parameter * size.largest
    return {"gathered layers": whole}


def _anchor(size: ModelSize, plan: Plan) -> Parts:
    """The weights of the probe."""
    return {"anchor": size.trainable * plan.precision.trained // plan.ranks}


def _cast_weights(size: ModelSize, plan: Plan, *, keeps: bool = True) -> Parts:
    """Autocast copies the matrices, which a backward pass keeps until it has used them.

    Lightning has autocast keep nothing by itself.

    Args:
        size: The model.
        plan: The run.
        keeps: Whether a backward pass follows.
    """
    numbers = plan.precision
    if not numbers.mixed:
        return {}
    matrices = size.parameters - (0 if size.tied else size.hidden * size.vocabulary)
    if not keeps or (size.is_adapted and plan.checkpointing):
        matrices = size.block + size.hidden * size.vocabulary
    return {"cast weights": matrices * numbers.compute}


def highest(found: Iterable[Phase]) -> Phase:
    """The phase that needs most of the device's memory."""
    found = [phase for phase in found if not phase.in_main_memory]
    return max(found, key=lambda phase: phase.total)


def _sum(parts: Parts) -> int:
    return sum(parts.values())

"""A prediction of memory as a table for people: phases, what they consist of, what would help."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lwf_lightning.memory import Phase, highest

if TYPE_CHECKING:
    from rich.table import Table

    from lwf_lightning.estimate import Estimate

_SMALLER_PASSES = {  # what cuts the activations and logits of each phase
    "elicit": "--data.init_args.elicit_batch_size",
    "Fisher of ewc": "--data.init_args.forget_batch_size",
    "probe": "probe_batch_size of FisherCallback, which changes the probe",
    "Fisher": "batch_size of FisherCallback, which changes no score",
    "scoring": "batch_size of FisherCallback, which changes no score",
    "validation": "--data.init_args.eval_batch_size",
    "learning step": "--model.init_args.tokens_per_pass",
    "unlearning step": "--data.init_args.forget_batch_size",
}
_SHARD = "FSDP2 over more processes (docs/multi-gpu.md)"
_LORA = "LoRA (model.init_args.lora)"
_HALF = "--trainer.precision bf16-true"
_BFLOAT16 = "--model.init_args.dtype bfloat16"
_ONLINE = "anchor online of FisherCallback"
_HELP: dict[str, tuple[str, ...]] = {  # part: what makes it smaller
    "weights": (_BFLOAT16, _SHARD),
    "base copy": (_LORA, _SHARD),
    "Fisher of ewc": (_LORA, _SHARD),
    "moments of AdamW": (_LORA, _HALF, _SHARD),
    "moments of unlearning": (_LORA, _HALF, _SHARD),
    "gradients": (_LORA, _HALF, _SHARD),
    "copy of AscentGuard": (_LORA, _HALF, _SHARD),
    "buckets of DDP": (_LORA, _HALF, _SHARD),
    "Fisher": (_LORA, _SHARD),
    "anchor": (_ONLINE, _LORA),
    "start copy of the probe": (_ONLINE, _LORA),
    "cast weights": (_HALF,),
    "gathered layers": (_BFLOAT16,),
}


def size(count: float) -> str:
    """Bytes in the unit that suits them.

    Example:
        >>> size(2_500_000_000)
        '2.5 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what is above would be rounded to 1e+03
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def table(estimate: Estimate) -> Table:
    """One row per phase, the highest marked."""
    from rich.table import Table

    model, plan = estimate.size, estimate.plan
    trained = "" if not model.is_adapted else f", {model.trainable:,} of them trained"
    where = f"on each of {plan.ranks} ranks" if plan.ranks > 1 else "on each process"
    result = Table(
        title=f"{model.parameters:,} parameters{trained}; memory {where}", title_justify="left"
    )
    result.add_column("phase")
    result.add_column("peak", justify="right")
    result.add_column("of which")
    top = highest(estimate.phases)
    for phase in estimate.phases:
        parts = sorted(phase.parts.items(), key=lambda part: -part[1])
        text = ", ".join(
            f"{name} {size(count)}" for name, count in parts if count * 100 > phase.total
        )
        name = f"{phase.name} (main memory)" if phase.in_main_memory else phase.name
        result.add_row(name, size(phase.total), text, style="bold" if phase is top else None)
    return result


def verdict(estimate: Estimate, available: int) -> Sequence[str]:
    """Whether the run fits, and if not, the flags that help most, by what takes most.

    Args:
        estimate: The prediction.
        available: Bytes there are for one rank.
    """
    top = highest(estimate.phases)
    need = f"Highest: {top.name}, {size(top.total)}"
    if top.total <= available:
        return [f"{need} of the {size(available)} that one process has here."]
    lines = [f"{need}; that is more than the {size(available)} that one process has here."]
    for name, count in sorted(top.parts.items(), key=lambda part: -part[1])[:4]:
        if advice := _advice(estimate, top, name):
            lines.append(f"  {name} ({size(count)}): {advice}")
    return lines


def _advice(estimate: Estimate, phase: Phase, part: str) -> str:
    """What would make a part of a phase smaller, and is not done already."""
    numbers = estimate.plan.precision
    smaller = _SMALLER_PASSES.get(phase.name, "")
    if part == "keys and values":
        found = [smaller, "--data.init_args.max_new_tokens"]
    elif part in ("activations", "logits"):
        found = [smaller]
        if part == "activations" and phase.name not in ("elicit", "validation"):
            found += ["--model.init_args.gradient_checkpointing true"]
    else:
        found = list(_HELP.get(part, ()))
    done = {
        _LORA: estimate.size.is_adapted,
        _HALF: numbers.trained == 2,
        _BFLOAT16: numbers.weights == 2,
        "--model.init_args.gradient_checkpointing true": estimate.plan.checkpointing,
    }
    return "; ".join(one for one in found if one and not done.get(one))

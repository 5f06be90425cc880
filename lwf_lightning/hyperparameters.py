"""The arguments of LWFModule: their ranges, and a LoRA configuration that fits in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lwf_lightning.named import check_name
from lwf_lightning.optimization import LearningRateSchedule

if TYPE_CHECKING:
    from peft import LoraConfig

TrainingDtype: TypeAlias = Literal["float32", "bfloat16"]
WithoutScores: TypeAlias = Literal["refuse", "use_all"]

_NAMES = {
    "dtype": TrainingDtype,
    "learning_rate_schedule": LearningRateSchedule,
    "without_scores": WithoutScores,
}


def lora_config(lora: Any) -> LoraConfig | None:
    """Takes the dict that comes back from a checkpoint's hyperparameters, too."""
    if not isinstance(lora, Mapping):
        return lora  # type: ignore[no-any-return]
    from peft import LoraConfig

    return LoraConfig(**lora)


def check_adapter(had_adapter: bool, lora: LoraConfig | None) -> None:
    """Refuses the weights of a model with an adapter for one without, and the other way.

    Raises:
        ValueError: It names the argument as the command line does.
    """
    if had_adapter != (lora is not None):
        was, way = ("with", "set it as there") if had_adapter else ("without", "leave it out")
        raise ValueError(
            f"the checkpoint was made {was} model.init_args.lora: {way}, or begin a run with the "
            "model of the checkpoint (python cli.py export)"
        )


def changed_fields(lora: LoraConfig) -> dict[str, Any]:
    """What differs from the default, as primitives that load under ``weights_only=True``."""
    default = asdict(type(lora)())
    changed = {name: value for name, value in asdict(lora).items() if value != default[name]}
    return {
        name: sorted(value) if isinstance(value, set) else value for name, value in changed.items()
    }


def check_passed_on(taken: Mapping[str, Any], passed: Mapping[str, Any], owner: str) -> None:
    """Refuses two values of one name, which a checkpoint could not tell apart.

    Args:
        taken: Arguments of a class that derives from LWFModule, and what it takes from it.
        passed: What LWFModule was given.
        owner: Name of that class.

    Raises:
        ValueError: If an argument of the class is another than the one of that name it passes on.
    """
    for name, value in passed.items():
        if not isinstance(value, (str, int, float)):  # a command line turns tuples into lists
            continue
        if name in taken and taken[name] != value:
            raise ValueError(
                f"{owner} takes {name}={taken[name]!r} and passes {name}={value!r} on to "
                f"LWFModule: give its own argument another name than {name}"
            )


def check_ranges(values: Mapping[str, Any]) -> None:
    """Refuses a name that is unknown and a value that is out of range.

    Raises:
        ValueError: It names the argument as the command line does.
    """
    for name, known in _NAMES.items():
        check_name(f"model.init_args.{name}", values[name], get_args(known))
    for name in ("learning_rate", "max_grad_norm", "unlearning_max_grad_norm", "unlearning_scale"):
        if not values[name] > 0:
            raise ValueError(f"model.init_args.{name} must be above 0, got {values[name]}")
    if not values["unlearning_ceiling"] > 0:
        raise ValueError(
            "model.init_args.unlearning_ceiling must be above 0, got "
            f"{values['unlearning_ceiling']}"
        )
    if not all(0 <= beta < 1 for beta in values["betas"]):
        raise ValueError(f"model.init_args.betas must lie in [0, 1), got {values['betas']}")
    for name in ("weight_decay", "max_skipped_steps", "unlearning_retain"):
        if not values[name] >= 0:
            raise ValueError(f"model.init_args.{name} must be at least 0, got {values[name]}")
    if not 0 <= values["warmup_ratio"] <= 1:
        raise ValueError(
            f"model.init_args.warmup_ratio must lie in [0, 1], got {values['warmup_ratio']}"
        )
    if values["tokens_per_pass"] is not None and values["tokens_per_pass"] < 1:
        raise ValueError(
            f"model.init_args.tokens_per_pass must be at least 1, got {values['tokens_per_pass']}"
        )
    if values["regularizer_options"] and values["regularizer"] is None:
        raise ValueError(
            "model.init_args.regularizer_options are for a regularizer: set "
            "model.init_args.regularizer, or model.init_args.regularizer_options to null, too"
        )
    for name, value in (("regularizer", "bss"), ("learning_loss", "token_forgetting")):
        if values[name] == value and values["tokens_per_pass"] is not None:
            raise ValueError(
                f"model.init_args.{name} {value} looks at a step's whole batch together: leave out "
                "tokens_per_pass"
            )

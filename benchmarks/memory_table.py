"""Predicted memory of large models, per rank, from their shapes alone: no weight is loaded.

    python -m benchmarks.memory_table

The tables of ``docs/performance.md`` and ``docs/multi-gpu.md``. A run of LWF with a probe anchor;
each rank passes 8 texts (in the second two) of 512 tokens, of which 128 are labelled, with gradient
checkpointing, on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.record import markdown_rows
from lwf_lightning.decoding import room_for
from lwf_lightning.estimate import size_of
from lwf_lightning.memory import Phase, highest, phases
from lwf_lightning.memory_plan import ModelSize, Pass, Plan, Precision, Prompts
from lwf_lightning.study.architectures import known_config

CONFIGS = {
    "Llama-3.2-1B": known_config("meta-llama/Llama-3.2-1B"),
    "Llama-3-8B": known_config("meta-llama/Meta-Llama-3-8B"),
    "Llama-3-70B": LlamaConfig(  # as its config.json says
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    ),
}
ONE = [Pass(texts=8, width=512, columns=128, labelled=8 * 128)]
PLAN = Plan(
    learning=ONE,
    unlearns=True,
    anchor="probe",
    unlearning=ONE,
    probe=ONE,
    fisher=ONE,
    scoring=ONE,
    elicitation=Prompts(32, 384, 128, *room_for(32, 384, 128)),
    guards=True,
    checkpointing=True,
    device="cuda",
)
PRECISIONS = {
    "bf16-mixed": Precision(weights=4, trained=4, compute=2, loaded=4, mixed=True),
    "bf16-true": Precision(weights=2, trained=2, compute=2, loaded=2),
}


def sizes(config: LlamaConfig) -> dict[str, ModelSize]:
    """The model whole, and with an adapter of rank 16 on every matrix of its blocks."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        whole = size_of(model)
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return {"full": whole, "LoRA": size_of(get_peft_model(model, lora))}


def large_models() -> list[str]:
    """The table of ``docs/performance.md``: with ever more ranks, and beside plain fine-tuning."""
    head = ["model", "trains", "ranks", "vanilla, bf16-true"]
    head += [f"LWF, {kind}" for kind in PRECISIONS]
    rows = []
    for name, config in CONFIGS.items():
        for trains, size in sizes(config).items():
            for ranks in (1, 8, 64):
                vanilla = Plan(ONE, checkpointing=True, device="cuda")
                plans = [(vanilla, "bf16-true"), *((PLAN, kind) for kind in PRECISIONS)]
                tops = [_highest(size, replace(plan, ranks=ranks), kind) for plan, kind in plans]
                told = [f"{top.total / 1e9:,.1f} GB ({top.name})" for top in tops]
                rows.append([name, trains, str(ranks), *told])
    return markdown_rows([head, ["---"] * len(head), *rows])


def by_ranks() -> list[str]:
    """The table of ``docs/multi-gpu.md``: two texts per pass and rank, under DDP and FSDP2."""
    two = [Pass(texts=2, width=512, columns=128, labelled=2 * 128)]
    passes = {"learning": two, "unlearning": two, "probe": two, "fisher": two, "scoring": two}
    plan = replace(PLAN, **passes)
    every = [plan, replace(plan, buckets=True), *(replace(plan, ranks=n) for n in (8, 16, 64))]
    head = ["", "1 rank", "each under DDP", "FSDP2, 8 ranks", "16", "64"]
    rows = []
    for name in ("Llama-3-8B", "Llama-3-70B"):
        found = sizes(CONFIGS[name])
        for trains, kind in (("full", "bf16-mixed"), ("full", "bf16-true"), ("LoRA", "bf16-true")):
            tops = [_highest(found[trains], one, kind) for one in every]
            label = f"{name.split('-')[-1]}, {trains}, `{kind}`"
            rows.append([label, *(f"{top.total / 1e9:,.0f}" for top in tops)])
    return markdown_rows([head, ["---", *["---:"] * (len(head) - 1)], *rows])


def main() -> None:
    """Prints both tables as Markdown."""
    print("\n".join([*large_models(), "", *by_ranks()]))


def _highest(size: ModelSize, plan: Plan, precision: str) -> Phase:
    return highest(phases(size, replace(plan, precision=PRECISIONS[precision])))


if __name__ == "__main__":
    main()

"""Predicted memory of large models, per rank, from their shapes alone: no weight is loaded.

    python -m benchmarks.memory_table

The table of ``docs/performance.md``. A run of LWF with a probe anchor; each rank passes 8 texts of
512 tokens, of which 128 are labelled, with gradient checkpointing, on a GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lwf_lightning.estimate import size_of
from lwf_lightning.memory import highest, phases
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
    elicitation=Prompts(texts=32, tokens=384, answer=128),
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


def main() -> None:
    """Prints one Markdown table."""
    head = ["model", "trains", "ranks", "vanilla, bf16-true"]
    head += [f"LWF, {kind}" for kind in PRECISIONS]
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for name, config in CONFIGS.items():
        for trains, size in sizes(config).items():
            for ranks in (1, 8, 64):
                vanilla = Plan(ONE, checkpointing=True, device="cuda")
                cells = [name, trains, str(ranks)]
                cells.append(_highest(size, vanilla, "bf16-true", ranks))
                cells += [_highest(size, PLAN, kind, ranks) for kind in PRECISIONS]
                print("| " + " | ".join(cells) + " |")


def _highest(size: ModelSize, plan: Plan, precision: str, ranks: int) -> str:
    found = phases(size, replace(plan, ranks=ranks, precision=PRECISIONS[precision]))
    top = highest(found)
    return f"{top.total / 1e9:,.1f} GB ({top.name})"


if __name__ == "__main__":
    main()

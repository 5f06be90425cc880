"""Measured peaks of memory beside those that ``lwf_lightning.memory`` predicts.

    python -m benchmarks.memory                     # all cases, some forty minutes
    python -m benchmarks.memory --case smollm2      # one of them, phase by phase

Each case is a real fit in a process of its own: elicitation, probe, Fisher, scoring, a validation,
learning and unlearning steps and a checkpoint. What a phase takes is the highest resident set
during it minus the resident set before the model was loaded. glibc keeps freed memory for itself,
which is no need of the program, so the process runs with fixed malloc thresholds (``ENVIRONMENT``).
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Result, Skipped, resident

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",  # above it a block goes back as soon as it is freed
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
ALLOWED = 15.0  # per cent
PHASES = {  # what is wrapped: the phase that runs inside
    "lwf_lightning.module.LWFModule.configure_model": "load",
    "lwf_lightning.datamodule.elicit": "elicit",
    "lwf_lightning.callbacks.fisher.probe_anchor": "probe",
    "lwf_lightning.callbacks.fisher.diagonal_fisher": "Fisher",
    "lwf_lightning.callbacks.fisher.forgetting_confidence": "scoring",
    "lwf_lightning.callbacks.fisher.write_tensors": "scoring",
    "lwf_lightning.module.LWFModule._learn": "learning step",
    "lwf_lightning.module.LWFModule._unlearn": "unlearning step",
    "lwf_lightning.module.LWFModule.validation_step": "validation",
    "lwf_lightning.trainer.LWFTrainer.save_checkpoint": "checkpoint",
}


@dataclass(frozen=True)
class Case:
    """One fit.

    Attributes:
        model: ``smollm2-135m``, ``world-base``, or ``llama-27m``, which is made at random.
        module: Arguments of LWFModule.
        data: Arguments of LWFDataModule.
        callback: Arguments of FisherCallback.
        trainer: Arguments of LWFTrainer.
        prompt: Words of a prompt; a third fewer in every other text.
        answer: Words of an answer.
        rows: Texts of either task.
    """

    model: str
    module: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    callback: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    prompt: int = 40
    answer: int = 16
    rows: int = 16


LORA = {"r": 16, "target_modules": "all-linear"}
CASES = {
    "world": Case("world-base", data={"batch_size": 64}, prompt=24, answer=8, rows=64),
    "llama-27m": Case("llama-27m"),
    "llama-27m, long": Case("llama-27m", data={"batch_size": 16}, prompt=180, answer=60),
    "llama-27m, vanilla": Case("llama-27m", {"schedule": "never", "regularizer": None}),
    # Not of SmolLM2: a CPU without units for bfloat16 takes half an hour for that.
    "llama-27m, bf16-mixed": Case("llama-27m", trainer={"precision": "bf16-mixed"}),
    "llama-27m, bf16-true": Case("llama-27m", trainer={"precision": "bf16-true"}),
    "smollm2": Case("smollm2-135m"),
    "smollm2, vanilla, long": Case(
        "smollm2-135m", {"schedule": "never", "regularizer": None}, prompt=150, answer=60
    ),
    "smollm2, online": Case(
        "smollm2-135m", callback={"anchor": "online", "refresh_interval": 2, "probe_steps": 2}
    ),
    "smollm2, LoRA": Case("smollm2-135m", {"lora": LORA}, prompt=80, answer=30),
    "smollm2, checkpointed": Case(
        "smollm2-135m", {"gradient_checkpointing": True}, prompt=150, answer=60
    ),
}
QUICK = ("world",)


def results(*, quick: bool = False) -> Iterator[Result | Skipped]:
    """How far the highest peak of each case lies from its prediction."""
    for name in QUICK if quick else CASES:
        found = _measure(name)
        if "skipped" in found:
            yield Skipped(f"peak of {name}", "the memory model", found["skipped"])
            continue
        predicted, measured = (max(found[kind].values()) for kind in ("predicted", "measured"))
        yield Result(
            f"peak of {name}",
            "the memory model",
            abs(predicted / measured - 1) * 100,
            ALLOWED,
            unit="% off",
            details=found,
        )


def child_environment() -> dict[str, str]:
    """That of a process of its own, with as many threads as this one has."""
    return {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _measure(name: str) -> dict[str, Any]:
    """Runs a case in a process of its own: bytes by phase, measured and predicted."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", name]
    child = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"case {name!r} failed: {child.stderr.strip()[-2000:]}")
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


class _Watch:
    """Highest resident set of each phase, in bytes above what there was before the model."""

    def __init__(self) -> None:
        self.before = 0
        self.peaks: dict[str, int] = {}

    def wrapped(self, function: Any, phase: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if phase == "load" and not self.before:
                self.before = resident()[1]
            forget_peak()
            try:
                return function(*args, **kwargs)
            finally:
                peak = resident()[0] - self.before
                self.peaks[phase] = max(self.peaks.get(phase, 0), peak)

        return run


def forget_peak() -> None:
    """Starts the highest resident set anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def child(name: str) -> None:
    """The fit itself; prints one line of JSON."""
    import lightning as L
    import peft
    import transformers
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lwf_lightning import FisherCallback, LWFDataModule, LWFModule
    from lwf_lightning.estimate import predict
    from lwf_lightning.tasks import TaskFields
    from lwf_lightning.trainer import LWFTrainer

    _warm_up()
    case = CASES[name]
    transformers.logging.set_verbosity_error()
    L.seed_everything(0, verbose=False)
    watch = _Watch()
    with tempfile.TemporaryDirectory() as folder:
        lora = case.module.get("lora")
        options = {**case.module, "lora": lora and peft.LoraConfig(**lora)}
        options["model_name"] = _made_llama(folder) if case.model == "llama-27m" else case.model
        options |= {"unlearning_interval": 1, "unlearning_ceiling": 1e9}
        module = LWFModule(**options)
        data = LWFDataModule(
            "learn",
            ["forget"],
            **{
                "data_dir": _written_tasks(folder, case),
                "custom_tasks": {
                    "learn": TaskFields(prompt="prompt", answer="answer"),
                    "forget": TaskFields(prompt="prompt", answer=None),
                },
                "batch_size": 8,
                "forget_batch_size": 8,
                "max_new_tokens": case.answer,
                "cache_dir": folder,
                **case.data,
            },
        )
        callbacks: list[Any] = [ModelCheckpoint(dirpath=folder, every_n_train_steps=3)]
        if module.schedule.unlearns:
            chosen = {"probe_steps": 2, "fisher_texts": 8, "forgetting_rate": 0.5}
            callbacks.append(FisherCallback(**{**chosen, **case.callback}))
        settings = {"accelerator": "cpu", "devices": 1, "max_steps": 3, **case.trainer}
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": True}
        trainer = LWFTrainer(
            callbacks=callbacks,
            default_root_dir=folder,
            num_sanity_val_steps=1,
            **quiet,
            **settings,
        )
        predicted = predict(trainer, module, data)
        for target, phase in PHASES.items():
            _patch(target, phase, watch)
        trainer.fit(module, data)
    print(
        json.dumps(
            {
                "measured": watch.peaks,
                "predicted": {phase.name: phase.total for phase in predicted.phases},
                "parts": {phase.name: phase.parts for phase in predicted.phases},
            }
        )
    )


def _warm_up() -> None:
    """Takes a step and answers a prompt with a tiny model: what torch sets up once is no need."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.ones(8, 64, dtype=torch.int64)
    for precision in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.generate(ids, max_new_tokens=2, pad_token_id=0)


def _patch(target: str, phase: str, watch: _Watch) -> None:
    place, _, attribute = target.rpartition(".")
    owner = pkgutil.resolve_name(place)
    setattr(owner, attribute, watch.wrapped(getattr(owner, attribute), phase))


def _made_llama(folder: str) -> str:
    """A random Llama of 27 million parameters with the world's tokenizer, saved to a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lwf_lightning.models import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer("world-base")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    path = str(Path(folder) / "llama-27m")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _written_tasks(folder: str, case: Case) -> str:
    for task in ("learn", "forget"):
        place = Path(folder) / "data" / task
        place.mkdir(parents=True)
        for split, rows in (("train", case.rows), ("validation", 8), ("test", 8)):
            with (place / f"{split}.jsonl").open("w") as file:
                for row in range(rows):
                    words = case.prompt if row % 2 else case.prompt * 2 // 3
                    prompt = " ".join(["Where"] * words)
                    answer = " ".join(["the"] * case.answer)
                    file.write(json.dumps({"prompt": prompt, "answer": f" {answer}"}) + "\n")
    return str(Path(folder) / "data")


def main() -> None:
    """Prints measured and predicted bytes, phase by phase."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    for name in options.case:
        found = _measure(name)
        print(f"\n{name}")
        for phase, measured in found["measured"].items():
            predicted = found["predicted"].get(phase, 0)
            parts = {k: round(v / 1e6) for k, v in found["parts"].get(phase, {}).items()}
            print(
                f"  {phase:<16}{measured / 1e6:>9.0f} MB{predicted / 1e6:>9.0f} MB"
                f"{(predicted / measured - 1) * 100:>+8.1f} %  {parts}"
            )
        peak, guess = max(found["measured"].values()), max(found["predicted"].values())
        print(
            f"  {'peak':<16}{peak / 1e6:>9.0f} MB{guess / 1e6:>9.0f} MB"
            f"{(guess / peak - 1) * 100:>+8.1f} %"
        )


if __name__ == "__main__":
    main()

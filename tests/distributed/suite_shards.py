"""Weights in shards, against brute force on whole ones. Run through torchrun."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lwf_lightning.data.batch import batches_of
from lwf_lightning.forgetting import diagonal_fisher, forgetting_confidence
from lwf_lightning.forgetting.anchor import probe_anchor
from lwf_lightning.forgetting.probe_cache import shared_probe
from lwf_lightning.forgetting.weights import copy_weights, exchanged_weights, trainable_parameters
from lwf_lightning.fsdp2 import shard_model
from lwf_lightning.generation import generate_answers
from lwf_lightning.losses import labelled_tokens
from lwf_lightning.metrics import choice_log_likelihoods
from lwf_lightning.ranks import Ranks
from lwf_lightning.shards import whole

pytestmark = pytest.mark.skipif("RANK" not in os.environ, reason="run with torchrun")
Make = Callable[..., Any]
RANK = int(os.environ.get("RANK", "0"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANKS = Ranks(RANK, WORLD_SIZE)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    started = distributed.is_initialized()
    if not started:
        distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield init_device_mesh("cpu", (WORLD_SIZE,))
    if not started:
        distributed.destroy_process_group()


def functions_of(conftest: str) -> Any:
    """What another folder of tests offers."""
    spec = importlib.util.spec_from_file_location(
        "offered", Path(__file__).parents[1] / "unit" / conftest
    )
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.fixture(scope="module")
def oracle() -> Any:
    return functions_of("forgetting/conftest.py")


class Strange(nn.Module):
    """Uses parameters outside the modules that own them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.scale = nn.Parameter(torch.tensor([1.5]))
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(0.1 * torch.randn(16, 37, generator=generator))

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs, output_hidden_states=True)
        first, last = output.hidden_states[0], output.hidden_states[-1]
        again = first @ self.model.get_output_embeddings().weight.T
        output.logits = output.logits * self.scale + last @ self.matrix + 0.1 * again
        return output


def make_model(oracle: Any, name: str) -> nn.Module:
    if name == "strange":
        return Strange(oracle.make_model("llama"))
    if name == "checkpointed":
        model = oracle.make_model("llama_tied")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model
    return oracle.make_model(name)


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    if isinstance(model, Strange):
        for block in model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        shard_model(model, mesh)
    return model


def whole_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in tensors.items()}


MODELS = ["llama", "llama_tied", "gpt2", "gpt_neox", "lora", "checkpointed"]


@pytest.mark.parametrize("name", [*MODELS, "strange"])
@pytest.mark.parametrize("count", [7, 1])
def test_fisher_and_scores_equal_brute_force(
    mesh: DeviceMesh, oracle: Any, make_texts: Make, name: str, count: int
) -> None:
    texts, model = make_texts(count), make_model(oracle, name)
    expected = oracle.fisher_oracle(model, texts)
    anchor = oracle.nearby_weights(model)
    confidence = oracle.confidence_oracle(model, texts, expected, anchor, 0.3, text_step="unit")
    model = sharded(model, mesh)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    batches = list(batches_of(texts, 2, pad_token_id=0))

    fisher = diagonal_fisher(model, batches)
    oracle.assert_near(whole_of(fisher), expected)
    found = forgetting_confidence(model, batches, fisher=fisher, anchor=anchor, alpha=0.3)
    torch.testing.assert_close(
        found.confidence.double() + found.constant, confidence, rtol=1e-5, atol=1e-5
    )

    for parameter_name, parameter in model.named_parameters():
        kept, trains = before[parameter_name]
        assert parameter is kept
        assert (parameter.requires_grad, parameter.grad) == (trains, None)
        if trains:  # as much memory as the parameter itself takes, and no more
            assert isinstance(fisher[parameter_name], DTensor)
            held = fisher[parameter_name].to_local()
            assert held.shape == parameter.to_local().shape
            assert held.untyped_storage().nbytes() == 4 * held.numel()


@pytest.mark.parametrize("sequence_first", [False, True])
def test_as_many_texts_as_tokens_on_one_rank(
    mesh: DeviceMesh, oracle: Any, make_texts: Make, sequence_first: bool
) -> None:
    model = oracle.SequenceFirst() if sequence_first else oracle.make_model("llama")
    texts = [make_texts(7, longest=7), make_texts(3), make_texts(2)]
    batches = [batch for part in texts for batch in batches_of(part, 7, 0)]
    assert batches[0]["labels"].shape == (7, 7)
    expected = oracle.fisher_oracle(model, [text for part in texts for text in part])
    fully_shard(model, mesh=mesh)

    fisher = diagonal_fisher(model, batches)

    oracle.assert_near(whole_of(fisher), expected)


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
def test_training_goes_on_as_if_nothing_had_been_estimated(
    mesh: DeviceMesh, oracle: Any, make_texts: Make, reduce_dtype: torch.dtype | None
) -> None:
    param_dtype = None if reduce_dtype is None else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    weights = []
    for estimates in (False, True):
        model = oracle.make_model("llama_tied")
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(3):
            if estimates:
                diagonal_fisher(model, list(batches_of(make_texts(3, seed=step), 2, 0)))
            (batch,) = batches_of(make_texts(4, seed=10 * step + RANK), 4, 0)
            labelled_tokens(model, batch).token_losses().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(whole_of(copy_weights(model)))
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_weights_are_exchanged_shard_by_shard_and_back(mesh: DeviceMesh, oracle: Any) -> None:
    model, other = (sharded(oracle.make_model("llama_tied"), mesh) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.to_local().mul_(1.5)
        ids = torch.randint(3, 37, (2, 7), generator=torch.Generator().manual_seed(RANK))
        own, others = model(ids).logits.clone(), other(ids).logits.clone()
        weights = copy_weights(other)
        with exchanged_weights(model, weights):
            torch.testing.assert_close(model(ids).logits, others, rtol=0, atol=0)
        torch.testing.assert_close(model(ids).logits, own, rtol=0, atol=0)
    assert (own - others).abs().max() > 0.1
    assert all(isinstance(weight, DTensor) for weight in weights.values())


def test_the_probe_equals_that_of_one_process(
    mesh: DeviceMesh, oracle: Any, make_texts: Make
) -> None:
    batches = list(batches_of(make_texts(7), 3, pad_token_id=0))  # the last one has one text
    expected = probe_anchor(oracle.make_model("llama_tied"), batches, learning_rate=1e-3)
    model = sharded(oracle.make_model("llama_tied"), mesh)
    before = whole_of(copy_weights(model))
    found = probe_anchor(model, batches, learning_rate=1e-3, ranks=RANKS)
    torch.testing.assert_close(whole_of(found), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole_of(copy_weights(model)), before, rtol=0, atol=0)


@pytest.mark.usefixtures("mesh")
def test_the_probe_decays_no_parameter_that_takes_no_part(oracle: Any, make_texts: Make) -> None:
    batches = list(batches_of(make_texts(7), 3, pad_token_id=0))
    found = []
    for ranks in (Ranks(), RANKS):
        model = oracle.Wrapped(oracle.make_model("llama_tied"))
        model.unused = nn.Parameter(torch.ones(3))
        found.append(probe_anchor(model, batches, learning_rate=1e-3, weight_decay=9, ranks=ranks))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [True, False])
def test_a_shared_probe_comes_back_on_every_rank(
    mesh: DeviceMesh, oracle: Any, make_texts: Make, tmp_path: Path, cut: bool
) -> None:
    batches = list(batches_of(make_texts(7), 3, pad_token_id=0))
    folder = RANKS.from_first(lambda: str(tmp_path))
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        model = oracle.make_model("llama_tied")
        model = sharded(model, mesh) if cut else model

        def compute(model: nn.Module = model) -> dict[str, Tensor]:
            assert not found
            return probe_anchor(model, batches, learning_rate=1e-3, ranks=RANKS)

        found.append(shared_probe(folder, model, batches, {}, compute, ranks=RANKS))
    assert all(isinstance(tensor, DTensor) == cut for tensor in found[1].values())
    torch.testing.assert_close(whole_of(found[1]), whole_of(found[0]), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama_tied", "lora"])
@pytest.mark.parametrize("counts", [(5, 2), (3, 0)])
def test_every_rank_generates_what_one_process_would(
    mesh: DeviceMesh, oracle: Any, name: str, counts: tuple[int, int]
) -> None:
    tokenizer = functions_of("conftest.py").byte_tokenizer()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 37, (3 + i,), generator=draw).tolist() for i in range(7)]
    mine = prompts[: counts[0]] if RANK == 0 else prompts[7 - counts[1] :]
    options = {"max_new_tokens": 6, "batch_size": 2}
    expected = generate_answers(oracle.make_model(name), tokenizer, mine, **options)
    model = sharded(oracle.make_model(name), mesh)
    assert generate_answers(model, tokenizer, mine, **options) == expected


ROBERTA = {"is_decoder": True, "pad_token_id": 1, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Roberta", ROBERTA),  # counts positions from its pad token
        ("Falcon", {"alibi": True}),  # fails with a mask of our own
    ],
)
def test_every_rank_finds_out_what_a_model_cannot(
    mesh: DeviceMesh, make_texts: Make, name: str, options: dict[str, Any]
) -> None:
    def make() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(
            vocab_size=37,
            hidden_size=16,
            intermediate_size=28,
            num_hidden_layers=2,
            num_attention_heads=2,
            **options,
        )
        return getattr(transformers, f"{name}ForCausalLM")(config).double().eval()

    tokenizer = functions_of("conftest.py").byte_tokenizer()
    mine = [[5, 6, 7 + RANK], [8] * (2 + RANK), [9, 10]][: 3 - 2 * RANK]
    (batch,) = batches_of(make_texts(5 - RANK), 5, pad_token_id=0)
    expected, found = (
        (
            choice_log_likelihoods(model, batch)[0],
            generate_answers(model, tokenizer, mine, max_new_tokens=4, batch_size=2),
            choice_log_likelihoods(model, batch)[0],
        )
        for model in (make(), sharded(make(), mesh))
    )
    torch.testing.assert_close(found, expected)


def test_parameters_are_the_shards_after_a_forward_pass(mesh: DeviceMesh, oracle: Any) -> None:
    model = sharded(oracle.make_model("llama_tied"), mesh)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))  # FSDP2 keeps the root whole after this
    assert any(not isinstance(p, DTensor) for p in model.parameters())
    assert all(isinstance(p, DTensor) for p in trainable_parameters(model).values())
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 3

"""What a checkpoint keeps: training goes on with the next batch."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy


def test_state_is_primitives_and_continues(make_data, tmp_path, make_knowledge):
    first = make_data()
    first.self_knowledge = make_knowledge(4)
    first.set_forget_set([3, 1])
    loader = first.train_dataloader()
    next(iter(loader))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    texts, learning = state["self_texts"], state["learning_texts"]
    assert len(texts) == len(learning) == 64
    assert state == {
        "loader": {"step": 1},
        "forget_set": [3, 1],
        "self_texts": texts,
        "learning_texts": learning,
        "seed": 0,
        "batch_sizes": {"batch_size": first.batch_size, "forget_batch_size": 8},
    }

    second = make_data()
    second.load_state_dict(state)
    assert second.forget_set == [3, 1]
    rest = [batch["input_ids"] for batch in loader]
    torch.testing.assert_close([batch["input_ids"] for batch in second.train_dataloader()], rest)


def test_state_before_training(make_data):
    data = make_data()
    data.load_state_dict(data.state_dict())
    assert len(list(data.train_dataloader())) == 2


def test_another_seed_than_the_checkpoint_warns(make_data):
    state = make_data(seed=3).state_dict()
    with pytest.warns(UserWarning, match=r"made with data\.init_args\.seed=3, now it is 0"):
        make_data().load_state_dict(state)


def test_other_learning_texts_than_the_checkpoint_are_refused(make_data, data_dir):
    state = make_data(eval_examples=1).state_dict()
    rows = data_dir / "qasc" / "train.jsonl"
    rows.write_text(rows.read_text().replace("qasc 4?", "qasc 44?"))
    message = r"the learning texts are not those of the checkpoint.*data\.init_args\.data_dir"
    with pytest.raises(ValueError, match=message):
        make_data().load_state_dict(state)
    del state["learning_texts"]  # a checkpoint of before
    make_data().load_state_dict(state)


class Recorder(L.LightningModule):
    """Learns next to nothing, and remembers which batches it has seen."""

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.evaluated: set[tuple[str, int]] = set()

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].sum(1).tolist())
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert isinstance(batch.labels, torch.Tensor)
        self.evaluated.add((batch.task, dataloader_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data, module, folder, steps, checkpoint=None, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"val_check_interval": 2, "check_val_every_n_epoch": None} | options),
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stopped_after", [1, 2, 3, 4])
def test_stopped_and_resumed_training_sees_the_same_batches(
    make_data, make_tokenizer, tmp_path, stopped_after
):
    whole = Recorder(make_tokenizer())
    train(make_data(stage=None), whole, tmp_path, 7)
    assert len(whole.seen) == 7
    assert whole.evaluated == {("qasc", 0), ("psychol", 1), ("dental", 2)}

    first, second = Recorder(make_tokenizer()), Recorder(make_tokenizer())
    checkpoint = train(make_data(stage=None), first, tmp_path, stopped_after)
    train(make_data(stage=None), second, tmp_path, 7, str(checkpoint))
    assert first.seen + second.seen == whole.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [None, 1])
def test_a_loader_made_anew_each_epoch_goes_on_where_the_last_one_was(
    make_data, make_tokenizer, tmp_path, limit
):
    options = {"max_epochs": -1, "limit_train_batches": limit, "val_check_interval": None}
    anew = options | {"reload_dataloaders_every_n_epochs": 1}
    once, reloaded = Recorder(make_tokenizer()), Recorder(make_tokenizer())
    train(make_data(stage=None), once, tmp_path, 7, **options)
    train(make_data(stage=None), reloaded, tmp_path, 7, **anew)
    assert len(reloaded.seen) == 7
    assert reloaded.seen == once.seen

    first, second = Recorder(make_tokenizer()), Recorder(make_tokenizer())
    checkpoint = train(make_data(stage=None), first, tmp_path, 3, **anew)
    train(make_data(stage=None), second, tmp_path, 7, str(checkpoint), **anew)
    assert first.seen + second.seen == once.seen


class LateRestore(SingleDeviceStrategy):
    """Restores a checkpoint once all is set up, as FSDP2 does."""

    restore_checkpoint_after_setup = True


class CountsItsSteps(Recorder):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 8  # Lightning asks for the loader
        return super().configure_optimizers()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_is_there_before_the_checkpoint_is_read_goes_on_from_it(
    make_data, make_tokenizer, tmp_path, workers
):
    def run(module, steps, checkpoint=None):
        options = {"max_epochs": 4, "val_check_interval": None, "strategy": LateRestore("cpu")}
        data = make_data(stage=None, num_workers=workers)
        return train(data, module, tmp_path, steps, checkpoint, **options)

    whole, first, rest = (
        kind(make_tokenizer()) for kind in (CountsItsSteps, Recorder, CountsItsSteps)
    )
    run(whole, -1)
    run(rest, -1, str(run(first, 4)))
    assert first.seen + rest.seen == whole.seen


@pytest.mark.filterwarnings("ignore")
def test_another_fit_begins_at_the_first_batch(make_data, make_tokenizer, tmp_path):
    data, first, second = make_data(), Recorder(make_tokenizer()), Recorder(make_tokenizer())
    for module in (first, second):
        train(data, module, tmp_path, 3)
    assert first.seen == second.seen

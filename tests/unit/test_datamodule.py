from __future__ import annotations

import re
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

import lwf_lightning.datamodule as datamodule_file
from lwf_lightning.data.rows import DataError
from lwf_lightning.datamodule import LWFDataModule
from lwf_lightning.forgetting.elicit import SelfKnowledge, SelfText
from lwf_lightning.tasks import TaskFields


def choice_rows(name, count):
    return [
        {"question": f"{name} {i}?", "choices": ["yes", "no", "maybe"], "label": i % 3}
        for i in range(count)
    ]


@pytest.fixture
def data_dir(tmp_path, write_jsonl_task):
    for name, train in (("qasc", 11), ("psychol", 4), ("dental", 9)):
        rows = choice_rows(name, train)
        write_jsonl_task(tmp_path / name, train=rows, validation=rows[:3], test=rows[:2])
    sums = [{"question": f"1+{i}?", "answer": f"Add.\n#### {1 + i}"} for i in range(5)]
    write_jsonl_task(tmp_path / "gsm8k", train=sums, validation=sums[:2], test=sums[:2])
    return tmp_path


@pytest.fixture
def make_data(data_dir, make_tokenizer):
    def make(learning="qasc", forgetting=("psychol", "dental"), stage="fit", **options):
        options = {"data_dir": str(data_dir), "batch_size": 4, **options}
        data = LWFDataModule(learning, list(forgetting), **options)
        data.tokenizer = make_tokenizer()
        if stage:
            data.setup(stage)
        return data

    return make


def knowledge(count):
    texts = [
        SelfText(f"p{i}", "a", (9,) * (i + 1), (50 + i, 2), "psychol", i) for i in range(count)
    ]
    return SelfKnowledge(texts, dropped=0)


# Arguments


@pytest.mark.parametrize(
    "flag",
    [
        "max_length",
        "batch_size",
        "eval_batch_size",
        "forget_batch_size",
        "learning_texts",
        "forgetting_prompts",
        "eval_examples",
        "max_new_tokens",
        "elicit_batch_size",
    ],
)
def test_numbers_below_one_name_their_flag(flag):
    for value in (0, -3):
        message = f"data.init_args.{flag} must be at least 1, got {value}"
        with pytest.raises(ValueError, match=re.escape(message)):
            LWFDataModule("qasc", **{flag: value})


@pytest.mark.parametrize("flag", ["num_workers", "seed"])
def test_negative_numbers_name_their_flag(flag):
    with pytest.raises(ValueError, match=f"data.init_args.{flag} must be at least 0, got -1"):
        LWFDataModule("qasc", **{flag: -1})


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="unknown task 'qasq'; known: gsm8k, qasc"):
        LWFDataModule("qasq")
    with pytest.raises(ValueError, match="unknown task 'nope'"):
        LWFDataModule("qasc", ["nope"])


def test_forgetting_task_equal_to_the_learning_task_warns():
    with pytest.warns(UserWarning, match=r"data\.init_args\.forgetting_tasks holds the learning"):
        data = LWFDataModule("qasc", ["dental", "qasc"])
    assert data.eval_names("val") == ["val/accuracy", "forget/accuracy_dental"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LWFDataModule("qasc", ["dental"])


def test_forgetting_task_named_twice_is_refused():
    with pytest.raises(ValueError, match="names a task twice"):
        LWFDataModule("qasc", ["dental", "dental"])


def test_learning_task_needs_answers():
    custom = {"mine": TaskFields(answer=None)}
    with pytest.raises(ValueError, match="'mine' has no field with gold answers"):
        LWFDataModule("mine", custom_tasks=custom)


def test_missing_data_dir_names_the_flag(make_tokenizer):
    data = LWFDataModule("qasc")
    data.tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"set data\.init_args\.data_dir to the folder that holds"):
        data.setup("fit")


def test_missing_tokenizer_says_what_to_do():
    with pytest.raises(ValueError, match=r"set datamodule\.tokenizer before setup"):
        LWFDataModule("qasc").setup("fit")


# Texts


def test_learning_texts_are_prompts_with_labelled_answers(make_data):
    data = make_data()
    assert len(data.learning_encoded) == 11
    text = data.learning_encoded[1]
    assert data.tokenizer.decode(text.input_ids) == "Question: qasc 1?\nAnswer: no</s>"
    assert data.tokenizer.decode([label for label in text.labels if label >= 0]) == " no</s>"


def test_forgetting_prompts_are_pooled_and_spread_evenly(make_data):
    data = make_data()
    assert [task for task, _ in data.forgetting_examples] == ["psychol"] * 4 + ["dental"] * 9
    data = make_data(forgetting_prompts=10)
    names = [task for task, _ in data.forgetting_examples]
    assert (names.count("psychol"), names.count("dental")) == (4, 6)


def test_limits_choose_by_seed(make_data):
    def prompts(seed):
        data = make_data(learning_texts=3, forgetting_prompts=4, eval_examples=2, seed=seed)
        assert [len(loader.dataset) for loader in data.val_dataloader()] == [2, 2, 2]
        return data.learning_encoded, data.forgetting_examples

    assert prompts(0) == prompts(0)
    assert prompts(0) != prompts(1)
    assert [len(part) for part in prompts(0)] == [3, 4]


def test_cut_answers_are_counted_in_a_warning(make_data):
    length = len("Question: qasc 1?\nAnswer: no") + 1
    with pytest.warns(UserWarning, match=r"\d+ of 11 gold answers of qasc are longer than data"):
        make_data(forgetting=(), max_length=length)


def test_answer_lost_to_truncation_is_named(make_data, data_dir):
    source = re.escape(f"{data_dir / 'qasc' / 'train.jsonl'}:row 1: ")
    with pytest.raises(DataError, match=source + r".*data\.init_args\.max_length=25"):
        make_data(max_length=25)


def test_bad_row_of_a_forgetting_task_is_named(make_data, data_dir):
    path = data_dir / "dental" / "train.jsonl"
    path.write_text(path.read_text().replace('"dental 4?"', '""'))
    with pytest.raises(DataError, match=re.escape(f"{path}:row 5: field 'question' is empty")):
        make_data()


# Evaluation


def test_evaluation_loaders(make_data):
    data = make_data(eval_batch_size=2)
    loaders = data.val_dataloader()
    batches = [list(loader) for loader in loaders]
    assert data.eval_tasks == ["qasc", "psychol", "dental"]
    assert [[len(batch) for batch in loader] for loader in batches] == [[2, 1]] * 3
    assert [loader[0].task for loader in batches] == data.eval_tasks
    assert {batch.kind for loader in batches for batch in loader} == {"choice"}
    assert batches[0][0].batch["input_ids"].shape[0] == 6
    assert data.eval_names("val") == [
        "val/accuracy",
        "forget/accuracy_psychol",
        "forget/accuracy_dental",
    ]
    assert data.eval_names("test")[:2] == ["test/accuracy", "test/accuracy_psychol"]


def test_evaluation_by_generation(make_data):
    data = make_data(evaluation="generate", evaluate_forgetting=False)
    (loader,) = data.val_dataloader()
    (batch,) = loader
    assert batch.kind == "generate"
    assert batch.batch["input_ids"].shape[0] == 3


def test_task_without_choices_is_generated(make_data):
    data = make_data("gsm8k", stage="test")
    kinds = [next(iter(loader)).kind for loader in data.test_dataloader()]
    assert kinds == ["generate", "choice", "choice"]


def test_prediction_generates_for_the_learning_task(make_data):
    batches = list(make_data(stage="predict").predict_dataloader())
    assert [(batch.task, batch.kind, len(batch)) for batch in batches] == [("qasc", "generate", 2)]


def test_forgetting_task_with_prompts_only(make_data, data_dir, write_jsonl_task):
    write_jsonl_task(data_dir / "mine", train=[{"text": "Once"}])
    custom = {"mine": TaskFields(prompt="text", answer=None)}
    data = make_data(forgetting=("mine", "dental"), custom_tasks=custom)
    assert data.forgetting_examples[0][1].prompt == "Once"
    assert data.eval_tasks == ["qasc", "dental"]
    assert len(data.val_dataloader()) == 2


def test_evaluation_leaves_the_random_state_alone(make_data):
    data = make_data()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        list(loader)
    torch.testing.assert_close(torch.get_rng_state(), before)


# Self-knowledge and forget set


def test_elicit_gets_the_pooled_prompts(make_data, monkeypatch, tmp_path):
    asked = {}

    def elicit(model, tokenizer, prompts, **options):
        asked.update(options, model=model, prompts=prompts)
        return knowledge(3)

    monkeypatch.setattr(datamodule_file, "elicit", elicit)
    data = make_data(
        forgetting=("psychol", "gsm8k"), max_new_tokens=7, cache_dir=str(tmp_path / "cache")
    )
    data.elicit_self_knowledge("the model")
    assert asked["prompts"][0] == "Question: psychol 0?\nAnswer:"
    assert asked["tasks"] == ["psychol"] * 4 + ["gsm8k"] * 5
    assert asked["stop"] == ("\nQuestion:",)
    assert (asked["model"], asked["max_new_tokens"]) == ("the model", 7)
    assert asked["cache_dir"] == str(tmp_path / "cache")
    assert len(data.self_knowledge.texts) == 3


def test_no_texts_left_is_refused(make_data, monkeypatch):
    nothing = SelfKnowledge([], dropped=13)
    monkeypatch.setattr(datamodule_file, "elicit", lambda *_, **__: nothing)
    data = make_data()
    with pytest.raises(ValueError, match=r"no texts are left in D_self: .* 13 prompts of psych"):
        data.elicit_self_knowledge(None)
    assert data.self_knowledge is None


def test_nothing_to_forget_is_refused(make_data):
    with pytest.raises(ValueError, match=r"name tasks in data\.init_args\.forgetting_tasks"):
        make_data(forgetting=()).elicit_self_knowledge(None)


def test_forget_batches_are_a_pure_function_of_the_step(make_data):
    data = make_data(forget_batch_size=2)
    assert data.forget_batch(0) is None
    data.self_knowledge = knowledge(8)
    assert data.forget_batch(0) is None
    data.set_forget_set([1, 3, 4, 6])

    def answers(step):
        batch = data.forget_batch(step)
        assert batch["labels"].shape == batch["input_ids"].shape
        return sorted(batch["labels"][batch["labels"] >= 50].tolist())

    both = [answers(0), answers(1)]
    assert sorted(both[0] + both[1]) == [51, 53, 54, 56]
    assert [answers(0), answers(1)] == both
    data.set_forget_set(range(0))
    assert data.forget_batch(0) is None


def test_forget_set_is_checked(make_data):
    data = make_data()
    with pytest.raises(ValueError, match="elicit the self-knowledge before"):
        data.set_forget_set([0])
    data.self_knowledge = knowledge(3)
    for wrong in ([3], [-1], [1, 1]):
        with pytest.raises(ValueError, match="different indices below 3"):
            data.set_forget_set(wrong)
    assert data.forget_set is None
    data.set_forget_set(torch.tensor([2, 0]).tolist())
    assert data.forget_set == [2, 0]


def test_pad_token_falls_back_to_end_of_text(make_data, make_tokenizer):
    data = make_data()
    assert data.tokenizer.pad_token is None
    assert data.pad_token_id == 2
    batch = next(iter(data.train_dataloader()))
    ends = (batch["labels"] == 2).sum(1)
    assert ends.tolist() == [1] * 4  # the real one is labelled, padding is not
    data.tokenizer = make_tokenizer(pad_token="<pad>")
    assert data.pad_token_id == 0


# State


def test_state_is_primitives_and_continues(make_data, tmp_path):
    first = make_data()
    first.self_knowledge = knowledge(4)
    first.set_forget_set([3, 1])
    loader = first.train_dataloader()
    next(iter(loader))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    texts = state["self_texts"]
    assert len(texts) == 64
    assert state == {
        "loader": {"step": 1},
        "forget_set": [3, 1],
        "self_texts": texts,
        "seed": 0,
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


def train(data, module, folder, steps, checkpoint=None):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2,
        check_val_every_n_epoch=None,
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


# The command line, and real data


class Anything(L.LightningModule):
    pass


def parse(tmp_path: Path, text: str) -> LWFDataModule:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    cli = LightningCLI(
        Anything, LWFDataModule, run=False, subclass_mode_data=True, args=["--config", str(config)]
    )
    return cli.datamodule


def test_a_jsonl_task_needs_field_names_only(tmp_path, write_jsonl_task, make_tokenizer):
    rows = [{"question": "Why?", "solution": "Because"}]
    write_jsonl_task(tmp_path / "mytask", train=rows, validation=rows)
    data = parse(
        tmp_path,
        f"""
data:
  class_path: lwf_lightning.LWFDataModule
  init_args:
    learning_task: mytask
    data_dir: {tmp_path}
    custom_tasks:
      mytask:
        prompt: question
        answer: solution
        prompt_template: "Q: {{prompt}}\\nA:"
""",
    )
    data.tokenizer = make_tokenizer()
    data.setup("fit")
    text = data.learning_encoded[0]
    assert data.tokenizer.decode(text.input_ids) == "Q: Why?\nA: Because</s>"


def test_wrong_choice_in_the_configuration_is_refused(tmp_path, capsys):
    text = "{class_path: lwf_lightning.LWFDataModule, init_args: {learning_task: a, source: web}}"
    with pytest.raises(SystemExit):
        parse(tmp_path, f"data: {text}")
    assert "source" in capsys.readouterr().err


def test_real_tasks_mixed(shared_data, make_tokenizer):
    data = LWFDataModule(
        "qasc",
        ["psychol", "dental", "sst5", "gsm8k"],
        data_dir=str(shared_data),
        learning_texts=50,
        forgetting_prompts=40,
        eval_examples=5,
        max_length=2048,
    )
    data.tokenizer = make_tokenizer()
    data.setup("fit")
    assert len(data.learning_encoded) == 50
    names = [task for task, _ in data.forgetting_examples]
    assert {name: names.count(name) for name in names} == dict.fromkeys(data.forgetting_tasks, 10)
    kinds = [next(iter(loader)).kind for loader in data.val_dataloader()]
    assert kinds == ["choice", "choice", "choice", "choice", "generate"]

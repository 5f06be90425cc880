"""LWFDataModule: everything about text, from rows to batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lwf_lightning.data.arguments import check_arguments
from lwf_lightning.data.batch import Batch, EncodedText, collate, filler
from lwf_lightning.data.evaluation import EvalItem, Evaluation
from lwf_lightning.data.resumed import check_learning, texts_digest, warn_of_batches
from lwf_lightning.data.rows import Row, Split
from lwf_lightning.data.sampler import ResumableLoader, filled_indices, seeded_sample
from lwf_lightning.data.training import learning_texts, pooled_prompts
from lwf_lightning.distributed import ranks_of
from lwf_lightning.evaluation_data import EvalKey, EvaluationDataMixin
from lwf_lightning.files import cache_root
from lwf_lightning.forgetting.elicit import SelfKnowledge, elicit
from lwf_lightning.progress import shows_progress
from lwf_lightning.tasks import (
    ChoiceStyle,
    Example,
    Source,
    Task,
    TaskFields,
    get_task,
    load_rows,
)
from lwf_lightning.vocabulary import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LWFDataModule(EvaluationDataMixin):
    """The learning task (D_L), the forgetting tasks (D_F), and what comes of them.

    The tokenizer is that of the module being trained. Without a Trainer, set ``tokenizer`` before
    ``setup``.

    Attributes:
        tokenizer: The tokenizer, once ``setup`` has run.
        learning_encoded: D_L: the training texts of the learning task, encoded.
        forgetting_examples: D_F: the training prompts of all forgetting tasks, each with the name
            of its task.
        self_knowledge: D_self, once elicited.
        forget_set: D_U: indices into ``self_knowledge.texts``, once selected.

    Example:
        >>> data = LWFDataModule("qasc", ["psychol", "dental"], data_dir="../shared/data")
        >>> data.eval_names("val")
        ['val/accuracy', 'forget/accuracy_psychol', 'forget/accuracy_dental']
    """

    def __init__(
        self,
        learning_task: str,
        forgetting_tasks: list[str] | None = None,
        data_dir: str | None = None,
        source: Source = "local",
        custom_tasks: dict[str, TaskFields] | None = None,
        choice_style: ChoiceStyle = "text",
        chat_template: bool = False,
        max_length: int = 512,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        forget_batch_size: int = 8,
        learning_texts: int | None = None,
        forgetting_prompts: int | None = None,
        eval_examples: int | None = None,
        evaluation: Evaluation = "choice",
        evaluate_forgetting: bool = True,
        evaluate_seen: bool = False,
        max_new_tokens: int = 64,
        elicit_batch_size: int = 32,
        cache_dir: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        """Checks the arguments; nothing is read before ``setup``.

        Args:
            learning_task: The task to learn: a built-in name or a key of ``custom_tasks``.
            forgetting_tasks: The tasks whose self-knowledge may be forgotten, pooled. Several of
                them are the paper's "mixed" setting.
            data_dir: Folder with ``<task>/{train,validation,test}.jsonl``.
            source: ``local`` JSONL files, or the Hugging Face ``hub`` for the tasks of the paper.
            custom_tasks: JSONL tasks of your own, by their field names.
            choice_style: ``text``: a choice task's answer is the text of the choice. ``letters``:
                choices are listed and the answer names one, as in the paper.
            chat_template: Whether prompts go through the tokenizer's chat template.
            max_length: Tokens per text; longer answers lose their end.
            batch_size: Texts of one learning step (on each process).
            eval_batch_size: Examples per evaluation batch, each with all its choices.
            forget_batch_size: Texts of one unlearning step (on each process).
            learning_texts: Limit of the training texts, chosen by ``seed``; by default all.
            forgetting_prompts: Limit of the prompts of all forgetting tasks together, spread
                evenly among them; by default all.
            eval_examples: Limit of the examples per task and split in evaluation; by default all.
            evaluation: ``choice``: choice tasks are scored by log-likelihood. ``generate``: every
                answer is generated and read, as is done anyway without choices.
            evaluate_forgetting: Whether to evaluate on the forgetting tasks too.
            evaluate_seen: Whether validation also asks the very prompts that are elicited
                (``forget/seen_accuracy_<task>``): with what is left of answers that were unlearned
                beside those of prompts that were not among them.
            max_new_tokens: Limit of a generated answer, in self-generation and evaluation.
            elicit_batch_size: Prompts answered at a time in self-generation; changes no result.
            cache_dir: Folder that keeps elicited texts for the next run; by default
                ``self_knowledge`` in ``$LWF_CACHE`` or ``~/.cache/lwf_lightning``.
            num_workers: Processes that prepare training batches.
            seed: Seed of the order of batches and of the choice under a limit.

        Raises:
            ValueError: If an argument is out of range or a task is unknown; names the flag.
        """
        super().__init__()
        self.learning_task = learning_task
        self.forgetting_tasks = forgetting_tasks or []
        self.data_dir = data_dir
        self.source: Source = source
        self.custom_tasks = custom_tasks
        self.choice_style = choice_style
        self.chat_template = chat_template
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.forget_batch_size = forget_batch_size
        self.learning_texts = learning_texts
        self.forgetting_prompts = forgetting_prompts
        self.eval_examples = eval_examples
        self.evaluation: Evaluation = evaluation
        self.evaluate_forgetting = evaluate_forgetting
        self.evaluate_seen = evaluate_seen
        self.max_new_tokens = max_new_tokens
        self.elicit_batch_size = elicit_batch_size
        self.cache_dir = cache_dir
        self.num_workers = num_workers
        self.seed = seed
        check_arguments(vars(self))
        self.tasks: dict[str, Task] = {
            name: get_task(name, custom_tasks, choice_style=choice_style)
            for name in [learning_task, *self.forgetting_tasks]
        }
        if not self.tasks[learning_task].has_answers:
            raise ValueError(
                f"data.init_args.learning_task: {learning_task!r} has no field with gold answers; "
                "it can only be a forgetting task"
            )

        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.learning_encoded: list[EncodedText] = []
        self.forgetting_examples: list[tuple[str, Example]] = []
        self.self_knowledge: SelfKnowledge | None = None
        self.forget_set: list[int] | None = None
        self._eval_items: dict[EvalKey, list[EvalItem]] = {}
        self._loader: ResumableLoader | None = None
        self._loader_state: dict[str, int] | None = None
        self._learning_digest: str | None = None
        self._resumed_texts: str | None = None

    def setup(self, stage: str) -> None:
        """Reads and encodes what the stage needs and is not there yet.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            DataError: If a file is missing or a row is malformed; names file, row and field.
            ValueError: If there is no tokenizer, or it lacks what is asked of it.
        """
        self._take_tokenizer()
        if stage == "fit":
            self.forget_set = self._loader = self._loader_state = self._resumed_texts = None
            self.self_knowledge = None
            if not self.learning_encoded:
                self._prepare_training()
        if stage in ("fit", "validate"):
            self._prepare_evaluation("val")
        if stage == "test":
            self._prepare_evaluation("test")
        if stage == "predict":
            self._prepare_evaluation("predict")

    def _take_tokenizer(self) -> None:
        module: Any = getattr(self.trainer, "lightning_module", None)
        tokenizer = getattr(module, "tokenizer", self.tokenizer)
        if tokenizer is None:
            raise ValueError("set datamodule.tokenizer before setup, or use a Trainer")
        if tokenizer is not self.tokenizer:  # another model: nothing encoded so far is of use
            self.tokenizer = tokenizer
            self.learning_encoded, self._eval_items = [], {}

    def _prepare_training(self) -> None:
        rows, task = self._rows(self.learning_task, "train"), self.tasks[self.learning_task]
        rows = seeded_sample(rows, self.learning_texts, self.seed)
        self.learning_encoded = learning_texts(
            self._tokenizer, task, rows, self.max_length, self.chat_template
        )
        self._learning_digest = texts_digest(self.learning_encoded)  # once, not at each checkpoint
        self.forgetting_examples = self.elicited_prompts()

    def elicited_prompts(self) -> list[tuple[str, Example]]:
        """The training prompts of all forgetting tasks within the limit; see ``setup``."""
        return pooled_prompts(
            [self.tasks[name] for name in self.forgetting_tasks],
            [self._rows(name, "train") for name in self.forgetting_tasks],
            self.forgetting_prompts,
            self.seed,
        )

    def _rows(self, name: str, split: Split) -> list[Row]:
        return load_rows(self.tasks[name], split, data_dir=self.data_dir, source=self.source)

    def elicit_self_knowledge(self, model: Any) -> None:
        """Lets the model answer the forgetting prompts, greedily: D_self.

        Args:
            model: A ``transformers`` causal LM that holds the base weights.

        Raises:
            ValueError: If there are no forgetting tasks, or every answer was empty.
        """
        if not self.forgetting_tasks:
            raise ValueError(
                "there is nothing to forget: name tasks in data.init_args.forgetting_tasks"
            )
        prompts: dict[str, list[str]] = {}
        for name, example in self.forgetting_examples:
            prompts.setdefault(name, []).append(example.prompt)
        knowledge = self.answers_of(model, prompts)
        if not knowledge.texts:
            raise ValueError(
                f"no texts are left in D_self: the base model's answers to all {knowledge.dropped} "
                f"prompts of {', '.join(self.forgetting_tasks)} were empty. Look at the prompt "
                "format, or choose other tasks in data.init_args.forgetting_tasks"
            )
        self.self_knowledge = knowledge
        rank_zero_info(
            f"D_self: {len(knowledge.texts)} texts, {knowledge.dropped} empty ones dropped"
        )
        self._check_resumed_texts()

    def answers_of(self, model: Any, prompts: Mapping[str, Sequence[str]]) -> SelfKnowledge:
        """The greedy answers of a model to prompts of each task, as D_self is elicited.

        Args:
            model: A ``transformers`` causal LM.
            prompts: Task -> its prompts.
        """
        parts = [
            elicit(
                model,
                self._tokenizer,
                asked,
                tasks=[name] * len(asked),
                max_new_tokens=self.max_new_tokens,
                batch_size=self.elicit_batch_size,
                stop=self.tasks[name].stop,  # its own alone: another task's may be part of answers
                max_prompt_tokens=self.max_length,
                chat_template=self.chat_template,
                cache_dir=self.cache_dir or cache_root() / "self_knowledge",
                ranks=ranks_of(self.trainer),
                progress=shows_progress(self.trainer),
            )
            for name, asked in prompts.items()
        ]
        return SelfKnowledge(
            [text for part in parts for text in part.texts], sum(part.dropped for part in parts)
        )

    def _check_resumed_texts(self) -> None:
        """Called once texts and checkpoint are there; which comes first is up to the strategy."""
        known, resumed = self.self_knowledge, self._resumed_texts
        if known is not None and resumed not in (None, known.digest()):
            raise ValueError(
                "the self-knowledge is not that of the checkpoint: resume with the same model, "
                "data.init_args.forgetting_tasks, forgetting_prompts, max_new_tokens and seed"
            )

    def set_forget_set(self, indices: Iterable[int]) -> None:
        """Chooses what is unlearned from now on: D_U.

        Args:
            indices: Indices into ``self_knowledge.texts``; none at all turns unlearning off.

        Raises:
            ValueError: If there is no self-knowledge, or an index is out of range or repeated.
        """
        if self.self_knowledge is None:
            raise ValueError("elicit the self-knowledge before choosing what to forget from it")
        chosen = [int(index) for index in indices]
        texts = len(self.self_knowledge.texts)
        if len(set(chosen)) < len(chosen) or not all(0 <= index < texts for index in chosen):
            raise ValueError(
                f"the forget set must be different indices below {texts}, got {chosen}"
            )
        self.forget_set = chosen

    def forget_batch(self, unlearning_step: int) -> Batch | None:
        """The batch of an unlearning step: a pure function of the seed and the step.

        Args:
            unlearning_step: Unlearning steps taken before this one.

        Returns:
            This rank's batch of at most ``forget_batch_size`` texts of the forget set, filled up
            to the size of the others'; None when nothing is selected.
        """
        return self._self_knowledge_batch(self.forget_set or [], unlearning_step)

    def retain_batch(self, unlearning_step: int) -> Batch | None:
        """The texts beside those of :meth:`forget_batch`, from what is not in the forget set."""
        if self.self_knowledge is None:
            return None
        forgotten = set(self.forget_set or [])
        kept = [n for n in range(len(self.self_knowledge.texts)) if n not in forgotten]
        return self._self_knowledge_batch(kept, unlearning_step)

    def _self_knowledge_batch(self, indices: list[int], unlearning_step: int) -> Batch | None:
        if not indices or self.self_knowledge is None:
            return None
        ranks = ranks_of(self.trainer)
        places = filled_indices(
            len(indices),
            self.forget_batch_size,
            self.seed + 1,  # another order than that of the learning texts
            unlearning_step,
            ranks.rank,
            ranks.world_size,
        )
        texts = self.self_knowledge.texts
        stand_in = filler(texts[indices[0]].encoded())
        return collate(
            [texts[indices[n]].encoded() if n < len(indices) else stand_in for n in places],
            self.pad_token_id,
        )

    @property
    def pad_token_id(self) -> int:
        """Id for padding: the end-of-text token's without a pad token that the model embeds."""
        ids = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        if ids == (None, None):
            raise ValueError("the tokenizer has neither a pad token nor an end-of-text token")
        module = getattr(self.trainer, "lightning_module", None)
        return padding_id(ids, getattr(module, "model", None))

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the learning task, one per learning step, in an order set by the seed.

        Made anew within a fit, it goes on where the last one was.
        """
        ranks = ranks_of(self.trainer)
        if self._loader is not None:
            self._loader_state = self._loader.state_dict()
        self._loader = ResumableLoader(
            self.learning_encoded,
            self.batch_size,
            self.seed,
            partial(collate, pad_token_id=self.pad_token_id),
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_workers=self.num_workers,
        )
        if self._loader_state is not None:
            self._loader.load_state_dict(self._loader_state)
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Position in the learning texts, forget set, seed, digests of texts: primitives only."""
        return {
            "loader": None if self._loader is None else self._loader.state_dict(),
            "forget_set": self.forget_set,
            "self_texts": None if self.self_knowledge is None else self.self_knowledge.digest(),
            "learning_texts": self._learning_digest,
            "seed": self.seed,
            "batch_sizes": self._batch_sizes(),
        }

    def _batch_sizes(self) -> dict[str, int]:
        """Texts of a step over all processes."""
        world = ranks_of(self.trainer).world_size
        return {name: world * getattr(self, name) for name in ("batch_size", "forget_batch_size")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the next batch and the same forget set; of no use but in a fit."""
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        check_learning(state_dict, self.seed, self._learning_digest)
        warn_of_batches(state_dict, self._batch_sizes())
        self._loader_state = state_dict["loader"]
        if self._loader is not None and self._loader_state is not None:
            self._loader.load_state_dict(self._loader_state)  # some strategies restore that late
        self.forget_set = state_dict["forget_set"]
        self._resumed_texts = state_dict["self_texts"]
        self._check_resumed_texts()

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ValueError("the datamodule has no tokenizer yet: call setup, or set it")
        return self.tokenizer

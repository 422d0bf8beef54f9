"""The recipe's schema: every key, default and bound."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Positive = Annotated[int, Field(gt=0, le=10**9)]  # far beyond any use, and near enough to be computed with
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
AnswerPart = Literal["all", "first_line", "last_number", "json"]
MEASURES: dict[AnswerPart, str] = {  # names of the share that is right
    "all": "exact match",
    "first_line": "same first line",
    "last_number": "same last number",
    "json": "same JSON",
}
PREFERENCE = "preference accuracy"  # of pairs: the share whose better answer is the more probable one per token
Groups = str | dict[str, list[str]]
Word = Annotated[str, Field(min_length=1)]
Swaps = Literal["none", "pronouns"] | list[Annotated[list[Word], Field(min_length=2, max_length=2)]]
MICRO_TOKENS = 4096  # more make a step hardly any faster


def measure_name(labels: object, pairs: object, compared: AnswerPart) -> str:
    """Of the share that is right. labels, pairs: true where the rows have them."""
    return "accuracy" if labels else PREFERENCE if pairs else MEASURES[compared]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Model(Section):
    path: str
    """A model folder, a hub id, or builtin:reviews-base."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """How weights that are not quantised are held; auto is float32 on a CPU and bfloat16 elsewhere, or float16 where a
    GPU has no bfloat16 of its own (NVIDIA before 2020; M1 and M2)."""
    remote_code: bool = False
    """Run Python code that comes with the model (auto_map, model_file); only of a model you have looked at."""


class Data(Section):
    train: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet; also .gz, .zst), a folder, a pattern (data/*.jsonl), a hub data set
    id, or builtin:reviews/train.jsonl."""
    valid: str | None = None
    """Rows to choose the best epoch by; without it those of train's folder, or a share of train is set apart."""
    test: str | None = None
    """Rows for the final figures; without it those of train's folder, or the validation rows serve."""
    format: Literal["auto", "classification", "prompt", "alpaca", "chat", "sharegpt", "text"] = "auto"
    """What a row is; auto looks at the column names."""
    encoding: str | None = None
    """How text files are encoded (cp1252, utf-16); without it UTF-8."""
    columns: dict[str, str] = {}
    """Which column holds what, as standard name: your name (text: review)."""
    labels: list[str] | None = None
    """The labels, in order; without it those that occur in train."""
    valid_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    """The share of train set apart when valid is missing."""
    limit: Positive | None = None
    """For a first try of a large file: at most so many rows of train, and of valid and test, drawn with the seed."""
    on_error: Literal["stop", "skip"] = "stop"
    """What a bad row does: stop the run, or be left out and listed."""
    max_dropped: Share = 0.01
    """The share of a split's rows that may be left out (skipped, too long, nothing to learn); more stop the run.
    Of plain text also the share of its tokens."""
    long_rows: Literal["cut", "split"] = "cut"
    """Plain text beyond train.max_length: cut off there, or split into rows of that length that overlap."""
    groups: Groups | None = None
    """Who the rows are about, for `finetune check` and the report: a column's name, or words for each group (women:
    [she, her])."""

    @field_validator("encoding")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        try:
            b"ab".decode("utf-8" if name is None else name, "ignore")
        except (LookupError, ValueError):
            raise ValueError(f"{name!r} is no encoding of text; write its name, such as cp1252") from None
        return name


class Prompt(Section):
    template: str = "auto"
    """auto, chat (the model's own), plain, alpaca, or your own text with {text} (or your columns) in it."""
    system: str | None = None
    """A system message put before every conversation that has none."""
    completion: str | None = None
    """How the answer is written after the prompt; {completion} (for labels {label}) stands for it."""
    loss_on: Literal["completion", "last", "all"] = "completion"
    """completion: every answer; last: only a conversation's last answer; all: the prompt too."""
    end_token: bool = True
    """Train the end-of-text token after every answer, so that generation stops."""


class Lora(Section):
    rank: Annotated[int, Field(gt=0, le=2**16)] = 8
    alpha: Annotated[float, Field(gt=0.0, le=1e6)] = 16.0
    """The adapter's weight is alpha / rank, on every backend; with rslora alpha / sqrt(rank)."""
    rslora: bool = False
    """Rank-stabilised LoRA: the rate that suits a small rank suits a large one too."""
    dora: bool = False
    """Weight-decomposed LoRA: of each adapted layer the length of every row is learned beside its direction. Needs
    dropout: 0, as PEFT and mlx-lm drop other inputs then."""
    dropout: Share = 0.0
    targets: list[str] | Literal["all"] = "all"
    """Linear layers by the last part of their name (q_proj, v_proj), or all of those in the blocks."""
    layers: Positive | Literal["all"] = "all"
    """Only the last so many blocks, or all."""
    start_from: str | None = None
    """An adapter folder (PEFT or mlx-lm) whose weights are the start."""

    @model_validator(mode="after")
    def _alike_elsewhere(self) -> Lora:
        if self.dora and self.dropout:
            raise ValueError(
                "dropout: with dora PEFT drops inputs of the frozen weight too, and mlx-lm only those of the adapter, "
                "so no adapter would mean the same in both; set dropout to 0, or remove dora"
            )
        return self


class Head(Section):
    first_epochs: Annotated[int, Field(ge=0, le=10**6)] = 100
    """Passes, at most, in which the head learns alone before the adapter joins it. Each row goes through the frozen
    model once, whatever their number; the pass with the lowest validation loss is kept. 0: both begin together."""


class Preferences(Section):
    loss: Literal["dpo", "orpo"] = "dpo"
    """dpo: hold the model to the one without its adapter (Rafailov et al., 2023); orpo: imitate the better answer too,
    with no second model (Hong et al., 2024)."""
    beta: Annotated[float, Field(gt=0.0, le=1e3)] = 0.1
    """dpo: how strongly the model is held; orpo: how much the odds of the two answers weigh (the paper's lambda)."""

    @property
    def refers(self) -> bool:
        """Whether the model without its adapter must be asked first."""
        return self.loss == "dpo"


class Train(Section):
    epochs: Positive | Literal["auto"] | None = None
    """Passes over the data; 3 unless steps is given. auto: up to the first that lowers the validation loss by less than
    2 %, at most 6, where labels are told better than by the most frequent one. What is measured and kept is then an
    average over the steps, which does better than the last of them."""
    steps: Positive | None = None
    """Optimiser steps, instead of epochs."""
    batch_size: Positive = 16
    """Examples in one optimiser step, on every machine."""
    micro_tokens: Positive | Literal["auto"] = MICRO_TOKENS
    """Tokens, padding counted, that are in memory at once: fewer where they would not fit; auto: as many as fit.
    A matter of memory alone, never of the result."""
    # With the largest rate and decay their product still fits float32.
    learning_rate: Annotated[float, Field(gt=0.0, le=1e37)] | Literal["auto"] = "auto"
    """The highest rate. auto: a rule's; or midway to the best of four in a short race on the training rows, where
    that is neither the lowest nor the highest of them, and clearly better on validation rows."""
    schedule: Literal["auto", "constant", "linear", "cosine"] = "auto"
    """How the rate falls to zero after the warmup. auto: linear; not at all with `epochs: auto`."""
    warmup: Share = 0.05
    """The share of all steps over which the rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0.0, le=1e37)] | None = 1.0
    max_length: Annotated[int, Field(ge=8, le=10**9)] = 1024
    """Tokens in an example; longer ones meet the truncation policy."""
    truncation: Literal["prompt", "end", "drop", "error"] = "prompt"
    """prompt: shorten the prompt, keep the answer whole; end: cut the end; drop the row; or stop."""
    gradient_checkpointing: bool | Literal["auto"] = False
    """Less memory for about a third more time; auto: only where the model would leave too little memory otherwise. No
    result changes."""
    early_stopping: Positive | None = None
    """Stop after so many evaluations without a better validation loss."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; without it at the end of every epoch."""
    checkpoint_minutes: Annotated[float, Field(gt=0.0, le=1e9)] | Literal["none"] = 10.0
    """A checkpoint too once so many minutes have passed since the last one, or none. Changes nothing but what a crash
    can cost."""

    @property
    def tokens_at_once(self) -> int:
        """`micro_tokens` as a number, for whatever needs one before it is known how many fit."""
        return MICRO_TOKENS if self.micro_tokens == "auto" else self.micro_tokens

    @property
    def shape(self) -> Literal["constant", "linear", "cosine"]:
        """`schedule`, or what auto stands for."""
        if self.schedule == "auto":
            return "constant" if self.epochs == "auto" else "linear"
        return self.schedule

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps exclude each other; keep one")
        return self


class Evaluate(Section):
    every: Positive | None = None
    """Steps between validations; without it at the end of every epoch."""
    generate: bool = True
    """For open answers: write each answer greedily and compare it with the expected one."""
    max_tokens: Positive = 128
    """The longest answer written."""
    answer: AnswerPart = "all"
    """What of an open answer is compared with the expected one: all, first_line, last_number, or json (its value).
    Where there is no such part the row is wrong."""
    base: bool = True
    """Measure the base model too, on the same rows."""
    forgetting: bool = True
    """Measure what the tuned model forgot, on general text that comes with the program."""
    swaps: Swaps = "none"
    """Ask held-out rows again with words swapped, which should change no answer: none, pronouns (English), or pairs of
    words ([[she, he], [Anna, Ali]])."""
    suite: str | None = None
    """A file of cases (JSON lines: a prompt, and checks of its answer) that both models are asked at the end."""


class Recipe(Section):
    model: Model
    task: Literal["auto", "classification", "generation", "text", "preference"] = "auto"
    """What is measured: labels, open answers, the loss alone, or pairs of answers; auto follows the data's format."""
    data: Data
    prompt: Prompt = Prompt()
    method: Literal["lora", "full"] = "lora"
    """What trains: a LoRA adapter beside the frozen model, or full: every weight of the model, in float32. full needs
    about 30 bytes of memory for each weight, and a rate about a tenth of LoRA's."""
    lora: Lora = Lora()
    head: Head | None = None
    """For rows with a label each: a linear layer on the last token's state chooses the label, head first and then with
    the adapter ({} for the defaults); without it the labels' own tokens are scored."""
    preferences: Preferences | None = None
    """For rows with two answers to a prompt, chosen and rejected: learn to prefer the first, by DPO ({} for the
    defaults) or ORPO."""
    quantize: Literal["none", "4bit"] = "none"
    """4bit: NF4 of bitsandbytes on torch, affine 4-bit on MLX."""
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    backend: Literal["auto", "mlx", "torch", "reference"] = "auto"
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU where there is one; cpu: the processor all the same."""
    tracker: Literal["none", "tensorboard", "trackio"] = "none"
    """Send losses and rates there too; both keep them on this machine."""
    output: str = "runs"
    """The folder in which each run makes its own folder."""

    @property
    def head_alone(self) -> bool:
        """Whether a head learns alone before the first step."""
        return self.head is not None and self.head.first_epochs > 0

    def with_train(self, **changes: Any) -> Recipe:
        """The same with other keys under `train`, which are not checked again."""
        return self.model_copy(update={"train": self.train.model_copy(update=changes)})

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.task == "classification" and self.data.format not in ("auto", "classification"):
            raise ValueError(
                f"task classification needs rows of text and label, and data.format says {self.data.format}"
            )
        if self.head is not None:
            if self.task not in ("auto", "classification") or self.data.format not in ("auto", "classification"):
                raise ValueError("head: it chooses among labels, so the rows need a text and a label; remove it")
            if self.lora.start_from is not None:
                raise ValueError("lora.start_from: an adapter without this head is no start for it; remove one of them")
            if self.prompt.loss_on != "completion":
                raise ValueError("prompt.loss_on: with a head only the label is learned; remove it")
        self._refuse_with_full()
        if self.preferences is None and self.task == "preference":
            raise ValueError("task: preference needs the section preferences; write preferences: {}")
        if self.preferences is not None:
            if self.task not in ("auto", "preference"):
                raise ValueError(f"preferences: pairs of answers are measured, and task says {self.task}; remove it")
            if self.head is not None:
                raise ValueError("preferences: pairs of answers have no label for a head to choose; remove one of them")
            if self.evaluate.swaps != "none":
                raise ValueError("evaluate.swaps: pairs of answers are not asked again; remove it")
            if self.lora.dropout:
                raise ValueError("lora.dropout: pairs are compared without chance; set it to 0")
            if self.prompt.loss_on == "all" or self.data.format not in ("auto", "prompt", "chat"):
                raise ValueError("preferences: two answers to a prompt are compared; leave data.format and loss_on out")
        if self.data.labels is not None and self.task not in ("auto", "classification"):
            raise ValueError(f"data.labels belongs to task classification, and task says {self.task}")
        return self

    def _refuse_with_full(self) -> None:
        """Raises ValueError where every weight is to train and a key speaks of what is frozen then."""
        if self.method != "full":
            return
        if self.quantize != "none":
            raise ValueError("quantize: weights of 4 bits cannot be trained themselves; remove it, or set method: lora")
        if self.head is not None:
            raise ValueError("head: it learns on the states of a frozen model; remove it, or set method: lora")
        if self.model.dtype not in ("auto", "float32"):
            raise ValueError(
                "model.dtype: method: full trains in float32, as most of its steps are smaller than what 16 bits can "
                "tell apart; remove it"
            )
        if self.lora != Lora():
            raise ValueError("lora: with method: full there is no adapter; remove the section, or set method: lora")

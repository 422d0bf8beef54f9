"""From files to examples, as a recipe asks: truncation, labels, splits, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from toy_tokenizers import CHATML, MISTRAL, QWEN3, all_kinds, byte_level, metaspace
from transformers import PreTrainedTokenizerFast

from finetune.data.prepare import prepare
from finetune.data.problems import refuse
from finetune.data.renderers import question_tokens
from finetune.errors import DataError, RecipeError
from finetune.events import Work
from finetune.recipe.schema import Recipe
from tests.unit.toy_run import result_of

REVIEWS = [{"text": f"film {n} is {'good' if n % 2 else 'bad'}", "label": n % 2} for n in range(40)]
CHAT = [
    {
        "messages": [
            {"role": "system", "content": "Be warm."},
            *({"role": role, "content": f"{role} {n} {turn}"} for turn in range(3) for role in ("user", "assistant")),
        ]
    }
    for n in range(10)
]

LOSING = {"valid": "valid.jsonl", "max_dropped": 0.5}


def write(folder: Path, rows: list, name: str = "train.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return name


def prepared(folder: Path, rows: list, tokenizer=None, data: dict | None = None, **sections):
    asked = {"train": write(folder, rows), **(data or {})}
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": asked, **sections})
    found = result_of(prepare(recipe, tokenizer or byte_level(), base=folder))
    refuse(found, recipe)
    return found


def learned(tokenizer, example) -> str:
    return tokenizer.decode(example.tokens[example.weights > 0])


def test_classification(tmp_path):
    tokenizer = byte_level(bos=True)
    found = prepared(tmp_path, REVIEWS, tokenizer)
    assert (found.task, found.format, found.template) == ("classification", "classification", "plain")
    assert found.labels == ("0", "1")
    assert [tokenizer.decode(tokens) for tokens in found.label_tokens] == [" 0", " 1"]
    assert (found.train.rows, found.valid.rows, found.test) == (36, 4, None)
    assert {one.answer for one in found.valid.examples} == {"0", "1"}
    example = found.train.examples[0]
    assert tokenizer.decode(example.prompt_tokens) == "<s>film 0 is bad\nLabel:" and example.location == "train.jsonl:1"
    assert learned(tokenizer, example) == " 0</s>" and example.prompt == "film 0 is bad\nLabel:"
    assert (example.tokens.dtype, example.weights.dtype) == (np.int32, np.float32)
    assert "set apart for validation (seed 0), stratified by label" in found.valid.notes[0]
    for row in (*found.train.examples, *found.valid.examples):
        tokens = found.label_tokens[found.labels.index(row.answer)]
        assert tuple(row.tokens[len(row.prompt_tokens) :]) == (*tokens, tokenizer.eos_token_id)


def test_the_same_recipe_gives_the_same_examples(tmp_path):
    one, two = prepared(tmp_path, REVIEWS), prepared(tmp_path, REVIEWS)
    pairs = zip((*one.train.examples, *one.valid.examples), (*two.train.examples, *two.valid.examples), strict=True)
    assert all((a.tokens == b.tokens).all() and a.location == b.location for a, b in pairs)
    other = prepared(tmp_path, REVIEWS, seed=1)
    assert {row.location for row in other.valid.examples} != {row.location for row in one.valid.examples}


def test_a_label_that_begins_another_is_scored_with_its_end(tmp_path):
    rows = [{"text": f"t {n}", "label": ("good", "good film")[n % 2]} for n in range(10)]
    found = prepared(tmp_path, rows)
    assert all(tokens[-1] == byte_level().eos_token_id for tokens in found.label_tokens)
    with pytest.raises(RecipeError, match=r"'good film' begins with label 'good'; set prompt.end_token: true"):
        prepared(tmp_path, rows, prompt={"end_token": False})


def test_a_label_has_the_same_tokens_wherever_it_stands(tmp_path):
    texts = ["good !", "bad !", "good fi", "bad fi", "long !", "sad fi"]  # "fi" and "lm" would make one token
    rows = [{"text": text, "label": ("lm", "bad")[n % 2]} for n, text in enumerate([*texts, "fi", "the fi"])]
    found = prepared(tmp_path, rows, metaspace(), prompt={"template": "{text}", "completion": "{label}"})
    for row in (*found.train.examples, *found.valid.examples):
        tokens = found.label_tokens[found.labels.index(row.answer)]
        assert tuple(row.tokens[len(row.prompt_tokens) : -1]) == tokens
        assert row.weights[len(row.prompt_tokens) :].all() and not row.weights[: len(row.prompt_tokens)].any()


def test_labels_by_chat_template(tmp_path):
    tokenizer = byte_level(CHATML)
    found = prepared(tmp_path, REVIEWS, tokenizer, prompt={"template": "chat", "system": "Judge."})
    assert [tokenizer.decode(tokens) for tokens in found.label_tokens] == ["0", "1"]
    assert found.train.examples[0].prompt == (
        "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nfilm 0 is bad<|im_end|>\n<|im_start|>assistant\n"
    )
    assert learned(tokenizer, found.train.examples[0]) == "0<|im_end|>"


def test_prompt_is_kept_apart_even_when_it_is_learned(tmp_path):
    found = prepared(tmp_path, REVIEWS, byte_level(bos=True), prompt={"loss_on": "all"})
    example = found.train.examples[0]
    assert example.weights.tolist() == [0] + [1] * (len(example.tokens) - 1)
    assert byte_level().decode(example.prompt_tokens).endswith("Label:")


@pytest.mark.parametrize(
    ("rows", "other", "error", "said"),
    [
        ([{"text": "a", "label": "x"}] * 3, {}, DataError, "needs two different labels, and there is x"),
        (REVIEWS, {"data": {"labels": ["0", "2"]}}, DataError, "train.jsonl:2: label '1' is not one of 0, 2"),
        (CHAT, {"data": {"labels": ["0", "2"]}}, RecipeError, "data.labels: the rows are chat and have no label"),
        (REVIEWS, {"prompt": {"system": "x"}}, RecipeError, "prompt.system: needs a conversation"),
        (REVIEWS, {"prompt": {"template": "chat"}}, RecipeError, "the model has no chat template"),
        (CHAT, {}, RecipeError, "the model has no chat template; choose .* set prompt.template: plain"),
        (CHAT, {"prompt": {"template": "{text}"}}, RecipeError, "the rows are chat; use auto, chat"),
        (CHAT, {"prompt": {"template": "plain", "completion": "{label}"}}, RecipeError, "hold their answers whole"),
        ([{"text": "a"}, {"text": "b"}], {"prompt": {"template": "alpaca"}}, RecipeError, "needs a question"),
        ([{"text": "a"}, {"text": "b"}], {"prompt": {"template": "chat"}}, RecipeError, "rows are plain text"),
        ([{"text": "a"}, {"text": "b"}], {"task": "generation"}, RecipeError, "rows are plain text; use text"),
        ([{"text": "a"}, {"text": "b"}], {"task": "classification"}, RecipeError, "the rows are text"),
        (REVIEWS, {"train": {"max_length": 8, "truncation": "error"}}, DataError, "train.jsonl:1: .*max_length is 8"),
        (REVIEWS, {"train": {"max_length": 8, "truncation": "drop"}}, DataError, "data.train: no row is left"),
    ],
)
def test_what_does_not_go_together(tmp_path, rows, other, error, said):
    with pytest.raises(error, match=said):
        prepared(tmp_path, rows, **other)


def test_a_validation_label_must_occur_in_train(tmp_path):
    write(tmp_path, [{"text": "a", "label": 7}, {"text": "b", "label": 1}], "valid.jsonl")
    with pytest.raises(DataError, match=r"valid.jsonl:1: label '7' does not occur in the training rows"):
        prepared(tmp_path, REVIEWS, data={"valid": "valid.jsonl"})
    skipping = {"valid": "valid.jsonl", "on_error": "skip", "max_dropped": 0.5}
    found = prepared(tmp_path, REVIEWS, data=skipping)
    assert len(found.valid.examples) == 1 and found.valid.left_out[0][0] == "valid.jsonl:1" and found.valid.rows == 2


def test_bad_rows_are_listed_together_or_skipped(tmp_path):
    rows = [*REVIEWS, {"text": "", "label": 1}]
    (tmp_path / "valid.jsonl").write_text('{"text": "x", "label": 1}')
    write(tmp_path, rows)
    text = (tmp_path / "train.jsonl").read_text() + "\nnonsense"

    def run(on_error, **more):
        (tmp_path / "bad.jsonl").write_text(text)
        data = {"train": "bad.jsonl", "valid": "valid.jsonl", "on_error": on_error} | more
        return prepared(tmp_path, rows, data=data)

    with pytest.raises(DataError, match=r"(?s)bad.jsonl:42: .*bad.jsonl:41: text is empty.*2 bad rows") as caught:
        run("stop")
    assert "data.on_error: skip and data.max_dropped: 0.05 to leave" in str(caught.value)  # both words at once
    found = run("skip", max_dropped=0.05)
    assert len(found.train.examples) == 40 and found.train.rows == 42 and len(found.train.left_out) == 2


def test_tasks_follow_the_format(tmp_path):
    assert prepared(tmp_path, [{"text": "a b"}, {"text": "c d"}]).task == "text"
    generation = prepared(tmp_path, REVIEWS, task="generation")
    assert generation.task == "generation" and not generation.labels and generation.train.examples[0].answer == "0"
    chat = prepared(tmp_path, CHAT, byte_level(CHATML))
    assert (chat.task, chat.template) == ("generation", "chat")
    assert chat.train.examples[0].answer.startswith("assistant") and chat.train.examples[0].answer.endswith(" 2")


def test_unrolled_conversations_are_said(tmp_path):
    found = prepared(tmp_path, CHAT, byte_level(QWEN3))
    assert found.train.rows == 9 and len(found.train.examples) == 27
    assert any("9 conversations unrolled" in note for note in found.train.notes)


texts = st.text(st.sampled_from("ab filmgood \n\u00e9"), min_size=1, max_size=200).filter(str.strip)
slow = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@slow
@given(
    st.lists(texts, min_size=4, max_size=8, unique_by=str.strip),
    st.sampled_from([24, 40]),
    st.sampled_from(sorted(all_kinds())),
)
def test_truncation_of_prompts_never_touches_the_answer(tmp_path, rows, max_length, kind):
    tokenizer = all_kinds()[kind]
    data = [{"text": text, "label": "good" if n % 2 else "bad"} for n, text in enumerate(rows)]
    found = prepared(tmp_path, data, tokenizer, train={"max_length": max_length})
    whole = prepared(tmp_path, data, tokenizer)
    full = {one.location: one for one in (*whole.train.examples, *whole.valid.examples)}
    for part in (found.train, found.valid):
        assert not part.dropped
        for one in part.examples:
            assert len(one.tokens) <= max_length and learned(tokenizer, one).strip() == f"{one.answer}</s>"
            assert (one.location in part.shortened) == (len(full[one.location].tokens) > max_length)
            if one.location in part.shortened:
                assert len(one.tokens) >= max_length - 8  # nothing is cut without need
                assert one.prompt.endswith("\nLabel:") and full[one.location].prompt.startswith(one.prompt[:-7])
            else:
                assert (one.tokens == full[one.location].tokens).all()


def test_truncation_of_conversations_drops_the_earliest_turns(tmp_path):
    tokenizer = byte_level(CHATML, bos=True)
    length = max(len(one.tokens) for one in prepared(tmp_path, CHAT, tokenizer).train.examples)
    found = prepared(tmp_path, CHAT, tokenizer, train={"max_length": length - 12})
    assert len(found.train.shortened) == 9 and not found.train.dropped
    for one in found.train.examples:
        assert one.prompt.startswith("<|im_start|>system\nBe warm.<|im_end|>\n<|im_start|>user\nuser")
        assert " 0<|im_end|>" not in one.prompt and learned(tokenizer, one).count("<|im_end|>") == 2
        assert one.tokens[0] == tokenizer.bos_token_id


def test_one_long_turn_is_cut_at_its_end_or_dropped(tmp_path):
    def rows(user, assistant):
        said = [[("user", f"{user} {n}"), ("assistant", f"{n} {assistant}")] for n in range(4)]
        return [{"messages": [{"role": role, "content": text} for role, text in one]} for one in said]

    tokenizer = byte_level(MISTRAL)
    found = prepared(tmp_path, rows("film " * 90, "good"), tokenizer, train={"max_length": 40})
    assert all(len(one.tokens) == 40 and one.prompt.endswith(" [/INST]") for one in found.train.examples)
    with pytest.raises(DataError, match="its answer and the template alone fill it"):
        prepared(tmp_path, rows("film", "good " * 90), tokenizer, train={"max_length": 40})


@pytest.mark.parametrize("policy", ["end", "prompt"])
def test_plain_text_is_cut_at_its_end(tmp_path, policy):
    rows = [{"text": "film " * 50 + str(n)} for n in range(4)]
    found = prepared(tmp_path, rows, data={"max_dropped": 0.9}, train={"max_length": 20, "truncation": policy})
    assert all(len(one.tokens) == 20 for one in found.train.examples) and len(found.train.shortened) == 3
    assert "3 rows lost their end" in found.train.notes[-2]


def test_cutting_the_end_drops_rows_without_an_answer(tmp_path):
    rows = [{"prompt": "film " * n, "completion": "good " * 30} for n in (1, 2, 3, 4, 90)]
    write(tmp_path, rows[:1], "valid.jsonl")
    found = prepared(tmp_path, rows, data=LOSING, train={"max_length": 20, "truncation": "end"})
    assert len(found.train.examples) == 4
    assert found.train.dropped == (("train.jsonl:5", "nothing of the answer is left within train.max_length"),)


def test_drop_keeps_the_others(tmp_path):
    rows = [{"prompt": "film " * n, "completion": "good"} for n in (1, 2, 3, 4, 90)]
    write(tmp_path, rows[:1], "valid.jsonl")
    found = prepared(tmp_path, rows, data=LOSING, train={"max_length": 20, "truncation": "drop"})
    assert len(found.train.examples) == 4 and found.train.dropped[0][0] == "train.jsonl:5"
    assert "more than train.max_length 20" in found.train.dropped[0][1] and not found.train.shortened


def test_rows_with_nothing_to_learn_are_dropped(tmp_path):
    unlearned = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}]
    write(tmp_path, CHAT[:1], "valid.jsonl")
    found = prepared(tmp_path, [*CHAT, *unlearned], byte_level(CHATML), data=LOSING)
    assert found.train.dropped == (("train.jsonl:11", "no token is supervised"),)


@pytest.mark.parametrize(
    ("what", "train", "data", "remedies"),
    [
        ("bad", {}, {"on_error": "skip"}, "fix them, raise train.max_length, or set"),
        ("long", {"truncation": "drop"}, {}, "raise train.max_length, set train.truncation: prompt, or set"),
        ("long", {"truncation": "end"}, {}, "raise train.max_length, set train.truncation: prompt, or set"),
        ("unanswerable", {}, {}, "raise train.max_length, or set"),
    ],
)
def test_too_many_rows_left_out_stop_the_run(tmp_path, what, train, data, remedies):
    """Whatever left them out, and whatever the recipe says of one row: a share is a word of its own."""
    worse = {
        "bad": {"prompt": "film"},
        "long": {"prompt": "film " * 90, "completion": "good"},
        "unanswerable": {"prompt": "film", "completion": "good " * 90},
    }[what]
    good = [{"prompt": f"film {n}", "completion": "good"} for n in range(198)]
    write(tmp_path, good[:1], "valid.jsonl")

    def run(lost, rows, **more):
        settings = {"max_length": 30} | train
        return prepared(tmp_path, [*good[: rows - lost], *[worse] * lost], data=LOSING | data | more, train=settings)

    assert len(run(2, 199, max_dropped=0.0101).train.left_out) == 2
    assert len(run(2, 200, max_dropped=0.01).train.left_out) == 2
    with pytest.raises(DataError, match=r"data.train: 3 of 200 rows \(1.5%\) would be left out") as caught:
        run(3, 200, max_dropped=0.01)
    said = str(caught.value)
    assert "train.jsonl:198: " in said and f"{remedies} data.max_dropped: 0.02" in said
    assert len(run(3, 200, max_dropped=0.02).train.left_out) == 3
    with pytest.raises(DataError, match=r"1 of 20 rows \(5.0%\).*data.max_dropped: 0.05$"):
        run(1, 20, max_dropped=0.01)


def test_an_unrolled_conversation_is_one_row(tmp_path):
    """Of a long talk every answer may be too long by itself."""
    long = {"role": "assistant", "content": "good " * 90}
    talk = {"messages": [{"role": "user", "content": "q"}, long] * 3}
    rows = [*CHAT, talk]
    write(tmp_path, CHAT[:1], "valid.jsonl")
    found = prepared(tmp_path, rows, byte_level(QWEN3), data=LOSING | {"max_dropped": 0.1}, train={"max_length": 80})
    assert len(found.train.dropped) > 1 and {place for place, _ in found.train.dropped} == {"train.jsonl:11"}


@pytest.mark.parametrize("kind", all_kinds())
def test_a_question_is_asked_as_in_training(tmp_path, kind):
    tokenizer = all_kinds(CHATML)[kind]
    cases = [
        (REVIEWS, {}, "film 0 is bad"),
        (REVIEWS, {"template": "Is it good? {text} "}, "film 0 is bad"),
        (REVIEWS, {"template": "chat", "system": "Judge."}, "film 0 is bad"),
        ([{"instruction": f"name {n}", "output": "x"} for n in range(5)], {}, "name 0"),
        ([{"prompt": f"name {n} ", "completion": "x"} for n in range(5)], {}, "name 0 "),
    ]
    for rows, prompt, question in cases:
        write(tmp_path, rows)
        recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "train.jsonl"}, "prompt": prompt})
        found = result_of(prepare(recipe, tokenizer, base=tmp_path))
        rows_by_place = {one.location: one for one in (*found.train.examples, *found.valid.examples)}
        named = recipe.model_copy(update={"data": recipe.data.model_copy(update={"format": found.format})})
        asked = question_tokens(named, tokenizer, [{"role": "user", "content": question}])
        assert asked == rows_by_place["train.jsonl:1"].prompt_tokens.tolist()


def test_a_conversation_goes_on_as_in_training(tmp_path):
    tokenizer = metaspace(CHATML)
    write(tmp_path, CHAT)
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": "train.jsonl", "format": "chat"}})
    found = result_of(prepare(recipe, tokenizer, base=tmp_path))
    example = next(one for one in (*found.train.examples, *found.valid.examples) if one.location == "train.jsonl:1")
    assert question_tokens(recipe, tokenizer, CHAT[0]["messages"][:-1]) == example.prompt_tokens.tolist()


def test_progress_is_reported(tmp_path):
    recipe = Recipe.model_validate({"model": {"path": "m"}, "data": {"train": write(tmp_path, REVIEWS)}})
    reported = [(one.what, one.done, one.total) for one in Work(prepare(recipe, byte_level(), base=tmp_path))]
    assert reported == [
        ("data: reading", 0, 1), ("data: comparing rows", 40, 40), ("data: reading", 1, 1),
        ("data: preparing train", 36, 36),
        ("data: preparing valid", 4, 4),
    ]  # fmt: skip


def test_labels_that_look_alike_are_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "film": 2, "Label": 3, ":": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")
    rows = [{"text": f"film {n}", "label": ("good", "bad")[n % 2]} for n in range(8)]
    with pytest.raises(RecipeError, match="labels 'bad' and 'good' are the same tokens to the model"):
        prepared(tmp_path, rows, tokenizer)

"""Where answers begin and end in tokens, on every kind of tokenizer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from toy_tokenizers import BARE, BROKEN, CHATML, GEMMA, LLAMA3, MISTRAL, QWEN3, TEMPLATES, all_kinds, byte_level

from finetune.data import loss_mask
from finetune.data.chat_template import PLAIN_CHAT, ChatRenderer
from finetune.data.column_template import ALPACA, PLAIN, TemplateRenderer
from finetune.data.rows import Record, Rendered
from finetune.data.tokenizer import begin_tokens, encode_prompt, stop_tokens
from finetune.errors import RecipeError

KINDS = all_kinds()
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30).filter(str.strip)
answers = words | st.sampled_from([" a", "\n\nb", "é", " \U0001f600 x", "1", "good "])
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Tokenised:
    """A row as text and as tokens, in plain lists."""

    rendered: Rendered
    tokens: list[int]
    weights: list[float]
    answer: tuple[int, int]
    split: bool

    def __len__(self) -> int:
        return len(self.tokens)


def tokenise(tokenizer, texts: list[Rendered]) -> list[Tokenised]:
    return [
        Tokenised(
            rendered, row.tokens.tolist(), row.weights.tolist(), (row.answer_start, row.answer_end), split=row.apart
        )
        for rendered, row in zip(texts, loss_mask.tokenise(tokenizer, texts), strict=True)
    ]


def one(tokenizer, rendered: Rendered) -> Tokenised:
    (row,) = tokenise(tokenizer, [rendered])
    return row


def supervised(tokenizer, row: Tokenised) -> str:
    return tokenizer.decode([t for t, weight in zip(row.tokens, row.weights, strict=True) if weight])


def check(tokenizer, row: Tokenised, end: int, turns: int = 1) -> None:
    """What holds for every row whose every answer ends with the token `end`."""
    prefix = begin_tokens(tokenizer)
    assert row.tokens[: row.answer[0]] == encode_prompt(tokenizer, row.rendered.prompt)
    written, added = row.rendered.text.count("<s>"), bool(prefix) and not row.rendered.text.startswith("<s>")
    assert row.tokens.count(tokenizer.bos_token_id) == written + added
    assert row.tokens.count(end) >= turns and row.tokens[-1] == end and row.weights[-1] == 1
    runs = [list(run) for weight, run in itertools.groupby(range(len(row)), lambda i: row.weights[i]) if weight]
    assert len(runs) == turns and all(row.tokens[run[-1]] == end for run in runs)
    assert row.weights[0] == 0


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(words, answers)
@example("0", "<s>")
def test_prompt_and_completion(kind, prompt, completion):
    tokenizer = KINDS[kind]
    renderer = TemplateRenderer("plain", PLAIN["prompt"], "prompt", ["prompt", "completion"])
    record = Record("f:1", values={"prompt": prompt, "completion": completion}, answer=completion)
    rendered = renderer.render(record)[0]
    assert rendered.text == prompt + completion and rendered.prompt == prompt.rstrip() == renderer.question(record)
    row = one(tokenizer, rendered)
    check(tokenizer, row, tokenizer.eos_token_id)
    assert row.tokens.count(tokenizer.eos_token_id) == 1
    if not row.split and kind != "metaspace" and kind != "metaspace without bos":
        assert supervised(tokenizer, row) == rendered.text[len(rendered.prompt) :] + "</s>"


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(words, st.sampled_from(["good", "bad", "1"]))
def test_labels_look_the_same_after_every_text(kind, text, label):
    tokenizer = KINDS[kind]
    renderer = TemplateRenderer("plain", PLAIN["classification"], "classification", ["text", "label"])
    row = one(tokenizer, renderer.render(Record("f:1", values={"text": text}, answer=label))[0])
    check(tokenizer, row, tokenizer.eos_token_id)
    assert supervised(tokenizer, row).strip() == f"{label}</s>"
    other = one(tokenizer, renderer.render(Record("f:1", values={"text": "plain"}, answer=label))[0])
    assert row.tokens[slice(*row.answer)] == other.tokens[slice(*other.answer)]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_conversations(kind, family):
    tokenizer = all_kinds(TEMPLATES[family])[kind]
    said = [("user", "what is this?"), ("assistant", "it is a film"), ("user", "good?"), ("assistant", "not at all")]
    record = Record("f:1", messages=tuple({"role": role, "content": text} for role, text in said))
    rows = tokenise(tokenizer, ChatRenderer("chat", tokenizer).render(record))
    ends = stop_tokens(tokenizer) - {tokenizer.eos_token_id} or {tokenizer.eos_token_id}
    learned = [supervised(tokenizer, row) for row in rows]
    if family == "qwen3":
        assert len(rows) == 2 and all(row.rendered.record.last_only for row in rows)
        for row, answer in zip(rows, ("it is a film", "not at all"), strict=True):
            check(tokenizer, row, *ends)
            assert supervised(tokenizer, row).strip().startswith("<think>") and answer in supervised(tokenizer, row)
    elif family == "bare":  # only the last turn can be closed, with EOS
        assert [row.tokens.count(tokenizer.eos_token_id) for row in rows] == [1]
        assert rows[0].tokens[-1] == tokenizer.eos_token_id and "what" not in learned[0]
    else:
        assert len(rows) == 1
        check(tokenizer, rows[0], *ends, turns=2)
        end = tokenizer.decode(list(ends))
        assert learned[0].replace(" ", "") == f"itisafilm{end}notatall{end}"
    assert not any("user" in text or "assistant" in text for text in learned)


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (CHATML, "yes<|im_end|>"),
        (LLAMA3, "yes<|eot|>"),
        (GEMMA, "yes<end_of_turn>"),
        (MISTRAL, " yes</s>"),
        (QWEN3, "<think>\n\n</think>\n\nyes<|im_end|>"),
        (BARE, "yes</s>"),
        (PLAIN_CHAT, " yes</s>"),
    ],
)
def test_what_is_supervised_exactly(template, learned):
    tokenizer = byte_level(template)
    messages = ({"role": "user", "content": "good?"}, {"role": "assistant", "content": "yes"})
    row = one(tokenizer, ChatRenderer("chat", tokenizer).render(Record("f:1", messages=messages))[0])
    assert supervised(tokenizer, row) == learned
    # A space at the prompt's end would join the answer, and two newlines would part before it.
    assert row.split == (template in (BARE, LLAMA3))
    assert row.tokens == row.tokens[: row.answer[0]] + tokenizer(learned, add_special_tokens=False)["input_ids"]


def test_exact_arrays():
    tokenizer = byte_level(bos=True)
    renderer = TemplateRenderer("plain", PLAIN["classification"], "classification", ["text"])
    row = one(tokenizer, renderer.render(Record("f:1", values={"text": "A film "}, answer="bad"))[0])
    assert tokenizer.convert_ids_to_tokens(row.tokens) == [
        "<s>", "A", "Ġfilm", "Ġ", "Ċ", "Label", ":", "Ġbad", "</s>",
    ]  # fmt: skip
    assert row.weights == [0, 0, 0, 0, 0, 0, 0, 1, 1] and row.answer == (7, 8)


def conversation(renderer: ChatRenderer, *weights: int) -> Rendered:
    said = []
    for number, weight in enumerate(weights):
        said.append({"role": "user", "content": f"q{number}"})
        said.append({"role": "assistant", "content": f"a{number}", "weight": weight})
    return renderer.render(Record("f:1", messages=tuple(said)))[0]


@pytest.mark.parametrize(
    ("loss_on", "end_token", "weights", "learned"),
    [
        ("completion", True, (1, 1), "a0<|im_end|>a1<|im_end|>"),
        ("completion", False, (1, 1), "a0a1"),
        ("completion", True, (0, 1), "a1<|im_end|>"),
        ("completion", True, (1, 0), "a0<|im_end|>"),
        ("last", True, (1, 1), "a1<|im_end|>"),
        ("completion", True, (0, 0), ""),
    ],
)
def test_which_turns_are_learned(loss_on, end_token, weights, learned):
    tokenizer = byte_level(CHATML)
    renderer = ChatRenderer("chat", tokenizer, loss_on=loss_on, end_token=end_token)
    assert supervised(tokenizer, one(tokenizer, conversation(renderer, *weights))) == learned


def test_loss_on_everything_but_the_begin_token():
    tokenizer = byte_level(CHATML, bos=True)
    row = one(tokenizer, conversation(ChatRenderer("chat", tokenizer, loss_on="all"), 1, 1))
    assert row.weights == [0] + [1] * (len(row) - 1)
    assert tokenizer.decode(row.tokens[slice(*row.answer)]) == "a1"


def test_tool_calls_and_system():
    tokenizer = byte_level(PLAIN_CHAT)
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    messages = ({"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    renderer = ChatRenderer("plain", tokenizer, PLAIN_CHAT, system="Be brief.")
    rendered = renderer.render(Record("f:1", messages=messages, tools=({"name": "f"},)))[0]
    assert rendered.prompt == 'Tools: [{"name": "f"}]\n\nBe brief.\n\nUser: go\nAssistant:'
    assert rendered.text[len(rendered.prompt) :] == ' {"name": "f", "arguments": {"x": 1}}</s>'


def test_templates_that_refuse_or_cannot_be_followed_say_so():
    system = tuple({"role": role, "content": "x"} for role in ("system", "user", "assistant"))
    with pytest.raises(ValueError, match=r"refuses this conversation .System role not supported"):
        ChatRenderer("chat", byte_level(GEMMA)).render(Record("f:1", messages=system))
    with pytest.raises(ValueError, match="where the answer begins cannot be known"):
        ChatRenderer("chat", byte_level(BROKEN)).render(Record("f:1", messages=system))


def test_a_token_across_the_border_is_split():
    tokenizer = byte_level()
    whole = tokenizer.convert_ids_to_tokens(tokenizer("Label")["input_ids"])
    assert whole == ["Label"]
    renderer = TemplateRenderer("plain", PLAIN["prompt"], "prompt", ["prompt"])
    row = one(tokenizer, renderer.render(Record("f:1", values={"prompt": "Lab"}, answer="el"))[0])
    assert row.split and row.tokens[: row.answer[0]] == encode_prompt(tokenizer, "Lab")
    assert supervised(tokenizer, row) == "el</s>"


def test_a_token_across_the_border_of_an_earlier_answer_is_split():
    tokenizer = byte_level(BARE)
    said = (("user", "a"), ("assistant", "film"), ("user", "b"), ("assistant", "\u3042"))
    record = Record("f:1", messages=tuple({"role": role, "content": text} for role, text in said))
    row = one(tokenizer, ChatRenderer("chat", tokenizer).render(record)[0])
    assert row.split and supervised(tokenizer, row) == "film\u3042</s>"


def test_nothing_written_twice():
    tokenizer = byte_level(bos=True)
    renderer = TemplateRenderer("plain", PLAIN["text"], "text", ["text"])
    row = one(tokenizer, renderer.render(Record("f:1", values={"text": "<s>A film</s>"}))[0])
    assert tokenizer.convert_ids_to_tokens(row.tokens) == ["<s>", "A", "Ġfilm", "</s>"]
    assert row.weights == [0, 1, 1, 1]


def test_no_end_token():
    tokenizer = byte_level()
    record = Record("f:1", values={"prompt": "good"}, answer=" film")
    renderer = TemplateRenderer("plain", PLAIN["prompt"], "prompt", ["prompt"], end_token=False)
    assert supervised(tokenizer, one(tokenizer, renderer.render(record)[0])) == " film"
    tokenizer.eos_token, eos = None, tokenizer.eos_token
    try:
        with pytest.raises(RecipeError, match=r"no EOS token; set prompt.end_token: false"):
            one(tokenizer, TemplateRenderer("plain", PLAIN["prompt"], "prompt", ["prompt"]).render(record)[0])
    finally:
        tokenizer.eos_token = eos


def test_alpaca_leaves_an_empty_input_out():
    renderer = TemplateRenderer("alpaca", ALPACA["alpaca"], "alpaca", ["instruction", "input", "output"])
    values = {"instruction": "Name it.", "input": "x", "output": "y"}
    with_input = renderer.render(Record("f:1", values=values, answer="y"))[0]
    assert with_input.text == "### Instruction:\nName it.\n\n### Input:\nx\n\n### Response:\ny"
    assert with_input.prompt.endswith("### Response:\n")
    without = renderer.render(Record("f:1", values={**values, "input": ""}, answer="y"))[0]
    assert without.text == "### Instruction:\nName it.\n\n### Response:\ny"


def test_own_templates():
    def render(template, **other):
        renderer = TemplateRenderer(template, template, "classification", ["text", "label", "year"], **other)
        return renderer.render(Record("f:1", values={"text": "t", "year": "1999"}, answer="bad"))[0].text

    assert render("{text} ({year}) {{x}}:") == "t (1999) {x}: bad"
    assert render("{text}\n") == "t\nbad"
    assert render("{text}:", completion=" <{label}>") == "t: <bad>"
    for template, said in [
        ("{txt}", "unknown placeholder {txt}; there are label, text, year"),
        ("{text", "write {{ and }}"),
        ("chats", "neither auto, chat, plain nor alpaca"),
        ("{text} {label}", "{label} is the answer"),
        ("{text!r}", "unknown placeholder"),
    ]:
        with pytest.raises(RecipeError, match=said.replace("{", r"\{").replace("}", r"\}")):
            render(template)
    with pytest.raises(RecipeError, match=r"must hold {completion} or {label} once"):
        render("{text}", completion="yes")

"""What a run will need: the largest micro-batch, operations, machines, and how many tokens fit."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from backends import matmul_speed, registry
from backends.interface import LoraSpec
from backends.memory_plan import trained_numbers
from backends.model_folder import ModelFolder
from backends.torch_backend.costs import NVIDIA
from finetune.commands.plan import answer, compare_backends, verdict
from finetune.console import Console, plain_page
from finetune.data.collate import groups, micro_batches, step_indices
from finetune.data.rows import Example, Prepared, Split
from finetune.evaluation.analysis import Questions
from finetune.events import Work
from finetune.recipe.load import check_recipe
from finetune.recipe.schema import MICRO_TOKENS
from finetune.report.plan_tables import steps_table
from finetune.training import budget, memory_settings, predicted_time
from finetune.training.budget import ENOUGH, LEAST, PLAIN, SPARE, Workload, fitting_tokens
from finetune.training.extra_evaluations import Seconds
from finetune.training.forecast import forecast_here, forecast_on
from finetune.training.job import Job
from finetune.training.memory_settings import starting_tokens
from finetune.training.predicted_time import seconds_of_parts
from finetune.training.sampled_steps import Rows, largest_micro
from finetune.training.speed import Speed
from tests.unit.test_memory_plan import FLOAT, HALF, architecture, model_folder
from tests.unit.toy_run import prepared

GPU = registry.costs("torch", "gpu")
LENGTHS = st.lists(st.integers(2, 300), min_size=1, max_size=40)


def examples(lengths: Sequence[int], supervised: int = 1) -> list[Example]:
    weights = [(np.arange(n) >= n - supervised).astype(np.float32) for n in lengths]
    return [Example(np.full(len(one), i, np.int32), one, "row") for i, one in enumerate(weights)]


def layers_run(made: Workload, tokens: int) -> float:
    """In an epoch, by all micro-batches; a backward pass counts twice."""
    return made.cut(tokens).batches * len(made.architecture.modules) * (3 + made.model.checkpointing)


def work(lengths: Sequence[int] = (100, 200, 300), last: int = 99, **changes: Any) -> Workload:
    shape = architecture(4)
    adapted = {name: size for name, size in shape.modules.items() if int(name.split(".")[2]) >= 4 - last}
    made = Workload(shape, FLOAT, LoraSpec(8, 16.0), adapted, examples(lengths), 8, 3.0, 0)
    return replace(made, **changes)


@given(LENGTHS, st.integers(1, 16), st.sampled_from([64, 512, 4096]))
def test_no_micro_batch_of_the_first_epoch_is_larger(lengths: list[int], batch_size: int, tokens: int) -> None:
    rows = examples(lengths)
    found = largest_micro(rows, batch_size, 0, tokens)
    sizes = []
    for step in range(-(-len(rows) // batch_size)):
        chosen = [rows[i] for i in step_indices(len(rows), batch_size, 0, step)]
        sizes += [batch.inputs.size for batch in micro_batches(chosen, tokens, share=False)]
    assert found.tokens == max(sizes)


@pytest.mark.parametrize("lora", [LoraSpec(8, 16.0), LoraSpec(8, 16.0, whole=True)])
def test_an_average_is_held_beside_what_trains_but_not_on_an_nvidia_card(lora: LoraSpec) -> None:
    plain = work(lora=lora)
    averaged = replace(plain, averaged=True)
    numbers = trained_numbers(plain.architecture, lora, plain.adapted)
    for costs, each in ((registry.costs("torch", "cpu"), 4), (registry.costs("mlx", "gpu"), 4), (NVIDIA, 0)):
        more = averaged.memory(512, costs).peak - plain.memory(512, costs).peak
        assert more == pytest.approx(each * numbers)


def test_the_longest_row_of_many_steps_is_seen() -> None:
    rows = examples([10] * 1000 + [500])
    assert all(largest_micro(rows, 2, seed, 64).width == 504 for seed in range(5))


@given(LENGTHS, st.integers(1, 200))
def test_operations_grow_with_the_rows(lengths: list[int], more: int) -> None:
    assert work([*lengths, more + 2]).operations() > work(lengths).operations()


def test_what_frozen_blocks_make_of_a_row_is_counted_apart() -> None:
    assert work([101], last=4).kept_on_disk("cpu") == 0
    assert work([101], last=1).kept_on_disk("cpu") == 100 * architecture().hidden * 4


def test_operations_of_a_row_by_hand() -> None:
    shape = architecture(4)
    made = work([101], epochs=1.0, lora=LoraSpec(1, 1.0))
    linear, attention = 4 * shape.linear * 100, 4 * 4 * shape.queries * 100**2  # forward and backward
    lora = 6 * 100 * sum(out + inp for out, inp in shape.modules.values())
    head = 4 * shape.vocabulary * shape.hidden
    assert made.operations() == pytest.approx(linear + attention + lora + head)


def test_frozen_blocks_are_computed_in_one_epoch_and_never_backward() -> None:
    whole, top, longer = (work(last=n, epochs=e).operations() for n, e in ((4, 1.0), (1, 1.0), (1, 10.0)))
    assert longer < top < whole


def test_recomputation_is_half_as_much_again() -> None:
    plain = work()
    ratio = replace(plain, model=replace(FLOAT, checkpointing=True)).operations() / plain.operations()
    assert 1.3 < ratio < 1.5


@given(st.floats(0, 2e9), st.floats(1, 4))
def test_more_memory_never_means_fewer_tokens(free: float, factor: float) -> None:
    made = work([300] * 64, batch_size=64)
    tokens = fitting_tokens(made, GPU, free)
    assert tokens <= fitting_tokens(made, GPU, free * factor)
    assert tokens == LEAST or made.memory(tokens, GPU).step <= free
    assert tokens & (tokens - 1) == 0


def test_no_more_tokens_than_a_step_has() -> None:
    assert fitting_tokens(work([50] * 4, batch_size=4), GPU, 1e15) == 256


def test_a_large_model_fits_on_large_machines_only() -> None:
    shape = architecture(4)
    heavy = work(architecture=replace(shape, other=8 * 10**9), model=HALF)
    fits = {machine.name: forecast_on(machine, heavy, name, None).fits for name, machine in registry.machines()}
    assert not fits["MacBook M1, 8 GB"]
    assert fits["RTX 4090, 24 GB"]
    assert all(forecast_on(machine, work(), name, None).fits for name, machine in registry.machines())


def test_this_machine_is_timed() -> None:
    found = forecast_here(work(), "reference", 4096)
    assert found.fits
    assert found.seconds > 0
    assert found.rate > 1e8 and found.speed.rate == found.rate * found.reached
    assert found.seconds == pytest.approx(3.0 * work().operations(work().cut(4096)) / found.speed.rate)


def rows(count: int, task: str = "classification") -> Prepared:
    """Rows with one supervised token, of two labels."""
    train, valid, test = (
        Split(name, n, tuple(replace(e, answer="ab"[i % 2], answer_start=39) for i, e in enumerate(examples([40] * n))))
        for name, n in (("train", count), ("valid", 6), ("test", 8))
    )
    labels: dict[str, Any] = {"labels": ("a", "b"), "label_tokens": ((1,), (2,))} if task == "classification" else {}
    return Prepared(task=task, format="prompt", template="plain", train=train, valid=valid, test=test, **labels)  # type: ignore[arg-type]


def planned(folder: Path, backend: str = "reference", **sections: Any) -> str:
    values = {
        "model": {"path": "m"}, "data": {"train": "t"}, "backend": "reference", "train": {"micro_tokens": "auto"},
        **sections,
    }  # fmt: skip
    console = Console(width=120, record=True, file=io.StringIO())
    for part in answer(check_recipe(values), ModelFolder.open(model_folder(folder)), rows(20), backend):
        console.print(part)
    return console.export_text()


@pytest.mark.parametrize(("layers", "kept"), [("all", False), (1, True)])
def test_the_plan_says_first_whether_it_fits_and_how_long_it_takes(tmp_path: Path, layers: Any, kept: bool) -> None:
    text = planned(tmp_path, lora={"layers": layers})
    assert re.match(r"fits here \(reference\): [\d.]+ [MG]B of [\d.]+ GB free, (about \d+|under 1) s in all\n", text)
    assert all(machine.name in text for _, machine in registry.machines())
    assert ("temporary file on disk" in text) == kept
    for line in (r"base model +8 rows", r"training +6 steps", r"validation +\d x 6 rows", r"tuned model +8 rows"):
        assert re.search(line, text), line
    assert re.search(r"\npeak +[\d.]+\nfree +[\d.]+\n", text)


def test_the_plan_says_first_that_it_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "free_bytes", lambda name, device: 1000)
    assert planned(tmp_path).startswith("does not fit here: it needs ")


def test_the_plan_without_a_backend_tells_of_other_machines(tmp_path: Path) -> None:
    text = planned(tmp_path, backend="")
    assert text.startswith("no backend works here") and "RTX 4090" in text and "whole run" not in text


def test_numbers_stand_at_the_right_and_no_table_has_a_caption(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "backend": "reference"}
    folder = ModelFolder.open(model_folder(tmp_path))
    made = answer(check_recipe(values), folder, rows(20), "reference")
    shown = [*made, steps_table(check_recipe(values), folder, rows(20).train.examples)]
    tables = [part for part in shown if isinstance(part, Table)]
    assert len(tables) == 4
    for table in tables:
        assert table.caption is None
        assert [column.justify for column in table.columns] == ["left", *["right"] * (len(table.columns) - 1)]


# the time of a whole run


def parts_of(prepared: Prepared, **sections: Any) -> dict[str, float]:
    values = {"model": {"path": "m"}, "data": {"train": "t"}, **sections}
    made = work(examples=prepared.train.examples)
    return seconds_of_parts(check_recipe(values), prepared, made, Speed(1e9), MICRO_TOKENS)


def test_every_part_of_a_run_has_its_time() -> None:
    found = parts_of(rows(20), train={"epochs": 20})
    assert list(found) == [
        "base model: loss", "base model: labels", "training", "validation: loss", "validation: labels",
        "tuned model: loss",
    ]  # fmt: skip
    assert all(value > 0 for value in found.values())
    longer = parts_of(replace(rows(20), label_tokens=((1, 3), (2,))), train={"epochs": 20})
    assert "tuned model: labels" in longer, "a longer label is scored each time"
    assert longer["validation: labels"] > 3 * found["validation: labels"]
    assert "tuned model: labels" in parts_of(rows(20)), "in a dozen steps hardly a model learns that labels follow"
    assert "base model: loss" not in parts_of(rows(20), evaluate={"base": False})
    assert "base model: answers" in parts_of(rows(20, "generation"))
    assert "base model: answers" not in parts_of(rows(20, "generation"), evaluate={"generate": False})


def test_what_frozen_blocks_make_of_rows_is_computed_once_and_row_by_row() -> None:
    half = replace(work([20] * 16, last=2), epochs=1.0)
    host = Speed(1e30, host=1.0, beside=False)
    modules = len(half.architecture.modules)
    batches = half.cut(MICRO_TOKENS, None).batches
    assert half.seconds(host, MICRO_TOKENS) == pytest.approx(modules * (batches * 3 / 2 + PLAIN * 16 / 2))
    again = replace(half, epochs=4.0).seconds(host, MICRO_TOKENS)
    assert again == pytest.approx(modules * (batches * 3 / 2 + PLAIN * 16 / 2 / 4))
    made = Seconds(check_recipe({"model": {"path": "m"}, "data": {"train": "t"}}), rows(4), half, host, MICRO_TOKENS)
    four = rows(4).train.examples
    assert made.reading(four) == pytest.approx(modules * (1 / 2 + PLAIN * 4 / 2))
    assert made.reading(four, known=True) == pytest.approx(modules / 2)


def test_twice_the_epochs_are_twice_the_training_and_more_validations() -> None:
    one, two = (parts_of(rows(20), train={"epochs": n}) for n in (2, 4))
    assert two["training"] == pytest.approx(2 * one["training"])
    assert two["validation: loss"] == pytest.approx(5 / 3 * one["validation: loss"])
    assert two["base model: loss"] == one["base model: loss"] == one["tuned model: loss"]


def test_a_validation_that_the_base_has_made_takes_no_time() -> None:
    apart = rows(20)
    same = replace(apart, test=None)
    assert parts_of(same)["validation: loss"] == pytest.approx(3 / 4 * parts_of(apart)["validation: loss"])


def test_memory_here_is_asked_for_on_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "describe", lambda name, device: {"device": "cuda: some card", "half": "bfloat16"})
    monkeypatch.setattr(registry, "measured_rate", lambda name, number_type, device: 1e13)
    for free, fits in ((2**40, True), (2**20, False), (None, None)):
        monkeypatch.setattr(registry, "free_bytes", lambda name, device, free=free: free)
        here = forecast_here(work(), "torch", None)
        assert (here.device, here.memory, here.fits) == ("gpu", free, fits)
        assert here.tokens == (MICRO_TOKENS if free is None else here.tokens) and here.tokens >= LEAST


def job(micro_tokens: Any) -> Any:
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "train": {"micro_tokens": micro_tokens}}
    rows = SimpleNamespace(train=SimpleNamespace(examples=work().examples))
    return SimpleNamespace(recipe=check_recipe(values), backend="torch", prepared=rows, folder="folder", streamed=None)


def started(monkeypatch: pytest.MonkeyPatch, micro_tokens: Any, free: int | None) -> tuple[int, list[str]]:
    monkeypatch.setattr(memory_settings, "workload", lambda *_: work([300] * 64, batch_size=64))
    session: Any = SimpleNamespace(device="cuda: some card", free_bytes=lambda: free)
    choice = Work(starting_tokens(job(micro_tokens), session))
    notes = [note.text for note in choice]
    return choice.result, notes


@pytest.mark.parametrize("free", [None, 20_000_000, 10**9, 10**12])
@pytest.mark.parametrize("asked", ["auto", 8192, 512])
def test_the_predicted_time_is_that_of_the_tokens_that_fit(
    monkeypatch: pytest.MonkeyPatch, asked: Any, free: int | None
) -> None:
    """Where only the number of passes costs time, and none of it the products."""
    made = work([300] * 64, batch_size=64)
    monkeypatch.setattr(predicted_time, "workload", lambda *_: made)
    monkeypatch.setattr(predicted_time, "rate_here", lambda *_: 1e30)
    monkeypatch.setattr(predicted_time, "timed", lambda *_: 1.0)
    split = replace(rows(20).train, examples=tuple(made.examples))
    prepared = replace(rows(20), train=split, valid=replace(split, name="valid"))
    session: Any = SimpleNamespace(device="cuda: some card", free_bytes=lambda: free, peak_bytes=lambda: 0)
    tokens, _ = started(monkeypatch, asked, free)
    planned: Any = SimpleNamespace(**vars(job(asked)) | {"prepared": prepared, "suite": None})
    parts = predicted_time.look_ahead(planned, session, Questions()).seconds
    host, layers = registry.costs("torch", "gpu").host, len(made.architecture.modules)
    assert parts["training"] == pytest.approx(3 * host * layers_run(made, tokens))
    read = sum(len(example) - 1 for example in made.examples)
    assert parts["validation: loss"] == pytest.approx(4 * host * layers * -(-read // tokens))


def test_a_number_stands_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    for free in (10**12, None):
        assert started(monkeypatch, 3000, free) == (3000, [])


def test_a_number_that_does_not_fit_is_lowered_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, said = started(monkeypatch, 3000, 20_000_000)
    assert LEAST <= tokens < 3000
    assert f"{tokens:,} tokens" in said[0]


def test_auto_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    less, more = (started(monkeypatch, "auto", free)[0] for free in (60_000_000, 10**12))
    assert LEAST <= less < more == 2**15  # the step has 64 rows of 304
    assert started(monkeypatch, "auto", None)[0] == MICRO_TOKENS


@pytest.mark.parametrize("whole", [False, True])
def test_the_gradient_and_the_best_have_room_before_they_are_there(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `plan`: no more tokens are taken than fit beside all that a loaded session does not hold yet."""
    made = work([300] * 64, batch_size=64, lora=LoraSpec(8, 16.0, whole=whole), averaged=True)
    numbers = trained_numbers(made.architecture, made.lora, made.adapted)
    for costs, each in ((GPU, 8), (registry.costs("mlx", "gpu"), 12)):
        assert made.made_later(costs) == each * numbers
    step = made.memory(2048, GPU).step / SPARE
    monkeypatch.setattr(memory_settings, "workload", lambda *_: made)
    chosen = []
    for free in (step + 8 * numbers + 1, step + 8 * numbers - 1):
        session: Any = SimpleNamespace(device="cuda: some card", free_bytes=lambda free=free: free)
        chosen.append(Work(starting_tokens(job("auto"), session)))
        list(chosen[-1])
    assert [choice.result for choice in chosen] == [2048, 1024]


def test_before_a_model_is_loaded_it_is_counted_in_the_type_that_the_card_computes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cards before 8.0 keep keys for every query head; with `dtype: auto` that follows from the card alone."""
    made = work([300] * 64, last=1, unsettled=True, streamable=True, model=replace(FLOAT, dtype="auto"))
    half = replace(made, model=replace(FLOAT, dtype="float16"), unsettled=False)
    kept = half.memory(ENOUGH, NVIDIA).training
    plain = replace(half, model=replace(FLOAT, dtype="bfloat16"))
    assert (
        plain.memory(ENOUGH, NVIDIA).training < kept - 2
        and plain.memory(LEAST, NVIDIA).peak < half.memory(LEAST, NVIDIA).peak
    )
    for module in (memory_settings, budget):
        monkeypatch.setattr(module, "workload", lambda *_: made)
    monkeypatch.setattr(registry, "costs", lambda *_: NVIDIA)
    values = {"model": {"path": "m"}, "data": {"train": "t"}, "lora": {"layers": 1}}
    recipe = check_recipe(values | {"train": {"gradient_checkpointing": "auto", "micro_tokens": ENOUGH}})
    folder: Any = SimpleNamespace(weights={"file": ()})
    rows: Any = SimpleNamespace(train=SimpleNamespace(examples=made.examples))
    found = {}
    for name, half_type in (("new", "bfloat16"), ("old", "float16")):
        facts = {"device": "cuda: some card", "half": half_type}
        monkeypatch.setattr(registry, "describe", lambda *_, facts=facts: facts)
        monkeypatch.setattr(registry, "free_bytes", lambda *_: (kept - 1) / SPARE)
        settling = Work(memory_settings.settle_memory(Job(recipe, folder, cast(Any, None), "torch", rows), None))
        list(settling)
        smallest = replace(made, unsettled=False).memory(LEAST, NVIDIA).peak
        monkeypatch.setattr(registry, "free_bytes", lambda *_, free=smallest: free)
        found[name] = settling.result.recipe.train.gradient_checkpointing, budget.has_to_stream(recipe, folder, "torch")
    assert found == {"new": (False, False), "old": (True, True)}


def test_the_rate_of_products_waits_once_and_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a product takes 10 ms and a wait 30 ms: the longer the queue, the nearer to the true rate."""
    clock, queued = [0.0], [0]
    monkeypatch.setattr(matmul_speed.time, "perf_counter", lambda: clock[0])

    class Product:
        T, shape = None, matmul_speed.SIZES["gpu"]

        def __matmul__(self, other: object) -> Product:
            clock[0] += 0.01
            queued[-1] += 1
            return self

    def wait(product: Product) -> None:
        clock[0] += 0.03
        queued.append(0)

    rows, width = matmul_speed.SIZES["gpu"]
    found = matmul_speed.operations_per_second(Product(), Product(), wait)
    assert queued.pop() == 0  # nothing is computed after the last wait
    assert queued == [1, 1, 3, *[6] * 3]
    assert found == pytest.approx(6 * 2 * rows * width**2 / 0.09)


@pytest.mark.parametrize("name", registry.NAMES)
def test_every_backend_measures_its_rate(name: str) -> None:
    if reason := registry.probe(name):
        pytest.skip(reason)
    assert 1e9 < registry.measured_rate(name, "float32") < 1e15


@pytest.mark.parametrize(("apart", "verdict"), [
    ((0.0,), "nothing to compare"), ((0.0, 3e-4), "the same model"), ((0.0, 31.0), "different models"),
    ((0.0, -2.0, 1e-6), "different models"), ((0.0, float("nan"), 1e-6), "different models"),
])  # fmt: skip
def test_a_comparison_of_backends_ends_with_what_it_means(
    monkeypatch: pytest.MonkeyPatch, apart: tuple[float, ...], verdict: str
) -> None:
    """apart: from the first backend, of one log-probability, for each that works."""
    names = [f"backend {n}" for n in range(len(apart))]

    def opened(name: str, *arguments: Any) -> Any:
        return SimpleNamespace(score=lambda batch: SimpleNamespace(logprob=np.array([[apart[names.index(name)], 1.0]])))

    monkeypatch.setattr(registry, "automatic", lambda: names)
    monkeypatch.setattr(registry, "probe", lambda name: None)
    monkeypatch.setattr(registry, "open_session", opened)
    tokens = np.arange(4, dtype=np.int32)
    example = Example(tokens, np.ones(4, np.float32), "a:1", "b", "c", 2, 4)
    folder: Any = SimpleNamespace(path=Path("m"), remote_code=False)
    settings = check_recipe({"model": {"path": "m"}, "data": {"train": "a.jsonl"}})
    first, _ = compare_backends(settings, folder, [example])
    assert verdict in " ".join(plain_page(lambda console: console.print(first)).split())


def test_a_processor_starts_layers_before_it_computes_and_a_gpus_host_beside_it() -> None:
    cpu, gpu = (replace(registry.costs("torch", device), host=1e-3, reached=0.5) for device in ("cpu", "gpu"))
    assert Speed.of(cpu, 2e12).seconds(1e10, 5) == pytest.approx(0.01 + 0.005)
    assert Speed.of(gpu, 2e12).seconds(1e10, 5) == pytest.approx(0.01)
    assert Speed.of(gpu, 2e12).seconds(1e10, 15) == pytest.approx(0.015)
    assert Speed.of(cpu, 2e12, processes=2).host == 0.5e-3


def test_rows_of_one_length_take_what_their_operations_take() -> None:
    made = work([97] * 16)  # 96 positions each: a multiple of the widths
    assert made.seconds(Speed(1.0), 4096) == pytest.approx(made.operations())


@pytest.mark.parametrize("lengths", [[12, 90] * 8, [20] * 15 + [300], [98] * 16], ids=["two", "one", "a token more"])
def test_padding_takes_time(lengths: list[int]) -> None:
    made = work(lengths)
    padded = made.cut(4096).rows.tokens
    assert padded >= sum(n - 1 for n in lengths)
    assert made.seconds(Speed(1.0), 4096) == pytest.approx(made.operations(made.cut(4096)))
    assert made.operations(made.cut(4096)) > made.operations()


def test_what_the_rows_of_a_step_begin_with_takes_time_once() -> None:
    same, apart = work([297] * 16), work([297] * 16)
    for example in same.examples:
        example.tokens[:200] = 7
    assert same.cut(8192).rows.tokens < 0.5 * apart.cut(8192).rows.tokens
    once = Rows(16 + 2, 16 * 96 + 2 * 200, 16 * 96 * 296 + 2 * 200**2)  # two steps; each row looks at its keys
    assert same.cut(8192).rows == once
    top = work([297] * 16, last=1)
    for example in top.examples:
        example.tokens[:200] = 7
    assert top.cut(8192).rows == work([297] * 16, last=1).cut(8192).rows, "frozen blocks keep whole rows"


def test_what_rows_begin_with_is_read_once_a_batch() -> None:
    whole = work([297] * 32)
    for example in whole.examples:
        example.tokens[:200] = 7
    recipe = check_recipe({"model": {"path": "m"}, "data": {"train": "t"}})
    read = Seconds(recipe, prepared(), replace(whole, batch_size=32), Speed(1.0), 4096)
    batches = -(-32 * (96 + 50) // (4096 - 200))  # as `groups` cuts them
    assert len(list(groups([97] * 32, 4096, 200))) == batches == 2
    supervised = sum(np.count_nonzero(example.weights[1:]) for example in whole.examples)
    once = Rows(34, 32 * 96 + 2 * 200, 32 * 96 * 296 + 2 * 200**2)
    assert read.reading(whole.examples) == pytest.approx(read.passes(once, supervised))
    assert read.passes(once, supervised) < 0.5 * read.passes(Rows.of([296] * 32), supervised)


def test_each_pass_unpacks_4_bit_weights_and_makes_masks() -> None:
    speed = Speed(1.0, unpacking=100.0, masking=10.0)
    made = work([97] * 16)
    plain, dropped = made.seconds(speed, 4096), replace(made, lora=replace(made.lora, dropout=0.1))
    packed = replace(made, model=replace(FLOAT, quantize="4bit"))
    masked = 16 * 96 * sum(inputs for _, inputs in made.adapted.values())
    assert dropped.seconds(speed, 4096) - plain == pytest.approx(2 * 10 * masked)
    few, many = (packed.seconds(speed, tokens) - made.seconds(speed, tokens) for tokens in (512, 4096))
    assert many == pytest.approx(2 * 100 * made.architecture.linear * 2)  # two steps of one micro-batch each
    assert few > many
    again = replace(packed, model=replace(packed.model, checkpointing=True))
    assert again.seconds(speed, 4096) - again.operations() == pytest.approx(1.5 * many)


def test_the_time_of_many_steps_follows_from_a_sample() -> None:
    made = work([97] * 10**4, batch_size=2)
    assert made.seconds(Speed(1.0), 4096) == pytest.approx(made.operations())


def test_a_gpus_host_sets_the_least_time() -> None:
    """Few tokens at a time are no faster: each layer of each pass has to be started."""
    assert Speed(1e12).seconds(1e9, 1e6) == 1e-3
    assert Speed(1e12, 1e-3).seconds(1e9, 100) == 0.1
    few, many = (layers_run(work([100] * 64, batch_size=64), tokens) for tokens in (512, 8192))
    layers = len(work().architecture.modules)
    assert many == 3 * layers and few > 8 * many
    again = work([100] * 64, batch_size=64, model=replace(FLOAT, checkpointing=True))
    assert layers_run(again, 8192) == 4 * layers
    sampled = work([100] * 10**4, batch_size=2)
    assert layers_run(sampled, 8192) == 3 * layers * 5000  # not all steps are looked at

    tiny, machine = work([20] * 8), next(machine for name, machine in registry.machines() if name == "torch")
    found = forecast_on(machine, tiny, "torch", 4096)
    assert found.seconds == pytest.approx(tiny.epochs * GPU.host * layers_run(tiny, 4096))


@pytest.mark.parametrize(("recomputed", "streamed", "how"), [
    (False, False, ""), (True, False, ", with blocks computed again in the backward pass"),
    (False, True, ", with frozen blocks read from the disk"),
    (True, True, ", with blocks computed again in the backward pass and frozen blocks read from the disk"),
])  # fmt: skip
def test_the_verdict_says_how_it_fits(recomputed: bool, streamed: bool, how: str) -> None:
    found = replace(forecast_on(registry.machines()[0][1], work(), "mlx", 64), recomputed=recomputed, streamed=streamed)
    assert verdict(found, 60.0).plain.startswith(f"fits here{how} (mlx): ")
    assert verdict(found, 60.0).plain.endswith(", about 60 s in all")

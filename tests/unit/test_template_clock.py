"""The time that a chat template writes is fixed once for a run: recorded, and used again."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from backends.model_folder import ModelFolder
from finetune.data.prepare import prepare
from finetune.data.renderers import question_tokens
from finetune.data.rows import Prepared
from finetune.data.template_clock import DATE, now, reads_clock
from finetune.disk.identity import check_identity, clock_of, identity_of
from finetune.errors import Incompatible
from finetune.recipe.locate import builtin
from finetune.recipe.schema import Recipe
from tests.unit.data.toy_tokenizers import CHATML, byte_level
from tests.unit.toy_run import result_of

MONDAY, TUESDAY = datetime(2026, 11, 23, 23, 59, 59), datetime(2026, 11, 24, 0, 0, 1)
SECONDS = "Now {{ strftime_now('%Y-%m-%d %H:%M:%S') }}. " + CHATML
LLAMA = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
WRITES = {
    SECONDS: "Now 2026-11-23 23:59:59. ",
    LLAMA + "On {{ date_string }}. " + CHATML: "On 23 Nov 2026. ",
    "On {{ date_string }}. " + CHATML: "On 23 Nov 2026. ",
    "On {{ current_date }}. " + CHATML: "On 2026-11-23. ",
}


def recipe(folder: Path) -> Recipe:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(3)))
    data = {"train": "rows.jsonl", "valid": "rows.jsonl", "format": "chat"}
    return Recipe.model_validate({"model": {"path": "m"}, "data": data})


def told(folder: Path, template: str, clock: datetime | None) -> Prepared:
    return result_of(prepare(recipe(folder), byte_level(template), base=folder, clock=clock))


def identity(folder: Path, found: Prepared) -> dict[str, Any]:
    base = ModelFolder.open(builtin("builtin:reviews-base"))
    return result_of(identity_of(recipe(folder), found, base))


def begun(folder: Path, found: Prepared) -> dict[str, Any]:
    """The identity of a run with these rows, written into its folder."""
    written = identity(folder, found)
    (folder / "identity.json").write_text(json.dumps(written))
    return written


@pytest.mark.parametrize("template", WRITES)
def test_every_name_that_templates_ask_gives_the_time_of_the_run(tmp_path: Path, template: str) -> None:
    found = told(tmp_path, template, MONDAY)
    assert {example.prompt.split("<|im_start|>")[0] for example in found.train.examples} == {WRITES[template]}
    asked = question_tokens(recipe(tmp_path), byte_level(template), [{"role": "user", "content": "a"}], MONDAY)
    assert asked == found.train.examples[0].prompt_tokens.tolist()


def test_a_run_keeps_its_time_and_a_new_one_has_its_own(tmp_path: Path) -> None:
    first = begun(tmp_path, told(tmp_path, SECONDS, MONDAY))
    assert clock_of(tmp_path) == MONDAY
    time.sleep(1.1)
    again = identity(tmp_path, told(tmp_path, SECONDS, clock_of(tmp_path)))
    check_identity(first, again)
    with pytest.raises(Incompatible, match="clock: the checkpoint has"):
        check_identity(first, identity(tmp_path, told(tmp_path, SECONDS, TUESDAY)))


@pytest.mark.parametrize("steps", [(3,), (3, 6), (99999999, 100000000)])
def test_a_run_whose_identity_is_lost_takes_its_time_from_its_newest_checkpoint(tmp_path: Path, steps: Any) -> None:
    written = begun(tmp_path, told(tmp_path, SECONDS, MONDAY))
    (tmp_path / "identity.json").unlink()
    for step in steps:
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        clock = MONDAY if step == steps[-1] else TUESDAY
        (folder / "identity.json").write_text(json.dumps(written | {"clock": clock.isoformat()}))
    broken = tmp_path / "checkpoints" / "step-00000009.broken"
    broken.mkdir()
    (broken / "identity.json").write_text("{}")
    assert clock_of(tmp_path) == MONDAY


def test_runs_without_a_time_keep_their_behaviour(tmp_path: Path) -> None:
    written = begun(tmp_path, told(tmp_path, "On {{ date_string }}. " + CHATML, None))
    assert "clock" not in written and clock_of(tmp_path) is None
    old = told(tmp_path, "On {{ date_string }}. " + CHATML, None).train.examples[0]
    assert old.prompt.startswith(f"On {DATE}. ")
    today = told(tmp_path, "{{ strftime_now('%Y') }}" + CHATML, None).train.examples[0]
    assert today.prompt.startswith(str(datetime.now().year))


def test_a_template_without_a_date_leaves_no_time_in_the_run(tmp_path: Path) -> None:
    assert "clock" not in begun(tmp_path, told(tmp_path, CHATML, MONDAY)) and not reads_clock(CHATML)
    assert clock_of(tmp_path) is None


def test_a_run_that_has_not_begun_takes_its_own_time_and_a_damaged_one_says_so(tmp_path: Path) -> None:
    before = now()
    found = clock_of(tmp_path)
    assert found is not None and found >= before
    (tmp_path / "identity.json").write_text('{"clock": "yesterday"}')
    with pytest.raises(Incompatible, match="clock cannot be read"):
        clock_of(tmp_path)

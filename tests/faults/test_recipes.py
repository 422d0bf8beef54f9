"""Every key of the recipe mistyped, out of range, of a wrong type, twice, or in a wrong section: exit 2 and the key."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import RecipeError
from finetune.recipe.load import load_recipe
from finetune.recipe.schema import Recipe
from tests.faults.cases import amounts
from tests.unit.test_recipe import keys

KEYS = keys(Recipe)
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
SCHEMA = Recipe.model_json_schema()
FREE = {"data.columns", "data.groups"}  # what stands in them are the user's own names
Tree = dict[str, Any]


def schema_of(key: str) -> dict[str, Any]:
    """The JSON schema of a key's own values, `null` and references resolved."""
    node = SCHEMA
    for part in key.split("."):
        node = node["properties"][part]
        for one in (node, *node.get("anyOf", ())):  # of a section that may be left out
            if reference := one.get("$ref", "").removeprefix("#/$defs/"):
                node = SCHEMA["$defs"][reference]
    return node


def choices(key: str) -> list[dict[str, Any]]:
    node = schema_of(key)
    return [one for one in node.get("anyOf", [node]) if one.get("type") != "null"]


def least() -> Tree:
    return {"model": {"path": "a/b"}, "data": {"train": "rows.jsonl"}}


def good(key: str) -> Any:
    """A value that the key may have."""
    if key == "data.encoding":
        return "cp1252"
    kinds = {"integer": 1, "number": 0.25, "boolean": True, "string": "words", "array": ["a"], "object": {"a": "b"}}
    first = choices(key)[0]
    if "enum" in first or "const" in first:
        return first.get("enum", [first.get("const")])[0]
    return max(kinds[first["type"]], first.get("minimum", 0)) if first["type"] == "integer" else kinds[first["type"]]


def put(tree: Tree, key: str, value: Any) -> Tree:
    *section, name = key.split(".")
    (tree.setdefault(section[0], {}) if section else tree)[name] = value
    return tree


def written(tree: Tree) -> str:
    """YAML, a key on a line."""
    lines = []
    for name, value in tree.items():
        if name in SECTIONS and isinstance(value, dict):
            lines += [f"{name}:", *(f"  {inner}: {_scalar(one)}" for inner, one in value.items())]
        else:
            lines.append(f"{name}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    return {"Infinity": ".inf", "-Infinity": "-.inf", "NaN": ".nan"}.get(text := json.dumps(value), text)


def misspelt(name: str, rng: random.Random) -> str:
    place = rng.randrange(len(name))
    edits = (
        name[:place] + name[place + 1 :],
        name[:place] + name[place] * 2 + name[place + 1 :],
        name[:place] + rng.choice("abcxyz_-") + name[place + 1 :],
        name[:place] + name[place:][:2][::-1] + name[place + 2 :],
        name.upper(),
        name + "s",
    )
    known = {part for key in KEYS for part in key.split(".")}
    return rng.choice([edit for edit in edits if edit and not edit.startswith("-") and edit not in {name, *known}])


def mistyped(key: str, rng: random.Random) -> tuple[str, str]:
    *section, name = key.split(".")
    wrong = misspelt(name, rng)
    return written(put(least(), ".".join([*section, wrong]), good(key))), wrong


def misplaced(key: str, rng: random.Random) -> tuple[str, str]:
    *section, name = key.split(".")
    others = sorted(one for one in SECTIONS - set(section) if f"{one}.{name}" not in KEYS)
    return written(put(least(), f"{rng.choice(others)}.{name}", good(key))), name


def twice(key: str, rng: random.Random) -> tuple[str, str]:
    name = key.split(".")[-1]
    lines = written(put(least(), key, good(key))).splitlines()
    at = next(i for i, line in enumerate(lines) if re.match(rf"\s*{name}:", line) and _section(lines, i) == key)
    lines.insert(at + 1, lines[at])
    return "\n".join(lines) + "\n", name


def _section(lines: list[str], at: int) -> str:
    """The dotted key that line `at` sets."""
    name = lines[at].split(":")[0]
    if not name.startswith(" "):
        return name
    return next(line.rstrip(":") for line in reversed(lines[:at]) if not line.startswith(" ")) + "." + name.strip()


def wrong_type(key: str, rng: random.Random) -> tuple[str, str]:
    offered: dict[str, list[Any]] = {
        "integer": [3, -7], "number": [0.5, 3.25], "boolean": [True, False], "string": ["word", ""],
        "array": [[], [1], [[1]], [{"a": 1}]], "object": [{}, {"a": 1}, {"a": {"b": []}}],
    }  # fmt: skip
    allowed = {one.get("type", "string") for one in choices(key)}
    if "number" in allowed:
        allowed.add("integer")
    if allowed & {"array", "object"}:  # what is in them counts too
        return written(put(least(), key, rng.choice([1.5, True, [[1]], [{"a": 1}]]))), key
    kind = rng.choice([kind for kind in sorted(offered) if kind not in allowed])
    return written(put(least(), key, rng.choice(offered[kind]))), key


def out_of_range(key: str, rng: random.Random) -> tuple[str, str]:
    """Beyond a bound of its numbers; not a word of its list; where anything goes, a wrong type."""
    bad: list[Any] = []
    for one in choices(key):
        if "minimum" in one:
            bad.append(one["minimum"] - rng.randint(1, 10**6))
        if "exclusiveMinimum" in one:
            bad += [one["exclusiveMinimum"], one["exclusiveMinimum"] - rng.randint(1, 10**6)]
        if (top := one.get("exclusiveMaximum")) is not None:
            bad += [top, top + rng.randint(1, 10**6)]
        if one.get("type") == "number":
            bad += [float("inf"), float("-inf"), float("nan")]
        if words := one.get("enum", [one["const"]] if "const" in one else None):
            bad.append(misspelt(str(rng.choice(words)), rng))
    return (written(put(least(), key, rng.choice(bad))), key) if bad else wrong_type(key, rng)


DAMAGES = (mistyped, misplaced, twice, wrong_type, out_of_range)


@pytest.mark.parametrize("rounds", amounts(1, 20_000 // (len(KEYS) * len(DAMAGES)) + 1))
def test_every_damage_to_every_key_is_refused_with_the_key(tmp_path: Path, rounds: int) -> None:
    file = tmp_path / "recipe.yaml"
    for number in range(rounds):
        for key in KEYS:
            for damage in DAMAGES:
                text, named = damage(key, random.Random(f"{number} {key} {damage.__name__}"))
                file.write_text(text, encoding="utf-8")
                try:
                    load_recipe(file)
                except RecipeError as error:
                    assert error.exit_code == 2
                    assert named in str(error), f"{damage.__name__} {key}:\n{text}\n{error}"
                    assert re.search(r"recipe\.yaml:\d+: ", str(error)), f"{damage.__name__} {key}: no line in {error}"
                else:
                    pytest.fail(f"{damage.__name__} {key} was taken:\n{text}")


@pytest.mark.parametrize("key", KEYS)
def test_without_damage_it_is_a_recipe(tmp_path: Path, key: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(written(put(least(), key, good(key))), encoding="utf-8")
    load_recipe(file)

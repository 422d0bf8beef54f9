"""YAML to Recipe and back: strict, with the line of every error and a "did you mean"."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, StreamEndEvent

from finetune.errors import Incompatible, RecipeError
from finetune.recipe.names import BUILTIN, absolute_paths
from finetune.recipe.schema import Data, Model, Prompt, Recipe
from finetune.text import secrets_in, shorten

MAX_BYTES, MAX_VALUES, MAX_DEPTH = 200_000, 5_000, 20  # a recipe is a page; what goes beyond is something else

LAST_KEY = "output"  # that `dump_recipe` writes
RECIPES = (".yaml", ".yml")


def load_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`lora.rank=16`), check, and make local paths absolute (to the recipe's folder).

    Raises RecipeError naming the file, the line and the remedy for every mistake at once.
    """
    try:
        if file.exists() and not file.is_file():  # a pipe would keep us waiting
            raise RecipeError(f"{file}: not an ordinary file; write the recipe into one")
        if file.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{file}: too large for a recipe ({file.stat().st_size:,} bytes)")
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{file}: no such recipe; `finetune init DATA` writes one") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"{file}: cannot be read ({reason}); a recipe is UTF-8 text") from None
    return parse_recipe(text, file, overrides)


def load_written(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, of a recipe that `dump_recipe` wrote for a run: every key is there.

    Raises Incompatible where its end is lost, whose keys would be read as their defaults.
    """
    recipe = load_recipe(file, overrides)
    if not re.search(rf"^{LAST_KEY}:", file.read_text(encoding="utf-8-sig"), re.MULTILINE):
        raise Incompatible(
            f"{file}: its end is lost (its last key, {LAST_KEY}, is missing); put back a copy of it, or begin anew"
        )
    return recipe


def parse_recipe(text: str, file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, of what `file` holds, or is going to hold."""
    tree = _tree(text, file)
    values = _plain(tree)
    for override in overrides:
        _apply_override(values, override)
    _refuse_secrets(file, values)
    recipe = check_recipe(values, locate=lambda keys: _location(file, tree, keys, overrides))
    return absolute_paths(recipe, file.resolve().parent, {o.split("=", 1)[0] for o in overrides})


def check_recipe(values: Mapping[str, Any], locate: Callable[[Sequence[str]], str] | None = None) -> Recipe:
    """A Recipe from plain values; `locate(keys)` gives a key's file and line, for the messages."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        locate = locate or (lambda keys: "recipe")
        lines = [_explain(problem, values, locate) for problem in error.errors()]
        raise RecipeError(*dict.fromkeys(lines)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back unchanged."""
    stream = io.StringIO()
    writer = YAML()
    writer.default_flow_style = False
    writer.width = 4096
    writer.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def _tree(text: str, file: Path) -> CommentedMap:
    try:
        refused = _beyond_bounds(text)
        tree = None if refused else YAML(typ="rt", pure=True).load(text)
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        key = str(error.problem).split('"')[1] if '"' in str(error.problem) else "a key"
        raise RecipeError(f"{file}:{line}: key {key} stands twice; remove one") from None
    except MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1
        raise RecipeError(f"{file}:{line}: not valid YAML: {error.problem or error.context}") from None
    except (YAMLError, ValueError, RecursionError, TypeError) as error:  # the last: a `<<` of something odd
        raise RecipeError(f"{file}: not valid YAML: {error}") from None
    if refused:
        raise RecipeError(f"{file}:{refused}")
    if not isinstance(tree, CommentedMap):
        raise RecipeError(f"{file}:1: a recipe is a mapping of sections (model:, data:, ...)")
    return tree


def _beyond_bounds(text: str) -> str | None:
    """`line: what` for the first thing no recipe has, found before anything is built of it."""
    depth = values = 0
    for event in YAML(typ="rt", pure=True).parse(text):
        values += not isinstance(event, StreamEndEvent)
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            return f"{line}: a tag ({tag:.40}) has no place in a recipe; write the plain value"
        if getattr(event, "anchor", None) is not None:  # aliases of aliases grow without bound
            return f"{line}: anchors and aliases (& and *) have no place in a recipe; write the value out"
        if depth > MAX_DEPTH or values > MAX_VALUES:
            return f"{line}: more than {MAX_VALUES:,} values, or {MAX_DEPTH} levels of them; is this a recipe?"
    return None


def _refuse_secrets(file: Path, node: Any, keys: tuple[str, ...] = ()) -> None:
    """Raises RecipeError, without the value, where one looks like a token: a run writes its recipe down."""
    inner = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, value in inner:
        _refuse_secrets(file, value, (*keys, str(key)))
    if any(secrets_in(text) for text in (*keys[-1:], node) if isinstance(text, str)):
        name = ".".join("..." if secrets_in(key) else key for key in keys)
        raise RecipeError(
            f"{file}: {name}: this looks like a token or a password, and a run writes its recipe down; remove it, and "
            "give it in the environment (HF_TOKEN) or by `hf auth login`"
        )


def _plain(node: Any) -> Any:
    """ruamel's round-trip types as plain Python ones; a tagged value stays what it is and fails the check."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    if isinstance(node, str):
        return _joined(str(node))
    for kind in (bool, int, float):
        if isinstance(node, kind):
            return kind(node)
    return node


def _joined(text: str) -> str:
    """The text with each pair of surrogates, as JSON escapes it, as the one character that it stands for."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:  # half a pair: what is a path refuses it
        return text


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise RecipeError(f"{override!r}: an override is written key=value, such as lora.rank=16")
    try:
        plain = not _beyond_bounds(text)
        value = _plain(YAML(typ="rt", pure=True).load(text)) if text.strip() and plain else text or None
    except (YAMLError, ValueError, RecursionError, TypeError):
        value = text
    section = values
    for key in keys[:-1]:
        inner = section.setdefault(key, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r}: {key} has no keys of its own")
        section = inner
    section[keys[-1]] = value


def _location(file: Path, tree: Any, keys: Sequence[str], overrides: Sequence[str]) -> str:
    """`file:line` of the deepest of `keys` that the file has, or the override that set it."""
    dotted = ".".join(keys)
    for override in overrides:
        name = override.split("=", 1)[0]
        if f"{dotted}.".startswith(f"{name}.") or (name.startswith(f"{dotted}.") and keys[0] not in tree):
            return f"command line ({override})"
    line = 1
    for key in keys:
        if not isinstance(tree, CommentedMap) or key not in tree:
            break
        line = tree.lc.key(key)[0] + 1
        tree = tree[key]
    return f"{file}:{line}"


def _explain(error: Any, values: Any, locate: Callable[[Sequence[str]], str]) -> str:
    """One pydantic error in plain words, with its file and line."""
    keys = [str(part) for part in error["loc"]]
    present: list[str] = []
    node: Any = values
    for key in keys:
        if not isinstance(node, Mapping) or key not in node:
            break
        present.append(key)
        node = node[key]
    if error["type"] == "extra_forbidden":
        known = _fields_of(keys[:-1])
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{locate(keys)}: unknown key {'.'.join(keys)}; {hint}"
    if error["type"] == "missing":
        return f"{locate(present)}: {'.'.join(keys)} is missing; `finetune init DATA` writes a recipe that has it"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if error["type"] == "value_error" else f", not {_written(node)}"
    return f"{locate(present)}: {'.'.join(present) or 'recipe'}: {message}{got}"


def _written(value: Any) -> str:
    try:
        return shorten(repr(value), 80)
    except ValueError:  # an integer of thousands of digits
        return f"a very long {type(value).__name__}"


def _fields_of(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in path:
        annotation = model.model_fields[key].annotation if key in model.model_fields else None
        kinds = get_args(annotation) or (annotation,)  # a section may be left out
        section = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None)
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def recipe_of(target: str, overrides: Sequence[str]) -> Recipe:
    """The recipe that is named, or one around a data file with the embedded tokenizer and every default."""
    if target.lower().endswith(RECIPES):
        return load_recipe(Path(target), overrides)
    if overrides:
        raise RecipeError(f"{overrides[0]}: changes belong to a recipe, and {target} is data; write one: finetune init")
    recipe = Recipe(
        model=Model(path=f"{BUILTIN}reviews-base"), data=Data(train=target), prompt=Prompt(template="plain")
    )
    return absolute_paths(recipe, Path.cwd(), ())

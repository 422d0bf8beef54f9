"""The rows of a recipe made ready for training, and nothing more: `python rows_worker.py RECIPE`.

For `rows.py`, which sets PYTHONPATH to the code that is measured. It is valid in every checkout so far: modules are
looked for where they are and where they were, and a preparation that is a generator of its progress is run to its end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

WHERE = {
    "load_recipe": ("finetune.recipe.load", "finetune.recipe.recipe_file", "finetune.recipe_file"),
    "prepare": ("finetune.data.prepare",),
}


def find(name: str) -> Any:
    for place in WHERE[name]:
        try:
            return getattr(import_module(place), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"{name} is in none of {', '.join(WHERE[name])}: say in rows_worker.py where it is now")


def main() -> None:
    from transformers import AutoTokenizer

    recipe = find("load_recipe")(Path(sys.argv[1]), [])
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.path, local_files_only=True)
    made = find("prepare")(recipe, tokenizer, base=Path.cwd())
    if isinstance(made, Iterator):
        for _ in made:
            pass


if __name__ == "__main__":
    main()

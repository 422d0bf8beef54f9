"""How long `finetune check` takes over 100,000 rows of chat: `python tests/benchmarks/check_speed.py [rows]`.

The promise is 60 seconds and 1 GB on two cores. A hundredth of the rows are exact and a hundredth near copies.
"""

from __future__ import annotations

import json
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any


def chat_rows(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Conversations of one or two exchanges in the words of the embedded reviews."""
    draw = random.Random(seed)
    reviews = files("finetune").joinpath("assets", "reviews", "train.jsonl").read_text(encoding="utf-8")
    words = re.findall(r"[a-z']+", " ".join(json.loads(line)["text"].lower() for line in reviews.splitlines()))
    earlier: dict[str, Any] = {}
    for number in range(count):
        if number % 100 == 50:
            yield earlier
        elif number % 100 == 75:
            *rest, last = earlier["messages"]
            yield {"messages": [*rest, last | {"content": last["content"] + " indeed"}]}
        else:
            roles = ("user", "assistant") * (1 if draw.random() < 0.8 else 2)
            earlier = {"messages": [_said(role, words, draw) for role in roles]}
            yield earlier


def _said(role: str, words: list[str], draw: random.Random) -> dict[str, str]:
    size = draw.randint(5, 30) if role == "user" else draw.randint(10, 70)
    return {"role": role, "content": " ".join(draw.choices(words, k=size))}


def main() -> None:
    from finetune.commands.check import run
    from finetune.recipe.load import recipe_of

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "chat.jsonl"
        with data.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in chat_rows(count))
        wall, used = time.perf_counter(), time.process_time()
        run(recipe_of(str(data), []), Path(folder) / "found.json")
        print(f"{count:,} rows, {data.stat().st_size / 1e6:.0f} MB", end=": ")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{time.perf_counter() - wall:.1f} s, {time.process_time() - used:.1f} CPU s, peak {peak / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()

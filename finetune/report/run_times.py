"""Predicted and measured seconds of a run's parts: time.json, and a line of the report."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Annotated, ClassVar

from pydantic import AliasChoices, Field

from finetune.disk.run_files import read_json
from finetune.disk.run_folder import RunFolder
from finetune.events import Event, Outlook, Progress, Result, StepDone, Validated, Work
from finetune.report.eta import TRAINING, VALIDATION
from finetune.text import duration

# By part of a run. Files of earlier versions say foretold.
PredictedSeconds = Annotated[dict[str, float], Field(validation_alias=AliasChoices("predicted", "foretold"))]


@dataclass
class Times:
    """Seconds of each part of a run."""

    __pydantic_config__: ClassVar = {"allow_inf_nan": False}

    predicted: PredictedSeconds
    measured: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunFolder, outlook: Outlook) -> Times:
        """Those that the run wrote when it began; of a new one, those predicted now. Raises Incompatible."""
        saved = read_json(
            run.path / "time.json", Times, "delete it; then only what is measured from now on is reported"
        )
        if saved:
            return saved
        return cls({part: round(seconds, 3) for part, seconds in outlook.parts.items()})

    @contextmanager
    def measuring(self, part: str, run: RunFolder) -> Iterator[None]:
        """Inside, the part is done; then time.json is written."""
        began = time.perf_counter()
        yield
        self.measured[part] = round(time.perf_counter() - began, 3)
        run.write_json("time.json", asdict(self))

    def watching(self, events: Generator[Event, None, Result]) -> Generator[Event, None, Result]:
        """The same events and the same result; the parts whose progress they tell are measured."""
        measured: dict[str, float] = {}
        work, last = Work(events), time.perf_counter()
        for event in work:
            if isinstance(event, Progress):
                part = event.what.partition(":")[0]
                measured[part] = measured.get(part, 0.0) + time.perf_counter() - last
            yield event
            last = time.perf_counter()
        self.measured |= {part: round(seconds, 3) for part, seconds in measured.items()}
        return work.result

    def of_events(self, events: Iterable[Event]) -> Times:
        """And of the steps and validations that metrics.jsonl tells of, in every process of the run."""
        seconds = {TRAINING: 0.0, VALIDATION: 0.0}
        for event in events:
            if isinstance(event, StepDone | Validated):
                seconds[TRAINING if isinstance(event, StepDone) else VALIDATION] += event.seconds
        return Times(self.predicted, self.measured | {part: round(value, 3) for part, value in seconds.items()})

    def lines(self) -> list[str]:
        """Of the parts that were predicted and measured; nothing where there is none."""
        both = [part for part in self.predicted if part in self.measured]
        if not both:
            return []
        predicted, measured = (sum(values[part] for part in both) for values in (self.predicted, self.measured))
        change = f" ({_change(measured / predicted)})" if predicted else ""
        parts = ", ".join(f"{part} {_pair(self.measured, self.predicted, part)}" for part in both)
        return [f"time: {duration(measured)}, predicted {duration(predicted)}{change}; {parts}"]


def _change(ratio: float) -> str:
    if ratio < 2:
        return f"{100 * (ratio - 1):+.0f} %"
    return f"{ratio:.1f} times as long" if ratio < 100 else "more than 100 times as long"


def _pair(measured: Mapping[str, float], predicted: Mapping[str, float], part: str) -> str:
    return f"{duration(measured[part])} (predicted {duration(predicted[part])})"

"""Predicted time of a number of operations on a device."""

from __future__ import annotations

from dataclasses import dataclass, replace

from backends import registry
from backends.interface import ModelSpec
from backends.memory_plan import NOTHING, Costs, Elementwise


@dataclass(frozen=True)
class Speed:
    """How fast a device computes, and how slowly its host starts that. The rest as in `Costs`."""

    rate: float  # floating-point operations per second that a run reaches
    host: float = 0.0  # seconds for a layer in a forward pass
    four_bit_host: float = 1.0  # times that, for one in 4 bits
    beside: bool = True  # whether the host works beside the device
    unpacking: float = 0.0
    masking: float = 0.0
    elementwise: Elementwise = NOTHING
    at_once: int | None = None  # tokens of a micro-batch that are computed together; None: all
    slower: float = 1.0  # times: what a loaded model was seen to need of the time predicted
    training_slower: float | None = None  # the same of steps of training; None: they were not timed

    @classmethod
    def of(cls, costs: Costs, rate: float, processes: int = 1) -> Speed:
        """rate: of matrix products, of all `processes` together, which share what is beside the products."""
        gpu, reached = costs.device == "gpu", rate * costs.reached
        both = zip(costs.elementwise, costs.spread, strict=True)
        elementwise = Elementwise(*(alone / processes + shared / reached for alone, shared in both))
        hosts = (costs.host / processes, costs.four_bit_host)
        return cls(reached, *hosts, gpu, costs.unpacking, costs.masking, elementwise, costs.tokens_at_once)

    @property
    def of_training(self) -> Speed:
        """Without timed steps, halfway: where rows took 1.5 times as long as predicted, steps took 1.0 to 1.5."""
        seen = (1.0 + self.slower) / 2 if self.training_slower is None else self.training_slower
        return replace(self, slower=seen)

    def pieces(self, tokens: float, micro_tokens: int) -> float:
        """In how many passes through the layers so many tokens are computed."""
        return -(-tokens // min(micro_tokens, self.at_once or micro_tokens))

    def seconds(self, operations: float, layers: float, elementwise: float = 0.0) -> float:
        """Of so many operations, in forward passes through so many layers in all, and seconds beside the products."""
        computing, starting = operations / self.rate + elementwise, self.host * layers
        return self.slower * (max(computing, starting) if self.beside else computing + starting)


def rate_here(backend: str, model: ModelSpec) -> float:
    """Floating-point operations per second of matrix products, timed once by this process."""
    facts = registry.describe(backend, model.device)
    kind = registry.device_kind(facts["device"])
    return registry.measured_rate(backend, model.number_type(kind, facts["half"]), model.device)

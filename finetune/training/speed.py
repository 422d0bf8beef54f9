"""Predicted time of a number of operations on a device."""

from __future__ import annotations

from dataclasses import dataclass

from backends.memory_plan import Costs


@dataclass(frozen=True)
class Speed:
    """How fast a device computes, and how slowly its host starts that. The rest as of `Costs`."""

    rate: float  # floating-point operations per second that a run reaches
    host: float = 0.0  # seconds for a layer in a forward pass
    beside: bool = True  # whether the host works beside the device
    unpacking: float = 0.0
    masking: float = 0.0
    slower: float = 1.0  # times: what a loaded model was seen to need of the time predicted

    @classmethod
    def of(cls, costs: Costs, rate: float, processes: int = 1) -> Speed:
        """rate: of matrix products, of all `processes` together."""
        gpu, host = costs.device == "gpu", costs.host / processes
        return cls(rate * costs.reached, host, gpu, costs.unpacking, costs.masking)

    def seconds(self, operations: float, layers: float) -> float:
        """Of so many operations, in forward passes through so many layers in all."""
        computing, starting = operations / self.rate, self.host * layers
        return self.slower * (max(computing, starting) if self.beside else computing + starting)

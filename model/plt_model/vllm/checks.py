"""What is set and what is refused when an engine starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Options:
    """`--additional-config '{"plt": {...}}'`.

    trips: "one" (decode rows: all passes in one trip through the layers) or "each" (R trips, for comparison).
    carry: "keep", or "zero", which loses what a token hands on to the next: a fault on purpose, for tests.
    """

    trips: str = "one"
    carry: str = "keep"
    one_trip: bool = True

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Options:
        """Raises ValueError for what is no option."""
        given: Any = vllm_config.additional_config
        given = given.get("plt", {}) if isinstance(given, dict) else {}
        allowed = {"trips": ("one", "each"), "carry": ("keep", "zero")}
        if not isinstance(given, dict):
            raise ValueError(f"additional_config plt is {given!r}: expected an object with {', '.join(allowed)}")
        for key, value in given.items():
            if key not in allowed:
                raise ValueError(f"additional_config plt has a key {key!r}: expected {', '.join(allowed)}")
            if value not in allowed[key]:
                raise ValueError(f"additional_config plt.{key} is {value!r}: expected {' or '.join(allowed[key])}")
        config = vllm_config.model_config.hf_config
        one_trip = config.one_trip_decode and config.plt_num_loops > 1 and given.get("trips", "one") == "one"
        return cls(given.get("trips", "one"), given.get("carry", "keep"), one_trip)


class PLTChecks(VerifyAndUpdateConfig):
    """vLLM calls these for our architectures before it builds anything."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        Options.of(vllm_config)

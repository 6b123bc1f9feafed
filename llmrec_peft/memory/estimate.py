"""From a configuration to the parts of the peak memory of one device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.memory.meta_model import bytes_of, empty_classifier, weights
from llmrec_peft.memory.trace import trace_optimizer, trace_passes
from llmrec_peft.memory.zero_partitioning import Shares, Tensors, share_out
from llmrec_peft.models.classifier import BehaviorClassifier

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of a process's memory: bytes on its device and in the host's memory, and where the figure comes from."""

    name: str
    device: int
    host: int
    how: str


@dataclass(frozen=True)
class Estimate:
    """The parts, which add up to the peak."""

    summary: str
    parts: tuple[Part, ...]

    @property
    def device(self) -> int:
        """Bytes on a device at the peak."""
        return sum(part.device for part in self.parts)

    @property
    def host(self) -> int:
        """Bytes in the host's memory for one process, of what is offloaded."""
        return sum(part.host for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain content, in bytes."""
        parts = [{"name": p.name, "device": p.device, "host": p.host, "how": p.how} for p in self.parts]
        return {"summary": self.summary, "parts": parts, "device": self.device, "host": self.host}

    def table(self) -> str:
        """The parts in GiB as text."""
        rows = [*self.parts, Part("total", self.device, self.host, "")]
        wide = max(len(row.name) for row in rows)
        lines = [f"{'GiB per process':<{wide}}  {'device':>9}  {'host':>9}  how it was found"]
        for row in rows:
            lines.append(f"{row.name:<{wide}}  {row.device / GIB:>9.3f}  {row.host / GIB:>9.3f}  {row.how}".rstrip())
        return "\n".join(lines)


def estimate_memory(config: MemoryConfig) -> Estimate:
    """Peak memory of training, per process.

    Raises:
        LLMRecError: a base, method or combination that cannot be used.
    """
    classifier = empty_classifier(config)
    summary, shares = classifier.summary(), share_out(tensors_in(classifier), config)
    activations = trace_passes(classifier, config)
    states, step = trace_optimizer(shares.updates, config, "cpu" if config.offload_optimizer else config.device)
    return Estimate(summary, tuple(_parts(config, shares, activations, states, step)))


def tensors_in(classifier: BehaviorClassifier) -> Tensors:
    """What the classifier holds, for sharing it out."""
    frozen, trained = ([p for p in classifier.parameters() if p.requires_grad == kind] for kind in (False, True))
    return Tensors(
        frozen_bytes=bytes_of(held for held in weights(classifier, trained=False)),
        frozen=[(value.numel(), value.element_size()) for value in frozen],
        trained=[(value.numel(), value.element_size()) for value in trained],
        hidden=classifier.config.get_text_config().hidden_size,
    )


def _parts(config: MemoryConfig, shares: Shares, activations: int, states: int, step: int) -> list[Part]:
    """At the peak gradients arrive while activations go, or the optimiser takes its step; the greater counts."""
    # Gradients arrive in a buffer that is there from the first one on; on a CPU its pages come to be one by one.
    passes = activations + shares.arriving if config.device == "gpu" else max(activations, shares.arriving)
    update = max(2 * shares.flattened, shares.flattened + step) - shares.gradients if shares.flattened else step
    offloaded = config.offload_optimizer
    spare = max(0, update) if offloaded else max(0, update - passes - shares.gathered)
    counted = "counted" if config.gpus == 1 and not config.zero else "counted, shared out"
    rows = [
        ("frozen weights", shares.frozen, config.offload_parameters, counted),
        ("trained weights", shares.trained, config.offload_parameters, counted),
        # Stage 1 exchanges gradients at the last micro-batch alone, and until then all of them are on the device.
        ("gradients", shares.gradients, offloaded and config.zero > 1, counted),
        ("master weights", shares.master, offloaded, counted),
        ("optimiser states", states, offloaded, "traced"),
        ("gathered weights", shares.gathered, False, "by DeepSpeed's limits"),
        ("buckets", shares.buffers, False, "by the launch configuration"),
        ("activations", passes, False, "traced"),
        ("optimiser's step, beyond that", spare, offloaded, "traced"),
    ]
    return [Part(name, 0 if host else size, size if host else 0, found) for name, size, host, found in rows]

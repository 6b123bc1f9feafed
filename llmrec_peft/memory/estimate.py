"""The estimate: from a configuration to the parts of one process's peak memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmrec_peft.memory.memory_options import MemoryConfig
from llmrec_peft.memory.meta_model import meta_classifier
from llmrec_peft.memory.optimizer_trace import trace_optimizer
from llmrec_peft.memory.tensor_bytes import bytes_of, weights
from llmrec_peft.memory.trace import trace_passes
from llmrec_peft.memory.zero_partitioning import ModelTensors, Partition, partition
from llmrec_peft.models.classifier import BehaviorClassifier

GIB = 2**30


@dataclass(frozen=True)
class Part:
    """A part of a process's memory: bytes on its device, bytes in host memory, and the method of the estimate."""

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
        """Bytes that one process offloads to host memory."""
        return sum(part.host for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Content for JSON, in bytes."""
        parts = [{"name": p.name, "device": p.device, "host": p.host, "how": p.how} for p in self.parts]
        return {"summary": self.summary, "parts": parts, "device": self.device, "host": self.host}

    def table(self) -> str:
        """The parts as a text table, in GiB."""
        rows = [*self.parts, Part("total", self.device, self.host, "")]
        wide = max(len(row.name) for row in rows)
        lines = [f"{'GiB per process':<{wide}}  {'device':>9}  {'host':>9}  method"]
        for row in rows:
            lines.append(f"{row.name:<{wide}}  {row.device / GIB:>9.3f}  {row.host / GIB:>9.3f}  {row.how}".rstrip())
        return "\n".join(lines)


def estimate_memory(config: MemoryConfig) -> Estimate:
    """Peak memory of training, per process.

    Raises:
        LLMRecError: a base, method or combination that cannot be used.
    """
    classifier = meta_classifier(config)
    summary, held = classifier.summary(), partition(model_tensors(classifier), config)
    activations = trace_passes(classifier, config)  # moves the classifier off the meta device: it comes last
    states, step = trace_optimizer(held.updates, config, "cpu" if config.offload_optimizer else config.device)
    return Estimate(summary, tuple(_parts(config, held, activations, states, step)))


def model_tensors(classifier: BehaviorClassifier) -> ModelTensors:
    """Sizes of the classifier's tensors."""
    frozen, trained = ([p for p in classifier.parameters() if p.requires_grad == kind] for kind in (False, True))
    return ModelTensors(
        frozen_bytes=bytes_of(weights(classifier, trained=False)),
        frozen=[(value.numel(), value.element_size()) for value in frozen],
        trained=[(value.numel(), value.element_size()) for value in trained],
        hidden=classifier.config.get_text_config().hidden_size,
    )


def _parts(config: MemoryConfig, held: Partition, activations: int, states: int, step: int) -> list[Part]:
    """The parts at the peak, which is in a backward pass or in the optimiser's step, whichever is larger."""
    # Gradients arrive in a buffer that a GPU allocates at the first one. On a CPU its pages become resident one by one,
    # while activations are freed.
    passes = activations + held.arriving if config.device == "gpu" else max(activations, held.arriving)
    # While gradients are flattened, both copies exist (2 F). Then the originals are freed, and the flat buffer and the
    # step's temporaries remain (F + step). `held.gradients` is a row of its own, so it is subtracted here.
    update = max(2 * held.flattened, held.flattened + step) - held.gradients if held.flattened else step
    offloaded = config.offload_optimizer
    beyond = max(0, update) if offloaded else max(0, update - passes - held.gathered)
    counted = "counted" if config.gpus == 1 and not config.zero else "counted, partitioned"
    rows = [
        ("frozen weights", held.frozen, config.offload_parameters, counted),
        ("trained weights", held.trained, config.offload_parameters, counted),
        # Stage 1 exchanges gradients at the last micro-batch only; until then all of them are on the device.
        ("gradients", held.gradients, offloaded and config.zero > 1, counted),
        ("master weights", held.master, offloaded, counted),
        ("optimiser states", states, offloaded, "traced"),
        ("gathered weights", held.gathered, False, "by DeepSpeed's limits"),
        ("buckets", held.buffers, False, "by the launch configuration"),
        ("activations", passes, False, "traced"),
        ("optimiser's step, beyond that", beyond, offloaded, "traced"),
    ]
    return [Part(name, 0 if host else size, size if host else 0, method) for name, size, host, method in rows]

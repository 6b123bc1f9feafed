"""Many requests as few tasks: what is the same is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmrec_peft.scoring.engine import Engine, Progress, Task
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter
from llmrec_peft.scoring.prompts import Event, Prefix, Prompts


@dataclass(frozen=True)
class Ask:
    """One history and its candidates, as tokens, and the bundle that answers."""

    member: LoadedAdapter
    prefix: Prefix
    probes: list[np.ndarray]
    dropped: np.ndarray


def ask(member: LoadedAdapter, prompts: Prompts, prefix: Prefix, candidates: Sequence[Event], first: int = 0) -> Ask:
    """Candidates after a history, as tokens; messages count them from `first`.

    Raises:
        DataError: an unknown item, a column that is missing, or what is no list.
        StreamError: a candidate that does not fit the window.
    """
    probes = prompts.events(candidates, "candidates", first)
    return Ask(member, prefix, probes, prompts.dropped(prefix, probes, first))


@dataclass
class _Shared:
    """The task of one prefix: its different probes, by their tokens."""

    prefix: tuple[np.ndarray, ...]
    member: LoadedAdapter
    probes: list[np.ndarray] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)

    def number(self, probe: np.ndarray) -> int:
        key = probe.tobytes()
        if key not in self.numbers:
            self.numbers[key] = len(self.probes)
            self.probes.append(probe)
        return self.numbers[key]


class Plan:
    """Asks gathered to be answered together.

    Asks with the same bundle and history are one task, and a candidate that stands twice is answered once.

    Attributes:
        candidates: of all asks, int.
        probes: different candidates after their histories, int.
    """

    def __init__(self) -> None:
        self.candidates = self.probes = 0
        self._shared: dict[tuple[int, bytes], _Shared] = {}
        self._places: list[tuple[LoadedAdapter, np.ndarray, list[tuple[_Shared, np.ndarray, np.ndarray]]]] = []

    def add(self, one: Ask, out: np.ndarray) -> None:
        """Gather an ask; its calibrated probabilities go into `out`, float64 [candidates, labels]."""
        own = []
        for count in np.unique(one.dropped):
            prefix = one.prefix.tail(int(count))
            key = (id(one.member), np.concatenate(prefix).tobytes())
            part = self._shared.setdefault(key, _Shared(prefix, one.member))
            numbers, before = np.flatnonzero(one.dropped == count), len(part.probes)
            own.append((part, numbers, np.array([part.number(one.probes[n]) for n in numbers])))
            self.probes += len(part.probes) - before
        self._places.append((one.member, out, own))
        self.candidates += len(one.probes)

    def run(self, engine: Engine, batch_tokens: int, progress: Progress | None = None) -> None:
        """Answer all that was gathered; `progress` hears of each different candidate.

        Raises:
            ModelError: an answer is not a finite number.
        """
        tasks = {id(part): Task(part.member, part.prefix, part.probes) for part in self._shared.values()}
        engine.answer(list(tasks.values()), batch_tokens, progress)
        for member, out, own in self._places:
            logits = np.empty(out.shape, np.float32)
            for part, numbers, taken in own:
                logits[numbers] = tasks[id(part)].answers[taken]
            out[:] = member.calibration.apply(logits)

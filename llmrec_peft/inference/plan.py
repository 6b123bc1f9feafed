"""Many requests as few tasks: what is the same is computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmrec_peft.inference.engine import Engine, Task
from llmrec_peft.inference.member import Member
from llmrec_peft.inference.prompts import Prompts, Trunk


@dataclass(frozen=True)
class Ask:
    """One history and its candidates, as tokens, and the bundle that answers."""

    member: Member
    prompts: Prompts
    trunk: Trunk
    probes: list[np.ndarray]
    dropped: np.ndarray


def ask(member: Member, prompts: Prompts, history: Any, candidates: Any, user: Mapping[str, Any] | None = None) -> Ask:
    """One request as tokens.

    Raises:
        DataError: an unknown item or label, a column that is missing, or what is no list.
        StreamError: a candidate that does not fit the window.
    """
    trunk = prompts.trunk(history, user)
    probes = prompts.events(candidates, "candidates")
    return Ask(member, prompts, trunk, probes, prompts.dropped(trunk, probes))


@dataclass
class _Shared:
    """The task of one trunk: its different probes, by their tokens."""

    trunk: tuple[np.ndarray, ...]
    member: Member
    probes: list[np.ndarray] = field(default_factory=list)
    numbers: dict[bytes, int] = field(default_factory=dict)

    def number(self, probe: np.ndarray) -> int:
        key = probe.tobytes()
        if key not in self.numbers:
            self.numbers[key] = len(self.probes)
            self.probes.append(probe)
        return self.numbers[key]


def answer(engine: Engine, asks: Iterable[Ask], batch_tokens: int) -> list[np.ndarray]:
    """Raw logits of each ask's candidates, float32 [candidates, labels].

    Asks with the same bundle and history are one task, and a candidate that stands twice is answered once.

    Raises:
        ModelError: an answer is not a finite number.
    """
    shared: dict[tuple[int, bytes], _Shared] = {}
    places: list[tuple[Ask, list[tuple[_Shared, np.ndarray, np.ndarray]]]] = []
    for one in asks:
        own = []
        for count in np.unique(one.dropped):
            trunk = one.trunk.tail(int(count))
            key = (id(one.member), np.concatenate(trunk).tobytes())
            part = shared.setdefault(key, _Shared(trunk, one.member))
            numbers = np.flatnonzero(one.dropped == count)
            own.append((part, numbers, np.array([part.number(one.probes[n]) for n in numbers])))
        places.append((one, own))
    tasks = {key: Task(part.member, part.trunk, part.probes) for key, part in shared.items()}
    engine.answer(list(tasks.values()), batch_tokens)
    by_part = {id(part): tasks[key] for key, part in shared.items()}
    results = []
    for one, own in places:
        logits = np.empty((len(one.probes), len(one.member.labels)), np.float32)
        for part, numbers, taken in own:
            logits[numbers] = by_part[id(part)].answers[taken]
        results.append(logits)
    return results

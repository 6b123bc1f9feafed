"""Requests of any number of candidates: tokens of a bounded number of them are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from llmrec_peft.errors import DataError, LLMRecError, input_errors
from llmrec_peft.scoring.batching import Ask, Plan, ask
from llmrec_peft.scoring.engine import Engine
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter
from llmrec_peft.scoring.prompts import Event, Prefix, Prompts
from llmrec_peft.serving.request_rules import check_list

PART = 4096
"""Different candidates that are answered together, and candidates that are made tokens together. A call of no more, of
all its requests, is answered in one go."""
REPEATS = 64
"""Candidates that are answered together are this many times `PART` at most, however often the same stand among them."""


@dataclass(frozen=True)
class Wanted:
    """One request as a caller gives it, and the bundle that answers; `name` begins its messages."""

    member: LoadedAdapter
    prompts: Prompts
    history: Any
    candidates: Any
    user: Mapping[str, Any] | None = None
    name: str = ""

    def count(self) -> int:
        """Candidates. Raises DataError for what is no list."""
        with self.named(), input_errors(DataError, "candidates", "give a list of events"):
            check_list("candidates", self.candidates)
            return len(self.candidates)

    def prefix(self) -> Prefix:
        """The history's tokens; raises as `Prompts.prefix` does."""
        with self.named():
            return self.prompts.prefix(self.history, self.user)

    def ask(self, prefix: Prefix, candidates: Sequence[Event], first: int = 0) -> Ask:
        """Some of its candidates, from number `first` on, as tokens; raises as `plan.ask` does."""
        with self.named():
            return ask(self.member, self.prompts, prefix, candidates, first)

    def pieces(self, count: int) -> Iterator[tuple[int, list[Event]]]:
        """Its candidates by `PART`, and the number of the first of each. Raises DataError for fewer than `count`."""
        events = iter(self.candidates)
        for first in range(0, count, PART):
            taken = list(islice(events, min(PART, count - first)))
            if len(taken) < min(PART, count - first):
                raise DataError(
                    f"{self.name}candidates: {count} were given, and only {first + len(taken)} are left; let the list "
                    "be as it is until it is answered"
                )
            yield first, taken

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors begin with the request's name."""
        try:
            yield
        except LLMRecError as error:
            if not self.name:
                raise
            raise type(error)(f"{self.name}{error}") from None


def probabilities(engine: Engine, wanted: Sequence[Wanted], batch_tokens: int) -> list[np.ndarray]:
    """Calibrated probabilities of each request, float64 [candidates, labels].

    Up to `PART` candidates in all are tokens at once. More are checked first, so that what is wrong shows before
    anything is computed, and then made tokens again and answered part by part. Requests with one history follow one
    another, so that it is encoded once for each part that they fill.

    Raises:
        DataError, DomainError, StreamError: as `Prompts.prefix` and `plan.ask` do; the message names the request.
        ModelError: an answer is not a finite number.
    """
    counts = [one.count() for one in wanted]
    results = [np.empty((count, len(one.member.labels))) for one, count in zip(wanted, counts, strict=True)]
    if sum(counts) > PART:
        _in_parts(engine, wanted, results, batch_tokens)
    else:
        plan = Plan()
        for one, out in zip(wanted, results, strict=True):
            plan.add(one.ask(one.prefix(), one.candidates), out)
        plan.run(engine, batch_tokens)
    return results


def _in_parts(engine: Engine, wanted: Sequence[Wanted], results: Sequence[np.ndarray], batch_tokens: int) -> None:
    total = sum(map(len, results))
    with _bar("checking", total) as bar:
        prefixes = [_checked(one, len(out), bar) for one, out in zip(wanted, results, strict=True)]
    with _bar("scoring", total) as bar:
        plan = Plan()
        for number in _order(wanted, prefixes):
            one, out = wanted[number], results[number]
            for first, candidates in one.pieces(len(out)):
                plan.add(one.ask(prefixes[number], candidates, first), out[first : first + len(candidates)])
                if plan.probes >= PART or plan.candidates >= REPEATS * PART:
                    _run(plan, engine, batch_tokens, bar)
                    plan = Plan()
        _run(plan, engine, batch_tokens, bar)


def _run(plan: Plan, engine: Engine, batch_tokens: int, bar: tqdm) -> None:
    goal = bar.n + plan.candidates
    plan.run(engine, batch_tokens, bar.update)
    bar.update(goal - bar.n)  # candidates that stand twice are answered once


def _checked(one: Wanted, count: int, bar: tqdm) -> Prefix:
    """The prefix of a request all of whose candidates can be answered after it."""
    prefix = one.prefix()
    for first, candidates in one.pieces(count):
        one.ask(prefix, candidates, first)
        bar.update(len(candidates))
    return prefix


def _order(wanted: Sequence[Wanted], prefixes: Sequence[Prefix]) -> list[int]:
    """Numbers of the requests, those of one bundle and history together."""
    together: dict[tuple[int, int], list[int]] = {}
    for number, (one, prefix) in enumerate(zip(wanted, prefixes, strict=True)):
        history = hash(np.concatenate(prefix.tail(0)).tobytes())
        together.setdefault((id(one.member), history), []).append(number)
    return [number for numbers in together.values() for number in numbers]


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="candidate", delay=2)

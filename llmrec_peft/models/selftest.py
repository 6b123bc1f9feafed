"""Self-test of a base before it gets streams: the predictions of a stream must be those of its prompts alone.

A few short rows of made-up tokens go through the loaded model, once as streams and once as single prompts. This finds
what no list of architectures could: layers that see past a mask, positions that are ignored, modules between backbone
and head, and backbones that take other arguments. It costs four passes of about 70 tokens together, and two more if
keys and values are cached.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from llmrec_peft.errors import ModelError, machine_fault, one_line
from llmrec_peft.models.requirements import candidates_of, check_positions, unfit_for_candidates
from llmrec_peft.models.sharding import is_split
from llmrec_peft.models.stock_parts import backbone_of, head_of

if TYPE_CHECKING:
    from llmrec_peft.models.classifier import BehaviorClassifier

PREFIX, CANDIDATES, REST = 4, (3, 4), 2
"""Tokens of the rows: of the prefix, of each candidate after it, and of the prefix beyond the candidates."""
TOLERANCE = 1e-3
"""Largest difference that passes in float32, relative to the spread over different prompts. Correct bases differ by
1e-7 to 2e-5; linear attention is off by 3e-3 (untrained weights) to 5."""
LOW_TOLERANCE = 0.1
"""Mean difference that passes in less precise types and 4 bits, relative to the same spread. The mean, since a single
number may be off by 1 if a mixture routes a token to another expert. Correct bases differ by up to 0.015, wrong layers
by 0.3 to 1."""
_FAILURES = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, NotImplementedError)


Pieces = tuple[list[int], list[list[int]], list[int]]
"""Tokens of a prefix, of two candidates, and of the rest of the prefix."""


class _Fault(NamedTuple):
    """A fault of a base, and the library exception that showed it, if any."""

    text: str
    cause: Exception | None = None


class _HeadReached(Exception):
    """Raised in a hook to stop the stock model before its head."""


def check_streams(classifier: BehaviorClassifier, streams: Any) -> None:
    """Raise ModelError unless the base predicts these streams as it would predict their prompts alone.

    streams: a data set from `build_streams`, a part of one, or its prompts by `IndependentPrompts`. Any other data set
    is not checked.
    """
    parent = getattr(streams, "parent", streams)
    domain = getattr(parent, "domain", None)
    if domain is None:
        return
    check_positions(classifier.config, domain.stream.max_length)
    check_prefixes(classifier)
    if parent is streams or not hasattr(streams, "streams"):  # not prompts, each alone in its row
        reason = candidates_of(domain)
        if reason is None and getattr(parent, "has_candidates", False):
            reason = "targets without a label are predicted too"
        if reason is not None:
            check_candidates(classifier, reason)


def check_base_for(classifier: BehaviorClassifier, domain: Any) -> None:
    """Raise ModelError unless the base supports streams of a domain (or its mapping), whatever their length."""
    check_prefixes(classifier)
    reason = candidates_of(domain)
    if reason is not None:
        check_candidates(classifier, reason)


def check_prefixes(classifier: BehaviorClassifier) -> None:
    """Raise ModelError unless rows without candidates give the head inputs of the stock classifier on their prompts."""
    fault = _fault(classifier, "prefixes")
    if fault:
        raise ModelError(
            f"base {_name(classifier)}: a stream's predictions are not those of the stock model ({fault.text}); use "
            "another base"
        ) from fault.cause


def check_candidates(classifier: BehaviorClassifier, reason: str, *, cache: bool = False) -> None:
    """Raise ModelError unless the base hides candidates from each other, by the kinds of its layers and by measurement.

    Args:
        reason: what needs candidates, for the message.
        cache: candidates also continue from cached keys and values of a prefix.
    """
    if classifier.encoder:
        return  # an encoder predicts each prompt alone; `forward` refuses candidates
    unfit = unfit_for_candidates(classifier.config, classifier.stock)
    fault = _Fault(unfit) if unfit else None
    if not fault and classifier.config._attn_implementation.startswith("flash"):
        return  # `forward` refuses rows with candidates and says what to do
    fault = fault or _fault(classifier, "candidates")
    if cache and not fault:
        fault = _fault(classifier, "cache")
    if fault:
        raise ModelError(
            f"base {_name(classifier)} cannot hide candidates from each other: {fault.text}, and {reason}; use a base "
            "of softmax attention alone, or a domain of prefixes alone"
        ) from fault.cause


def hides_candidates(classifier: BehaviorClassifier) -> bool:
    """Whether `check_candidates` passes."""
    try:
        check_candidates(classifier, "")
    except ModelError:
        return False
    return not classifier.encoder


def _name(classifier: BehaviorClassifier) -> str:
    return f"{classifier.base or 'model'} ({classifier.config.model_type})"


def _fault(classifier: BehaviorClassifier, name: str) -> _Fault | None:
    """What is wrong with a base by one measurement, which runs once; None if nothing, or if it cannot run.

    Sharded weights and weights on the meta device are not measured; there only the configuration is checked.
    """
    if classifier.encoder or any(value.is_meta or is_split(value) for value in classifier.parameters()):
        return None
    key = (str(classifier.config._attn_implementation), _precision(classifier), name)
    measure, needs = _MEASUREMENTS[name]
    if key not in classifier.selftests:
        try:
            with _quietly(classifier), torch.no_grad():
                found, expected = measure(classifier, _pieces(classifier))
        except ModelError as error:
            return _Fault(str(error).split(";")[0], error)
        except _FAILURES as error:
            if machine_fault(error) is not None:
                raise  # the machine failed (memory, disk), not the base
            reason = f"{type(error).__name__}: {one_line(error, 80)}".rstrip(". ")
            return _Fault(f"its {type(backbone_of(classifier.stock)).__name__} {needs} ({reason})", error)
        classifier.selftests[key] = _difference(found.float(), expected.float(), key[1])
    fault = classifier.selftests[key]
    return None if fault is None else _Fault(fault)


def _difference(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with head inputs `found` [prompts, H] of a base that computes in `dtype`; None if nothing."""
    spread = float((expected - expected.mean(0)).std())
    if not spread > 0:
        return None  # all prompts give the same vector (or NaN), so nothing can leak between them
    gaps = (found - expected).abs() / spread
    gap, limit = (gaps.max(), TOLERANCE) if dtype is torch.float32 else (gaps.mean(), LOW_TOLERANCE)
    if gap <= limit:
        return None
    return f"self-test off by {float(gap):.2g} of what prompts differ by, where {limit:g} is allowed"


def _precision(classifier: BehaviorClassifier) -> torch.dtype:
    """The least precise number format that the base computes in; float16 for packed weights."""
    parameters = list(classifier.stock.parameters())
    if any(hasattr(value, "quant_state") or not value.is_floating_point() for value in parameters):
        return torch.float16
    return min((value.dtype for value in parameters), key=lambda dtype: torch.finfo(dtype).bits)


@contextmanager
def _quietly(classifier: BehaviorClassifier) -> Iterator[None]:
    """In eval mode and outside autocast, with each module's own mode restored."""
    modes = {module: module.training for module in classifier.modules()}
    classifier.eval()
    try:
        with torch.autocast(classifier.device.type, enabled=False):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _pieces(classifier: BehaviorClassifier) -> Pieces:
    """Tokens of prefix, candidates and the rest of the prefix: always the same, none of them the pad token."""
    config = classifier.config.get_text_config()
    vocabulary = [token for token in range(min(config.vocab_size, 4096)) if token != config.pad_token_id]
    draw = random.Random(0)
    tokens = [draw.choice(vocabulary) for _ in range(PREFIX + sum(CANDIDATES) + REST)]
    first, second = PREFIX, PREFIX + CANDIDATES[0]
    return tokens[:first], [tokens[first:second], tokens[second:-REST]], tokens[-REST:]


def _rows(classifier: BehaviorClassifier, *rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, device=classifier.device)


def _padded(classifier: BehaviorClassifier, rows: list[list[int]]) -> torch.Tensor:
    """Rows of token ids, padded on the right."""
    pad, length = classifier.config.get_text_config().pad_token_id or 0, max(map(len, rows))
    return _rows(classifier, *(row + [pad] * (length - len(row)) for row in rows))


def _alone(classifier: BehaviorClassifier, prompts: list[list[int]]) -> torch.Tensor:
    """Inputs of the stock classifier's head at the last token of each prompt, alone in its row: [prompts, H]."""
    read: list[torch.Tensor] = []

    def stop(_head: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        read.append(inputs[0])
        raise _HeadReached  # a float32 head does not take the output of a bfloat16 base

    ids, lengths = _padded(classifier, prompts), torch.tensor([len(row) for row in prompts], device=classifier.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    hook = head_of(classifier.stock).register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(_HeadReached):
            classifier.stock(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    hidden = read[0]
    return hidden[torch.arange(len(prompts), device=ids.device), lengths - 1] if hidden.dim() == 3 else hidden


def _prefixes(classifier: BehaviorClassifier, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of different lengths, one padded on the right, each read at two places."""
    prefix, _, rest = pieces
    whole = prefix + rest
    ids = _padded(classifier, [prefix, whole])
    ends = torch.tensor([1, len(prefix) - 1, len(whole) + 2, 2 * len(whole) - 1], device=ids.device)
    found = classifier.head_inputs(ids, None, ends)
    return found, _alone(classifier, [prefix[:2], prefix, whole[:3], whole])


def _candidates(classifier: BehaviorClassifier, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: a prefix, two candidates after it, and more of the prefix."""
    prefix, (one, two), rest = pieces
    places = [0] * len(prefix) + [1] * len(one) + [2] * len(two) + [0] * len(rest)
    point = len(prefix)
    positions = [*range(point), *(point + n for part in (one, two, rest) for n in range(len(part)))]
    first = point + len(one)
    ends = torch.tensor([first - 1, first + len(two) - 1, len(places) - 1], device=classifier.device)
    found = classifier.head_inputs(
        _rows(classifier, prefix + one + two + rest), _rows(classifier, positions), ends,
        segment=_rows(classifier, places),
    )  # fmt: skip
    return found, _alone(classifier, [prefix + one, prefix + two, prefix + rest])


def _continued(classifier: BehaviorClassifier, pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
    """The prefix first, then the candidates on its cached keys and values, as in a scorer."""
    from transformers import DynamicCache

    prefix, (one, two), _ = pieces
    past, point = DynamicCache(), len(prefix)
    last = torch.tensor([point - 1], device=classifier.device)
    segment = torch.zeros_like(_rows(classifier, prefix))
    begin = _rows(classifier, list(range(point)))
    classifier.hidden_states(_rows(classifier, prefix), begin, last, segment=segment, past=past)
    found = classifier.hidden_states(
        _rows(classifier, one + two),
        _rows(classifier, [point + n for part in (one, two) for n in range(len(part))]),
        torch.tensor([len(one) - 1, len(one) + len(two) - 1], device=classifier.device),
        segment=_rows(classifier, [1] * len(one) + [2] * len(two)),
        past=past,
        past_seen=torch.ones_like(segment, dtype=torch.bool),
    )
    return found, _alone(classifier, [prefix + one, prefix + two])


_MEASUREMENTS: dict[str, tuple[Callable[..., tuple[torch.Tensor, torch.Tensor]], str]] = {
    "prefixes": (_prefixes, "does not run on token ids and positions alone"),
    "candidates": (_candidates, "takes no mask for each row"),
    "cache": (_continued, "takes no keys and values of earlier tokens under a mask"),
}
"""Each measurement, and what a base that fails in it lacks."""

"""A domain: how one kind of behaviour log becomes text, labels, splits and windows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from llmrec_peft.data.domain_rules import LabelRule, NegativeRule, RecommendRule, SplitRule, StreamRule
from llmrec_peft.data.duplicates import RULES
from llmrec_peft.data.templates import (
    MAX_TEMPLATE,
    OUTCOME_COLUMNS,
    check_template,
    template_columns,
    template_literals,
)
from llmrec_peft.documents import has_surrogates, read_yaml
from llmrec_peft.errors import DomainError
from llmrec_peft.fields import annotations_of, broken_fields
from llmrec_peft.fields import text as of_text
from llmrec_peft.messages import quoted, shortened

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from llmrec_peft.data.log import BehaviorLog

Section = TypeVar("Section", bound="DataclassInstance")

ITEM_EVENT = "item {item_id}"
"""Event of a domain for models that read item ids in place of texts."""


@dataclass
class Domain:
    """The templates and rules of one domain, as in its YAML file.

    Raises:
        DomainError: a template, label or rule that cannot be used.
    """

    name: str
    """Short name, used for adapters and files."""
    event: str = field(metadata={"most": MAX_TEMPLATE})  # required: mypy sees a default in `of_text`
    """Text of an event; {columns} of the items and of the interactions."""
    outcomes: dict[str, str]
    """From label to the text that follows the marker, in class order."""
    header: str = of_text("", most=MAX_TEMPLATE)
    """Text before the first event; {columns} of the interactions, which describe the user."""
    marker: str = " ->"
    """Text that closes an event; the prediction is made at its last token."""
    label: LabelRule = field(default_factory=LabelRule)
    """Where labels come from."""
    simultaneous: Literal["order", "isolate"] = "order"
    """Events of one moment see earlier rows of that moment (order), or none of them (isolate)."""
    duplicates: Literal["keep", "drop"] | None = None
    """Rows with equal user, item and moment: keep all, or drop all but one; drop by default with order, else keep."""
    split: SplitRule = field(default_factory=SplitRule)
    """Train, valid and test."""
    negatives: NegativeRule = field(default_factory=NegativeRule)
    """Sampled negatives."""
    stream: StreamRule = field(default_factory=StreamRule)
    """Windows."""
    recommend: RecommendRule = field(default_factory=RecommendRule)
    """Recommended items."""

    def __post_init__(self) -> None:
        _check_parts(self)
        if self.duplicates is None:
            # With `order` a row sees the outcome of the row that it repeats; isolated rows do not see each other.
            self.duplicates = "keep" if self.simultaneous == "isolate" else "drop"
        _check_texts(self)
        _check_rules(self)
        _check_fields(self)

    # -- reading and writing -------------------------------------------------------------------

    @classmethod
    def from_yaml(cls, path: str | Path) -> Domain:
        """Read a domain file.

        Raises:
            DomainError: no such file, not YAML, an unknown key, or a rule broken.
        """
        where = shortened(path)
        content = read_yaml(path, error=DomainError, kind="domain file")
        return cls.from_dict(content, source=where)

    @classmethod
    def from_dict(cls, content: Any, *, source: str = "domain") -> Domain:
        """Build a domain from plain mappings; the reverse of :meth:`to_dict`."""
        return _from_mapping(cls, content, source)

    @classmethod
    def of_manifest(cls, content: dict[str, Any], *, source: str = "domain") -> Domain:
        """Build the domain of a bundle, a merged model or a student from its manifest.

        A manifest without the key `duplicates` describes a model that was trained and evaluated with all rows.
        """
        return cls.from_dict({"duplicates": "keep", **content} if isinstance(content, dict) else content, source=source)

    def to_dict(self) -> dict[str, Any]:
        """The domain as plain mappings, ready for YAML or JSON."""
        return dataclasses.asdict(self)

    # -- labels --------------------------------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """Label names in class order."""
        return list(self.outcomes)

    @property
    def negative_class(self) -> int:
        """Class number that sampled negatives get."""
        return self.labels.index(self.negatives.label) if self.negatives.label else 0

    def classes(self, log: BehaviorLog) -> np.ndarray:
        """Class number of each row, int32 [rows]; -1 where the label rule or `duplicates` leaves the row out.

        Raises:
            DataError: no such column, a missing value (unless they are left out), or a value outside the labels.
        """
        classes = self.row_labels(log)
        if self.duplicates == "drop":
            classes[log.duplicates.surplus(classes, log.context_only)] = -1
        return classes

    def row_labels(self, log: BehaviorLog) -> np.ndarray:
        """As `classes`, but by the label rule alone: duplicates have their class too."""
        from llmrec_peft.data.labels import label_classes  # needs Arrow, which reading a configuration must not

        return label_classes(log, self.label, self.labels)

    # -- text ----------------------------------------------------------------------------------

    @property
    def reads_ids(self) -> bool:
        """Whether an event is only the item's id, which is one token; then the marker may be empty."""
        return self.event == ITEM_EVENT

    def of_ids(self, context: int, targets: int) -> Domain:
        """This domain for a model that reads item ids: the same labels, rules and splits, but only item ids.

        Args:
            context, targets: sizes of its windows, as in `StreamRule`.
        """
        # Tokens: an event as a candidate (1) and again on the prefix with its outcome (2); each negative (1).
        most = 1 + 2 * context + targets * (3 + self.negatives.per_positive)
        stream = dataclasses.replace(self.stream, context=context, targets=targets, max_length=max(8, most))
        return dataclasses.replace(self, event=ITEM_EVENT, header="", marker="", stream=stream)

    @property
    def event_columns(self) -> list[str]:
        """Columns named by the event's template, in order."""
        return template_columns(self.event)

    @property
    def header_columns(self) -> list[str]:
        """Columns named by the header's template, in order."""
        return template_columns(self.header)

    def forbidden(self, special_tokens: list[str]) -> list[str]:
        """Texts that no column's value may contain: the marker and the tokenizer's special tokens."""
        return [text.strip() for text in [self.marker, *special_tokens] if text.strip()]


def _from_mapping(cls: type[Section], content: Any, where: str) -> Section:
    """Build a dataclass of dataclasses, refusing unknown keys by name."""
    if not isinstance(content, dict):
        raise DomainError(f"{where}: must be a mapping of keys; got {type(content).__name__}")
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in content:
        if key not in fields:
            raise DomainError(f"{where}: unknown key '{key}'; the keys are {', '.join(fields)}")
    missing = [name for name, item in fields.items()
               if name not in content
               and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING]  # fmt: skip
    if missing:
        raise DomainError(f"{where}: key '{missing[0]}' is required and missing; add it")
    rules = {
        "label": LabelRule, "split": SplitRule, "negatives": NegativeRule, "stream": StreamRule,
        "recommend": RecommendRule,
    }  # fmt: skip
    values = dict(content)
    if cls is Domain:
        for key, rule in rules.items():
            if key in values and not dataclasses.is_dataclass(values[key]):
                values[key] = _from_mapping(rule, values[key], f"{where}: {key}")
        values["outcomes"] = _text_keys(values["outcomes"], f"{where}: outcomes")
    elif cls is LabelRule and values.get("map") is not None:
        values["map"] = _text_keys(values["map"], f"{where}: map", only_bool=True)
    return cls(**values)


def _text_keys(content: Any, where: str, only_bool: bool = False) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise DomainError(f"{where}: must be a mapping; got {content!r}")
    for key in content:
        if isinstance(key, bool) or (not only_bool and not isinstance(key, str)):
            raise DomainError(f"{where}: labels must be text, and YAML reads {key!r} here; put quotes around the label")
    return {str(key): value for key, value in content.items()}


def _check_parts(domain: Domain) -> None:
    """Check the types that the other checks rely on."""
    where = f"domain {quoted(domain.name, 100)}"
    for name, (kind, _) in annotations_of(Domain).items():
        part = getattr(domain, name)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(part, kind):
            raise DomainError(f"{where}: {name} must be a mapping of keys; got {quoted(part, 100)}")
    for name, mapping in {"outcomes": domain.outcomes, "label.map": domain.label.map}.items():
        keys = mapping if isinstance(mapping, dict) else [None] * (mapping is not None or name == "outcomes")
        if not all(isinstance(key, str) for key in keys):
            raise DomainError(f"{where}: {name} must be a mapping with texts as keys; got {quoted(mapping, 100)}")
    column = domain.label.column
    if not isinstance(column, str) or not column:
        raise DomainError(f"{where}: label.column must be a column's name; got {quoted(column, 100)}")


def _check_texts(domain: Domain) -> None:
    where = f"domain '{domain.name}'"
    for key in ("name", "event", "marker"):
        value = getattr(domain, key)
        if not isinstance(value, str) or not (value.strip() or (key == "marker" and domain.reads_ids and not value)):
            raise DomainError(f"{where}: {key} must be a text that is not blank; got {value!r}")
    if not isinstance(domain.header, str):
        raise DomainError(f"{where}: header must be a text, or left out; got {domain.header!r}")
    for key in ("event", "header"):
        check_template(getattr(domain, key), f"{where}: {key}")
        columns = template_columns(getattr(domain, key))
        if domain.marker and any(domain.marker.strip() in text for text in template_literals(getattr(domain, key))):
            raise DomainError(
                f"{where}: {key} contains the marker {domain.marker!r}, which only closes events; reword it"
            )
        shown = [name for name in columns if name in (domain.label.column, *OUTCOME_COLUMNS)]
        if shown:
            raise DomainError(f"{where}: {key} shows the column '{shown[0]}', which reveals the label; remove it")
    if not domain.event_columns:
        raise DomainError(f"{where}: event {domain.event!r} names no column; use at least one, such as {{title}}")
    texts = [domain.name, domain.marker, *domain.outcomes, *domain.outcomes.values()]
    halves = [text for text in texts if isinstance(text, str) and has_surrogates(text)]
    if halves:
        raise DomainError(
            f"domain: {quoted(halves[0])} holds half of a surrogate pair, which is not a character; remove it"
        )
    if len(domain.outcomes) < 2:
        raise DomainError(f"{where}: outcomes must hold two labels or more; got {list(domain.outcomes)}")
    for label, word in domain.outcomes.items():
        if not isinstance(word, str) or not word.strip():
            raise DomainError(
                f"{where}: the outcome of '{label}' must be a word; got {word!r} (quote yes, no, on, off)"
            )
        if domain.marker and domain.marker.strip() in word:
            raise DomainError(
                f"{where}: the outcome {word!r} of '{label}' contains the marker {domain.marker!r}; reword it"
            )
    if len(set(domain.outcomes.values())) < len(domain.outcomes):
        raise DomainError(f"{where}: two labels have one outcome word in {domain.outcomes}; give each its own")


def _check_rules(domain: Domain) -> None:
    where = f"domain '{domain.name}'"
    label, labels = domain.label, domain.labels
    numbers = {"label.above": label.above, "split.valid": domain.split.valid, "split.test": domain.split.test}
    for key, number in numbers.items():
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise DomainError(f"{where}: {key} must be a number; got {number!r}")
    if label.above is not None and (label.map is not None or len(labels) != 2):
        raise DomainError(f"{where}: label.above needs two outcomes and no map; got {len(labels)} and {label.map}")
    for spelling, name in (label.map or {}).items():
        if name is not None and name not in labels:
            raise DomainError(f"{where}: label.map maps '{spelling}' to '{name}'; the labels are {', '.join(labels)}")
    if domain.negatives.label is not None and domain.negatives.label not in labels:
        raise DomainError(
            f"{where}: negatives.label '{domain.negatives.label}' is not among the labels {', '.join(labels)}"
        )
    lists = {"stream.history_labels": domain.stream.history_labels, "recommend.exclude": domain.recommend.exclude}
    for key, named in lists.items():
        if not isinstance(named, list | None):
            raise DomainError(f"{where}: {key} must be a list of labels, or left out; got {named!r}")
        unknown = [name for name in named or [] if name not in labels]
        if unknown:
            raise DomainError(f"{where}: {key} has '{unknown[0]}'; the labels are {', '.join(labels)}")
    choices: dict[str, tuple[str | None, tuple[str, ...]]] = {
        "simultaneous": (domain.simultaneous, ("order", "isolate")),
        "duplicates": (domain.duplicates, RULES),
        "split.by": (domain.split.by, ("time", "user")),
        "negatives.sampling": (domain.negatives.sampling, ("popularity", "uniform")),
    }
    for key, (choice, allowed) in choices.items():
        if choice not in allowed:
            raise DomainError(f"{where}: {key} must be one of {', '.join(allowed)}; got {choice!r}")


def _check_fields(domain: Domain) -> None:
    """Check the types and bounds that the fields declare."""
    rules = {item.name: getattr(domain, item.name) for item in dataclasses.fields(domain)}
    parts = {f"{name}.": rule for name, rule in rules.items() if dataclasses.is_dataclass(rule)}
    for prefix, part in {"": domain, **parts}.items():
        for name, requirement, value in broken_fields(part):
            raise DomainError(
                f"domain {quoted(domain.name, 100)}: {prefix}{name} must be {requirement}; got {quoted(value, 100)}"
            )

"""A domain: how one kind of behaviour log is put into words, labelled, split and cut into windows.

Arrow is imported where rows are read: a configuration describes domains and has no rows. Annotations that name it are
quoted here, since jsonargparse imports what a module with postponed annotations imports for types.
"""

import dataclasses
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from llmrec_peft.data.duplicates import RULES
from llmrec_peft.data.item_text import (
    MAX_TEMPLATE,
    OUTCOME_COLUMNS,
    broken_up,
    check_template,
    part_text,
    template_columns,
    template_literals,
    value_text,
)
from llmrec_peft.data.splits import context_only
from llmrec_peft.data.values import plain, shorten
from llmrec_peft.documents import has_surrogates, read_yaml, shortened
from llmrec_peft.errors import DataError, DomainError, input_errors
from llmrec_peft.fields import MAX_COUNT, annotations_of, broken_fields
from llmrec_peft.fields import number as of_number
from llmrec_peft.fields import text as of_text

if TYPE_CHECKING:
    import pyarrow as pa

Rule = TypeVar("Rule")

ITEM_EVENT = "item {item_id}"
"""Event of a domain for models that read item ids in place of texts."""


@dataclass
class LabelRule:
    """Which column says what the user did, and how its values become labels."""

    column: str = "label"
    """Column of the interactions that holds the outcome."""
    above: float | None = of_number(None, -1e18, 1e18)
    """With two outcomes: values above this are the second one, others the first."""
    map: dict[str, str | None] | None = None
    """From the column's values to labels; null leaves such rows out of the log."""
    missing: Literal["refuse", "leave_out"] = "refuse"
    """What a row without a value is: an error, or left out of the log; distilling can ask a teacher about it."""


@dataclass
class SplitRule:
    """How the log is divided into training, validation and test targets."""

    by: Literal["time", "user"] = "time"
    """One global time for all users, or whole users."""
    valid: float = of_number(0.1, 0, 1)
    """Share of the interactions (by time) or of the users (by user) for validation."""
    test: float = of_number(0.1, 0, 1)
    """Share for the test, taken last."""


@dataclass
class NegativeRule:
    """Sampled negatives for logs that hold positives alone."""

    per_positive: int = of_number(0, 0, 1000)
    """How many sampled items stand beside each positive; 0 for logs with both outcomes."""
    sampling: Literal["popularity", "uniform"] = "popularity"
    """Draw by popularity in the past of the positive, or uniformly among the items seen by then."""
    label: str | None = None
    """The label that sampled items get; the first outcome if not given."""


@dataclass
class StreamRule:
    """How one user's log is cut into windows."""

    context: int = of_number(10, 0, 100_000)
    """History events before the targets, at most; their outcomes carry no loss."""
    targets: int = of_number(30, 1, 100_000)
    """Events in a window that are answered, at most."""
    max_length: int = of_number(1024, 8, MAX_COUNT)
    """Tokens in a window, at most; the oldest history events are left out first, whole."""
    history_labels: list[str] | None = None
    """Labels whose events later events may see; all if not given. Others are candidates and leave no trace."""


@dataclass
class RecommendRule:
    """What is recommended."""

    exclude: list[str] | None = None
    """Labels whose items are not recommended again, such as buy; all if not given, [] for none."""


@dataclass
class Domain:
    """One domain's words and rules, as its YAML file says them.

    Raises:
        DomainError: a template, label or rule that cannot be used.
    """

    name: str
    """Short name, used for adapters and files."""
    event: str = of_text(most=MAX_TEMPLATE)
    """Text of an event; {columns} of the items and of the interactions."""
    outcomes: dict[str, str]
    """From label to the word that follows the marker, in class order."""
    header: str = of_text("", most=MAX_TEMPLATE)
    """Text before the first event; {columns} of the interactions that describe the user."""
    marker: str = " ->"
    """Text that closes an event; the answer is read at its last token."""
    label: LabelRule = field(default_factory=LabelRule)
    """Where labels come from."""
    simultaneous: Literal["order", "isolate"] = "order"
    """Events of one moment see each other in row order, or not at all."""
    duplicates: Literal["keep", "drop"] | None = None
    """Of rows with one user, item and moment, keep all or drop all but one; by default drop with order, else keep."""
    split: SplitRule = field(default_factory=SplitRule)
    """How targets are divided."""
    negatives: NegativeRule = field(default_factory=NegativeRule)
    """Sampled negatives."""
    stream: StreamRule = field(default_factory=StreamRule)
    """Windows."""
    recommend: RecommendRule = field(default_factory=RecommendRule)
    """Lists of items."""

    def __post_init__(self) -> None:
        _check_parts(self)
        if self.duplicates is None:
            # In order a row sees the outcome of the row that it repeats; isolated rows see nothing of each other.
            self.duplicates = "keep" if self.simultaneous == "isolate" else "drop"
        _check_texts(self)
        _check_rules(self)
        _check_fields(self)

    # -- reading and writing -------------------------------------------------------------------

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Domain":
        """Read a domain file.

        Raises:
            DomainError: no such file, not YAML, an unknown key, or a rule broken.
        """
        where = shortened(path)
        content = read_yaml(path, error=DomainError, kind="domain file")
        return cls.from_dict(content, source=where)

    @classmethod
    def from_dict(cls, content: Any, *, source: str = "domain") -> "Domain":
        """Build a domain from plain mappings; the reverse of :meth:`to_dict`."""
        return _from_mapping(cls, content, source)

    @classmethod
    def of_manifest(cls, content: dict[str, Any], *, source: str = "domain") -> "Domain":
        """Build the domain of a bundle, a merged model or a student from its manifest.

        Manifests from before the key `duplicates` are of models that were trained and measured with every row kept.
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

    def classes(self, log) -> np.ndarray:
        """Class number of each interaction, int32 [rows]; -1 where the label rule or `duplicates` leaves the row out.

        Raises:
            DataError: no such column, a missing value (unless they are left out), or a value outside the labels.
        """
        classes = self.row_labels(log)
        if self.duplicates == "drop":
            classes[log.duplicates.surplus(classes, context_only(log))] = -1
        return classes

    def row_labels(self, log) -> np.ndarray:
        """Class number of each interaction by the label rule alone, duplicates included; otherwise as `classes`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = log.column(self.label.column)
        if self.label.above is not None:
            try:
                values = np.asarray(pc.cast(column, pa.float64()))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise DataError(
                    f"{log.name}: label column '{self.label.column}' must hold numbers for `above`; got {column.type}"
                ) from None
            missing = np.isnan(values)
            if self.label.missing == "refuse":
                _refuse_rows(log, missing, f"label column '{self.label.column}' is missing",
                             "remove these rows, or set label.missing to leave_out")  # fmt: skip
            return np.where(missing, -1, values > self.label.above).astype(np.int32)
        # The few distinct values are mapped in Python, the rows by an Arrow take.
        try:
            encoded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
        except pa.ArrowNotImplementedError:
            raise DataError(
                f"{log.name}: label column '{self.label.column}' must hold texts or numbers, got {column.type}; "
                "convert it"
            ) from None
        names = encoded.dictionary.to_pylist()
        codes = np.array([self._class_of(value) for value in names], dtype=np.int32)
        classes = codes[np.asarray(encoded.indices)] if len(names) else np.empty(0, np.int32)
        for number, value in enumerate(names):
            if codes[number] == -2:
                _refuse_rows(
                    log,
                    np.asarray(encoded.indices) == number,
                    f"label column '{self.label.column}' has {value!r}, which is not one of the domain's labels",
                    f"use {', '.join(map(repr, self._known_values()))} or add it to label.map (null leaves rows out)"
                    if value is not None
                    else "give it a label, or set label.missing to leave_out",
                )
        return classes

    def _known_values(self) -> list[Any]:
        return list(self.label.map) if self.label.map else self.labels + list(range(len(self.labels)))

    def _class_of(self, value: Any) -> int:
        """Class of one of the column's values; -1 to leave it out, -2 if it is unknown.

        Values are compared with labels as text, so that parquet, csv and jsonl agree. A number that is no label's name
        is a class number, unless labels are named by numbers: 1 must not mean "2" where the labels are "1" to "5".
        """
        if value is None or value != value:  # null or NaN
            return -1 if self.label.missing == "leave_out" else -2
        texts = [str(value), _as_label(value)]  # "4.0" and "4"
        if self.label.map is not None:
            names = [self.label.map[text] for text in texts if text in self.label.map]
            return -2 if not names else -1 if names[0] is None else self.labels.index(names[0])
        for text in texts:
            if text in self.outcomes:
                return self.labels.index(text)
        text = str(int(value)) if isinstance(value, bool) else texts[1]
        if any(_is_number(label) for label in self.labels) or not (text.isascii() and text.isdigit()):
            return -2
        return int(text) if int(text) < len(self.labels) else -2

    # -- text ----------------------------------------------------------------------------------

    @property
    def reads_ids(self) -> bool:
        """Whether an event is the item's id alone, one token by a tokenizer for it; then the marker may be empty."""
        return self.event == ITEM_EVENT

    def of_ids(self, context: int, targets: int) -> "Domain":
        """This domain for a model that reads item ids: the same labels, rules and splits; an event is its item's token.

        context, targets: its windows. There is no header, and no column beside the item.
        """
        # An event stands as a candidate and once more on the prefix, with its outcome; its negatives stand once.
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
        """Texts that no column's value may spell: the marker and the tokenizer's special tokens."""
        return [text.strip() for text in [self.marker, *special_tokens] if text.strip()]


def _as_label(value: Any) -> str:
    """A value as labels and maps spell it: whole numbers without a point, true and false in lower case."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def render(template: str, columns: "dict[str, pa.Array]", forbidden: list[str]) -> "pa.Array":
    """Fill a template for many rows at once.

    Args:
        template: text with {column} or {column:format} fields.
        columns: an Arrow array [rows] for each field; null and NaN become the empty text.
        forbidden: see :func:`neutralise`.

    Returns:
        Arrow large_string array [rows].

    Raises:
        DomainError: no field, or a format that does not fit its column's values.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    parts: list[Any] = []
    literals = template_literals(template)
    for literal, name, spec, _ in string.Formatter().parse(template):
        if literal:
            parts.append(pa.scalar(literal, pa.large_string()))
        if name is not None:
            parts.append(_as_text(name, columns[name], spec or "", forbidden))
    if not any(isinstance(part, pa.Array) for part in parts):
        raise DomainError(f"template {template!r} names no column; use at least one {{column}}")
    texts = pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))
    # Two harmless values side by side can still spell a forbidden text: "-" and ">". What the template itself spells,
    # such as a chat's special tokens, is the domain's own wish.
    for word in forbidden:
        spelled = pc.greater(pc.count_substring(texts, word), sum(literal.count(word) for literal in literals))
        if pc.any(spelled).as_py():
            mended = [broken_up(text, forbidden) for text in texts.filter(spelled).to_pylist()]
            texts = pc.replace_with_mask(texts, spelled, pa.array(mended, pa.large_string()))
    return texts


def _as_text(name: str, values: "pa.Array", spec: str, forbidden: list[str]) -> "pa.Array":
    """Format and neutralise distinct values once, then spread them over the rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = _joined(name, values)
    encoded = _encoded(name, values)
    column = f"column's values of type {encoded.dictionary.type}, such as the "
    texts = [value_text(name, value, spec, forbidden, column) for value in python_values(encoded.dictionary, name)]
    return pc.fill_null(pa.array(texts, pa.large_string()).take(encoded.indices), "")


def python_values(values: "pa.Array", name: str) -> list[Any]:
    """Arrow values [n] as the Python values that templates write: float32 as NumPy's, moments to the microsecond.

    Raises:
        DataError: values that Python cannot hold, such as the year 50,000, or texts that are not UTF-8.
    """
    import pyarrow as pa

    kind = values.type
    if pa.types.is_floating(kind):  # null is NaN
        return list(values.to_numpy(zero_copy_only=False))
    with input_errors(DataError, f"column {name!r} of type {kind}", "correct the values, or write them as texts"):
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            values = values.cast(pa.timestamp("us", kind.tz), safe=False)
        elif pa.types.is_duration(kind) and kind.unit == "ns":
            values = values.cast(pa.duration("us"), safe=False)
        return values.to_pylist()


def _encoded(name: str, values: "pa.Array") -> "pa.DictionaryArray":
    """Values as a dictionary of those that differ. Raises DomainError for a type that is no text, number or date."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or isinstance(kind, pa.BaseExtensionType)):
        try:
            return values if pa.types.is_dictionary(values.type) else pc.dictionary_encode(values)
        except pa.ArrowNotImplementedError:
            pass
    raise DomainError(
        f"field {{{name}}} names a column of type {values.type}; flatten it to texts, numbers or dates first"
    )


def _joined(name: str, values: "pa.Array") -> "pa.Array":
    """Lists as text, their parts separated by commas; null where a list or one of its parts is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from llmrec_peft.data.tables import ID_TYPE

    values = values.cast(pa.large_list(values.type.value_type))
    parts = _encoded(name, values.flatten())
    texts = pa.array([part_text(plain(name, value)) for value in python_values(parts.dictionary, name)], ID_TYPE)
    sizes = pc.fill_null(pc.list_value_length(values), 0)
    offsets = np.concatenate([[0], np.cumsum(sizes.to_numpy(zero_copy_only=False))])
    lists = pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), texts.take(parts.indices), mask=values.is_null()
    )
    return pc.binary_join(lists, pa.scalar(", ", ID_TYPE))


def _refuse_rows(log, bad: np.ndarray, what: str, advice: str) -> None:
    if bad.any():
        rows = np.flatnonzero(bad)
        shown = ", ".join(map(str, rows[:3]))
        raise DataError(f"{log.name}: {what} in {len(rows)} rows (first: {shown}); {advice}")


def _from_mapping(cls: type[Rule], content: Any, where: str) -> Rule:
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
    """What the rules below take for granted."""
    where = f"domain {shortened(repr(domain.name))}"
    for name, (kind, _) in annotations_of(Domain).items():
        part = getattr(domain, name)
        if dataclasses.is_dataclass(kind) and not isinstance(part, kind):
            raise DomainError(f"{where}: {name} must be a mapping of keys; got {shortened(repr(part))}")
    for name, mapping in {"outcomes": domain.outcomes, "label.map": domain.label.map}.items():
        keys = mapping if isinstance(mapping, dict) else [None] * (mapping is not None or name == "outcomes")
        if not all(isinstance(key, str) for key in keys):
            raise DomainError(f"{where}: {name} must be a mapping with texts as keys; got {shortened(repr(mapping))}")
    column = domain.label.column
    if not isinstance(column, str) or not column:
        raise DomainError(f"{where}: label.column must be a column's name; got {shortened(repr(column))}")


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
            raise DomainError(f"{where}: {key} contains the marker {domain.marker!r}, which only closes events; reword")
        shown = [name for name in columns if name in (domain.label.column, *OUTCOME_COLUMNS)]
        if shown:
            raise DomainError(f"{where}: {key} shows the column '{shown[0]}', which tells the answer; remove it")
    if not domain.event_columns:
        raise DomainError(f"{where}: event {domain.event!r} names no column; use at least one, such as {{title}}")
    texts = [domain.name, domain.marker, *domain.outcomes, *domain.outcomes.values()]
    halves = [text for text in texts if isinstance(text, str) and has_surrogates(text)]
    if halves:
        raise DomainError(
            f"domain: {shorten(halves[0])} holds half of a surrogate pair, which is no character; remove it"
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
                f"{where}: the outcome {word!r} of '{label}' contains the marker {domain.marker!r}; reword"
            )
    if len(set(domain.outcomes.values())) < len(domain.outcomes):
        raise DomainError(f"{where}: two labels have one outcome word in {domain.outcomes}; give each its own")


def _check_rules(domain: Domain) -> None:
    where = f"domain '{domain.name}'"
    label, labels = domain.label, domain.labels
    numbers = {"label.above": label.above, "split.valid": domain.split.valid, "split.test": domain.split.test}
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DomainError(f"{where}: {key} must be a number; got {value!r}")
    if label.above is not None and (label.map is not None or len(labels) != 2):
        raise DomainError(f"{where}: label.above needs two outcomes and no map; got {len(labels)} and {label.map}")
    for value, name in (label.map or {}).items():
        if name is not None and name not in labels:
            raise DomainError(f"{where}: label.map sends '{value}' to '{name}'; the labels are {', '.join(labels)}")
    if domain.negatives.label is not None and domain.negatives.label not in labels:
        raise DomainError(
            f"{where}: negatives.label '{domain.negatives.label}' is none of the labels {', '.join(labels)}"
        )
    lists = {"stream.history_labels": domain.stream.history_labels, "recommend.exclude": domain.recommend.exclude}
    for key, named in lists.items():
        if not isinstance(named, list | None):
            raise DomainError(f"{where}: {key} must be a list of labels, or left out; got {named!r}")
        unknown = [name for name in named or [] if name not in labels]
        if unknown:
            raise DomainError(f"{where}: {key} has '{unknown[0]}'; the labels are {', '.join(labels)}")
    choices = {
        "simultaneous": (domain.simultaneous, ("order", "isolate")),
        "duplicates": (domain.duplicates, RULES),
        "split.by": (domain.split.by, ("time", "user")),
        "negatives.sampling": (domain.negatives.sampling, ("popularity", "uniform")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise DomainError(f"{where}: {key} must be one of {', '.join(allowed)}; got {value!r}")


def _check_fields(domain: Domain) -> None:
    """Types and bounds, as the fields say them."""
    rules = {item.name: getattr(domain, item.name) for item in dataclasses.fields(domain)}
    parts = {f"{name}.": rule for name, rule in rules.items() if dataclasses.is_dataclass(rule)}
    for prefix, part in {"": domain, **parts}.items():
        for name, requirement, value in broken_fields(part):
            raise DomainError(
                f"domain {shortened(repr(domain.name))}: {prefix}{name} must be {requirement}; "
                f"got {shortened(repr(value))}"
            )

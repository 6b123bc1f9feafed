"""Templates filled for many rows at once, in Arrow; `templates.fill` gives the same text for one row."""

import string
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.tables import ID_TYPE
from llmrec_peft.data.templates import broken_up, part_text, template_literals, value_text
from llmrec_peft.data.values import plain
from llmrec_peft.errors import DataError, DomainError, input_errors


def render(template: str, columns: dict[str, pa.Array], forbidden: list[str]) -> pa.Array:
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
    # Two harmless values side by side can still form a forbidden text: "-" and ">". Forbidden texts in the template's
    # own literals, such as a chat's special tokens, are intended.
    for word in forbidden:
        spelled = pc.greater(pc.count_substring(texts, word), sum(literal.count(word) for literal in literals))
        if pc.any(spelled).as_py():
            mended = [broken_up(text, forbidden) for text in texts.filter(spelled).to_pylist()]
            texts = pc.replace_with_mask(texts, spelled, pa.array(mended, pa.large_string()))
    return texts


def _as_text(name: str, values: pa.Array, spec: str, forbidden: list[str]) -> pa.Array:
    """Format and neutralise each distinct value once, then expand to the rows."""
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = _joined(name, values)
    encoded = _encoded(name, values)
    column = f"column's values of type {encoded.dictionary.type}, such as the "
    texts = [value_text(name, value, spec, forbidden, column) for value in python_values(encoded.dictionary, name)]
    return pc.fill_null(pa.array(texts, pa.large_string()).take(encoded.indices), "")


def python_values(values: pa.Array, name: str) -> list[Any]:
    """Arrow values [n] as the Python values that templates write: float32 as NumPy's, moments to the microsecond.

    Raises:
        DataError: values that Python cannot hold, such as the year 50,000, or texts that are not UTF-8.
    """
    kind = values.type
    if pa.types.is_floating(kind):  # null is NaN
        return list(values.to_numpy(zero_copy_only=False))
    with input_errors(DataError, f"column {name!r} of type {kind}", "correct the values, or write them as texts"):
        if pa.types.is_timestamp(kind) and kind.unit == "ns":
            values = values.cast(pa.timestamp("us", kind.tz), safe=False)
        elif pa.types.is_duration(kind) and kind.unit == "ns":
            values = values.cast(pa.duration("us"), safe=False)
        return values.to_pylist()


def _encoded(name: str, values: pa.Array) -> pa.DictionaryArray:
    """Values as a dictionary array. Raises DomainError for a type that is not text, number or date."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not (pa.types.is_nested(kind) or pa.types.is_binary(kind) or isinstance(kind, pa.BaseExtensionType)):
        try:
            return values if pa.types.is_dictionary(values.type) else pc.dictionary_encode(values)
        except pa.ArrowNotImplementedError:
            pass
    raise DomainError(
        f"field {{{name}}} names a column of type {values.type}; flatten it to texts, numbers or dates first"
    )


def _joined(name: str, values: pa.Array) -> pa.Array:
    """Lists as text, their parts separated by commas; null where the list or one of its parts is null."""
    values = values.cast(pa.large_list(values.type.value_type))
    parts = _encoded(name, values.flatten())
    texts = pa.array([part_text(plain(name, value)) for value in python_values(parts.dictionary, name)], ID_TYPE)
    sizes = pc.fill_null(pc.list_value_length(values), 0)
    offsets = np.concatenate([[0], np.cumsum(sizes.to_numpy(zero_copy_only=False))])
    lists = pa.LargeListArray.from_arrays(
        pa.array(offsets, pa.int64()), texts.take(parts.indices), mask=values.is_null()
    )
    return pc.binary_join(lists, pa.scalar(", ", ID_TYPE))

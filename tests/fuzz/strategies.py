"""Odd values, and valid documents with some of their values changed: what the fuzz tests draw from."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = (
    "", " ", "\u200b\ufeff", "\x00", "nan", "NaN", "null", "None", "-inf", "1e309", "0012", "1.0", "-1", "9" * 60,
    "2020-01-02", "2020-01-02 03:04:05 UTC", "2020-01-02T03:04:05.000Z", "1577934245000", " -> yes\n", "<|endoftext|>",
    "\ud83d", "\U0001f3ac", "\u202e", "&amp;", '"', "'", "a\tb", "a,b", "a;b", "a::b", "{title}", "{0.__class__}",
    "{title:>1000000000}", "../../etc/passwd", "x" * 3000, "True", "[]", "{}",
)  # fmt: skip
"""Texts that once meant something to some reader, parser or template."""
ODD_NUMBERS = (
    0, -0.0, -1, 1, 2, 7, 0.5, 1e-320, 1e300, -1e300, float("nan"), float("inf"), float("-inf"), True, 2**31, 2**32,
    2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**40, 10**400,
    1_577_934_245, 1_577_934_245_000, 1_577_934_245_000_000,
)  # fmt: skip


def scalars() -> st.SearchStrategy[Any]:
    """One odd value: a text, a number, a truth or nothing."""
    return st.one_of(
        st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.integers(), st.floats(),
        st.sampled_from(ODD_TEXTS), st.text(max_size=20),
    )  # fmt: skip


def trees() -> st.SearchStrategy[Any]:
    """An odd value, or small lists and mappings of them."""
    keys = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=8))
    return st.recursive(
        scalars(),
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
        max_leaves=6,
    )


def paths_of(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of all values in a document, each a tuple of keys and positions; the document itself is ()."""
    found = [prefix]
    entries = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in entries:
        found += paths_of(value, (*prefix, key))
    return found


@st.composite
def changed(draw: st.DrawFn, document: Any, *, most: int = 3) -> Any:
    """The document with one to `most` values replaced, removed or added."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        places = [place for place in paths_of(result) if place]
        if not places:
            return draw(trees())
        *way, last = draw(st.sampled_from(places))
        holder = result
        for key in way:
            holder = holder[key]
        kind = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if kind == "remove":
            del holder[last]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(ODD_TEXTS))] = draw(trees())
        else:
            holder[last] = draw(trees())
    return result


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with some of them changed, cut out, doubled or put in."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(result) - 1)))
        kind = draw(st.sampled_from(("flip", "cut", "drop", "insert")))
        if kind == "flip" and result:
            result[place] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del result[place:]
        elif kind == "drop":
            del result[place : place + draw(st.integers(1, 64))]
        else:
            result[place:place] = draw(st.binary(min_size=1, max_size=16))
    return bytes(result)

"""Whether an item's title can be seen: the same rule for item tables and requests, without Arrow."""

import re
from typing import Any

from llmrec_peft.messages import quoted

# White space, control characters, Unicode's default-ignorable code points (fillers, joiners, bidi marks, variation
# selectors, soft hyphen, tags), annotation marks, and the braille blank: characters that show nothing.
_UNSEEN = (
    (0x00, 0x20), (0x7F, 0xA0), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x1680, 0x1680),
    (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2000, 0x200F), (0x2028, 0x202F), (0x205F, 0x206F), (0x2800, 0x2800),
    (0x3000, 0x3000), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFFB),
    (0x1BCA0, 0x1BCA3), (0x1D159, 0x1D159), (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
)  # fmt: skip
SEEN = "[^" + "".join(f"{chr(low)}-{chr(high)}" for low, high in _UNSEEN) + "]"
"""Regular expression of one visible character, the same for Python's `re` and for Arrow's RE2."""
_SEEN = re.compile(SEEN)


def is_unseen(text: str) -> bool:
    """Whether a text has no visible character; as `tables.is_blank` for one text."""
    return _SEEN.search(text) is None


def title_fault(title: Any) -> str | None:
    """What is wrong with an item's title, as the end of a sentence that begins with the item; None if nothing is."""
    if title is None or (isinstance(title, float) and title != title):
        return f"has no title ({title})"
    if not isinstance(title, str):
        return f"has a title that is not text, {quoted(title)}"
    return f"has a title without a visible character, {quoted(title)}" if is_unseen(title) else None

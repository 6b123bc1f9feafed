"""Which versions of bundles a bank has in memory, and for how long."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmrec_peft.errors import BundleError, DataError
from llmrec_peft.messages import quoted
from llmrec_peft.scoring.loaded_adapter import LoadedAdapter, stamp

Stamp = tuple[Any, ...]
"""What `member.stamp` gives for a bundle's directory; another stamp is another version."""

NAME_LENGTH = 200
"""Characters of a domain's name in a bank, at most."""


class Versions:
    """Bundles in memory by stamp. A version stays while a domain uses it, or from its preload to its first use.

    A request that has begun holds its `Member` itself, so the memory of a dropped version is free when the last such
    request ends. The caller holds a lock around every call.

    Args:
        max_bytes: beyond, those not used for the longest go, but never the last one; None for no limit.
        on_drop: called with each version that leaves memory for good.
    """

    def __init__(self, max_bytes: int | None = None, on_drop: Callable[[LoadedAdapter], None] | None = None) -> None:
        self._max_bytes, self._on_drop = max_bytes, on_drop
        self._members: OrderedDict[Stamp, LoadedAdapter] = OrderedDict()
        self._ahead: set[Stamp] = set()

    def get(self, stamp: Stamp) -> LoadedAdapter | None:
        """The version in memory, or None; it counts as used now."""
        if stamp not in self._members:
            return None
        self._members.move_to_end(stamp)
        return self._members[stamp]

    def size(self, stamp: Stamp) -> int:
        """Bytes of a version; 0 if it is not in memory."""
        return self._members[stamp].size if stamp in self._members else 0

    def put(self, stamp: Stamp, member: LoadedAdapter, *, ahead: bool = False) -> None:
        """Keep a version for the domain that uses it; `ahead` of its first use, for the one that will."""
        self._members.setdefault(stamp, member)
        self._members.move_to_end(stamp)
        if ahead:
            self._ahead.add(stamp)
        else:
            self._ahead.discard(stamp)
        while self._max_bytes is not None and len(self._members) > 1 and self._bytes() > self._max_bytes:
            gone, _ = self._members.popitem(last=False)
            self._ahead.discard(gone)

    def drop(self, stamp: Stamp) -> None:
        """Forget a version that no domain uses any more, unless it was preloaded and waits for its first use."""
        if stamp not in self._ahead:
            member = self._members.pop(stamp, None)
            if member is not None and self._on_drop is not None:
                self._on_drop(member)

    def ahead(self, directory: str) -> list[Stamp]:
        """Preloaded versions of a directory that wait for their first use."""
        return [stamp for stamp in self._ahead if stamp[0] == directory]

    def release(self, stamp: Stamp) -> None:
        """Wait no longer for the first use of a preloaded version."""
        self._ahead.discard(stamp)

    def _bytes(self) -> int:
        return sum(member.size for member in self._members.values())


def check_name(name: Any) -> None:
    """Raise DataError for what cannot be a domain's name in a bank."""
    if not isinstance(name, str) or not name.isprintable() or name != name.strip() or not 0 < len(name) <= NAME_LENGTH:
        raise DataError(
            f"a domain's name must be a text of 1 to {NAME_LENGTH} printable characters without spaces around it, not "
            f"{quoted(name)}; rename it"
        )


def stamp_of(directory: Path) -> Stamp:
    """Stamp of a bundle's directory. Raises BundleError where its files cannot be looked at."""
    try:
        return stamp(directory)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        place = Path(getattr(error, "filename", None) or directory).name
        raise BundleError(
            f"bundle {directory} cannot be read ({reason}: {place}); name a directory that training left"
        ) from None


def holds(directory: Path, mark: Stamp) -> bool:
    """Whether a directory holds this very version still."""
    try:
        return stamp(directory) == mark
    except OSError:
        return False

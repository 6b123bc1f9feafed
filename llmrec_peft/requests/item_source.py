"""Item lookup as the request encoder needs it, and the source that stands for a missing item table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llmrec_peft.data.templates import fill
from llmrec_peft.errors import DataError
from llmrec_peft.messages import quoted


class ItemSource(Protocol):
    """Items by id."""

    @property
    def takes_any_id(self) -> bool:
        """Whether no id is unknown here, so that only the vocabulary can refuse one."""

    @property
    def column_names(self) -> Sequence[str]:
        """Columns that each item has."""

    def check(self, ids: Sequence[str], what: str) -> None:
        """Raise DataError for an id that the source lacks; `what` names its place in the request, for the message."""

    def texts(self, ids: Sequence[str], template: str, forbidden: list[str]) -> list[str]:
        """The template filled with each item's columns, neutralised (see `templates.neutralise`)."""

    def values(self, ids: Sequence[str], names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns of the items as Python values [ids], by name."""


class NoTable:
    """Without an item table every id is unknown, except where the ids themselves are the texts.

    Args:
        takes_any_id: whether a student of item ids reads them: the event's template is then {item_id} alone.
    """

    def __init__(self, takes_any_id: bool = False) -> None:
        self.takes_any_id = takes_any_id
        self.column_names = ["item_id"] if takes_any_id else []

    def check(self, ids: Sequence[str], what: str) -> None:
        if ids and not self.takes_any_id:
            raise unknown_items(ids, what, "since no item table was given")

    def texts(self, ids: Sequence[str], template: str, forbidden: list[str]) -> list[str]:
        return [fill(template, {"item_id": item_id}, forbidden) for item_id in ids]

    def values(self, ids: Sequence[str], names: Sequence[str]) -> dict[str, list[Any]]:
        return {name: list(ids) for name in names}


def unknown_items(missing: Sequence[str], what: str, where: str) -> DataError:
    """The error about ids that an item source lacks."""
    return DataError(
        f"{what}: item {quoted(missing[0])} is unknown {where} ({len(missing)} such); add it to the table, or "
        "give its columns as a mapping"
    )

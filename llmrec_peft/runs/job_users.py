"""The users of a batch job, and the request of each to a recommender."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.tables import bool_numpy, is_blank
from llmrec_peft.data.times import check_moment
from llmrec_peft.errors import ConfigError, DataError
from llmrec_peft.messages import listed, quoted
from llmrec_peft.requests.request import Event
from llmrec_peft.runs.id_files import read_ids, table_fingerprint
from llmrec_peft.runs.logged_events import LoggedEvents, cells

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class UserRequest:
    """A request to a recommender for one user.

    Attributes:
        history: (event, label) in time order.
        user: columns that the domain's header names.
        context: columns of the moment that the domain's event names, for all candidates.
    """

    history: list[tuple[Event, str]]
    user: dict[str, Any]
    context: dict[str, Any]


class JobUsers:
    """The users of a batch job, in the order of the input.

    The history of a user is the user's rows of the log before `until`, in time order, without the rows that the
    domain's label rule leaves out. The header's columns come from the input, or else from the user's first row of the
    log, as in training.

    Attributes:
        name: name of the input, for messages.
        ids: Arrow large strings [n].
        refused: reason by row (from 0), for rows without an id and for repeated ids.
    """

    def __init__(
        self,
        log: BehaviorLog,
        domain: Domain,
        path: str | None = None,
        *,
        until: float | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        """Read the input and find its users in the log.

        Args:
            log: histories and items.
            domain: its templates and labels.
            path: file of users (parquet, csv, jsonl), or None for all users of the log.
            until: seconds since 1970, or one of the log's own numbers where it is not `dated`; rows from this moment on
                are no history.
            context: columns of the moment that the event's template names and items lack, for all users.

        Raises:
            DataError: no such file, no column user_id, no row, or a column that nothing has.
            ConfigError: columns of the moment that are not given, or are not needed, or an `until` of another unit.
        """
        check_moment(until, log.dated, "until")
        self._log, self._domain, self._until = log, domain, until
        self._logged = LoggedEvents(log, domain)
        self.name = f"log {log.name}" if path is None else Path(path).name
        if path is None:
            table = pa.table({"user_id": log.user_ids})
        else:
            table = read_ids(path, "users", "user_id", log.user_ids, f"log {log.name!r}")
        if "history" in table.column_names:
            raise DataError(
                f"users {path} has a column 'history', but histories come from the log; add their rows to the log at "
                "data.path, or drop the column"
            )
        self.ids: pa.Array = pa.concat_arrays(table.column("user_id").chunks)
        needed = (*domain.header_columns, *self._logged.moment)
        self._columns = table.select([name for name in dict.fromkeys(needed) if name in table.column_names])
        self._context = dict(context or {})
        self._check_columns()
        self._codes = pc.fill_null(pc.index_in(self.ids, value_set=log.user_ids), -1).to_numpy(zero_copy_only=False)
        self.refused = _refused(self.ids)
        if path is not None and not self.known and len(log.user_ids):
            _log.warning(
                "none of the %d users of %s is in log %r (%s there, and %s in the log): all get predictions without "
                "a history", len(self.ids), self.name, log.name, *(_first(ids) for ids in (self.ids, log.user_ids)),
            )  # fmt: skip

    def _check_columns(self) -> None:
        given, known = set(self._columns.column_names), self._log.interactions.column_names
        domain, name = self._domain.name, self._log.name
        for column in self._domain.header_columns:
            if column not in given and column not in known:
                raise DataError(
                    f"the header of domain {domain!r} names {column!r}, which neither users ({self.name}) nor the "
                    f"interactions of log {name!r} have; add the column to users"
                )
        extra = sorted(set(self._context) - set(self._logged.moment))
        if extra:
            raise ConfigError(
                f"context has {extra[0]!r}, but the event of domain {domain!r} takes from it only "
                f"{listed(self._logged.moment)}; leave it out"
            )
        missing = [column for column in self._logged.moment if column not in given and column not in self._context]
        if missing:
            raise ConfigError(
                f"the event of domain {domain!r} names {listed(missing)}, which the items of log {name!r} lack; give "
                f"--context '{{{missing[0]}: ...}}' for the moment of the recommendation, or a column in users"
            )
        for column in self._logged.moment:
            if column not in known:
                raise DataError(
                    f"the event of domain {domain!r} names {column!r}, which neither the items nor the interactions of "
                    f"log {name!r} have, so no history can be written; add the column to the log"
                )

    def __len__(self) -> int:
        return len(self.ids)

    def describe(self, row: int) -> str:
        """A user and the row of the input, for messages."""
        return f"user {self.ids[row].as_py()!r} (row {row} of {self.name})"

    @property
    def known(self) -> int:
        """Number of users that are in the log."""
        return int((self._codes >= 0).sum())

    def request(self, row: int) -> UserRequest:
        """The request for the user of one row.

        Raises:
            DataError: a row without an id, a repeated id, or no value of a header's column for this user.
        """
        if row in self.refused:
            raise DataError(self.refused[row])
        code, own = int(self._codes[row]), self._columns.slice(row, 1)
        given = {name: cells(own.column(name), name)[0] for name in own.column_names}
        user = {
            name: given[name] if name in given else self._first_value(name, code)
            for name in self._domain.header_columns
        }
        history = self._logged.history(code, self._until) if code >= 0 else []
        context = self._context | {name: given[name] for name in self._logged.moment if name in given}
        return UserRequest(history, user, context)

    def _first_value(self, name: str, code: int) -> Any:
        if code < 0:
            raise DataError(
                f"the header names {name!r}, which the log does not have for a user it does not know; add a "
                f"column {name!r} to users"
            )
        return self._logged.first(code, name)

    # -- fingerprints --------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hash of the users and of the columns that the input has for them."""
        return table_fingerprint(self._columns.append_column("user_id", self.ids))

    def log_fingerprint(self) -> str:
        """Hash of the items' columns that templates read, and of all histories."""
        log, digest = self._log, hashlib.sha256()
        columns = [name for name in self._domain.event_columns if name in log.items.column_names]
        digest.update(table_fingerprint(log.items.select(list(dict.fromkeys(["item_id", *columns])))).encode())
        digest.update(table_fingerprint(pa.table({"user_id": log.user_ids})).encode())
        for array in (log.user_offsets, log.item_codes, log.timestamps, self._logged.classes):
            digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        named = [
            name
            for name in (*self._domain.header_columns, *self._logged.moment)
            if name in log.interactions.column_names
        ]
        digest.update(table_fingerprint(log.interactions.select(list(dict.fromkeys(named)))).encode())
        return digest.hexdigest()


def _first(ids: pa.Array | pa.ChunkedArray) -> str:
    return listed([quoted(value) for value in ids.slice(0, 3).to_pylist()])


def _refused(ids: pa.Array) -> dict[int, str]:
    codes = pc.index_in(ids, value_set=pc.unique(ids)).to_numpy(zero_copy_only=False)
    _, first = np.unique(codes, return_index=True)
    repeats = np.setdiff1d(np.arange(len(ids)), first)
    found = {
        int(row): f"user_id stands in row {first[codes[row]]} already; keep one row a user" for row in repeats.tolist()
    }
    for row in np.flatnonzero(bool_numpy(is_blank(ids))).tolist():
        found[row] = "user_id is null or empty; give an id, or drop the row"
    return found

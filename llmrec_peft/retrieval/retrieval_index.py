"""The retrieval index: collaborative models fitted on one log, and the features that they give a ranker.

`save` writes a directory (`index_files`), which may be in a bundle's under the name DIRECTORY.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import BundleError, ConfigError, DataError
from llmrec_peft.retrieval.collaborative import default_models
from llmrec_peft.retrieval.collaborative_model import CollaborativeModel
from llmrec_peft.retrieval.cooccurrence import ItemCooccurrence
from llmrec_peft.retrieval.fusion import Fusion
from llmrec_peft.retrieval.histories import Histories
from llmrec_peft.retrieval.index_files import IndexContent, manifest_path, read_index, write_index
from llmrec_peft.retrieval.item_codes import is_known
from llmrec_peft.retrieval.pair_features import GATES, Features
from llmrec_peft.retrieval.popularity import choose_half_life
from llmrec_peft.retrieval.rates import UserItemRates

EVENTS = 2_000_000  # history events gathered at a time


@dataclass(frozen=True)
class RetrievalIndex(IndexContent):
    """Collaborative models of one log, with the features of user-item pairs that they give."""

    @classmethod
    def fit(
        cls,
        log: BehaviorLog,
        rows: np.ndarray,
        labels: np.ndarray,
        models: Sequence[CollaborativeModel] | None = None,
        *,
        seed: int = 0,
        timed: bool = True,
    ) -> Self:
        """Fit models on `rows` (the training rows) of a log.

        Args:
            labels: int [rows of the log], 1, 0 or -1, see `feedback`.
            models: unfitted ones; `default_models` if not given.
            seed: random seed of the default models.
            timed: whether times can be compared across users. If so, and if the log is `dated`, the default
                popularity has a half-life that is chosen on the newest training rows.

        Raises DataError as `CollaborativeModel.fit`, ConfigError for two models of one name.
        """
        rows, labels = np.asarray(rows, np.int64), np.asarray(labels)
        if models is None:
            half_life = choose_half_life(log, rows, labels) if timed and log.dated else None
            models = default_models(half_life, with_negatives=bool((labels[rows] == 0).any()), seed=seed)
        if len({model.NAME for model in models}) < len(models):
            raise ConfigError(f"models must have different names, got {[m.NAME for m in models]}; leave one out")
        fitted = {model.NAME: model.fit(log, rows, labels) for model in models}
        rows = rows[labels[rows] >= 0]
        note = {
            "rows": len(rows),
            "positives": int((labels[rows] == 1).sum()),
            "users": len(np.unique(log.user_codes[rows])),
            "items": len(np.unique(log.item_codes[rows])),
            "first_time": float(log.timestamps[rows].min()),
            "last_time": float(log.timestamps[rows].max()),
        }
        return cls(
            fitted,
            _strings(log.items.column("item_id")),
            np.bincount(log.item_codes[rows], minlength=log.num_items).astype(np.int64),
            note,
        )

    def refit(self, log: BehaviorLog, rows: np.ndarray, labels: np.ndarray) -> Self:
        """The same models with the same settings, including the chosen half-life, fitted on other rows."""
        return self.fit(log, rows, labels, [replace(model) for model in self.models.values()])

    @property
    def num_items(self) -> int:
        """Items of the table."""
        return len(self.item_ids)

    def for_items(self, item_ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> Self:
        """This index in the codes of another item table: new items are unknown, missing ones are dropped."""
        ids = _strings(item_ids)
        if ids.equals(self.item_ids):
            return self
        old_codes = pc.fill_null(pc.index_in(ids, value_set=self.item_ids), -1).to_numpy(zero_copy_only=False)
        rows = np.where(old_codes >= 0, self.item_rows[np.maximum(old_codes, 0)], 0)
        models = {name: model.recode(old_codes) for name, model in self.models.items()}
        return replace(self, item_ids=ids, item_rows=rows, models=models)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Columns of `features`."""
        names = [part for name in self.models for part in (("item_rate", "user_rate") if name == "rates" else (name,))]
        return (*names, *GATES)

    def features(self, histories: Histories, owners: np.ndarray, candidates: np.ndarray) -> Features:
        """Features [n, F] of pairs: user `owners[n]` of the histories with item `candidates[n]`.

        Rates are log-odds, co-occurrence is log(0.01 + sum) and counts are log(1 + count), so that all suit a
        logistic regression.
        """
        owners, candidates = np.asarray(owners, np.int64), np.asarray(candidates, np.int64)
        columns: list[np.ndarray] = []
        for name, model in self.models.items():
            if isinstance(model, UserItemRates):
                columns += [model.item_logits(candidates), model.user_logits(histories)[owners]]
                continue
            score = model.score_pairs(histories, owners, candidates)
            # 0.01 keeps the logarithm of an item without shared users finite.
            columns.append(np.log(0.01 + score) if name == ItemCooccurrence.NAME else score)
        known = is_known(candidates, self.num_items)
        item_rows = np.where(known, self.item_rows[np.where(known, candidates, 0)], 0)
        columns += [np.log1p(histories.counts[owners]), np.log1p(item_rows)]
        return Features(self.feature_names, np.column_stack(columns).astype(np.float64))

    def target_features(
        self, log: BehaviorLog, labels: np.ndarray, rows: np.ndarray, items: np.ndarray | None = None
    ) -> Features:
        """Features of targets, rows [n] of a log, with their users' histories of strictly earlier events.

        Args:
            labels: int [rows of the log], see `feedback`.
            items: codes [n], for targets that are not the row's own item (sampled negatives). The index must be in the
                codes of the log: `for_items(log.items.column("item_id"))`.
        """
        rows = np.asarray(rows, np.int64)
        items = log.item_codes[rows] if items is None else np.asarray(items, np.int64)
        if log.num_items != self.num_items:
            raise DataError(
                f"log {log.name!r} has {log.num_items} items, the retrieval index {self.num_items}; take "
                "index.for_items of the log's item ids"
            )
        # Targets of one user at one moment share a history: moments [h, 2], and the history of each target.
        pairs = np.column_stack([log.user_codes[rows].astype(np.float64), log.timestamps[rows].astype(np.float64)])
        moments, owners = np.unique(pairs, axis=0, return_inverse=True)
        order = np.argsort(owners.ravel(), kind="stable")
        sorted_owners = owners.ravel()[order]
        values = np.empty((len(rows), len(self.feature_names)))
        users = moments[:, 0].astype(np.int64)
        # A user's history is at most all of the user's rows, which bounds the events of a block.
        longest = np.cumsum(np.diff(log.user_offsets)[users]) if len(users) else np.zeros(0)
        start = 0
        while start < len(users):
            before = longest[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(longest, before + EVENTS, "right")))
            begin, end = np.searchsorted(sorted_owners, [start, stop])
            part = order[begin:end]
            # Targets of the histories start to stop - 1.
            histories = Histories.before(log, labels, users[start:stop], moments[start:stop, 1])
            values[part] = self.features(histories, sorted_owners[begin:end] - start, items[part]).values
            start = stop
        return Features(self.feature_names, values)

    def save(self, directory: str | Path, *, fusion: Fusion | None = None, adapter: str | None = None) -> Path:
        """Write a directory, whole or not at all; one that holds an index already is replaced.

        Args:
            fusion: fitted with these models.
            adapter: SHA-256 of the adapter's weights that the fusion was fitted with, which `load` then checks.

        Raises BundleError if the directory holds something else, DataError for a fusion with other features.
        """
        if fusion is not None and fusion.names != self.feature_names:
            raise DataError(
                f"fusion has the features {', '.join(fusion.names)}, the retrieval index "
                f"{', '.join(self.feature_names)}; fit it with these models"
            )
        return write_index(Path(directory), self, fusion, adapter)

    @classmethod
    def load(cls, directory: str | Path, *, adapter: str | None = None) -> tuple[Self, Fusion | None]:
        """Read what `save` wrote: the index, and its fusion if it has one.

        adapter: SHA-256 of the adapter's weights in use; a fusion that was fitted with others is refused.

        Raises BundleError for another format, a file that was changed, cut short or added, unknown models or settings,
        arrays that do not fit each other, or another adapter.
        """
        content, fusion = read_index(Path(directory), adapter)
        index = cls(**vars(content))
        if fusion is not None and fusion.names != index.feature_names:
            raise BundleError(
                f"{manifest_path(directory)} has a fusion of other features than its models give; fit it again"
            )
        return index, fusion


def _strings(ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> pa.Array:
    """Item ids as one large_string array."""
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else pa.array(ids)
    return ids.cast(pa.large_string())

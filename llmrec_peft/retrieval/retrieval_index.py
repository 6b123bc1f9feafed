"""Evidence: what a log says of items beside their text. Collaborative models of one log, their features, and files.

A directory of two files keeps it: `evidence.safetensors` with the arrays and the item ids, `evidence.json` with what
made them and the fusion that was fitted with them. It may stand in a bundle's directory, by the name of DIRECTORY.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmrec_peft.checkpoints.checksum import digest, sha256
from llmrec_peft.checkpoints.directory_checks import check_links, stray_weights
from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import INDEX
from llmrec_peft.checkpoints.manifest_schema import INDEX_ARRAYS as ARRAYS
from llmrec_peft.checkpoints.manifest_schema import INDEX_MANIFEST as MANIFEST
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import BundleError, ConfigError, DataError, input_errors, output_errors
from llmrec_peft.files import move_into_place, scratch_directory, write_json
from llmrec_peft.models.safetensors_header import read_header, read_metadata
from llmrec_peft.retrieval.collaborative import (
    MODELS,
    CollaborativeModel,
    ItemCooccurrence,
    LabelFactors,
    MatrixFactorisation,
    Popularity,
    UserItemRates,
)
from llmrec_peft.retrieval.fusion import GATES, Features, Fusion
from llmrec_peft.retrieval.histories import Histories

DIRECTORY = "retrieval"
"""Name of the directory inside a bundle's."""
HALF_LIVES = (7.0, 30.0, 90.0, 365.0, 1460.0, None)
"""Days that `choose_half_life` tries."""
TAIL = 0.1  # share of the training positives, the newest, that it tries them on
EVENTS = 2_000_000  # history events gathered at a time


@dataclass(frozen=True)
class RetrievalIndex:
    """Collaborative models of one log.

    models: by name. item_ids: of the item table whose codes they speak. item_rows: int64 [items], labelled training
    rows of each item. note: counts and times of what was fitted.
    """

    models: dict[str, CollaborativeModel]
    item_ids: pa.Array
    item_rows: np.ndarray
    note: dict[str, Any]

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

        labels: int [rows of the log], 1, 0 or -1, see `signs`. models: unfitted ones; all five if not given, with a
        half-life chosen on the newest training rows if `timed` (times mean something across users) and the log is
        `dated`, and without LabelFactors where no row is negative.

        Raises DataError as `CollaborativeModel.fit`, ConfigError for two models of one name.
        """
        rows, labels = np.asarray(rows, np.int64), np.asarray(labels)
        if models is None:
            half_life = choose_half_life(log, rows, labels) if timed and log.dated else None
            models = [Popularity(half_life), ItemCooccurrence(), MatrixFactorisation(seed=seed), UserItemRates()]
            if (labels[rows] == 0).any():
                models.append(LabelFactors(seed=seed))
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
        """The same models with the same settings, the chosen half-life too, fitted on other rows."""
        return self.fit(log, rows, labels, [replace(model) for model in self.models.values()])

    @property
    def num_items(self) -> int:
        """Items of the table."""
        return len(self.item_ids)

    def for_items(self, item_ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> RetrievalIndex:
        """This evidence in the codes of another item table: items move, new ones are unknown, missing ones go."""
        ids = _strings(item_ids)
        if ids.equals(self.item_ids):
            return self
        places = pc.fill_null(pc.index_in(ids, value_set=self.item_ids), -1).to_numpy(zero_copy_only=False)
        rows = np.where(places >= 0, self.item_rows[np.maximum(places, 0)], 0)
        return replace(
            self, item_ids=ids, item_rows=rows, models={k: model.recode(places) for k, model in self.models.items()}
        )

    # -- features ------------------------------------------------------------------------------

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Columns of `features`."""
        names = [part for name in self.models for part in (("item_rate", "user_rate") if name == "rates" else (name,))]
        return (*names, *GATES)

    def features(self, histories: Histories, owners: np.ndarray, candidates: np.ndarray) -> Features:
        """Features of pairs, [n]: user `owners[n]` of the histories with item `candidates[n]`.

        Rates are log-odds, co-occurrence is log(0.01 + sum), so that all suit a logistic regression.
        """
        owners, candidates = np.asarray(owners, np.int64), np.asarray(candidates, np.int64)
        columns = []
        for name, model in self.models.items():
            if isinstance(model, UserItemRates):
                columns += [model.item_logits(candidates), model.user_logits(histories)[owners]]
                continue
            score = model.score_pairs(histories, owners, candidates)
            columns.append(np.log(0.01 + score) if name == ItemCooccurrence.NAME else score)
        known = (candidates >= 0) & (candidates < self.num_items)
        item_rows = np.where(known, self.item_rows[np.where(known, candidates, 0)], 0)
        columns += [np.log1p(histories.counts[owners]), np.log1p(item_rows)]
        return Features(self.feature_names, np.column_stack(columns).astype(np.float64))

    def target_features(
        self, log: BehaviorLog, labels: np.ndarray, rows: np.ndarray, items: np.ndarray | None = None
    ) -> Features:
        """Features of targets: rows [n] of a log, with histories of what their users did strictly before.

        items: codes [n], for targets that are not the row's own item (sampled negatives). The codes of the log must be
        those of this evidence; `for_items(log.items.column("item_id"))` sees to that.
        """
        rows = np.asarray(rows, np.int64)
        items = log.item_codes[rows] if items is None else np.asarray(items, np.int64)
        if log.num_items != self.num_items:
            raise DataError(
                f"log {log.name!r} has {log.num_items} items, the evidence {self.num_items}; take "
                "evidence.for_items of the log's item ids"
            )
        # Targets of one user at one moment share a history.
        pairs = np.column_stack([log.user_codes[rows].astype(np.float64), log.timestamps[rows].astype(np.float64)])
        moments, owners = np.unique(pairs, axis=0, return_inverse=True)
        order = np.argsort(owners.ravel(), kind="stable")
        sorted_owners = owners.ravel()[order]
        values = np.empty((len(rows), len(self.feature_names)))
        users = moments[:, 0].astype(np.int64)
        longest = np.cumsum(np.diff(log.user_offsets)[users]) if len(users) else np.zeros(0)
        start = 0
        while start < len(users):
            before = longest[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(longest, before + EVENTS, "right")))
            begin, end = np.searchsorted(sorted_owners, [start, stop])
            part = order[begin:end]
            histories = Histories.before(log, labels, users[start:stop], moments[start:stop, 1])
            values[part] = self.features(histories, sorted_owners[begin:end] - start, items[part]).values
            start = stop
        return Features(self.feature_names, values)

    # -- files ---------------------------------------------------------------------------------

    def save(self, directory: str | Path, *, fusion: Fusion | None = None, adapter: str | None = None) -> Path:
        """Write a directory, whole or not at all; one that holds evidence already is replaced.

        fusion: fitted with these models. adapter: SHA-256 of the adapter's weights that it was fitted with, which
        `load` then checks.

        Raises BundleError if the directory holds something else, DataError for a fusion with other features.
        """
        from safetensors.numpy import save_file

        directory = Path(directory)
        if fusion is not None and fusion.names != self.feature_names:
            raise DataError(
                f"fusion has the features {', '.join(fusion.names)}, the evidence {', '.join(self.feature_names)}; "
                "fit it with these models"
            )
        if directory.exists() and not (directory / MANIFEST).is_file() and any(directory.iterdir()):
            raise BundleError(f"{directory} exists and holds no evidence, so it is not replaced; choose another")
        writing = output_errors(BundleError, f"retrieval {directory}", "make room or choose another directory")
        with writing, scratch_directory(directory) as scratch:
            manifest = {
                "format_version": INDEX.version,
                "models": {name: model.settings() for name, model in self.models.items()},
                "fitted": self.note,
                "fusion": None if fusion is None else fusion.to_dict(),
                "adapter_sha256": adapter,
            }
            save_file(self._tensors(), scratch / ARRAYS, metadata={"manifest_sha256": digest(manifest)})
            write_json(manifest | {"files": {ARRAYS: sha256(scratch / ARRAYS)}}, scratch / MANIFEST)
            scratch.chmod(0o755)
            move_into_place(scratch, directory)
        return directory

    def _tensors(self) -> dict[str, np.ndarray]:
        encoded = [value.encode("utf-8", "surrogatepass") for value in self.item_ids.to_pylist()]
        found = {
            "item_ids": np.frombuffer(b"".join(encoded), np.uint8),
            "item_id_ends": np.cumsum([len(value) for value in encoded], dtype=np.int64),
            "item_rows": self.item_rows,
        }
        for name, model in self.models.items():
            found |= {f"{name}.{key}": np.ascontiguousarray(value) for key, value in model.arrays.items()}
        return found

    @classmethod
    def load(cls, directory: str | Path, *, adapter: str | None = None) -> tuple[Self, Fusion | None]:
        """Read what `save` wrote: the evidence, and its fusion if it has one.

        adapter: SHA-256 of the adapter's weights in use; a fusion that was fitted with others is refused.

        Raises BundleError for another format, a file changed, cut short or put there by others, unknown models or
        settings, arrays that do not fit each other, or another adapter.
        """
        directory = Path(directory)
        with input_errors(BundleError, f"evidence {directory}", "restore both files, or fit again"):
            return cls._load(directory, adapter)

    @classmethod
    def _load(cls, directory: Path, adapter: str | None) -> tuple[Self, Fusion | None]:
        from safetensors.numpy import load_file

        path, arrays = directory / MANIFEST, directory / ARRAYS
        for file in (path, arrays):
            if not file.is_file():
                raise BundleError(f"{directory} has no file {file.name}; fit and save the evidence again")
        check_links(directory, "evidence")
        stray = stray_weights(directory, (ARRAYS,))
        if stray:
            raise BundleError(f"{directory} holds {', '.join(stray)}, which Evidence.save does not write; remove it")
        manifest = read_manifest(directory, INDEX)
        if manifest["files"].get(ARRAYS) != sha256(arrays):
            raise BundleError(f"{arrays} is not the file that {MANIFEST} was written with; restore both, or fit again")
        try:
            read_header(arrays)
            metadata = read_metadata(arrays)
        except ValueError as error:
            raise BundleError(f"{arrays} {error}; restore it or fit again") from None
        if metadata.get("manifest_sha256") != digest({k: v for k, v in manifest.items() if k != "files"}):
            raise BundleError(f"{path} was changed after it was written; restore it or fit again")
        fusion = None if manifest["fusion"] is None else Fusion.from_dict(manifest["fusion"])
        said = manifest["adapter_sha256"]
        if fusion is not None and adapter is not None and said is not None and said != adapter:
            raise BundleError(
                f"the fusion in {directory} was fitted with adapter weights {said[:16]}..., and these are "
                f"{adapter[:16]}...; fit it again, or restore the bundle"
            )
        retrieval_index = cls._built(path, load_file(arrays), manifest)
        if fusion is not None and fusion.names != retrieval_index.feature_names:
            raise BundleError(f"{path} has a fusion of other features than its models give; fit it again")
        return retrieval_index, fusion

    @classmethod
    def _built(cls, path: Path, tensors: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> Self:
        models, known = {}, {"item_ids", "item_id_ends", "item_rows"}
        for name, settings in manifest["models"].items():
            try:
                model = MODELS[name](**settings)
            except (KeyError, TypeError, ConfigError):
                raise BundleError(f"{path} has model {name!r} with settings that this version does not know") from None
            known |= {f"{name}.{key}" for key in model.ARRAYS}
            models[name] = model
        if set(tensors) != known:
            raise BundleError(f"{path}: the arrays are not those of its models; restore the files or fit again")
        kinds = {"item_ids": "u1", "item_id_ends": "i8", "item_rows": "i8"}
        wrong = [name for name, kind in kinds.items() if tensors[name].ndim != 1 or tensors[name].dtype != kind]
        ends = tensors["item_id_ends"]
        sound = not wrong and (np.diff(ends, prepend=0) >= 0).all() and ends[-1:].sum() == len(tensors["item_ids"])
        if not sound:
            raise BundleError(f"{path}: the arrays of its item ids are not sound; restore the files or fit again")
        if any(value.dtype.kind not in "fiu" for value in tensors.values()):
            raise BundleError(f"{path}: an array holds no numbers; restore the files or fit again")
        size = len(tensors["item_rows"])
        for name, model in models.items():
            arrays = {key: tensors[f"{name}.{key}"] for key in model.ARRAYS}
            model._set(arrays)
            if not model.sound(size):
                raise BundleError(f"{path}: the arrays of model {name!r} do not fit {size} items; fit again")
        ids = _item_ids(tensors["item_ids"], tensors["item_id_ends"])
        if len(ids) != size or tensors["item_rows"].min(initial=0) < 0:
            raise BundleError(f"{path}: {len(ids)} item ids for {size} items; restore the files or fit again")
        return cls(models, ids, tensors["item_rows"], dict(manifest["fitted"]))


def choose_half_life(log: BehaviorLog, rows: np.ndarray, labels: np.ndarray) -> float | None:
    """Days (one of HALF_LIVES) under which the older training positives tell best which items the newest name.

    By mean log-likelihood of the newest tenth of the positives in `rows`, under the older ones' weights plus one.
    """
    taken = np.asarray(rows, np.int64)
    taken = taken[labels[taken] == 1]
    times = log.timestamps[taken]
    if not len(taken) or times.min() == times.max():
        return None
    order = np.argsort(times, kind="stable")
    cut = times[order[int(len(taken) * (1 - TAIL))]]
    older, newer = taken[times < cut], taken[times >= cut]
    if not len(older):
        return None
    scores = {}
    for days in HALF_LIVES:
        weights = Popularity(days).fit(log, older, labels).arrays["weights"] if days else None
        weights = np.bincount(log.item_codes[older], minlength=log.num_items) if weights is None else weights
        # In the same currency: a short half-life leaves little weight, and an added 1 would drown it.
        weights = weights * (len(older) / weights.sum()) + 1
        scores[days] = float(np.log(weights[log.item_codes[newer]] / weights.sum()).mean())
    return max(scores, key=scores.__getitem__)


def _strings(ids: pa.Array | pa.ChunkedArray | Sequence[str]) -> pa.Array:
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else pa.array(ids)
    return ids.cast(pa.large_string())


def _item_ids(text: np.ndarray, ends: np.ndarray) -> pa.Array:
    data, starts = text.tobytes(), np.concatenate([[0], ends[:-1]])
    return pa.array(
        [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts.tolist(), ends.tolist(), strict=True)],
        pa.large_string(),
    )

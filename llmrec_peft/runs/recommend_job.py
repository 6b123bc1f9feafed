"""A recommendation job: what its result depends on, and the recommendations of a shard of users."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm.auto import tqdm

from llmrec_peft.checkpoints.manifest import digest
from llmrec_peft.checkpoints.sealing import sha256
from llmrec_peft.config.schema import RecommendConfig
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError, LLMRecError
from llmrec_peft.retrieval.recommender import Recommendation, Recommender
from llmrec_peft.retrieval.retrieval_index import DIRECTORY, MANIFEST
from llmrec_peft.runs.id_files import read_ids, table_fingerprint
from llmrec_peft.runs.job_users import JobUsers, UserRequest
from llmrec_peft.runs.settings import flat_settings, versions
from llmrec_peft.runs.shards import JobShards

# Prefixes of settings that are paths: what lies there is compared, by its digest.
PATHS = ("bundle", "data.", "output_dir", "users", "retrieval", "candidates", "base")
# Settings that may change on a resume: a job that stopped at a user may go on without that user.
FREE = ("on_error", "trust_remote_code")


def read_candidates(path: str | None, log: BehaviorLog) -> list[str] | None:
    """Item ids of the file of candidates, all of the log; None without such a file."""
    if path is None:
        return None
    named = log.items.column("item_id")
    ids = read_ids(path, "candidates", "item_id", named, f"log {log.name!r}").column("item_id").to_pylist()
    known = set(named.to_pylist())
    unknown = [(row, item) for row, item in enumerate(ids) if item not in known]
    if unknown:
        row, item = unknown[0]
        raise DataError(
            f"candidates {path}: row {row} has item {item!r}, which is unknown among the {log.num_items:,} items of "
            f"log {log.name!r} ({len(unknown)} such rows); add it to the items, or drop the row"
        )
    return ids


def job_metadata(
    config: RecommendConfig, users: JobUsers, candidates: list[str] | None, manifest: dict[str, Any]
) -> dict[str, str]:
    """Everything that the recommendations depend on, by the names that messages use."""
    settings = flat_settings(config)
    metadata = {key: repr(value) for key, value in settings.items() if not key.startswith(PATHS) and key not in FREE}
    retrieval_index = Path(config.retrieval or Path(config.bundle) / DIRECTORY) / MANIFEST
    metadata["the bundle"] = digest(manifest)
    metadata["the retrieval"] = sha256(retrieval_index) if retrieval_index.is_file() else "none"
    metadata["the log"] = users.log_fingerprint()
    metadata["the list of users"] = users.fingerprint()
    metadata["the list of candidates"] = (
        "none" if candidates is None else table_fingerprint(pa.table({"id": candidates}))
    )
    return metadata | versions()


@dataclass(frozen=True)
class RecommendJob:
    """Recommends items to the users of a job; `candidates` are item ids, None for those that retrieval names."""

    config: RecommendConfig
    recommender: Recommender
    users: JobUsers
    candidates: list[str] | None

    @property
    def schema(self) -> pa.Schema:
        """Columns of the result."""
        labels = [(f"p_{label}", pa.float64()) for label in self.recommender.scorer.labels]
        return pa.schema(
            [("user_id", pa.string()), ("rank", pa.int32()), ("item_id", pa.string()), ("score", pa.float64()),
             *labels, ("source", pa.string())]
        )  # fmt: skip

    def write_shards(self, shards: JobShards, numbers: Sequence[int], *, progress: bool) -> None:
        """Write the shards of these numbers; an error stops the job on all processes."""
        try:
            with tqdm(numbers, desc="recommending", unit="shard", disable=not progress) as left:
                for number in left:
                    if shards.stopped:
                        return
                    found, errors = self._recommend(shards.rows(number))
                    shards.write(number, self._table(found), errors)
        except Exception:
            shards.stop()
            raise

    def _recommend(self, rows: range) -> tuple[dict[int, list[Recommendation]], list[dict[str, Any]]]:
        """Ranked items by row, and one entry for each row that is left out.

        Raises:
            LLMRecError: naming the first user without a recommendation, if the job stops at errors.
        """
        requests: dict[int, UserRequest] = {}
        failed: dict[int, LLMRecError] = {}
        for row in rows:
            try:
                requests[row] = self.users.request(row)
            except LLMRecError as error:
                failed[row] = error
        found = self._rank(requests, failed)
        if failed and self.config.on_error == "stop":
            row = min(failed)
            raise type(failed[row])(f"{self.users.describe(row)}: {failed[row]}")
        errors = [
            {"row": row, "user_id": self.users.ids[row].as_py(), "error": " ".join(str(failed[row]).split())}
            for row in sorted(failed)
        ]
        return found, errors

    def _rank(
        self, requests: dict[int, UserRequest], failed: dict[int, LLMRecError]
    ) -> dict[int, list[Recommendation]]:  # fmt: skip
        """Ranked items by row; put the errors of rows without any into `failed`."""
        found: dict[int, list[Recommendation]] = {}
        try:
            found = self._rank_batch(requests)
        except LLMRecError:
            # The error does not say whose request it is, so rank them one by one.
            for row, request in requests.items():
                try:
                    found |= self._rank_batch({row: request})
                except LLMRecError as error:
                    failed[row] = error
        for row in [row for row, items in found.items() if not items]:
            del found[row]
            failed[row] = DataError(
                "no item is left to recommend: recommend.exclude of the domain excludes all of them; give more items "
                "or candidates, or leave such users out by --on_error skip"
            )
        return found

    def _rank_batch(self, requests: dict[int, UserRequest]) -> dict[int, list[Recommendation]]:
        batch, config = requests.values(), self.config
        found = self.recommender.recommend_many(
            [request.history for request in batch],
            config.k,
            users=[request.user for request in batch],
            contexts=[request.context for request in batch],
            candidates=self.candidates,
            pool=config.pool,
            batch_tokens=config.batch_tokens,
        )
        return dict(zip(requests, found, strict=True))

    def _table(self, found: dict[int, list[Recommendation]]) -> pa.Table:
        rows = [
            (self.users.ids[row].as_py(), rank, item.item_id, item.score, *item.probabilities, item.source)
            for row, items in sorted(found.items())
            for rank, item in enumerate(items, start=1)
        ]
        columns = [pa.array([row[n] for row in rows], field.type) for n, field in enumerate(self.schema)]
        return pa.table(columns, schema=self.schema)

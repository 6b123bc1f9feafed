"""Ranked items for many users, in parts that a broken-off job goes on from."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from accelerate import PartialState
from tqdm.auto import tqdm

from llmrec_peft.checkpoints.checksum import digest, sha256
from llmrec_peft.checkpoints.manifest import installed, read_manifest
from llmrec_peft.checkpoints.manifest_schema import MANIFEST
from llmrec_peft.config.schema import RecommendConfig, config_to_yaml
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.documents import parse_yaml
from llmrec_peft.errors import ConfigError, DataError, LLMRecError
from llmrec_peft.retrieval.recommender import Recommendation, Recommender
from llmrec_peft.retrieval.retrieval_index import DIRECTORY as EVIDENCE
from llmrec_peft.retrieval.retrieval_index import MANIFEST as EVIDENCE_MANIFEST
from llmrec_peft.runs.job_users import Request, Users, read_ids, table_fingerprint
from llmrec_peft.runs.launch_checks import PACKAGES, check_shared, flatten
from llmrec_peft.runs.output_paths import check_output
from llmrec_peft.runs.shards import DIRECTORY as PARTS
from llmrec_peft.runs.shards import ERRORS, RESULT, Parts, check_results
from llmrec_peft.runs.split_streams import read_log
from llmrec_peft.scoring.scorer import Scorer
from llmrec_peft.training.distributed import check_ranks_equal, distributed_session, raise_on_all_ranks

# Settings that say where things lie: what lies there counts, by its digest.
PLACES = ("bundle", "data.", "output_dir", "users", "retrieval", "candidates", "base")
# A job that stopped at a user may go on without that user.
FREE = ("on_error", "trust_remote_code")


@dataclass(frozen=True)
class _Job:
    """What answers, whom, and all that the answers depend on."""

    config: RecommendConfig
    recommender: Recommender
    users: Users
    candidates: list[str] | None
    facts: dict[str, str]

    @property
    def schema(self) -> pa.Schema:
        """Columns of the result."""
        labels = [(f"p_{label}", pa.float64()) for label in self.recommender.scorer.labels]
        return pa.schema(
            [("user_id", pa.string()), ("rank", pa.int32()), ("item_id", pa.string()), ("score", pa.float64()),
             *labels, ("source", pa.string())]
        )  # fmt: skip


def recommend(config: RecommendConfig) -> None:
    """Rank items for the users of a file or of a log, each exactly once, and write recommendations.parquet.

    Raises:
        LLMRecError: with one line on what cannot be used, or on the user who cannot be answered.
    """
    with distributed_session() as state:
        _recommend(config, state)


def _recommend(config: RecommendConfig, state: PartialState) -> None:
    show = print if state.is_main_process else (lambda *_, **__: None)
    with raise_on_all_ranks():
        job = _read(config, state, show)
    check_ranks_equal(job.facts, "give all processes the same settings, files and versions")
    parts = Parts(Path(config.output_dir), job.facts, job.users.ids, config.chunk)
    with raise_on_all_ranks():
        if state.is_main_process:
            parts.prepare()
    with raise_on_all_ranks():
        check_shared(parts.settings, state)
        pending = parts.pending(errors=config.on_error == "skip")
    users = sum(len(parts.rows(number)) for number in pending)
    earlier = f", {len(job.users) - users:,} of them answered by an earlier run" if users < len(job.users) else ""
    show(f"{len(job.users):,} users in {len(parts):,} parts{earlier}; the log knows {job.users.known:,}", flush=True)
    start = time.perf_counter()
    with raise_on_all_ranks():
        own = pending[state.process_index :: state.num_processes]
        _answer_parts(job, parts, own, bar=state.is_main_process and bool(own))
    seconds = time.perf_counter() - start
    with raise_on_all_ranks():
        if state.is_main_process:
            rows, errors = parts.join(job.schema)
            show(f"{users:,} users in {seconds:.1f} s: {users / max(seconds, 1e-9):.1f} users/s")
            _report(Path(config.output_dir), rows, errors, len(job.users))


def _report(out: Path, rows: int, errors: Sequence[dict[str, Any]], users: int) -> None:
    print(f"written to {out / RESULT}: {rows:,} rows of {users - len(errors):,} users")
    if errors:
        first = f"row {errors[0]['row']}, {errors[0]['error']}"
        print(f"left out: {len(errors):,} of {users:,} users, listed in {out / ERRORS}; the first: {first}")
    if len(errors) == users:
        raise DataError(f"none of the {users:,} users could be answered; the first: {first}; see {out / ERRORS}")


# -- reading ---------------------------------------------------------------------------------------


def _read(config: RecommendConfig, state: PartialState, show) -> _Job:
    inputs = {"bundle": config.bundle, "data.path": config.data.path, "users": config.users, "base": config.base,
              "candidates": config.candidates, "retrieval": config.retrieval}  # fmt: skip
    check_output(config.output_dir, inputs, writes=(RESULT, ERRORS, PARTS))
    check_results(Path(config.output_dir))
    manifest = read_manifest(config.bundle)
    domain = Domain.of_manifest(manifest["domain"], source=f"{config.bundle}/{MANIFEST}")
    show(f"reading {config.data.path}", flush=True)
    log = read_log(config.data)
    users = Users(log, domain, config.users, until=config.until, context=config.context)
    if users.refused and config.on_error == "stop":
        row, reason = min(users.refused.items())
        raise DataError(f"{_who(users, row)}: {reason} ({len(users.refused)} such rows)")
    candidates = _read_candidates(config.candidates, log)
    facts = _facts(config, users, candidates, manifest)
    show(f"loading {config.bundle}", flush=True)
    scorer = Scorer.load(
        config.bundle,
        log,
        config.base,
        dtype=config.dtype,
        device=None if state.device.type == "cpu" else str(state.device),
        cache_bytes=0,  # what a part answers, to the last bit, must not depend on the parts before it
        retrieval=config.retrieval,
        trust_remote_code=config.trust_remote_code,
    )
    recommender = Recommender(scorer, scorer.retrieval_index, scorer.fusion, quotas=config.quotas or None)
    if scorer.retrieval_index is None and candidates is None:
        show(f"no retrieval: the model ranks all {log.num_items:,} items for each user", flush=True)
    return _Job(config, recommender, users, candidates, facts)


def _read_candidates(path: str | None, log: BehaviorLog) -> list[str] | None:
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


def _facts(
    config: RecommendConfig, users: Users, candidates: list[str] | None, manifest: dict[str, Any]
) -> dict[str, str]:
    """All that the answers depend on, by name."""
    settings = flatten(parse_yaml(config_to_yaml(config), "the configuration", error=ConfigError))
    facts = {key: repr(value) for key, value in settings.items() if not key.startswith(PLACES) and key not in FREE}
    retrieval_index = Path(config.retrieval or Path(config.bundle) / EVIDENCE) / EVIDENCE_MANIFEST
    facts["the bundle"] = digest(manifest)
    facts["the retrieval"] = sha256(retrieval_index) if retrieval_index.is_file() else "none"
    facts["the log"] = users.log_fingerprint()
    facts["the list of users"] = users.fingerprint()
    facts["the list of candidates"] = "none" if candidates is None else table_fingerprint(pa.table({"id": candidates}))
    found = installed(*PACKAGES)
    return facts | {f"the version of {name}": found.get(name, "absent") for name in PACKAGES}


# -- answering -------------------------------------------------------------------------------------


def _answer_parts(job: _Job, parts: Parts, numbers: Sequence[int], *, bar: bool) -> None:
    try:
        with tqdm(numbers, desc="recommending", unit="part", disable=not bar) as left:
            for number in left:
                if parts.stopped:
                    return
                found, errors = _answer(job, parts.rows(number))
                parts.write(number, _table(job, found), errors)
    except Exception:
        parts.stop()
        raise


def _answer(job: _Job, rows: range) -> tuple[dict[int, list[Recommendation]], list[dict[str, Any]]]:
    """Lists by row, and what is said of rows left out.

    Raises:
        LLMRecError: naming the first user who cannot be answered, if the job is to stop at one.
    """
    requests: dict[int, Request] = {}
    failed: dict[int, LLMRecError] = {}
    for row in rows:
        try:
            requests[row] = job.users.request(row)
        except LLMRecError as error:
            failed[row] = error
    found = _ranked(job, requests, failed)
    for row in sorted(failed):
        if job.config.on_error == "stop":
            raise type(failed[row])(f"{_who(job.users, row)}: {failed[row]}")
    errors = [
        {"row": row, "user_id": job.users.ids[row].as_py(), "error": " ".join(str(failed[row]).split())}
        for row in sorted(failed)
    ]
    return found, errors


def _ranked(job: _Job, requests: dict[int, Request], failed: dict[int, LLMRecError]) -> dict[int, list[Recommendation]]:
    """Lists by row; who has none is put into `failed`."""
    found: dict[int, list[Recommendation]] = {}
    try:
        found = _asked(job, requests)
    except LLMRecError:
        # One of them cannot be answered: each by itself tells which.
        for row, request in requests.items():
            try:
                found |= _asked(job, {row: request})
            except LLMRecError as error:
                failed[row] = error
    for row in [row for row, items in found.items() if not items]:
        del found[row]
        failed[row] = DataError(
            "no item is left to recommend: recommend.exclude of the domain takes all of them out; give more items or "
            "candidates, or leave such users out by --on_error skip"
        )
    return found


def _asked(job: _Job, requests: dict[int, Request]) -> dict[int, list[Recommendation]]:
    asked, config = requests.values(), job.config
    found = job.recommender.recommend_many(
        [request.history for request in asked],
        config.k,
        users=[request.user for request in asked],
        contexts=[request.context for request in asked],
        candidates=job.candidates,
        pool=config.pool,
        batch_tokens=config.batch_tokens,
    )
    return dict(zip(requests, found, strict=True))


def _table(job: _Job, found: dict[int, list[Recommendation]]) -> pa.Table:
    rows = [
        (job.users.ids[row].as_py(), rank, item.item_id, item.score, *item.probabilities, item.source)
        for row, items in sorted(found.items())
        for rank, item in enumerate(items, start=1)
    ]
    columns = list(zip(*rows, strict=True)) or [[]] * len(job.schema)
    return pa.table([pa.array(list(values), field.type) for values, field in zip(columns, job.schema, strict=True)],
                    schema=job.schema)  # fmt: skip


def _who(users: Users, row: int) -> str:
    return f"user {users.ids[row].as_py()!r} (row {row} of {users.name})"

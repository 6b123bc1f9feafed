"""Ranked items for many users, in shards that an interrupted job resumes from."""

import time
from pathlib import Path

from llmrec_peft.checkpoints.manifest import read_manifest
from llmrec_peft.checkpoints.manifest_schema import MANIFEST
from llmrec_peft.config.schema import RecommendConfig
from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import DataError
from llmrec_peft.retrieval.recommender import Recommender
from llmrec_peft.runs.console import main_printer
from llmrec_peft.runs.job_users import JobUsers
from llmrec_peft.runs.launch_checks import check_shared
from llmrec_peft.runs.output_paths import check_output_directory
from llmrec_peft.runs.recommend_job import RecommendJob, job_metadata, read_candidates
from llmrec_peft.runs.shards import DIRECTORY, ERRORS, RESULT, JobShards, check_job_results
from llmrec_peft.runs.split_streams import read_log
from llmrec_peft.scoring.scorer import Scorer
from llmrec_peft.training.distributed import check_ranks_equal, distributed_session, raise_on_all_ranks


def recommend(config: RecommendConfig) -> None:
    """Rank items for the users of a file or of a log, each exactly once, and write recommendations.parquet.

    Raises:
        LLMRecError: with one line on what cannot be used, or on the user without a recommendation.
    """
    with distributed_session() as state:
        show, out = main_printer(state), Path(config.output_dir)
        with raise_on_all_ranks():
            # Settings.
            inputs = {"bundle": config.bundle, "data.path": config.data.path, "users": config.users,
                      "base": config.base, "candidates": config.candidates, "retrieval": config.retrieval}  # fmt: skip
            check_output_directory(out, inputs, writes=(RESULT, ERRORS, DIRECTORY))
            check_job_results(out)
            manifest = read_manifest(config.bundle)
            domain = Domain.of_manifest(manifest["domain"], source=f"{config.bundle}/{MANIFEST}")

            # Log, users and candidates.
            show(f"reading {config.data.path}")
            log = read_log(config.data)
            users = JobUsers(log, domain, config.users, until=config.until, context=config.context)
            if users.refused and config.on_error == "stop":
                row, reason = min(users.refused.items())
                raise DataError(f"{users.describe(row)}: {reason} ({len(users.refused)} such rows)")
            candidates = read_candidates(config.candidates, log)
            metadata = job_metadata(config, users, candidates, manifest)

            # Recommender: the bundle with its retrieval index and fusion.
            show(f"loading {config.bundle}")
            scorer = Scorer.load(
                config.bundle,
                log,
                config.base,
                dtype=config.dtype,
                device=None if state.device.type == "cpu" else str(state.device),
                cache_bytes=0,  # a shard must not depend on earlier shards, to the last bit
                retrieval=config.retrieval,
                trust_remote_code=config.trust_remote_code,
            )
            recommender = Recommender(scorer, scorer.retrieval_index, scorer.fusion, quotas=config.quotas or None)
            if scorer.retrieval_index is None and candidates is None:
                show(f"no retrieval index: the model ranks all {log.num_items:,} items for each user")
        check_ranks_equal(metadata, "give all processes the same settings, files and versions")

        # Shards that are still to be written. One process prepares the directory, all must see it.
        job = RecommendJob(config, recommender, users, candidates)
        shards = JobShards(out, metadata, users.ids, config.chunk)
        with raise_on_all_ranks():
            if state.is_main_process:
                shards.prepare()
        with raise_on_all_ranks():
            check_shared(shards.settings, state)
            pending = shards.pending(errors=config.on_error == "skip")
        left = sum(len(shards.rows(number)) for number in pending)
        earlier = f", {len(users) - left:,} of them done by an earlier run" if left < len(users) else ""
        show(f"{len(users):,} users in {len(shards):,} shards{earlier}; {users.known:,} of them in the log")

        # Recommend: each process writes every N-th of these shards.
        start = time.perf_counter()
        with raise_on_all_ranks():
            own = pending[state.process_index :: state.num_processes]
            job.write_shards(shards, own, progress=state.is_main_process and bool(own))
        seconds = time.perf_counter() - start

        # Concatenate and report.
        with raise_on_all_ranks():
            if state.is_main_process:
                rows, errors = shards.concatenate(job.schema)
                show(f"{left:,} users in {seconds:.1f} s: {left / max(seconds, 1e-9):.1f} users/s")
                show(f"written to {out / RESULT}: {rows:,} rows of {len(users) - len(errors):,} users")
                if errors:
                    first = f"row {errors[0]['row']}, {errors[0]['error']}"
                    show(f"left out: {len(errors):,} of {len(users):,} users, listed in {out / ERRORS}; first: {first}")
                    if len(errors) == len(users):
                        raise DataError(
                            f"none of the {len(users):,} users got a recommendation; the first: {first}; see "
                            f"{out / ERRORS}"
                        )

"""Ten million interactions from parquet to streams, with the time and the memory that it takes.

    python benchmarks/data_memory.py [--rows 10000000]

A parquet log with shuffled users and times is written batch by batch into a temporary directory. A fresh process reads
and sorts it, splits it by time, cuts the training part into streams (context 10, targets 30, with a price in each
event, so that each event is a text of its own) and makes 1,000 of them into tokens. Two peaks of memory are printed: of
the resident set, which counts pages of mapped files that the system may drop at any time, and of anonymous memory,
which it may not. So is the peak of blocks that Python's own allocator held, which tells how many rows were Python
objects at once.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

BATCH = 500_000
DOMAIN = {
    "name": "shop",
    "event": "{title} at {price:.2f}",
    "outcomes": {"skip": " no\n", "click": " yes\n"},
    "stream": {"context": 10, "targets": 30, "max_length": 2048},
}


def write_log(directory: Path, rows: int, seed: int = 0) -> None:
    """Write a shuffled log of `rows` interactions of rows / 50 users with 50,000 items."""
    rng = np.random.default_rng(seed)
    items = 50_000
    ids = pc.binary_join_element_wise("item", pc.cast(pa.array(np.arange(items)), pa.string()), "-")
    titles = pc.binary_join_element_wise("Product number", pc.cast(pa.array(np.arange(items)), pa.string()), " ")
    pq.write_table(pa.table({"item_id": ids, "title": titles}), directory / "items.parquet")
    writer = None
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        users = pc.cast(pa.array(rng.integers(0, max(rows // 50, 1), count)), pa.string())
        table = pa.table(
            {
                "user_id": pc.binary_join_element_wise("user", users, "-"),
                "item_id": ids.take(pa.array(rng.integers(0, items, count))),
                "timestamp": rng.integers(1_500_000_000, 1_700_000_000, count),
                "label": rng.integers(0, 2, count).astype(np.int8),
                "price": rng.random(count),
            }
        )
        if writer is None:
            writer = pq.ParquetWriter(directory / "interactions.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def status(key: str) -> float:
    """A field of the process's status in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return float("nan")


def measure(directory: str) -> dict[str, float]:
    """Read the log, sampling anonymous memory and Python's blocks twenty times a second."""
    from llmrec_peft.data.domain import Domain
    from llmrec_peft.data.log import BehaviorLog
    from llmrec_peft.data.simulate import write_simulated_shop
    from llmrec_peft.data.streams import build_streams
    from llmrec_peft.models.base import load_tokenizer

    domain, tokenizer = Domain.from_dict(DOMAIN), load_tokenizer("smollm2-135m")
    # A small log first, so that what the libraries load on first use does not count as this log's.
    with tempfile.TemporaryDirectory() as small:
        small_log = BehaviorLog.read(write_simulated_shop(small, users=5))
        build_streams(small_log.split().train, domain, tokenizer)[0]
    base, blocks = status("RssAnon"), sys.getallocatedblocks()
    peak, peak_blocks, stop = [base], [blocks], threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            peak[0] = max(peak[0], status("RssAnon"))
            peak_blocks[0] = max(peak_blocks[0], sys.getallocatedblocks())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    log = BehaviorLog.read(directory)
    read = time.perf_counter()
    streams = build_streams(log.split().train, domain, tokenizer)
    cut = time.perf_counter()
    for number in np.linspace(0, len(streams) - 1, 1000).astype(int):
        if len(streams[number]) != streams.lengths[number]:
            raise SystemExit(f"stream {number} is not as long as planned")
    made = time.perf_counter()
    stop.set()
    watcher.join()
    step = np.diff(log.user_codes)
    if np.any((step < 0) | ((step == 0) & (np.diff(log.timestamps) < 0))):
        raise SystemExit("the log is not sorted")
    return {
        "rows": len(log),
        "seconds_to_read": read - start,
        "seconds_to_streams": cut - read,
        "seconds_for_1000_streams": made - cut,
        "targets": streams.num_targets,
        "streams": len(streams),
        "peak_rss_mib": status("VmHWM"),
        "peak_anonymous_mib": peak[0],
        "anonymous_before_mib": base,
        "anonymous_after_mib": status("RssAnon"),
        "arrow_pool_after_mib": pa.total_allocated_bytes() / 2**20,
        "peak_python_blocks": peak_blocks[0] - blocks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as directory:
        print(f"writing {options.rows:,} rows ...", file=sys.stderr)
        write_log(Path(directory), options.rows)
        size = sum(entry.stat().st_size for entry in Path(directory).iterdir()) / 2**20
        command = [sys.executable, __file__, "--measure", directory]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"parquet_mib: {size:.0f}")
    for name, value in result.items():
        print(f"{name}: {value:,.1f}" if isinstance(value, float) else f"{name}: {value:,}")


if __name__ == "__main__":
    main()

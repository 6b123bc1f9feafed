"""Small files of logs, and the message that refuses one."""

import json

import pytest

from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.errors import DataError

NOW = 1_600_000_000
MOMENT = 1_577_934_245  # 2020-01-02 03:04:05 UTC
ROWS = f"user_id,item_id,timestamp,rating\n1,1,{NOW},5\n1,2,{NOW + 1},3\n"
ITEMS = "item_id,title\n1,A\n2,B\n"


def files(directory, **contents):
    """Write files; `__` in a name stands for a point."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        path = directory / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return directory


def records(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        BehaviorLog.read(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1_000
    return message


def titles(log):
    return dict(zip(log.items["item_id"].to_pylist(), log.items["title"].to_pylist(), strict=True))


def inter(directory, header="user_id:token\titem_id:token\ttimestamp:float", row=f"u\t1\t{NOW}", **more):
    return files(directory, x__inter=f"{header}\n{row}\n", **more)

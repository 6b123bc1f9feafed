"""The swap recipe: a file of requests of two domains, answered as the bank answers them, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from llmrec_peft import DomainBank

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def requests(data, tmp_path):
    """A file of three requests of two domains, the last with context columns of its own; and its records."""
    ids = pq.read_table(data / "items.parquet").column("item_id").to_pylist()
    records = [
        {"domain": "a", "history": [[ids[0], "click"], [ids[1], "skip"]], "candidates": ids[2:5]},
        {"domain": "b", "history": [], "candidates": ids[5:7], "id": "second"},
        {"domain": "a", "history": [[ids[3], "click"]], "candidates": []},
    ]
    path = tmp_path / "requests.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path, records


@pytest.fixture
def flags(trained, data, requests, tiny_base):
    bundles = {"a": str(trained("lora") / "bundle"), "b": str(trained("adapter") / "bundle")}
    return [
        "--base", str(tiny_base("llama")), "--bundles", json.dumps(bundles),
        "--items", json.dumps(dict.fromkeys(bundles, str(data))), "--requests", str(requests[0]),
    ]  # fmt: skip


def test_predictions_are_those_of_the_bank(flags, recipe, requests, trained, data, tiny_base, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    recipe("score")(
        [
            *flags,
            "--output",
            str(out),
            "--batch_requests",
            "2",
            "--swap",
            json.dumps({"a": str(trained("head") / "bundle")}),
        ]
    )
    printed = capsys.readouterr().out
    assert "3 requests, 5 candidates" in printed
    assert "swap of a bundle in memory" in printed and "swap of a bundle on disk" in printed
    bundles = {"a": trained("lora") / "bundle", "b": trained("adapter") / "bundle"}
    bank = DomainBank.load(tiny_base("llama"), bundles, dict.fromkeys(bundles, data))
    expected = bank.score([(r["domain"], [tuple(e) for e in r["history"]], r["candidates"]) for r in requests[1]])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [0, "second", 2]
    for line, want in zip(lines, expected, strict=True):
        assert line["labels"] == ["skip", "click"]
        np.testing.assert_allclose(np.array(line["probabilities"]).reshape(-1, 2), want, atol=2e-6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"domain": "a", "history": []}', "request 3 of .* has candidates None; it must be a list of events"),
        ('{"domain": "a", "history": [], "candidates": [], "items": []}', "unknown key 'items'"),
        ('{"domain": "c", "history": [], "candidates": []}', "domain 'c', which is not in the bank"),
        ("{", "JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left(line, message, flags, recipe, requests, tmp_path, capsys):
    import re

    path = requests[0]
    path.write_text(path.read_text() + "\n" + line)
    out = tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit) as stopped:
        recipe("score")([*flags, "--output", str(out)])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists() and not list(tmp_path.glob(".answers*"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--fallback", "c"], "fallback must be"),
        (["--swap", "{c: x}"], "swap must be a mapping of domains among a, b"),
        (["--requests", "nowhere.jsonl"], "requests must be an existing file"),
        (["--max_gb", "0"], "max_gb must be above 0"),
    ],
)
def test_bad_settings_are_named(extra, message, flags, recipe, capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe("score")([*flags, *extra])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err

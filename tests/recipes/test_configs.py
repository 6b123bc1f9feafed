"""Every configuration file in the repository is read, and every launch command that one shows can be typed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from llmrec_peft.config.schema import CONFIGS, TrainRecipeConfig, config_to_yaml, read_config
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import build_streams
from tests.conftest import ROOT
from tests.recipes.conftest import launch_command, opening_comment

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
CONFIG_FILES = sorted((ROOT / "recipes").rglob("*.yaml"))
DOMAIN_FILES = [path for path in CONFIG_FILES if path.name == "domain.yaml"]
METHOD_FILES = [path for path in CONFIG_FILES if path.name != "domain.yaml"]
LAUNCHER_FILES = sorted((ROOT / "accelerate_configs").rglob("*.yaml"))

PLACES = ("DIR", "FILE.jsonl", "OUT", "OUT/bundle")
"""What stands in a command for a place of the reader's own."""


def named(paths: list[Path]):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch):
    """Read a command as accelerate and the recipe would from the repository's root; returns the configuration."""
    monkeypatch.chdir(ROOT)
    launcher = launch_command_parser().parse_args(words)
    script = Path(launcher.training_script)
    assert script.is_file() and script.parent == Path("recipes")
    assert launcher.config_file is None or load_config_from_file(launcher.config_file).num_processes >= 1
    flags = launcher.training_script_args
    for word in flags:
        if "/" in word and word not in PLACES and not word.startswith(("out/", "{")):
            assert Path(word).is_file(), word
    return read_config(CONFIGS[script.stem], flags)


def test_there_are_files_to_check():
    """The parametrised tests below pass when they find nothing; this one does not."""
    assert {path.stem for path in RECIPES} >= set(CONFIGS)
    assert len(DOMAIN_FILES) == len({path.parent for path in CONFIG_FILES}) >= 6
    assert len(METHOD_FILES) >= 10
    trained = {name for name, kind in CONFIGS.items() if issubclass(kind, TrainRecipeConfig)}
    assert {path.stem for path in METHOD_FILES} == trained | {"distill"}
    assert LAUNCHER_FILES


@pytest.mark.parametrize("path", named(METHOD_FILES))
def test_a_methods_file_is_read_and_its_command_runs_it(path, monkeypatch):
    words = launch_command(opening_comment(path).splitlines()[0])
    assert words[0] == f"recipes/{path.stem}.py"
    assert words[words.index("--config") + 1] == path.relative_to(ROOT).as_posix()
    shown = check_command(words, monkeypatch)
    place = [] if "data" in yaml.safe_load(path.read_text("utf-8")) else ["--data.path", shown.data.path]
    config = read_config(CONFIGS[path.stem], ["--config", str(path), *place])
    if path.stem == "distill":  # its domain is its teacher's
        assert (config.teacher, config.student, config.train) == (shown.teacher, shown.student, shown.train)
        assert (config.teacher, shown.output_dir) == (f"out/{path.parent.name}/bundle", f"out/{path.parent.name}-ids")
        return
    assert config.domain == Domain.from_yaml(path.parent / "domain.yaml") == shown.domain
    assert config.train == shown.train and config.method == shown.method
    assert shown.output_dir == f"out/{path.parent.name}"


@pytest.mark.parametrize("path", named(DOMAIN_FILES))
def test_a_domain_file_is_read_and_its_command_uses_it(path, monkeypatch):
    words = launch_command(opening_comment(path).splitlines()[0])
    assert words[words.index("--domain") + 1] == path.relative_to(ROOT).as_posix()
    config = check_command(words, monkeypatch)
    domain = Domain.from_yaml(path)
    assert config.domain == domain and domain.name == path.parent.name
    assert Domain.from_dict(domain.to_dict()) == domain


@pytest.mark.parametrize("path", named(LAUNCHER_FILES))
def test_a_launchers_file_shows_a_command_that_uses_it(path, monkeypatch):
    words = launch_command(opening_comment(path))
    assert words[words.index("--config_file") + 1] == path.relative_to(ROOT).as_posix()
    check_command(words, monkeypatch)


@pytest.mark.parametrize("path", named(RECIPES))
def test_a_recipes_docstring_is_its_launch_command(path, monkeypatch):
    words = launch_command(ast.get_docstring(ast.parse(path.read_text("utf-8"))))
    assert f"recipes/{path.name}" in words
    config = check_command(words, monkeypatch)
    assert isinstance(config, CONFIGS[path.stem])


@pytest.mark.parametrize("path", named(METHOD_FILES))
def test_a_methods_file_survives_being_written_out(path, tmp_path):
    config = read_config(CONFIGS[path.stem], ["--config", str(path), "--data.path", "x"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), "utf-8")
    assert read_config(CONFIGS[path.stem], ["--config", str(tmp_path / "config.yaml")]) == config


# -- the domains on logs of their form ---------------------------------------------------------


def texts(domain_name: str, log: BehaviorLog, tokenizer, split: str = "test") -> list[str]:
    """The streams of one split of a log as the model would read them."""
    domain = Domain.from_yaml(ROOT / "recipes" / "configs" / domain_name / "domain.yaml")
    splits = log.split(by=domain.split.by, valid=0.25, test=0.25)
    streams = build_streams(getattr(splits, split), domain, tokenizer, source=splits.train.rows)
    return [tokenizer.decode(stream.input_ids) for stream in streams]


def write_table(path: Path, columns: list[str], rows: list[tuple]) -> None:
    lines = [",".join(columns), *(",".join(str(value) for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def test_retail_sets_products_not_bought_beside_the_bought_one(tmp_path, tiny_tokenizer):
    rows = [(f"u{n % 4}", f"p{n % 7}", n // 3, "return" if n % 10 == 9 else "purchase") for n in range(60)]
    write_table(tmp_path / "interactions.csv", ["user_id", "item_id", "timestamp", "behaviour"], rows)
    items = [(f"p{n}", f"TIN {n}") for n in range(7)]
    write_table(tmp_path / "items.csv", ["item_id", "title"], items)
    shown = texts("retail", BehaviorLog.read(tmp_path), tiny_tokenizer)
    assert all(re.search(r"TIN \d -> yes\n", text) for text in shown)
    assert not any("-> no" in text for text in shown)  # what was not bought is asked about, and is never history


def test_coupons_put_the_driver_in_the_header_and_the_place_in_the_event(tmp_path, tiny_tokenizer):
    domain = Domain.from_yaml(ROOT / "recipes" / "configs" / "coupons" / "domain.yaml")
    assert len(domain.header_columns) == 12
    columns = [*domain.header_columns, *(name for name in domain.event_columns if name != "title")]
    rows = [(f"d{n // 5}", f"c{n % 3}", n, n % 2, *(f"{name}{n // 5}" for name in columns)) for n in range(100)]
    write_table(tmp_path / "interactions.csv", ["user_id", "item_id", "timestamp", "label", *columns], rows)
    write_table(tmp_path / "items.csv", ["item_id", "title"], [(f"c{n}", f"Coupon {n}") for n in range(3)])
    shown = texts("coupons", BehaviorLog.read(tmp_path), tiny_tokenizer)
    assert len(shown) == 5
    for text in shown:
        driver = re.match(r"Driver: gender(\d+), age age\1, maritalstatus\1", text)
        assert driver and text.count(f"weather{driver[1]}") == text.count("Coupon ") == 5


def test_news_keeps_opened_articles_as_history_and_skipped_ones_out_of_it(tmp_path, tiny_tokenizer):
    news = "".join(f"N{n}\tsports\tgolf\tArticle {n}\tText\thttps://x\t[]\t[]\n" for n in range(12))
    (tmp_path / "news.tsv").write_text(news, "utf-8")
    rows = "".join(
        f"{n}\tU{n % 2}\t11/{1 + n}/2019 8:00:00 AM\tN0 N1\tN{2 + n % 9}-1 N{3 + n % 9}-0 N{(7 + n) % 12}-0\n"
        for n in range(20)
    )
    (tmp_path / "behaviors.tsv").write_text(rows, "utf-8")
    shown = texts("news", BehaviorLog.read(tmp_path), tiny_tokenizer)
    assert shown and all("sports: Article 0 -> yes\nsports: Article 1 -> yes\n" in text for text in shown)
    assert not any("-> no" in text for text in shown)


@pytest.mark.parametrize("form", ["pointwise", "instruction"])
def test_content_is_one_record_and_one_target(form, tmp_path, tiny_tokenizer):
    words = ["No", "Yes"] if form == "instruction" else [0, 1]
    records = [
        {"instruction": "Will they like it?", "input": f"Film {n}", "output": words[n % 2]}
        if form == "instruction"
        else {"input": f"Film {n}", "label": words[n % 2]}
        for n in range(40)
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    shown = texts("content", BehaviorLog.read(path), tiny_tokenizer)
    question = "Will they like it? " if form == "instruction" else ""
    assert len(shown) == 10
    assert all(re.fullmatch(rf"{re.escape(question)}Film \d+\nAnswer:", text) for text in shown)


@pytest.mark.parametrize("domain", ["movies", "shop"])
def test_rated_and_shown_items_are_history_with_both_outcomes(domain, small_tables, tiny_tokenizer):
    interactions, items = small_tables
    items = items.append_column("category", items.column("genres")).append_column(
        "price", [[float(n) for n in range(len(items))]]
    )
    shown = texts(domain, BehaviorLog(interactions, items, name="small"), tiny_tokenizer)
    assert any("-> yes\n" in text for text in shown) and any("-> no\n" in text for text in shown)

"""Configurations: files, domains and flags in layers, the messages of what is refused, and YAML that reads back."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmrec_peft.config.parsing import _Keys
from llmrec_peft.config.renamed_keys import RENAMED
from llmrec_peft.config.schema import (
    CONFIGS,
    AdapterConfig,
    DistillConfig,
    EvaluateConfig,
    HeadConfig,
    LoraConfig,
    TrainConfig,
    TrainRecipeConfig,
    config_to_yaml,
    parse_config,
    read_config,
)
from llmrec_peft.data.domain import Domain
from llmrec_peft.errors import ConfigError, DomainError

DOMAIN = """
name: movies
header: "Movies one viewer rated:\\n"
event: "{title} ({genres})"
outcomes: {dislike: " no\\n", like: " yes\\n"}
label: {column: rating, above: 3}
"""

CONFIG = """
domain: domains/movies.yaml
train: {max_steps: 7, learning_rate: 1e-3}
method: {r: 4}
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with lora.yaml, which names a domain file in a directory beside it."""
    (tmp_path / "domains").mkdir()
    (tmp_path / "domains" / "movies.yaml").write_text(DOMAIN, encoding="utf-8")
    (tmp_path / "lora.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


@pytest.fixture
def base(files: Path) -> list[str]:
    return ["--config", str(files / "lora.yaml"), "--data.path", "somewhere"]


def refused(args: list[str], config_class: type = LoraConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(config_class, args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_file_and_its_domain_are_read(files, base):
    config = read_config(LoraConfig, base)
    assert config.domain == Domain.from_yaml(files / "domains" / "movies.yaml")
    assert (config.train.max_steps, config.train.learning_rate) == (7, 1e-3)
    assert (config.method.r, config.method.alpha) == (4, 32)
    assert (config.data.path, config.data.format) == ("somewhere", "auto")
    assert config.method_name == "lora"


def test_flags_go_over_files_wherever_they_stand(files):
    flags = ["--train.max_steps=9", "--domain.stream.targets", "5", "--data.path", "somewhere"]
    last = ["--config", str(files / "lora.yaml")]
    for args in (flags + last, last + flags):
        config = read_config(LoraConfig, args)
        assert (config.train.max_steps, config.domain.stream.targets, config.domain.stream.context) == (9, 5, 10)


def test_a_domain_flag_replaces_the_files_domain(files, base):
    other = files / "shop.yaml"
    other.write_text('name: shop\nevent: "{title}"\noutcomes: {skip: " skip\\n", click: " click\\n"}\n', "utf-8")
    config = read_config(LoraConfig, [*base, f"--domain={other}", "--domain.marker=  =>"])
    assert config.domain.labels == ["skip", "click"]
    assert (config.domain.header, config.domain.marker) == ("", "  =>")


def test_a_later_file_goes_over_an_earlier_one(files, base):
    (files / "more.yaml").write_text("train: {max_steps: 8, seed: 3}\n", "utf-8")
    config = read_config(LoraConfig, [*base, "--config", str(files / "more.yaml")])
    assert (config.train.max_steps, config.train.seed, config.train.learning_rate) == (8, 3, 1e-3)


def test_a_domain_in_place_follows_the_domain_rules(files):
    path = files / "inline.yaml"
    inline = {"domain": yaml.safe_load(DOMAIN) | {"label": {"column": "behaviour", "map": {1: "like", 0: "dislike"}}}}
    path.write_text(yaml.safe_dump(inline), "utf-8")
    config = read_config(HeadConfig, ["--config", str(path), "--data.path", "x"])
    assert config.domain.label.map == {"1": "like", "0": "dislike"}  # text keys, as in a domain file
    inline["domain"]["strem"] = {}
    path.write_text(yaml.safe_dump(inline), "utf-8")
    with pytest.raises(DomainError, match="inline.yaml: domain: unknown key 'strem'"):
        read_config(HeadConfig, ["--config", str(path), "--data.path", "x"])


def test_values_of_every_kind_are_read(base):
    flags = {
        "--train.class_weights": "[1, 2.5]",
        "--train.report_to": "[tensorboard, wandb]",
        "--evaluation.test_targets": "null",
        "--evaluation.before": "false",
        "--evaluation.metrics": "[auc, ndcg@10]",
        "--method.target_modules": "[q_proj, v_proj]",
        "--domain.outcomes.like": " liked\n",
        "--domain.event": "{title}: {genres}",  # a text, though YAML would read a mapping
        "--output_dir": "2026",
    }
    config = read_config(LoraConfig, [*base, *(part for pair in flags.items() for part in pair)])
    assert config.train.class_weights == [1.0, 2.5]
    assert config.train.report_to == ["tensorboard", "wandb"]
    assert config.evaluation.test_targets is None
    assert config.evaluation.before is False
    assert config.evaluation.metrics == ["auc", "ndcg@10"]
    assert config.method.target_modules == ["q_proj", "v_proj"]
    assert config.domain.outcomes == {"dislike": " no\n", "like": " liked\n"}
    assert (config.domain.event, config.output_dir) == ("{title}: {genres}", "2026")


FLAGS = {
    "distill": ["--teacher", "out/bundle", "--data.path", "x", "--student.kind", "shallow", "--loss.hidden", "0.5"],
    "evaluate": [
        "--data.path",
        "simulated:shop",
        "--bundle",
        "out/bundle",
        "--limit",
        "5",
        "--ranking.candidates",
        "all",
    ],
    "index": ["--data.path", "x", "--bundle", "out/bundle", "--valid_targets", "null", "--retrieval", "r"],
    "merge": ["--bundle", "[a, b]", "--weights", "[0.5, 2]", "--output_dir", "out/merged", "--dtype", "bfloat16"],
    "recommend": ["--bundle", "b", "--data.path", "x", "--output_dir", "o", "--context", "{hour: 9, day: Mon}"],
    "score": ["--bundles", "{a: out/a, b: out/b}", "--requests", "r.jsonl", "--items", "{a: x}", "--fallback", "b"],
}
"""What recipes that do not train are given."""


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_yaml_reads_back_as_the_same_configuration(name, files, tmp_path):
    flags = list(FLAGS.get(name, ["--data.path", "simulated:shop"]))
    trains = issubclass(CONFIGS[name], TrainRecipeConfig)
    if trains:
        flags += ["--domain", str(files / "domains" / "movies.yaml"), "--train.learning_rate", "1e-5"]
        flags += ["--train.class_weights", "[0.5, 2]", "--domain.marker=\u25b8", "--evaluation.metrics", "[auc]"]
    config = read_config(CONFIGS[name], flags)
    text = config_to_yaml(config)
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    again = read_config(CONFIGS[name], ["--config", str(path)])
    assert again == config
    assert config_to_yaml(again) == text
    assert not trains or 'like: " yes\\n"' in text


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--train.max_step=9", "the command line: unknown key --train.max_step; did you mean --train.max_steps?"),
        ("--max_steps=9", "the command line: unknown key --max_steps; did you mean --train.max_steps?"),
        ("--domain.stream.target=9", "unknown key --domain.stream.target; did you mean --domain.stream.targets?"),
        ("--xyzzy=9", "unknown key --xyzzy; --help lists the keys"),
        ("stray", "unrecognized arguments: stray"),
        ("--train.max_steps=nine", "train.max_steps must be a whole number, not 'nine'; change it"),
        ("--train.learning_rate=high", "train.learning_rate must be a number, not 'high'"),
        ("--train.resume=maybe", "train.resume must be true or false, not 'maybe'"),
        ("--model.dtype=int8", "model.dtype must be one of float32, bfloat16, float16, not 'int8'"),
        ("--train.class_weights=even", "must be balanced or a list, each a number or null, not 'even'"),
        ("--train.class_weights=[1]", r"train.class_weights must be 2 numbers, for dislike, like, not \[1.0\]"),
        ("--train.class_weights=[0, 0]", "train.class_weights must be finite and not negative"),
        ("--train.max_steps=0", "train.max_steps must be at least 1, or -1, not 0; change train.max_steps"),
        ("--train.batch_size=0", "train.batch_size must be at least 1, not 0"),
        ("--train.warmup=1", "train.warmup must be at least 0 and below 1, not 1.0"),
        ("--train.learning_rate=.nan", "train.learning_rate must be a finite number above 0, not nan"),
        ("--train.early_stopping=2", "train.eval_steps must be at least 1 with early_stopping, not 0"),
        ("--train.select_metric=po_ratio", "metric 'po_ratio' has no better end"),
        ("--evaluation.metrics=[acu]", "metric 'acu' does not exist"),
        ("--evaluation.valid_targets=0", "evaluation.valid_targets must be at least 1, or null, not 0"),
        ("--data.path= ", "data.path must be the place of a log"),
        ("--method.r=0", "r must be a whole number of at least 1, not 0"),
        ("--config", "--config must be followed by a YAML file, not ''"),
    ],
)
def test_what_cannot_be_used_is_named(base, flag, message):
    pattern = message if "\\" in message else re.escape(message)
    assert re.search(pattern, refused([*base, flag]))


DISTILL = ["--teacher", "t", "--data.path", "x"]


def test_old_keys_are_read_with_one_line_on_the_new_name(tmp_path, caplog):
    (tmp_path / "old.yaml").write_text(
        "answers: {targets: 7, only: true}\nstudent: {kind: shallow, heads_kept: 0.5}", "utf-8"
    )
    old = read_config(DistillConfig, [*DISTILL, "--config", str(tmp_path / "old.yaml"), "--answers.targets=8"])
    new = ["--teacher_outputs.targets=8", "--teacher_outputs.only=true", "--student.kind=shallow"]
    assert old == read_config(DistillConfig, [*DISTILL, *new, "--student.attention", "0.5"])
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/old.yaml: key answers is now called teacher_outputs; rename it",
        f"{tmp_path}/old.yaml: key student.heads_kept is now called student.attention; rename it",
        "the command line: key answers is now called teacher_outputs; rename it",
    ]


def test_an_old_key_is_refused_beside_its_new_name_and_where_it_never_was(tmp_path, base):
    (tmp_path / "both.yaml").write_text("answers: {targets: 7}\nteacher_outputs: {only: true}", "utf-8")
    message = refused([*DISTILL, "--config", str(tmp_path / "both.yaml")], DistillConfig)
    assert message.endswith("answers is the old name of teacher_outputs, and both are given; remove answers")
    assert "unknown key --answers.targets" in refused([*base, "--answers.targets=7"])


def test_every_renamed_key_leads_to_a_known_one():
    known = {key for kind in CONFIGS.values() for key in _Keys.of(kind).all}
    assert RENAMED and set(RENAMED.values()) <= known and not known & RENAMED.keys()


def test_domain_overrides_obey_the_domain(base):
    with pytest.raises(DomainError, match="label.above needs two outcomes"):
        read_config(LoraConfig, [*base, "--domain.outcomes.love", " love\n"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {max_steps: 3}", "bad.yaml: unknown key trian"),
        ("train: {max_stepz: 3}", "bad.yaml: unknown key train.max_stepz; did you mean train.max_steps?"),
        ("train: 3", "bad.yaml: train must be a mapping of its keys, not 3"),
        ("train: {max_steps: three}", "train.max_steps must be a whole number, not 'three'"),
        ("[1, 2]", "must be a mapping of keys, not list"),
        ("train: [1", "must be YAML in UTF-8"),
        ("method: {size: 8}", "unknown key method.size"),
        ("method: lora", "method must be a mapping of its keys, not 'lora'"),
    ],
)
def test_files_that_cannot_be_used_are_named(files, text, message):
    (files / "bad.yaml").write_text(text, "utf-8")
    args = ["--config", str(files / "bad.yaml"), "--data.path", "x", "--domain", str(files / "domains" / "movies.yaml")]
    assert message in refused(args)


def test_missing_things_are_named(files, base):
    domain = ["--domain", str(files / "domains" / "movies.yaml")]
    assert refused(domain) == (
        "data.path is required and missing; give --data.path VALUE or set it in the --config file"
    )
    assert refused(["--data.path", "x"]).startswith("domain is required and missing; give --domain FILE.yaml")
    assert "nowhere.yaml: cannot read it (No such file" in refused(["--config", "nowhere.yaml"])
    assert refused(["--data.path", "x"], EvaluateConfig).startswith("bundle is required and missing; give --bundle")
    (files / "latin.yaml").write_bytes("output_dir: caf\xe9".encode("latin-1"))
    assert "must be YAML in UTF-8" in refused(["--config", str(files / "latin.yaml")])
    with pytest.raises(DomainError, match="cannot read the domain file"):
        read_config(LoraConfig, [*base, "--domain", "nowhere.yaml"])


def test_a_bundle_brings_its_own_domain():
    assert "unknown key --domain" in refused(["--domain", "x.yaml"], EvaluateConfig)


def test_parse_config_prints_and_exits(base, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(LoraConfig, [*base, "--print_config", "--method.r", "2"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["method"]["r"] == 2
    assert printed["domain"]["outcomes"] == {"dislike": " no\n", "like": " yes\n"}


def test_parse_config_refuses_with_one_line_and_code_2(base, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(LoraConfig, [*base, "--methd.r", "2"])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: the command line: unknown key --methd.r; did you mean --method.r?\n"


def test_help_names_every_key_with_its_text(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_config(AdapterConfig, ["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "--config FILE.yaml",
        "--domain FILE.yaml",
        "--print_config",
        "--domain.stream.targets",
        "--method.size",
    ):
        assert part in text
    assert TrainConfig.__doc__.strip(".") in text
    assert "Width of the bottleneck." in text


def test_parsing_does_not_need_torch():
    """A recipe refuses a mistyped key at once, before the seconds that the heavy imports take."""
    code = "import sys; from llmrec_peft.config.parsing import read_config; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0

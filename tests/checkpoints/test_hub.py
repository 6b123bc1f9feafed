"""Pushing to the Hub: the real client against a stub server, and what the server stored is loaded back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download

from llmrec_peft.checkpoints.hub import push_to_hub
from llmrec_peft.checkpoints.loading import LoadOptions, load_trained
from llmrec_peft.checkpoints.manifest_schema import CONFIG, FILES, MANIFEST, WEIGHTS
from llmrec_peft.checkpoints.model_card import CARD
from llmrec_peft.errors import BundleError, ConfigError, LLMRecError
from llmrec_peft.merging.merge_bundle import MergeOptions, merge_bundle
from tests.support.bundles import answers, edit_manifest, write_bundle
from tests.support.stub_hub import MAY_READ, MAY_WRITE, StubHub, running_hub

# The client's own call of its transport.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

REPO, BASE = "owner/movies", "someone/tiny-llama"


@pytest.fixture
def online(monkeypatch, tmp_path) -> Iterator[None]:
    """Let the client out, to loopback alone, with no token and no cache but the test's own."""
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(online) -> Iterator[StubHub]:
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def sound(tiny_base, tmp_path_factory) -> Path:
    """A LoRA bundle on the tiny llama, named by a local path, and its merged models, in shards and in one file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("sound")
    write_bundle(directory / "bundle", tiny_base("llama"), r=4)
    for name, size in {"sharded": "40KB", "merged": "1GB"}.items():
        merge_bundle(directory / "bundle", directory / name, MergeOptions(max_shard_size=size))
    torch.set_num_threads(threads)
    return directory


@pytest.fixture
def bundle(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound / "bundle", tmp_path / "bundle"))


@pytest.fixture
def merged(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound / "merged", tmp_path / "merged"))


@pytest.fixture
def push(hub):
    def run(directory: Path, repo_id: str = REPO, **options) -> str:
        return push_to_hub(directory, repo_id, **{"token": MAY_WRITE, "endpoint": hub.url, "base": BASE, **options})

    return run


def download(hub: StubHub, tmp_path: Path, repo_id: str = REPO, **options) -> Path:
    return Path(snapshot_download(repo_id, endpoint=hub.url, cache_dir=tmp_path / "cache", **options))


@pytest.mark.usefixtures("one_thread")
class TestRoundTrip:
    def test_bundle(self, push, hub, bundle, tiny_base, tmp_path):
        expected = answers(bundle)
        assert push(bundle, private=True) == f"{hub.url}/{REPO}"
        files = hub.files(REPO)
        assert files.keys() == {*FILES, CARD, ".gitattributes"} and hub.private == {REPO: "private"}
        assert hub.messages == ["Upload bundle"] and len(hub.repositories[REPO]["main"]) == 2
        assert files[WEIGHTS] == (bundle / WEIGHTS).read_bytes()
        for name, content in files.items():
            assert str(tiny_base("llama")).encode() not in content, name
        loaded = load_trained(download(hub, tmp_path), LoadOptions(base=str(tiny_base("llama"))))
        assert torch.equal(answers(loaded), expected)
        assert loaded.manifest["base"]["name"] == loaded.manifest["model_options"]["base"] == BASE
        assert json.loads(files[CONFIG])["base_model_name_or_path"] == BASE
        card = ModelCard(files[CARD].decode())
        assert card.data.base_model == BASE and f'snapshot_download("{REPO}")' in card.text
        assert "OWNER/NAME" not in card.text and [result.metric_value for result in card.data.eval_results] == [0.7]

    def test_merged_model(self, push, hub, sound, tiny_base, tmp_path):
        out = shutil.copytree(sound / "sharded", tmp_path / "sharded")
        (out / "trainer_state.json").write_text("{}")
        push(out)
        files = hub.files(REPO)
        shards = {name for name in files if name.endswith(".safetensors")}
        names = {"config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", MANIFEST}
        assert len(shards) > 1 and files.keys() - shards == {*names, CARD, ".gitattributes"}
        for name, content in files.items():
            assert str(tiny_base("llama")).encode() not in content, name
        loaded = load_trained(download(hub, tmp_path))
        assert torch.equal(answers(loaded), answers(out)) and loaded.manifest["base"]["name"] == BASE

    def test_a_push_takes_the_place_of_the_one_before(self, push, hub, bundle, merged, sound, tiny_base, tmp_path):
        for out in (sound / "sharded", merged):
            push(out)
            load_trained(download(hub, tmp_path))
        push(bundle)
        assert hub.files(REPO).keys() >= {*FILES, CARD}
        assert not hub.files(REPO).keys() & {"config.json", "model.safetensors", "model.safetensors.index.json"}
        load_trained(download(hub, tmp_path), LoadOptions(base=str(tiny_base("llama"))))
        push(merged)
        assert not hub.files(REPO).keys() & {CONFIG, WEIGHTS}

    def test_branch(self, push, hub, bundle):
        push(bundle, revision="v2", commit_message="Second")
        assert hub.files(REPO).keys() == {".gitattributes"} and set(FILES) < hub.files(REPO, "v2").keys()
        assert hub.messages == ["Second"]
        push(bundle, revision="v2")


class TestWhatIsPushed:
    def test_nothing_that_lies_beside(self, push, hub, bundle):
        for name in ("notes.txt", "optimizer.json", ".env", "train.parquet"):
            (bundle / name).write_text("mine")
        (bundle / "checkpoint-1").mkdir()
        (bundle / "checkpoint-1" / "optimizer.pt").write_bytes(b"mine")
        push(bundle)
        assert hub.files(REPO).keys() == {*FILES, CARD, ".gitattributes"}

    @pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "model.safetensors"])
    def test_other_weights_are_refused_before_a_request(self, name, push, hub, bundle):
        (bundle / name).write_bytes(b"x")
        with pytest.raises(BundleError, match=f"holds '{name}' beside"):
            push(bundle)
        assert hub.requests == []

    def test_damaged_bundles_are_refused_before_a_request(self, push, hub, bundle, tmp_path):
        content = (bundle / WEIGHTS).read_bytes()
        torch.save({"a": torch.zeros(1)}, tmp_path / "pickle")
        for bad in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), (tmp_path / "pickle").read_bytes()):
            (bundle / WEIGHTS).write_bytes(bad)
            with pytest.raises(BundleError):
                push(bundle)
        with pytest.raises(BundleError, match="is not a directory"):
            push(tmp_path / "none")
        assert hub.requests == []

    def test_damaged_merged_model(self, push, hub, merged):
        (merged / "tokenizer.json").write_text(
            (merged / "tokenizer.json").read_text().replace('"normalizer": null', '"normalizer": {"type": "Lowercase"}')
        )
        with pytest.raises(BundleError, match="with a tokenizer of fingerprint"):
            push(merged)
        edit_manifest(merged, lambda manifest: manifest.update(calibration={"temperature": 2.0, "bias": None}))
        with pytest.raises(BundleError, match="so it was edited"):
            push(merged)
        assert hub.requests == []

    def test_path_of_a_machine(self, push, hub, bundle, tiny_base):
        with pytest.raises(ConfigError, match=f"by the path '{tiny_base('llama')}'.*pass base='owner/name'"):
            push(bundle, base=None)
        assert hub.requests == []

    def test_card_that_was_edited(self, push, hub, bundle):
        text = (bundle / CARD).read_text("utf-8").replace("library_name:", "license: apache-2.0\nlibrary_name:")
        (bundle / CARD).write_text(text, "utf-8")
        push(bundle)
        assert ModelCard(hub.files(REPO)[CARD].decode()).data.license == "apache-2.0"
        (bundle / CARD).write_bytes(b"\xff")
        with pytest.raises(BundleError, match="is not UTF-8 text"):
            push(bundle)
        (bundle / CARD).unlink()
        push(bundle)
        assert ModelCard(hub.files(REPO)[CARD].decode()).data.base_model == BASE

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
    def test_repository_of_another_model(self, name, push, hub, bundle):
        hub.repositories[REPO] = {"main": [{name: b"theirs", CARD: b"theirs"}]}
        with pytest.raises(BundleError, match=f"{REPO} holds '{name}' and no {MANIFEST}"):
            push(bundle)
        assert hub.files(REPO) == {name: b"theirs", CARD: b"theirs"}


class TestErrors:
    """Each is one line that names the repository and the next step."""

    @pytest.mark.parametrize(
        ("repo_id", "options", "message"),
        [
            (REPO, {"token": "hf_wrong"}, "status 401.*log in with `hf auth login`"),
            (REPO, {"token": False}, "status 401.*log in with `hf auth login`"),
            (REPO, {"token": True}, "needs a token, and there is none"),
            (REPO, {"token": MAY_READ}, r"status 403 \(.*no right to write.*\); use a token that may write"),
            ("nobody/movies", {}, "status 404.*check the owner's name"),
            ("a/b/c", {}, "repo_id 'a/b/c' cannot be: .*; write owner/name"),
            ("owner/a b", {}, "repo_id 'owner/a b' cannot be"),
        ],
    )
    def test_refused(self, repo_id, options, message, push, hub, bundle):
        with pytest.raises(ConfigError, match=message) as caught:
            push(bundle, repo_id, **options)
        assert "\n" not in str(caught.value) and "hf_w" not in str(caught.value)
        assert hub.repositories == {}

    def test_failure_in_the_middle_leaves_the_repository_as_it_was(self, push, hub, bundle):
        push(bundle)
        before = hub.files(REPO)
        hub.fail_at = "/commit/"
        with pytest.raises(ConfigError, match=r"status 500.*try again later"):
            push(bundle, commit_message="again")
        assert hub.files(REPO) is before

    def test_card_that_the_hub_cannot_read(self, push, hub, bundle):
        (bundle / CARD).write_text("---\ntags: [\n---\n", "utf-8")
        with pytest.raises(ConfigError, match="was not pushed: Invalid metadata in README.md. - bad YAML"):
            push(bundle)
        assert hub.files(REPO).keys() == {".gitattributes"}

    def test_no_connection(self, online, bundle):
        with running_hub() as gone:
            url = gone.url
        with pytest.raises(ConfigError, match=f"{REPO} was not pushed: .*check the connection"):
            push_to_hub(bundle, REPO, token=MAY_WRITE, endpoint=url, base=BASE)

    def test_offline_mode(self, bundle):
        with pytest.raises(LLMRecError, match="while HF_HUB_OFFLINE is set; unset it"):
            push_to_hub(bundle, REPO, token=MAY_WRITE, endpoint="http://127.0.0.1:9", base=BASE)

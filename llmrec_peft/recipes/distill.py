"""Distilling a teacher into a student."""

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from llmrec_peft.checkpoints.bundle import Bundle
from llmrec_peft.checkpoints.manifest import WEIGHTS, digest
from llmrec_peft.checkpoints.merged import load_answering, read_answering
from llmrec_peft.config.schema import DistillConfig, read_config
from llmrec_peft.data.domain import Domain
from llmrec_peft.data.log import BehaviorLog
from llmrec_peft.data.streams import StreamDataset, StreamSubset
from llmrec_peft.data.vocabulary import Vocabulary
from llmrec_peft.distillation.distill_trainer import DistillTrainer, layer_map
from llmrec_peft.distillation.pruning import check_prunable
from llmrec_peft.distillation.student_checkpoint import StudentMetadata, save_student
from llmrec_peft.distillation.students import (
    NO_SHALLOW,
    chosen_layers,
    first_item,
    give_content,
    start_ids,
    start_shallow,
)
from llmrec_peft.distillation.teacher_cache import ADVICE, matrix, read_kept, write_kept
from llmrec_peft.distillation.teacher_outputs import (
    TeacherAnswers,
    check_kept,
    content_layers,
    item_content,
    reduced,
    teacher_answers,
)
from llmrec_peft.errors import ConfigError, DataError, ModelError
from llmrec_peft.files import scratch_directory
from llmrec_peft.models.base import check_positions, is_encoder, load_config, load_tokenizer, resolve_base
from llmrec_peft.models.bottleneck import transformer_layers
from llmrec_peft.models.classifier import BehaviorClassifier, load_classifier
from llmrec_peft.recipes.train import check_classes, fit
from llmrec_peft.runs.launch_checks import check_launch, common_facts, flatten
from llmrec_peft.runs.output_paths import check_output, writing
from llmrec_peft.runs.outputs import Timings
from llmrec_peft.runs.run_directory import prepare_run
from llmrec_peft.runs.split_streams import SplitStreams, build_splits, check_split, read_log, split_of, streams_of
from llmrec_peft.runs.trainer_setup import build_loss, training_arguments
from llmrec_peft.training.distributed import check_ranks_equal, distributed_session, raise_on_all_ranks, uses_fsdp


def distill(config: DistillConfig | None = None, **options: Any) -> dict[str, Any]:
    """Train a student and leave it in `student` of `config.output_dir`, with metrics, predictions and a report.

    Args:
        config: what to do.
        options: in its place, its keys: `distill(teacher="out/bundle", data={"path": "DIR"}, student={"kind": "ids"})`;
            a key of a section may be written as it is on the command line, such as `**{"train.max_steps": 100}`.

    Returns:
        What metrics.json holds.

    Raises:
        LLMRecError: with one line on what cannot be used, before an old run in the same place is touched.
    """
    if config is None:
        flags = flatten(options)
        arguments = [
            part for key, value in flags.items() for part in (f"--{key}", yaml.safe_dump(value).split("\n")[0])
        ]
        config = read_config(DistillConfig, arguments)
    elif options:
        raise ConfigError(f"distill takes a configuration or its keys, not both; leave {min(options)} out")
    with distributed_session() as state:
        return _distill(config, state)


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher gave: its answers to the training targets, and what it makes of each item."""

    answers: TeacherAnswers | None = None
    content: np.ndarray | None = None


def _distill(config: DistillConfig, state: PartialState) -> dict[str, Any]:
    show = print if state.is_main_process else (lambda *_, **__: None)
    timings, student = Timings(), config.student
    with raise_on_all_ranks():
        manifest = read_answering(config.teacher)
        teacher_domain = _teacher_domain(config, manifest)
        domain = teacher_domain.of_ids(student.context, student.targets) if student.kind == "ids" else teacher_domain
        run = prepare_run(config)
        arguments = training_arguments(run)
        check_launch(config, arguments)
        _check_launch(arguments)
        asks = config.loss.needs_teacher
        _check_student(config, manifest, teacher_domain)
        chosen = _kept_layers(config, manifest)
        layers = _compared_layers(config, manifest, chosen)
        kept = Path(config.teacher_outputs.path or run.path("teacher"))
        check_output(kept, {"data.path": config.data.path, "teacher": config.teacher}, what="teacher_outputs.path")
        if asks:
            check_kept(kept, manifest, [other for _, other in layers])
    check_ranks_equal(common_facts(config), "start every process with the same settings and versions")
    with raise_on_all_ranks(), timings.timed("reading"):
        show(f"reading {config.data.path}", flush=True)
        log = read_log(config.data)
        splits = split_of(log, domain)
        for name in ("valid", "test"):
            check_split(splits, name, manifest["counts"].get("split"))
        if student.kind == "ids" and student.content:
            _check_content(teacher_domain, log)
    with scratch_directory(Path(tempfile.gettempdir(), "llmrec-student")) as start:
        # All that the log can be refused for comes before the teacher's answers, which take the longest.
        with raise_on_all_ranks(), writing(start, "the student's start"):
            base = _source(config, manifest, log, domain, start)
            tokenizer = load_tokenizer(base, trust_remote_code=config.trust_remote_code)
            streams = build_splits(log, domain, tokenizer, unlabelled=config.teacher_outputs.unlabelled)
            if config.loss.hard:
                check_classes(streams.train)
            loss = build_loss(config.train, streams, len(domain.labels))
        for name, counts in streams.counts().items():
            show(f"{name}: {counts['targets']:,} targets of {counts['users']:,} users in {counts['streams']:,} streams")
        teacher, given = None, TeacherOutputs()
        if asks or student.kind == "shallow" or (student.kind == "ids" and student.content):
            show(f"loading the teacher {config.teacher}", flush=True)
            with raise_on_all_ranks():
                teacher = _teacher(config, state)
            with timings.timed("asking the teacher"), writing(kept, "teacher_outputs.path"):
                given = _ask(config, teacher, teacher_domain, log, splits, [other for _, other in layers], kept, state)
        with raise_on_all_ranks():
            if student.kind == "shallow":
                with writing(start, "the student's start"):
                    start_shallow(teacher.classifier, chosen, start, student.mlp, student.attention)
                base = str(start)
            del teacher
            _check_targets(streams, given)
            fingerprint = streams.fingerprint(base, valid=config.train.eval_steps > 0)
            fingerprint = digest({"streams": fingerprint, "teacher": digest(manifest)})
            set_seed(config.train.seed)
            # The layers of a teacher without sdpa have none either.
            attn = _attention(manifest) if student.kind == "shallow" else "sdpa"
            classifier = load_classifier(base, domain, "full", attn=attn, trust_remote_code=config.trust_remote_code)
            if given.content is not None:
                _read_content(classifier, given.content, streams, config)
        show(classifier.summary())
        lesson = StudentMetadata(student, config.loss, _told(manifest, given), chosen)

        def save(model: BehaviorClassifier, mapping: dict[str, Any], **facts: Any) -> None:
            save_student(run.path("student"), model, mapping, lesson, **facts)

        return fit(
            run, arguments, classifier, streams, loss, fingerprint, timings, save, kind=DistillTrainer,
            train=_windows(streams.train, given, config), teacher=given.answers, distill_loss=config.loss,
            layers=[own for own, _ in layers],
        )  # fmt: skip


# -- the teacher -------------------------------------------------------------------------------------


def _attention(manifest: Mapping[str, Any]) -> str:
    """Attention kernel of a teacher, a bundle or a merged model, as far as a student must take it over."""
    said = manifest.get("attn") or manifest.get("model_options", {}).get("attn")
    return "eager" if said == "eager" else "sdpa"


def _teacher_domain(config: DistillConfig, manifest: Mapping[str, Any]) -> Domain:
    """The teacher's domain; with `unlabelled`, rows without a label are left to the teacher."""
    domain = Domain.of_manifest(manifest["domain"], source=f"teacher {config.teacher}")
    if not config.teacher_outputs.unlabelled:
        return domain
    return replace(domain, label=replace(domain.label, missing="leave_out"))


def _teacher(config: DistillConfig, state: PartialState) -> Bundle:
    teacher = load_answering(config.teacher, base=config.base, trust_remote_code=config.trust_remote_code)
    teacher.classifier.to(state.device)
    return teacher


def _ask(
    config: DistillConfig,
    teacher: Bundle,
    domain: Domain,
    log: BehaviorLog,
    splits,
    layers: list[int],
    kept: Path,
    state: PartialState,
) -> TeacherOutputs:
    """The teacher's answers to training targets, and its representations of the items, as far as they are wanted."""
    answers, content = None, None
    if config.loss.needs_teacher:
        streams = streams_of(splits, "train", domain, teacher.tokenizer, unlabelled=config.teacher_outputs.unlabelled)
        streams = streams.limited(config.teacher_outputs.targets)
        answers = teacher_answers(
            teacher, streams, kept, layers=layers, batch_tokens=config.teacher_outputs.batch_tokens, processes=state
        )
    if config.student.kind == "ids" and config.student.content:
        content = _content(teacher, domain, log, kept, config.teacher_outputs.batch_tokens)
    return TeacherOutputs(answers, content)


def _content(teacher: Bundle, domain: Domain, log: BehaviorLog, kept: Path, batch_tokens: int) -> np.ndarray:
    """What the teacher makes of each item of the log [items, H], kept beside its answers."""
    vocabulary = Vocabulary(domain, teacher.tokenizer)
    texts = vocabulary.events({name: log.items.column(name).combine_chunks() for name in domain.event_columns})
    flat, offsets = vocabulary.tokens(texts.to_pylist())
    header = "" if domain.header_columns else domain.header
    lead = np.concatenate([vocabulary.prefix, *([vocabulary.tokens([header])[0]] if header else [])])
    events = [np.concatenate([flat[offsets[row] : offsets[row + 1]], vocabulary.marker]) for row in range(len(texts))]
    layers = content_layers(len(transformer_layers(teacher.classifier.stock)))
    key = hashlib.sha256(digest(teacher.manifest).encode() + np.concatenate([lead, *events]).tobytes()).hexdigest()
    path = kept.with_name(f"{kept.name}-items-{key[:16]}.arrow")
    if path.is_file():
        found = matrix(read_kept(path, key), "content")
        if len(found) != len(events):
            raise DataError(f"{path} holds {len(found)} items, and the log has {len(events)}; {ADVICE}")
        return found
    found = item_content(teacher, lead, events, layers, batch_tokens=batch_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.FixedSizeListArray.from_arrays(pa.array(found.reshape(-1)), found.shape[1])
    write_kept(pa.table({"content": column}), path, key)
    return found


def _check_content(domain: Domain, log: BehaviorLog) -> None:
    """Raise DataError where an item alone has no text by the teacher's domain."""
    columns = [name for name in domain.event_columns if name not in log.items.column_names]
    if columns:
        raise DataError(
            f"student.content: the event of domain {domain.name!r} names {columns[0]!r}, which items lack, so an item "
            "alone has no text; set student.content to false"
        )


def _told(manifest: dict[str, Any], given: TeacherOutputs) -> dict[str, Any] | None:
    """What a student says of its teacher."""
    if given.answers is None and given.content is None:
        return None
    files, weights = manifest["files"], manifest.get("weights", {})
    return {
        "method": manifest.get("method", "merged"),
        "base": manifest["base"].get("name"),
        "weights": weights.get("fingerprint") or files.get(WEIGHTS),
        "targets": 0 if given.answers is None else len(given.answers.asked),
    }


# -- the student -------------------------------------------------------------------------------------


def _check_launch(arguments: TrainingArguments) -> None:
    plugin = arguments.deepspeed_plugin
    if uses_fsdp() or (plugin is not None and plugin.zero_stage == 3):
        raise ConfigError(
            "a student is small and is not split over processes; launch distilling with ddp or single_cpu"
        )


def _check_student(config: DistillConfig, manifest: dict[str, Any], domain: Domain) -> None:
    """Refuse a student that the teacher, its windows or the loss rule out, by what their configurations say."""
    student, trust = config.student, config.trust_remote_code
    if student.kind == "shallow":
        if manifest.get("method") == "adapter":
            raise ModelError(NO_SHALLOW)
        if student.mlp < 1 or student.attention < 1:
            check_prunable(load_config(_teacher_base(config, manifest), trust_remote_code=trust), trust)
    if student.kind != "small":
        return
    if domain.reads_ids and not domain.marker:
        raise ConfigError(
            f"student.kind small reads item texts, and teacher {config.teacher} reads item ids; choose ids or shallow"
        )
    own = load_config(student.base, trust_remote_code=trust)
    try:
        check_positions(own, domain.stream.max_length)
    except ModelError as error:
        reason = str(error).split(";")[0]
        raise ModelError(
            f"student.base {student.base} cannot hold the teacher's windows: {reason}; choose another base, or a "
            "teacher of shorter windows"
        ) from None
    if config.loss.pairs and is_encoder(own):
        raise ConfigError(
            f"loss.pairs compares answers of one stream, and student.base {student.base} ({own.model_type}) reads each "
            "target alone; set it to 0"
        )


def _kept_layers(config: DistillConfig, manifest: dict[str, Any]) -> list[int] | None:
    """Of a shallow student, the teacher's layers that it keeps; a third of them by default."""
    if config.student.kind != "shallow":
        return None
    depth = _depth(config, manifest)
    student = config.student
    pruned = student.mlp < 1 or student.attention < 1
    return chosen_layers(depth, student.layers or max(1, depth // 3), student.pick, pruned)


def _depth(config: DistillConfig, manifest: dict[str, Any]) -> int:
    """Layers of the teacher."""
    found = load_config(_teacher_base(config, manifest), trust_remote_code=config.trust_remote_code)
    return found.get_text_config().num_hidden_layers


def _teacher_base(config: DistillConfig, manifest: dict[str, Any]) -> str:
    """Where the teacher's configuration and tokenizer lie."""
    if manifest.get("kind") == "merged":
        return config.teacher
    options = manifest["model_options"]
    return resolve_base(config.base) if config.base else resolve_base(options["base"], options.get("gguf_file"))


def _compared_layers(config: DistillConfig, manifest: dict[str, Any], kept: list[int] | None) -> list[tuple[int, int]]:
    """Pairs of layers whose outputs are compared: (student's, teacher's)."""
    if not config.loss.hidden:
        return []
    depth = _depth(config, manifest)
    if kept is not None:
        return layer_map(len(kept), depth, kept)
    own = load_config(config.student.base, trust_remote_code=config.trust_remote_code)
    return layer_map(own.get_text_config().num_hidden_layers, depth)


def _source(config: DistillConfig, manifest: dict[str, Any], log: BehaviorLog, domain: Domain, directory: Path) -> str:
    """Where the student's tokenizer lies, and all else that it starts from if it takes no weights of the teacher's."""
    if config.student.kind == "small":
        return resolve_base(config.student.base)
    if config.student.kind == "shallow":
        return _teacher_base(config, manifest)
    start_ids(log.items.column("item_id"), domain, config.student, config.train.seed, directory)
    return str(directory)


def _check_targets(streams: SplitStreams, given: TeacherOutputs) -> None:
    """The teacher's answers are found by target number, which both count alike."""
    count = streams.train.num_targets
    if given.answers is not None and len(given.answers.logits) != count:
        raise DataError(
            f"the student has {count} training targets and the teacher's answers {len(given.answers.logits)}; "
            "remove the kept answers"
        )


def _windows(train: StreamDataset, given: TeacherOutputs, config: DistillConfig) -> StreamDataset | StreamSubset:
    """The windows that are trained on."""
    if given.answers is None or not config.teacher_outputs.only:
        return train
    windows = np.searchsorted(train.target_offsets, given.answers.asked, "right") - 1
    return StreamSubset(train, np.unique(windows))


def _read_content(
    classifier: BehaviorClassifier, content: np.ndarray, streams: SplitStreams, config: DistillConfig
) -> None:
    """Let a student of ids read what the teacher makes of the items."""
    train: StreamDataset = streams.train
    seen = np.zeros(len(content), bool)
    seen[streams.log.item_codes[streams.splits.train.rows]] = True
    seen[train.target_items] = True
    give_content(
        classifier, torch.from_numpy(reduced(content, config.student.content_width)), torch.from_numpy(seen),
        first_item(streams.train.domain), config.student.content_dropout,
    )  # fmt: skip

"""From a Hugging Face directory to a pruned one: import, split text, evaluate, prune, retrain, evaluate, export.

Every stage is a verb and writes its artifact atomically to a work folder next to the result:

    OUT.work/question.json           the settings; a run with other settings is refused
    OUT.work/parent/                 the imported checkpoint
    OUT.work/text/                   calibration, held-out (and training) text, tokenized (data/split.py)
    OUT.work/before.json             loss of the parent on the held-out text
    OUT.work/pruned/                 the pruned checkpoint (before that, pruned.learning/ while masks are learned)
    OUT.work/retrained/              the pruned checkpoint after training
    OUT.work/after.json              loss of the checkpoint that will be exported
    OUT.work/logs/                   what each verb printed
    OUT/                             the Hugging Face directory, with megatron_prune.json; written last

A killed run resumes after the last finished stage. The work folder is removed once OUT exists, unless it is to be kept.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, verbs
from megatron_prune.api import hf_source, launching, models
from megatron_prune.api.asked import Asked
from megatron_prune.api.hf_source import HFSource
from megatron_prune.api.made import Evaluation, Loss, Model, Pruned, shape_words
from megatron_prune.claims import claim
from megatron_prune.data import split
from megatron_prune.errors import DataError, UsageError

RECORD = "megatron_prune.json"
QUESTION = "question.json"
LONGEST_GPU, LONGEST_CPU = 2048, 512  # tokens per sequence, if the model takes more
WINDOWS = 64  # of held-out text at most


During = Callable[[str], contextlib.AbstractContextManager[object]]


def run(asked: Asked, tell: Callable[[str], None], during: During = contextlib.nullcontext) -> Pruned:
    """Make OUT, or return it if it is finished. ``tell`` gets a line when a stage ends; every stage runs inside
    ``during(its name)``. Raises MegatronPruneError before anything is written if the settings cannot work.
    """
    launching.refuse_if_launched("--hf")
    run = _Run(asked, tell, during)
    return run.finished() or run.go()


class _Run:
    def __init__(self, question: Asked, tell: Callable[[str], None], during: During):
        self.asked, self.chosen, self.tell, self.during = question.settings, question, tell, during
        self.pruning, asked = question.pruning, question.settings
        self.out = Path(asked.out)
        self.work = self.out.with_name(self.out.name + ".work")
        self.source = HFSource.read(asked)
        longest = LONGEST_CPU if _on_cpu() else LONGEST_GPU
        self.seq_length = asked.seq_length or min(self.source.positions, longest)
        self._check()
        self.texts = self._texts()
        self.question = self._question()

    # -- settings ---------------------------------------------------------------------------------

    def _check(self) -> None:
        asked = self.asked
        if self.seq_length > self.source.positions:
            raise UsageError("--seq-length", got=self.seq_length, expected=f"up to the model's {self.source.positions}")
        for name in ("calibration_sequences", "windows", "retrain_tokens", "retrain_batch_size", "nproc", "workers"):
            value = getattr(asked, name)
            if value is not None and value < 1:
                raise UsageError("--" + name.replace("_", "-"), got=value, expected="1 or more")
        if asked.text and asked.dataset:
            raise UsageError("--text, --dataset", got="both", expected="one of them")
        if asked.retrain_tokens is not None and self.steps < 1:
            least = self.seq_length * asked.retrain_batch_size
            raise UsageError(
                "--retrain-tokens", got=asked.retrain_tokens, expected=f"{least} or more",
                why=f"a step takes {asked.retrain_batch_size} sequences of {self.seq_length} tokens",
            )  # fmt: skip
        if (learning := self.chosen.learning) and learning.mask_tokens is not None and self.mask_samples < 1:
            least = self.seq_length * max(1, learning.mask_batch_size)
            raise UsageError(
                "--mask-tokens", got=learning.mask_tokens, expected=f"{least} or more",
                why=f"a step takes --mask-batch-size {learning.mask_batch_size} sequences of {self.seq_length} tokens",
            )  # fmt: skip
        ranks = asked.tensor_model_parallel_size * asked.pipeline_model_parallel_size
        if ranks < 1 or asked.nproc % ranks:
            raise UsageError(
                "--nproc", got=asked.nproc, expected=f"a multiple of {ranks}",
                why="that is the tensor times the pipeline parallel size",
            )  # fmt: skip
        self.chosen.check(self.source.args, self.source.kind)

    @property
    def steps(self) -> int:
        """Training steps: whole batches only."""
        return (self.asked.retrain_tokens or 0) // (self.seq_length * self.asked.retrain_batch_size)

    @property
    def mask_samples(self) -> int:
        """Sequences that masks are learned on, before those of the retraining: whole batches only."""
        learning = self.chosen.learning
        if learning is None or learning.mask_tokens is None or learning.mask_batch_size < 1:
            return 0
        return learning.mask_tokens // (self.seq_length * learning.mask_batch_size) * learning.mask_batch_size

    @property
    def train_samples(self) -> int:
        """Sequences of training text: of the masks' learning, and of the retraining after it."""
        return self.mask_samples + self.steps * self.asked.retrain_batch_size

    def _texts(self) -> split.Texts:
        asked = self.asked
        if asked.text:
            return split.of_files(asked.text, asked.json_keys, asked.text_documents)
        if asked.dataset:
            return split.of_dataset(asked.dataset, column=asked.json_keys)
        return split.of_this_machine()

    def _question(self) -> dict[str, Any]:
        asked = self.asked
        retraining = {"steps": self.steps, "lr": asked.retrain_lr, "batch_size": asked.retrain_batch_size}
        question = {
            "version": 1,
            "model": self.source.identity,
            "pruning": self.pruning,
            "text": self.texts.identity,
            "seq_length": self.seq_length,
            "calibration_sequences": asked.calibration_sequences,
            "windows": asked.windows,
            "retraining": retraining if self.steps else None,
            "dtype": asked.dtype,
            "layout": [asked.tensor_model_parallel_size, asked.pipeline_model_parallel_size],
        }
        return json.loads(json.dumps(question))  # type: ignore[no-any-return]  # as it reads back from the file

    # -- all stages -------------------------------------------------------------------------------

    def finished(self) -> Pruned | None:
        """The result, if OUT was made with these settings. UsageError if OUT is something else."""
        if not self.out.exists() or (self.out.is_dir() and not any(self.out.iterdir())):
            return None
        record = artifacts.read_json(self.out / RECORD) if (self.out / RECORD).is_file() else None
        if not isinstance(record, dict) or record.get("question") != self.question:
            what = _difference(record["question"], self.question) if record else "no pruning of megatron_prune"
            raise UsageError(
                "--out", got=f"{self.out}, which holds {what}", expected="a directory that is empty or does not exist"
            )
        self.tell(f"{self.out} is finished; nothing to do")
        self._clean()
        return self._result(record)

    def go(self) -> Pruned:
        with self._own():
            self._check_space()
            return self._go()

    def _go(self) -> Pruned:
        asked, work = self.asked, self.work
        self.tell(f"model       {asked.hf}: {self.source.shape.parameters():,} parameters, "
                  f"{shape_words(self.source.shape)}, {self.source.dtype}")  # fmt: skip
        capped = f" (the model takes {self.source.positions:,})" if self.seq_length < self.source.positions else ""
        self.tell(f"sequences   of {self.seq_length:,} tokens{capped}")
        parent = self._stage("import", work / "parent", self._import)
        try:
            text = self._text(parent)
        except DataError:
            self._clean(always=True)  # the next command will name other text, or less of it
            raise
        before = self._evaluate("before", parent, text)
        pruned = self._stage("prune", work / "pruned", lambda: self._prune(parent))
        final = self._retrain(pruned) if self.steps else pruned
        after = self._evaluate("after", final, text)
        record = self._record(parent, pruned, before, after, text)
        self._stage("export", self.out, lambda: _export(final, self.out, record, asked.workers))
        self._clean()
        return self._result(record)

    def _stage(self, name: str, made: Path, make: Callable[[], object]) -> Path:
        """Run a stage unless its result exists: everything in the work folder is complete or absent."""
        if made.exists():
            self.tell(f"{name:<11} {made}: from before")
            return made
        begun = time.monotonic()
        with self.during(name):
            make()
        self.tell(f"{name:<11} {made} ({time.monotonic() - begun:.1f} s)")
        return made

    # -- stages ----------------------------------------------------------------------------------

    def _import(self) -> None:
        from megatron_prune.api.checkpoints import import_hf

        asked = self.asked
        import_hf(
            self.source.folder,
            self.work / "parent",
            dtype=asked.dtype,
            tensor_model_parallel_size=asked.tensor_model_parallel_size,
            workers=asked.workers,
        )

    def _text(self, parent: Path) -> dict[str, Any]:
        """Split and tokenize the text; DataError if there is too little, with what to change."""
        from megatron_prune.checkpoint.layout import vocabulary
        from megatron_prune.checkpoint.reader import open_checkpoint
        from megatron_prune.data.tokenizers import check_fits_checkpoint, load_tokenizer

        asked, length = self.asked, self.seq_length
        checkpoint = open_checkpoint(parent)
        tokenizer = load_tokenizer("HuggingFaceTokenizer", self.source.folder)
        check_fits_checkpoint(tokenizer, checkpoint, vocabulary(checkpoint.args))
        wanted = {
            split.CALIBRATION: asked.calibration_sequences * length + 1 if self.chosen.reads_text() else 0,
            split.HELD_OUT: (asked.windows or WINDOWS) * length + 1,
            split.TRAIN: self.train_samples * length + 1 if self.train_samples else 0,
        }
        begun = time.monotonic()
        with self.during("text"):
            made = split.prepare(self.texts, self.work / "text", tokenizer, wanted, workers=asked.workers)
        windows = {part: (found["tokens"] - 1) // length for part, found in made["parts"].items()}
        for part, flag, least in (
            (split.CALIBRATION, "--calibration-sequences", asked.calibration_sequences),
            (split.HELD_OUT, "--windows", asked.windows or 1),
            (
                split.TRAIN,
                "--retrain-tokens, --mask-tokens" if self.mask_samples else "--retrain-tokens",
                self.train_samples,
            ),
        ):
            if windows.get(part, least) < least:
                raise DataError(
                    f"{flag}: expected {least} sequences of {length} tokens of {part.replace('_', '-')} text, got "
                    f"{windows[part]} from {made['name']}; give more text, a shorter --seq-length, or ask for less"
                )
        made["windows"] = min(windows[split.HELD_OUT], asked.windows or WINDOWS)
        parts = ", ".join(f"{part.replace('_', '-')} {found['tokens']:,} tokens of {found['documents']:,} documents"
                          for part, found in made["parts"].items())  # fmt: skip
        self.tell(f"text        {made['name']}: {parts} ({time.monotonic() - begun:.1f} s)")
        if left_out := {name.replace("_", " "): n for name, n in made["left_out"].items() if n}:
            self.tell("            left out: " + ", ".join(f"{n} {name}" for name, n in left_out.items()))
        return made

    def _evaluate(self, name: str, checkpoint: Path, text: Mapping[str, Any]) -> Loss:
        scores = self.work / f"{name}.json"
        begun, known = time.monotonic(), scores.is_file()
        if known:
            found = Evaluation.read(scores)
        else:
            with self.during(name):
                found = models.evaluate(
                    checkpoint,
                    self.work / "text" / split.HELD_OUT,
                    labels=["held-out"],
                    seq_length=self.seq_length,
                    windows=text["windows"],
                    output=scores,
                    **self._job(f"evaluate-{name}"),
                )
        loss = found.corpora["held-out"]
        took = "from before" if known else f"{time.monotonic() - begun:.1f} s"
        self.tell(f"{name:<11} perplexity {loss.perplexity:.3f} on {loss.predictions:,} held-out tokens ({took})")
        return loss

    def _prune(self, parent: Path) -> None:
        reads = self.chosen.reads_text()
        text: dict[str, Any] = {
            "calibration_data_path": self.work / "text" / split.CALIBRATION,
            "calibration_sequences": self.asked.calibration_sequences,
            "calibration_seq_length": self.seq_length,
        }
        job, pruning = self._job("prune"), dict(self.pruning)
        if learning := self.chosen.learning:
            own = {flag.name for flag in type(learning).flags()} - {
                flag.name for flag in verbs.LearningSettings.flags()
            }
            pruning = {name: value for name, value in pruning.items() if name not in own}
            pruning["mask_tokens"] = self.mask_samples * self.seq_length
            job["megatron"] |= {
                "train_data_path": self.work / "text" / split.TRAIN,
                "data_cache_path": self.work / "cache",
                "seq_length": self.seq_length,
                "global_batch_size": learning.mask_batch_size,
                "lr": learning.mask_weight_lr,
                "save_interval": max(1, self.mask_samples // learning.mask_batch_size // 10),
            }
        models.prune_checkpoint(parent, self.work / "pruned", **(text if reads else {}), **pruning, **job)

    def _retrain(self, pruned: Path) -> Path:
        """Retrain the pruned checkpoint with its zeros held. A killed run resumes from its last save."""
        from megatron_prune.training.account import is_complete

        asked, save = self.asked, self.work / "retrained"
        if is_complete(save):
            self.tell(f"retrain     {save}: from before")
            return save
        begun = time.monotonic()
        words = {
            "pretrained_checkpoint": pruned,
            "use_checkpoint_args": True,
            "load": save,
            "save": save,
            "save_interval": max(1, self.steps // 10),
            "masks": pruned / "masks" if (pruned / "masks").is_dir() else None,
            "data_path": self.work / "text" / split.TRAIN,
            "data_cache_path": self.work / "cache",
            "stream_range": f"{self.mask_samples}:{self.train_samples}",
            "seq_length": self.seq_length,
            "global_batch_size": asked.retrain_batch_size,
            "micro_batch_size": 1,
            "train_iters": self.steps,
            "lr": asked.retrain_lr,
            "min_lr": float(f"{asked.retrain_lr / 10:.12g}"),
            "lr_decay_style": "cosine",
            "lr_warmup_fraction": 0.05,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
        }
        job = self._job("retrain")
        with self.during("retrain"):
            launching.run(["pretrain", *launching.flags(words), *launching.flags(job.pop("megatron"))], **job)
        tokens = self.steps * asked.retrain_batch_size * self.seq_length
        self.tell(f"retrain     {save}: {tokens:,} tokens ({time.monotonic() - begun:.1f} s)")
        return save

    def _job(self, name: str) -> dict[str, Any]:
        asked = self.asked
        layout = {"tensor_model_parallel_size": asked.tensor_model_parallel_size,
                  "pipeline_model_parallel_size": asked.pipeline_model_parallel_size}  # fmt: skip
        return {
            "megatron": {**layout, **hf_source.PRECISION[asked.dtype or self.source.dtype]},
            "nproc": asked.nproc,
            "devices": asked.devices or None,
            "log": self.work / "logs" / f"{name}.txt",
        }

    # -- work folder and record -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        """Lock the work folder; UsageError if it has other settings, ClaimedError if another process holds it."""
        self.work.mkdir(parents=True, exist_ok=True)
        with claim(self.work / "lock", self.out):
            path = self.work / QUESTION
            if path.is_file():
                held = artifacts.read_json(path)
                if held != self.question:
                    raise UsageError(
                        "--out", got=f"{self.out}, of which {self.work} holds {_difference(held, self.question)}",
                        expected=f"another directory, or remove {self.work} first",
                    )  # fmt: skip
            else:
                artifacts.write_json(path, self.question)
            yield

    def _check_space(self) -> None:
        """Space for parent, pruned and exported model; for training, two saves with optimizer (16 bytes per weight)."""
        trained = 2 * 16 * self.source.shape.parameters() if self.train_samples else 0
        held = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        artifacts.check_space(self.out, max(3 * self.source.nbytes + trained - held, 0))

    def _record(self, parent: Path, pruned: Path, before: Loss, after: Loss, text: Mapping[str, Any]) -> dict[str, Any]:
        """The record that OUT keeps (``megatron_prune.json``)."""
        from megatron_prune.checkpoint.reader import open_checkpoint

        made, model = Model.of_checkpoint(pruned), open_checkpoint(parent)
        last = made.pruning[-1]
        return {
            "version": 1,
            "question": self.question,
            "source": {"hf": self.asked.hf, "fingerprint": model.fingerprint()},
            "method": method_words(self.pruning, last),
            "pruning": json.loads(json.dumps(list(made.pruning), default=str)),
            "text": dict(text),
            "seq_length": self.seq_length,
            "before": _scores(before),
            "after": _scores(after),
            "parameters_before": model.shape.parameters(),
            "parameters": made.parameters,
            "retrained_tokens": self.steps * self.asked.retrain_batch_size * self.seq_length,
            "versions": artifacts.versions(),
            "device": artifacts.device(),
        }

    def _result(self, record: Mapping[str, Any]) -> Pruned:
        last = record["pruning"][-1]
        return Pruned(
            path=self.out,
            source=record["source"]["hf"],
            method=record["method"],
            text=record["text"]["name"],
            before=Loss.of(record["before"]),
            after=Loss.of(record["after"]),
            parameters_before=record["parameters_before"],
            parameters=record["parameters"],
            removed_linears=last["removed_linears"],
            removed_all=last["removed_all"],
            retrained_tokens=record["retrained_tokens"],
            work=self.work if self.work.exists() else None,
            record=record,
        )

    def _clean(self, always: bool = False) -> None:
        if always or not self.asked.keep:
            shutil.rmtree(self.work, ignore_errors=True)


def method_words(pruning: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """``wanda 2:4``, ``shortgpt, ratio 0.25``"""
    if made.get("pattern") not in (None, "unstructured"):
        return f"{pruning['method']} {made['pattern']}"
    return f"{pruning['method']}, {made['removed_linears']:.1%} of the blocks' linear weights"


def _scores(loss: Loss) -> dict[str, Any]:
    return {
        "loss": loss.loss,
        "perplexity": loss.perplexity,
        "predictions": loss.predictions,
        "windows": loss.windows,
        "seq_length": loss.seq_length,
        "window_losses": list(loss.window_losses),
    }


def _export(load: Path, out: Path, record: Mapping[str, Any], workers: int) -> None:
    from megatron_prune.api import model_card
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.convert import huggingface

    files = {RECORD: artifacts.json_bytes(record), model_card.NAME: model_card.card(open_checkpoint(load))}
    huggingface.export_hf(load, out, workers=workers, files=files)


def _on_cpu() -> bool:
    from megatron_prune.engine import cpu

    return cpu.is_cpu()


def _difference(held: Any, wanted: Mapping[str, Any]) -> str:
    """How a folder's settings differ from these: ``another pruning (seq_length 64, now 128)``."""
    if not isinstance(held, dict):
        return "no question of this kind"
    for name, value in wanted.items():
        if held.get(name) != value:
            before, now = (json.dumps(one) for one in (held.get(name), value))
            return f"another pruning ({name}: {before:.120}, now {now:.120})"
    return "another pruning"

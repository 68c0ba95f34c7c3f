"""A made-up study: real corpora, plans and pruned checkpoints, and trainings that only write accounts.

``FakeLauncher`` does what the verbs would, in milliseconds: ``plan`` and ``apply`` are the real ones,
``calibrate`` writes seeded statistics, ``sparsify`` masks that remove the first weights, ``pretrain`` and
``evaluate`` write accounts and scores that are functions of their command line alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_prune import artifacts, methods, verbs
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.cli.pruning_commands import apply_main, plan_main
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.data import indexed
from megatron_prune.errors import EXIT_NEEDS_SCORES
from megatron_prune.masks import MASKS, Pattern, find_masks, open_masks, write_single
from megatron_prune.methods import sheared_llama
from megatron_prune.structured import candidates, statistics
from megatron_prune.structured import target as targets
from megatron_prune.structured.candidate import with_scores
from megatron_prune.study import schema
from megatron_prune.study.commands import Command
from megatron_prune.study.prunings import Places
from megatron_prune.training import data, learned_file, lineage, objective, teacher_cache

VOCABULARY = 123
SHAPE_FLAGS = {
    "num-layers": 4,
    "hidden-size": 32,
    "num-attention-heads": 4,
    "group-query-attention": True,
    "num-query-groups": 2,
    "ffn-hidden-size": 64,
    "swiglu": True,
    "normalization": "RMSNorm",
    "position-embedding-type": "rope",
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "vocab-size": VOCABULARY,
    "padded-vocab-size": 128,
}


def corpora(
    folder: Path, train: int = 12_000, vocabulary: int = VOCABULARY, more: Sequence[str] = (), seed: int = 0
) -> dict[str, str]:
    """Four corpora of random tokens, ``train`` of them for training, and ``more``; their prefixes by name."""
    generator = np.random.default_rng(seed)
    prefixes = {}
    lengths = {"train": train, **dict.fromkeys(("calibration", "validation", "test", *more), 2_000)}
    for name, length in lengths.items():
        prefix = folder / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
        for _ in range(length // 100):
            builder.add_document(torch.from_numpy(generator.integers(0, vocabulary, 100)), [100])
        builder.finalize(f"{prefix}.idx")
        prefixes[name] = str(prefix)
    return prefixes


def mapping(prefixes: dict[str, str], **changes: Any) -> dict[str, Any]:
    """A study.yaml as plain data: two methods at 50%, one budget, both settings, one seed."""
    return {
        "name": "made-up",
        "data": {**prefixes, "seq_length": 16},
        "parent": {"pretrain": {"tokens": 2560, "arguments": SHAPE_FLAGS}},
        "recipe": {"lr": 1e-3, "global_batch_size": 8, "micro_batch_size": 4, "arguments": {"weight-decay": 0.1}},
        "methods": [{"name": "shortgpt"}, {"name": "minitron-width", "settings": {"divisible-by": 8}}],
        "ratios": [0.5],
        "budgets": [1280],
        "calibration": {"sequences": 8},
        "evaluation": {"windows": 16},
        **changes,
    }


def study(prefixes: dict[str, str], **changes: Any) -> schema.StudyConfig:
    return schema.from_mapping(mapping(prefixes, **changes))


_STDOUT = threading.Lock()


class Killed(BaseException):
    """Simulates SIGKILL: nothing in the package may catch it."""


class FakeLauncher:
    """A launcher that writes the output of the verbs. ``kill_at`` n: die before the n-th command from now.

    ``broken`` are stages of cells that end with exit code 0 and write nothing.
    """

    def __init__(self, kill_at: int | None = None, broken: tuple[tuple[str, str], ...] = ()):
        self.kill_at, self.broken = kill_at, broken
        self.commands: list[Command] = []

    def __call__(self, command: Command, *, log: Path, env: dict[str, str]) -> int:
        if self.kill_at is not None and len(self.commands) >= self.kill_at:
            raise Killed
        self.commands.append(command)
        log.write_text(f"{command.stage} was here\n")
        if (log.parent.name, command.stage) not in self.broken:
            # One at a time, since they share stdout. Cells still begin and end in any order.
            with _STDOUT, open(log, "a") as output, contextlib.redirect_stdout(output):
                getattr(self, f"_{command.stage.replace('-', '_')}")(list(command.argv[1:]))
        return 0

    def _import(self, argv: list[str]) -> None:
        given = words(argv[1:])
        import_hf(given["hf"], given["save"])

    def _plan(self, argv: list[str]) -> None:
        plan_main(argv)

    def _candidates(self, argv: list[str]) -> None:
        assert plan_main(argv) == EXIT_NEEDS_SCORES

    def _score(self, argv: list[str]) -> None:
        given = words(argv)
        question, _ = candidates.read(given["score"])
        found = statistics.read(given["statistics"])
        while (run := question.next_run(found)) is not None:
            losses = [number(candidate.label) for candidate in run.candidates]
            found = with_scores(found, run.candidates, losses, run.windows)
        found.write(given["output"])

    def _retrain_candidates(self, argv: list[str]) -> None:
        own = words(argv[: argv.index("--pretrain")])
        given = words(argv[argv.index("--pretrain") + 1 :])
        question, _ = candidates.read(own["candidates"])
        found = statistics.read(own["statistics"])
        start, end = map(int, given["stream_range"].split(":"))
        assert question.retraining is not None
        assert (end - start) * int(given["seq_length"]) == question.retraining.tokens
        scores = dict(found.scores)
        for rank, candidate in enumerate(question.finalists(found)):  # the last of them learns fastest
            after = statistics.Retrained(5.0 - rank, question.retraining.tokens, 10**9, "recipe")
            scores[candidate.key] = replace(scores[candidate.key], retrained=after)
        replace(found, scores=scores).write(own["statistics"])

    def _apply(self, argv: list[str]) -> None:
        apply_main(argv)

    def _sparsify(self, argv: list[str]) -> None:
        given = words(argv)
        assert ("calibration_data_path" in given) == (given["method"] in ("wanda", "sparsegpt"))
        pattern, parent = Pattern.parse(given["pattern"]), open_checkpoint(given["load"])
        assert ("ratio" in given) == (pattern.ratio is None)
        kept = {
            weight.name: first_removed(weight.shape, pattern, float(given.get("ratio", 0)), int(given.get("seed", 0)))
            for weight in weights(parent.shape)
            if weight.is_linear
        }
        folder = Path(f"{given['save']}-masks")
        masks = write_single(folder, parent.shape, ((name, mask, pattern) for name, mask in kept.items()))
        entry = {
            "method": given["method"],
            "pattern": str(pattern),
            "source": asdict(parent.shape),
            "target": asdict(parent.shape),
            "parent": {"fingerprint": parent.fingerprint()},
            "masks": masks.hash,
            "removed_linears": masks.removed / parent.shape.linear_parameters(),
            "removed_all": masks.removed / parent.shape.parameters(),
            "flops": 10**9 if "calibration_data_path" in given else 0,
            "tokens": 128 if "calibration_data_path" in given else 0,
            "lineage": lineage.of(parent),
        }
        chain = [*parent.pruning, entry]
        with CheckpointWriter(given["save"], args=parent.args, dtype=torch.float32, pruning=chain) as writer:
            folder.rename(writer.beside(MASKS))
            for weight in weights(parent.shape):
                values = parent.read(weight.name)
                writer.add(weight.name, weight.shape, [values * kept.get(weight.name, torch.ones(1))])

    def _calibrate(self, argv: list[str]) -> None:
        given = words(argv)
        parent = open_checkpoint(given["load"])
        generator = torch.Generator().manual_seed(int(given.get("seed", 0)))
        tensors = {
            name: torch.rand(size, generator=generator, dtype=torch.float64)
            for name, size in statistics.tensor_shapes(parent.shape).items()
        }
        statistics.Statistics(
            tensors,
            parent.shape,
            parent.fingerprint(),
            seq_length=int(given["calibration_seq_length"]),
            sequences=int(given["calibration_sequences"]),
            loss_sum=1.0,
            calibrations=(
                {
                    "prefix": given["calibration_data_path"],
                    "corpus": indexed.fingerprint(given["calibration_data_path"]),
                    "windows": list(range(int(given["calibration_sequences"]))),
                },
            ),
        ).write(given["output"])

    def _pretrain(self, argv: list[str]) -> None:
        given = words(argv)
        save = Path(given["save"])
        source = given.get("pretrained_checkpoint") or given.get("shape_from")
        if source is None and save.parent.name.startswith("scratch"):
            source = str(save.parent / "flags")
            _write_parent(Path(source), given)
        shape = open_checkpoint(source).shape if source else _write_parent(save, given)
        save.mkdir(parents=True, exist_ok=True)
        made = account(given, shape)
        known = {name.replace("-", "_"): name for name in SHAPE_FLAGS}
        args = open_checkpoint(source or save).args
        # Of the model, as Megatron resolves them.
        made["arguments"] |= {name: args.get(name) for name in known} | shape.to_args()
        if "pretrained_checkpoint" in given:
            begins_with(made, source)
        if given.get("objective", "lm") != "lm":
            learns_from(made, given)
        if "masks" in given:
            masks = open_masks(given["masks"])
            made["masks"], made["parameters_nonzero"] = masks.hash, shape.parameters() - masks.removed
            steps = made["flops_executed"] // shape.training_flops(made["seq_length"])
            made["flops_theoretical"] = steps * shape.training_flops(made["seq_length"], masks.removed)
        name = save.parent.name
        write_losses(save, made, [number(given["stream_range"], name, step) for step in range(made["steps"])])
        if source:
            write_weights(save, source, made["steps"])
        made["final"] = weights_of(save)
        artifacts.write_json(save / "account.json", made)

    def _teach(self, argv: list[str]) -> None:
        """A manifest whose shards are said to be there."""
        given = words(argv)
        teacher, length = open_checkpoint(given["load"]), int(given["seq_length"])
        start, end = map(int, given["stream_range"].split(":"))
        stream = data.described([given["data_path"]], length, int(given["stream_seed"]), int(given["stream_epochs"]))
        taught = teacher_cache.Taught(
            {"path": given["load"], "fingerprint": teacher.fingerprint()}, stream, (start, end), VOCABULARY, (),
            int(given["top_k"]), given.get("dtype", "float16"), end - start,
            (end - start) * teacher.shape.forward_flops(length),
        )  # fmt: skip
        folder = Path(given["output"])
        folder.mkdir(parents=True)
        teacher_cache.shard_path(folder, 0).write_bytes(b"")
        teacher_cache.write_manifest(folder, taught, ["0"])

    def _learn_masks(self, argv: list[str]) -> None:
        """Weights like any training's, and masks that are drawn."""
        self._pretrain(argv)
        given = words(argv)
        save, known = Path(given["save"]), {flag.name for flag in verbs.TargetSettings.flags()}
        target = targets.from_settings(verbs.TargetSettings.read({k: v for k, v in given.items() if k in known}))
        source = open_checkpoint(save).shape
        wanted = target.choose(source, methods.get("sheared-llama"), {})
        kinds = sheared_llama.kinds(source, wanted)
        generator = torch.Generator().manual_seed(int(given["seed"]))
        state = learned_file.LearnerState(
            source, wanted, {}, {kind.name: torch.randn(kind.shape, generator=generator) for kind in kinds},
            {kind.name: torch.zeros(2) for kind in kinds}, {}, torch.zeros(1, len(kinds), 4),
        )  # fmt: skip
        made = artifacts.read_json(save / "account.json")
        spent = {key: made[key] for key in ("range", "steps", "tokens")} | {"flops": made["flops_executed"]}
        learned = learned_file.LearnedMasks(state, open_checkpoint(save).fingerprint(), spent)
        learned.write(save / learned_file.FILE)

    def _evaluate(self, argv: list[str]) -> None:
        given = words(argv)
        write_scores(given, {name: number(given["load"].split("cells/")[-1], name) for name in labels_of(given)})


def write_losses(save: Path, made: dict[str, Any], losses: Sequence[float]) -> None:
    """losses.csv, and its entries in the account."""
    batch = made["global_batch_size"]
    rows = [f"{step},{step * batch},{loss},1e-3,1.0" for step, loss in enumerate(losses, start=1)]
    (save / "losses.csv").write_text("\n".join(["step,samples,loss,learning_rate,grad_norm", *rows]) + "\n")
    made["initial_loss"], made["final_loss"] = losses[0], losses[-1]


def write_weights(save: Path, source: str, iteration: int) -> None:
    """A save of that iteration, with weights that are a function of the run's name, in the shape of ``source``; those
    between links keep the zeros of ``source``, and its masks."""
    parent, made = open_checkpoint(source), save.parent / "made"
    generator = torch.Generator().manual_seed(int(1e9 * number(save.parent.name)))
    with CheckpointWriter(made, args=parent.args, dtype=torch.float32) as writer:
        for weight in weights(parent.shape):
            drawn = torch.randn(weight.shape, generator=generator)
            kept = parent.read(weight.name) != 0 if save.parent.name.startswith("retrained") else 1
            writer.add(weight.name, weight.shape, [drawn * kept])
    if save.parent.name.startswith("retrained") and (masks := find_masks(parent.root)):
        shutil.copytree(masks, save / MASKS, dirs_exist_ok=True)
    directory = save / f"iter_{iteration:07d}"
    shutil.rmtree(directory, ignore_errors=True)
    (made / "release").rename(directory)
    shutil.rmtree(made)
    (save / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def weights_of(save: Path) -> dict[str, Any]:
    """Which weights are in ``save``."""
    held = open_checkpoint(save)
    return {"iteration": held.iteration, "fingerprint": held.fingerprint(), "full_hash": held.full_hash()}


def labels_of(given: dict[str, str]) -> list[str]:
    """The labels of the corpora of ``evaluate``."""
    return given["labels"].split()


def write_scores(given: dict[str, str], losses: dict[str, float], accuracy: float = 0.5) -> None:
    """scores.json as ``evaluate`` writes it, with the mean loss of each corpus, and windows around it.

    ``accuracy``: of the tasks that are asked for, about.
    """
    load, prefixes = Path(given["load"]), dict(zip(given["labels"].split(), given["data_path"].split(), strict=True))
    windows, seq_length = int(given["windows"]), int(given["seq_length"])
    corpora = {}
    for name, prefix in prefixes.items():
        spread = np.random.default_rng(len(load.parent.name)).normal(0, 0.2, windows)
        own = (spread + losses[name] - spread.mean()).tolist()
        corpora[name] = {
            "fingerprint": indexed.fingerprint(prefix),
            "windows": windows,
            "seq_length": seq_length,
            "loss": sum(own) / windows,
            "window_losses": own,
        }
    parameters = open_checkpoint(load).shape.parameters()
    found = find_masks(load)
    masks = open_masks(found).hash if found else None
    if load.parent.name.startswith(("pruned", "scratch")):  # these accounts have only the hash of their masks
        masks = artifacts.read_json(load / "account.json")["masks"]
    artifacts.write_json(given["output"], {
        "version": 1,
        "checkpoint": {"path": str(load), **weights_of(load)},
        "corpora": corpora,
        **({"tasks": answers(given, load.parent.name, accuracy)} if "tasks" in given else {}),
        "parameters": parameters,
        "parameters_nonzero": parameters,
        "masks": masks,
        "versions": artifacts.versions(),
        "device": artifacts.device(),
    })  # fmt: skip


QUESTIONS = 80


def answers(given: dict[str, str], cell: str, accuracy: float) -> dict[str, Any]:
    """The entry ``tasks`` of the scores: answers to made-up questions, some harder than others."""
    names, results, questions = given["tasks"].split(","), {}, {}
    for task in names:
        hard = np.random.default_rng(int(1e9 * number(task))).normal(0, 1.5, QUESTIONS)
        own = np.random.default_rng(int(1e9 * number(task, cell))).normal(0, 1, QUESTIONS)
        right = (math.log(accuracy / (1 - accuracy)) * 1.9 > hard + own).astype(float)
        scores = {"acc": right.tolist(), "acc_norm": np.roll(right, 1).tolist()}
        metrics = {
            name: {"value": float(np.mean(one)), "stderr": float(np.std(one, ddof=1) / QUESTIONS**0.5),
                   "higher_is_better": True}
            for name, one in scores.items()
        }  # fmt: skip
        results[task] = {"metrics": metrics, "samples": QUESTIONS, "samples_of": QUESTIONS, "version": 1.0,
                         "num_fewshot": int(given.get("num_fewshot", 0))}  # fmt: skip
        questions[task] = {"fingerprint": task, "scores": scores}
    return {
        "results": results, "questions": questions, "single": {name: [name] for name in names}, "lm_eval": "0",
        "limit": int(given["limit"]) if "limit" in given else None, "longest": int(given["seq_length"]), "truncated": 0,
        "micro_batch_size": 1, "tokenizer": {"model": "m", "fingerprint": "f"},
    }  # fmt: skip


def first_removed(shape: tuple[int, ...], pattern: Pattern, ratio: float, seed: int) -> torch.Tensor:
    """A mask, bool [out, in], that removes the first weights of every row, or group; ``seed`` shifts it by rows."""
    out, inputs = shape
    group = pattern.m or inputs
    removed = group - pattern.n if pattern.n else int(inputs * ratio)
    kept = torch.arange(inputs) % group >= removed
    return torch.stack([kept.flip(0) if row < seed else kept for row in range(out)])


def words(argv: list[str]) -> dict[str, str]:
    """Flags as Megatron's names of them; a flag without a value is ``True``."""
    found: dict[str, str] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            found[name] = ""
        else:
            found[name] = f"{found[name]} {word}".strip()
    return {name: value or "True" for name, value in found.items()}


def number(*parts: object) -> float:
    """A loss between 2 and 6 that is a function of ``parts``."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).digest()
    return 2 + 4 * int.from_bytes(digest[:4], "big") / 2**32


def account(given: dict[str, str], shape: ModelShape) -> dict[str, Any]:
    """An account as the engine writes it, for a run whose flags are ``given``."""
    start, end = (int(part) for part in given["stream_range"].split(":"))
    batch, length = int(given["global_batch_size"]), int(given["seq_length"])
    stream = data.described([given["data_path"]], length, int(given["stream_seed"]), int(given["stream_epochs"]))
    seed = given.get("stream_permutation_seed")
    steps = (end - start) // batch
    return {
        "version": 1,
        "complete": True,
        "start": "random",
        "stream": stream,
        "range": [start, end],
        "permutation_seed": None if seed is None else int(seed),
        "global_batch_size": batch,
        "micro_batch_size": int(given["micro_batch_size"]),
        "seq_length": length,
        "steps": steps,
        "tokens": (end - start) * length,
        "unique_tokens": (end - start) * length,
        "replayed": [],
        "flops_executed": (end - start) * shape.training_flops(length),
        "flops_theoretical": (end - start) * shape.training_flops(length),
        "seed": int(given["seed"]),
        "parameters": shape.parameters(),
        "parameters_nonzero": shape.parameters(),
        "arguments": {
            **{name: _value(value) for name, value in given.items()},
            "adam_beta1": 0.9,
            "train_iters": steps,
            "lr_decay_iters": steps,
            "lr": float(given["lr"]),
            "lr_warmup_iters": int(given.get("lr_warmup_iters", 0)),
            "check_for_nan_in_loss_and_grad": True,
        },
        "initial": None,
        "lineage": [],
        "masks": None,
        "wall_seconds": 10 + steps / 4,
        "attempts": [{"from_step": 1, "device": artifacts.device(), "versions": artifacts.versions()}],
    }


def foreign(folder: Path, seed: int = 1) -> Path:
    """A checkpoint that was trained elsewhere: it has no trace of training here."""
    _write_parent(
        folder, {name.replace("-", "_"): str(value) for name, value in SHAPE_FLAGS.items()} | {"seed": str(seed)}
    )
    return folder


def begins_with(made: dict[str, Any], source: str | Path) -> None:
    """Record the weights of a checkpoint as the start of an account, as `pretrain` does."""
    checkpoint = open_checkpoint(source)
    made["start"] = "pruned" if checkpoint.pruning else "continued"
    made["initial"] = {"path": str(source), "fingerprint": checkpoint.fingerprint()}
    made["lineage"] = lineage.of(checkpoint)


def learns_from(made: dict[str, Any], given: dict[str, str]) -> None:
    """Record an account's objective and what its teacher cost, as `pretrain` does."""
    ends = [float(end) for end in given["distill_alpha"].split(":")]
    asked: dict[str, Any] = {"alpha": ends[0] if len(ends) == 1 else ends, "kl": given["distill_kl"]}
    asked["temperature"] = float(given["distill_temperature"])
    samples = made["range"][1] - made["range"][0]
    if "teacher_cache" in given:
        found = teacher_cache.read_manifest(Path(given["teacher_cache"]), teacher_cache.FLAG)
        assert found is not None
        taught = found[0]
        assert taught.range[0] <= made["range"][0] and made["range"][1] <= taught.range[1]
        made["objective"] = objective.distill(
            **asked, teacher=taught.teacher["fingerprint"], top_k=taught.k, cache=taught.described()
        )
        made["flops_teacher"] = objective.flops_in_cache(taught.described(), samples)
    else:
        teacher = open_checkpoint(given["teacher"])
        made["objective"] = objective.distill(**asked, teacher=teacher.fingerprint())
        made["flops_teacher"] = samples * teacher.shape.forward_flops(made["seq_length"])


def _write_parent(save: Path, given: dict[str, str]) -> ModelShape:
    """A checkpoint whose weights are a function of a seed."""
    args: dict[str, Any] = {name: _value(value) for name, value in given.items()}
    args |= {"add_bias_linear": False, "position_embedding_type": "rope", "group_query_attention": True}
    shape = ModelShape.from_args(args)
    generator = torch.Generator().manual_seed(int(given["seed"]))
    with CheckpointWriter(save, args=args, dtype=torch.float32) as writer:
        for layout in weights(shape):
            writer.add(layout.name, layout.shape, [torch.randn(layout.shape, generator=generator)])
    return shape


def _value(text: str) -> Any:
    return True if text == "True" else int(text) if text.isdecimal() else text


def run(study: schema.StudyConfig, runs: Path, launcher: FakeLauncher) -> Places:
    """Run a study with a fake launcher, quietly."""
    import io

    from rich.console import Console

    from megatron_prune.study.run import scheduler
    from megatron_prune.study.run.local import Local
    from megatron_prune.study.run.status import CellProgress

    places = Places(runs / study.name)
    with CellProgress(Console(file=io.StringIO())) as progress:
        scheduler.run(study, places, launcher=Local(study, places, progress, launcher), progress=progress)
    return places


def run_killed(study: schema.StudyConfig, runs: Path) -> Places:
    """The same, killed after every command, and started again until it ends."""
    while True:
        try:
            return run(study, runs, FakeLauncher(kill_at=1))
        except Killed:
            continue


def remake(places: Places, cell: str) -> None:
    """Make a parent or a pruning again, with other weights and matching scores and account."""
    held, made = open_checkpoint(places.checkpoint(cell)), places.cell(cell) / "made"
    with CheckpointWriter(made, args=held.args, dtype=torch.float32, pruning=held.pruning) as writer:
        for weight in weights(held.shape):
            writer.add(weight.name, weight.shape, [held.read(weight.name) + 1])
    shutil.rmtree(held.directory)
    (made / "release").rename(held.directory)
    edit(places.scores(cell), checkpoint=weights_of(places.checkpoint(cell)))
    if places.account(cell).is_file():
        edit(places.account(cell), final=weights_of(places.checkpoint(cell)))


def edit(path: Path, **changes: Any) -> None:
    artifacts.write_json(path, artifacts.read_json(path) | changes)

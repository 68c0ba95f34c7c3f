"""Retrain the best candidates of a search for a while, and score them again.

``plan --retrain-candidates K --retrain-tokens T`` asks for it. For each of the K candidates with the lowest loss
before retraining, ordinary verbs run in sequence, in SCRATCH/<candidate>/:

    plan.json, pruned/         ``apply`` cuts the parent
    retrained/                 ``pretrain`` trains it on T tokens of a stream, recorded in its account
    statistics.safetensors     ``calibrate`` on the windows of --statistics: its loss is the new score

The scores are added to the statistics, and the same plan command then chooses. SCRATCH can be deleted afterwards.
A training that diverged (its account says so) ranks last.

Finished steps are not run again. For a cluster, ``--commands`` prints the commands instead; after they have run there,
the verb collects their results.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prune import artifacts, verbs
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.errors import MegatronPruneError, RunError, UsageError
from megatron_prune.methods.options import MinitronWidthOptions
from megatron_prune.structured import candidates, plan
from megatron_prune.structured import statistics as statistics_file
from megatron_prune.structured.candidate import Candidate
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.judge import loss_text
from megatron_prune.structured.statistics import Retrained, Statistics
from megatron_prune.training.account import read_account, total_flops

OWN = ("--load", "--save", "--pretrained-checkpoint", "--use-checkpoint-args", "--shape-from", "--masks")
PRECISION = {"float32": None, "bfloat16": "--bf16", "float16": "--fp16"}


def retrain_candidates(
    asked: verbs.RetrainCandidatesSettings, shared: Sequence[str], pretrain: Sequence[str], say: Callable[[str], None]
) -> int:
    """Retrain the best candidates and add their losses to the statistics; returns how many competed.

    ``shared`` are flags for pretrain and calibrate, ``pretrain`` flags for pretrain alone. ``say`` gets a line for each
    candidate before and after its training or, with ``asked.commands``, the commands to run.
    """
    if not asked.commands:
        artifacts.refuse_unwritable("--output" if asked.output else "--statistics", asked.output or asked.statistics)
    question, of = candidates.read(asked.candidates)
    found = statistics_file.read(asked.statistics)
    chosen = _asked(question, of, found, asked)
    recipe = _Recipe.of(list(shared), list(pretrain), found, question)
    trials = [_Trial(candidate, question, found, recipe, asked) for candidate in chosen]
    for number, trial in enumerate(trials, 1):
        score = found.scores[trial.candidate.key]
        if score.retrained and (score.retrained.tokens, score.retrained.recipe) == (recipe.tokens, recipe.id):
            continue
        trial.keep_commands()
        title = f"candidate {number} of {len(trials)}, {trial.candidate.label}"
        if asked.commands:
            say(f"# {title}\n{trial.words()}")
            continue
        say(f"{title}: {recipe.tokens:,} tokens")
        score = replace(score, retrained=trial.run())
        found = replace(found, scores={**found.scores, trial.candidate.key: score})
        found.write(asked.output or asked.statistics)
        assert score.retrained is not None
        say(f"{title}: loss {loss_text(score.loss)} before, {loss_text(score.retrained.loss)} after")
    if not asked.commands:
        found.write(asked.output or asked.statistics)
    return len(trials)


def _asked(question: Question, of: str, found: Statistics, options: verbs.RetrainCandidatesSettings) -> list[Candidate]:
    """The candidates to retrain, best first; UsageError if the files do not belong together."""
    asked = question.retraining
    if asked is None:
        raise UsageError(
            "--candidates", got=options.candidates, expected="the file that plan --retrain-candidates wrote"
        )
    if found.hash != of:
        raise UsageError(
            "--statistics", got=options.statistics, expected="the statistics that --candidates was planned from"
        )
    if open_checkpoint(options.load).fingerprint() != question.parent:
        raise UsageError("--load", got=options.load, expected="the parent checkpoint that --candidates was planned for")
    if question.unscored(found):
        raise UsageError(
            "--statistics",
            got=options.statistics,
            expected="statistics with a score of every candidate",
            why="the best candidates are retrained",
            do="run calibrate --score first",
        )
    if len(found.calibrations) != 1:
        raise UsageError(
            "--statistics", got=options.statistics, expected="statistics of one calibration, not merged ones"
        )
    if options.nproc < 1:
        raise UsageError("--nproc", got=options.nproc, expected="at least 1 process")
    return question.finalists(found)


@dataclass(frozen=True)
class _Recipe:
    """How every candidate is trained: the same flags, and so the same samples."""

    shared: tuple[str, ...]  # flags for pretrain and calibrate
    own: tuple[str, ...]  # flags for pretrain alone
    samples: tuple[int, int]
    tokens: int
    id: str

    @staticmethod
    def of(shared: list[str], own: list[str], found: Statistics, question: Question) -> _Recipe:
        """The recipe in the flags; UsageError or DataError if they do not give the requested number of tokens."""
        from megatron_prune.data import blend, contamination
        from megatron_prune.data.streams import parse_range

        assert question.retraining is not None
        words = [*shared, *own]
        for word in words:
            if (flag := word.split("=")[0]) in OWN:
                raise UsageError(
                    flag, got="it for all candidates", expected="no such flag", why="it is set for each candidate"
                )
        behind = found.calibrations[0]
        precision = PRECISION[behind["params_dtype"]]
        if [flag for flag in PRECISION.values() if flag in shared] != [flag for flag in (precision,) if flag]:
            raise UsageError(
                "--bf16, --fp16",
                got=" ".join(shared) or "no flags before --pretrain",
                expected=f"the precision of --statistics, {behind['params_dtype']}, before --pretrain",
                why="losses before and after are compared",
            )
        if (behind.get("fp8") is not None) != any(word.startswith("--fp8-") for word in shared):
            raise UsageError(
                "--fp8-preset",
                got="it for one of them",
                expected="it for both calibration and retraining, or for neither",
                why="losses before and after are compared",
            )
        reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        reader.add_argument("--stream-range")
        reader.add_argument("--seq-length", type=int)
        reader.add_argument("--data-path", nargs="+")
        reader.add_argument("--train-data-path", nargs="+")
        given = reader.parse_known_args(words)[0]
        data = given.train_data_path or given.data_path
        needed = {"--stream-range": given.stream_range, "--seq-length": given.seq_length, "--data-path": data}
        if lacking := [flag for flag, value in needed.items() if value is None]:
            raise UsageError(lacking[0], got="nothing", expected="a value among the flags after --pretrain")
        start, end = parse_range(given.stream_range)
        wanted, tokens = question.retraining.tokens, (end - start) * given.seq_length
        if tokens != wanted:
            raise UsageError(
                "--stream-range",
                got=f"{given.stream_range}, which is {tokens} tokens",
                expected=f"the {wanted} tokens of --retrain-tokens, {wanted / given.seq_length:g} samples",
            )
        corpora = blend.members(blend.parse_blend(data))
        contamination.refuse_shared_documents([corpus.prefix for corpus in corpora], [behind["prefix"]])
        identity = {"shared": shared, "pretrain": own, "corpora": [corpus.fingerprint for corpus in corpora]}
        return _Recipe(tuple(shared), tuple(own), (start, end), tokens, artifacts.sha256_json(identity))


class _Trial:
    """One candidate: its folder, its three commands, and their results."""

    def __init__(
        self,
        candidate: Candidate,
        question: Question,
        found: Statistics,
        recipe: _Recipe,
        options: verbs.RetrainCandidatesSettings,
    ):
        self.candidate, self.found, self.recipe, self.options = candidate, found, recipe, options
        self.folder = Path(options.scratch).absolute() / candidate.key[:16]
        self.pruned, self.retrained = self.folder / "pruned", self.folder / "retrained"
        self.statistics = self.folder / "statistics.safetensors"
        # The number of candidates is not a property of one of them.
        assert isinstance(question.settings, MinitronWidthOptions)  # no other method retrains candidates
        own = replace(question.settings, retrain_candidates=None, retrain_tokens=None)
        self.plan = plan.for_candidate(replace(question, settings=own), candidate, found)

    @property
    def stages(self) -> list[tuple[str, list[str], int, Callable[[], bool]]]:
        """Name, words after ``python -m megatron_prune``, processes, and whether its result exists."""
        folder, behind, recipe = self.folder, self.found.calibrations[0], self.recipe
        apply = ["--load", self.options.load, "--plan", str(folder / "plan.json"), "--save", str(self.pruned)]
        start = ["--pretrained-checkpoint", str(self.pruned)]
        pretrain = [*start, "--load", str(self.retrained), "--save", str(self.retrained), *recipe.shared, *recipe.own]
        calibrate = ["--load", str(self.retrained), *recipe.shared]
        calibrate += ["--calibration-data-path", behind["prefix"], "--calibration-sampling", behind["sampling"]]
        calibrate += ["--calibration-sequences", str(self.found.sequences)]
        calibrate += ["--calibration-seq-length", str(self.found.seq_length)]
        if behind["seed"] is not None:
            calibrate += ["--seed", str(behind["seed"])]
        calibrate += ["--output", str(self.statistics)]
        return [
            ("apply", ["apply", *apply], 1, self._is_applied),
            ("pretrain", ["pretrain", *pretrain], self.options.nproc, self._is_trained),
            ("calibrate", ["calibrate", *calibrate], self.options.nproc, self._is_calibrated),
        ]

    def words(self) -> str:
        """The commands, for display."""
        lines = []
        for _, argv, nproc, _ in self.stages:
            launcher = "python" if nproc == 1 else f"torchrun --nproc-per-node {nproc}"
            lines.append(f"{launcher} -m megatron_prune {shlex.join(argv)}")
        return "\n".join(lines)

    def keep_commands(self) -> None:
        """Write the plan and commands.json; UsageError if the folder was started with other commands."""
        path, content = self.folder / "commands.json", [argv for _, argv, _, _ in self.stages]
        if path.is_file() and artifacts.read_json(path) != content:
            raise UsageError(
                "--scratch",
                got=self.options.scratch,
                expected="another directory, or the flags that it was begun with",
                why=f"{path} lists other commands",
            )
        self.plan.write(self.folder / "plan.json")
        artifacts.write_json(path, content)

    def run(self) -> Retrained:
        """Run the unfinished stages; returns the score. RunError with the end of the log if a stage fails."""
        from megatron_prune.engine.launch import launch

        for name, argv, nproc, done in self.stages:
            if done() or (name != "apply" and self._diverged):
                continue
            log = self.folder / f"{name}.log"
            code = launch(argv, nproc=nproc, log=log)
            if not (done() or self._diverged):
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RunError(f"{name} of {self.candidate.label} ended with {code}. The end of {log}:\n{tail}")
        account = read_account(self.retrained / "account.json")
        if self._diverged:
            return Retrained(math.inf, account["tokens"], total_flops(account), self.recipe.id)
        after = statistics_file.read(self.statistics)
        flops = total_flops(account) + after.provenance()["flops"]
        return Retrained(after.loss, account["tokens"], flops, self.recipe.id)

    @property
    def _diverged(self) -> bool:
        """True if the training ended itself because numbers were not finite: such a model has no statistics."""
        account = self._account()
        return account is not None and "ended" in account["attempts"][-1]

    def _is_applied(self) -> bool:
        return self.pruned.is_dir() and open_checkpoint(self.pruned).pruning[-1].get("plan") == self.plan.hash

    def _is_trained(self) -> bool:
        account = self._account()
        return account is not None and account["complete"]

    def _account(self) -> dict[str, Any] | None:
        """The account of this training; None before it has begun."""
        path = self.retrained / "account.json"
        if not path.is_file():
            return None
        account = read_account(path)
        wanted = (list(self.recipe.samples), self.recipe.tokens)
        return account if (account["range"], account["tokens"]) == wanted else None

    def _is_calibrated(self) -> bool:
        if not self.statistics.is_file():
            return False
        try:
            after = statistics_file.read(self.statistics)
        except MegatronPruneError:
            return False
        windows = ("corpus", "windows", "params_dtype", "fp8")
        same = all(after.calibrations[0].get(key) == self.found.calibrations[0].get(key) for key in windows)
        return same and after.parent == open_checkpoint(self.retrained).fingerprint()

"""``pretrain``: the same samples at any layout, also after a kill; accounts; refusals."""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_prune import artifacts
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.reshard import reshard
from megatron_prune.engine.launch import start
from megatron_prune.study import match
from megatron_prune.training import lineage
from tests.conftest import WITH_TE
from tests.training.small import (
    GLOBAL_BATCH,
    MODEL,
    SEQ_LENGTH,
    consumed,
    kill_ranks,
    layout,
    recipe,
)
from tests.training.small import record as _record
from tests.waiting import GENEROUS, content, wait_for_progress

STEPS = 6
RANGE = f"16:{16 + STEPS * GLOBAL_BATCH}"


def _expected(corpus: Path) -> dict[int, list[list[int]]]:
    """Labels of every step, cut by hand out of the .bin along Megatron's one-epoch order."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        vocab_size, pad, eod, unique_identifiers = 384, -1, 0, {}

    config = GPTDatasetConfig(
        random_seed=3, sequence_length=SEQ_LENGTH, split="1,0,0", tokenizer=Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
        blend=([str(corpus)], None),
    )  # fmt: skip
    indexed = IndexedDataset(str(corpus))
    order = GPTDataset(indexed, str(corpus), np.arange(len(indexed), dtype=np.int32), None, Split.train, config)
    document_index, sample_index, shuffle_index = order.document_index, order.sample_index, order.shuffle_index
    tokens = [indexed[d] for d in document_index]
    concatenated = np.concatenate(tokens)
    starts = np.concatenate([[0], np.cumsum([len(t) for t in tokens])])

    def labels(sample: int) -> list[int]:
        position, offset = sample_index[shuffle_index[sample]]
        begin = int(starts[position] + offset)
        return [int(t) for t in concatenated[begin + 1 : begin + 1 + SEQ_LENGTH]]

    begin = int(RANGE.split(":")[0])
    return {
        step: sorted(labels(begin + (step - 1) * GLOBAL_BATCH + i) for i in range(GLOBAL_BATCH))
        for step in range(1, STEPS + 1)
    }


def _losses(save: Path) -> list[float]:
    with open(save / "losses.csv") as table:
        return [float(row["loss"]) for row in csv.DictReader(table)]


def _account(save: Path) -> dict:
    return json.loads((save / "account.json").read_text())


@pytest.fixture(scope="module")
def reference(tiny_corpus, tmp_path_factory, job):
    """The run on one process, never interrupted."""
    save = tmp_path_factory.mktemp("reference") / "run"
    job(["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, save)]).ok()
    return save


@pytest.mark.parametrize(
    ("tp", "pp", "dp"),
    [
        (1, 1, 1),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, 1, marks=pytest.mark.slow),
        (1, 1, 2),
        (2, 2, 1),
    ],
)
def test_every_layout_consumes_the_samples_of_the_range(tiny_corpus, tmp_path, tp, pp, dp):
    argv = [*MODEL, *recipe(tiny_corpus, RANGE, None), *layout(tp, pp)]
    assert _record(tmp_path, argv, tp * pp * dp) == 0
    assert consumed(tmp_path) == _expected(tiny_corpus)


def test_the_loss_is_the_same_at_every_layout_that_shares_the_initial_weights(reference, tiny_corpus, tmp_path, job):
    for name, flags, nproc in (
        ("tp2", layout(2), 2),
        ("dp2", [*layout(), "--micro-batch-size", "1"], 2),
        ("dp2-distributed-optimizer", ["--use-distributed-optimizer", "--overlap-grad-reduce",
                                       "--overlap-param-gather"], 2),
    ):  # fmt: skip
        save = tmp_path / name
        job(["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, save), *flags], nproc=nproc).ok()
        np.testing.assert_allclose(_losses(save), _losses(reference), rtol=2e-5, err_msg=name)
        if name == "dp2":  # compared runs may differ in these, and in nothing else
            ours, theirs = _account(save)["arguments"], _account(reference)["arguments"]
            differing = {key for key in ours if ours[key] != theirs[key]}
            assert {"micro_batch_size", "world_size"} < differing <= set(match.ALLOWED)


@pytest.mark.parametrize(
    ("first", "then", "resharded"),
    [((2, 1, 2), (1, 2, 1), True), ((1, 2, 1), (1, 1, 2), True), ((1, 1, 2), (1, 1, 1), False)],
)
def test_killed_and_resumed_it_consumes_the_same_samples(reference, tiny_corpus, tmp_path, first, then, resharded):
    save, folder = tmp_path / "run", tmp_path / "records"
    flags = ["--use-distributed-optimizer", "--save-interval", "2"]
    argv = [*MODEL, *recipe(tiny_corpus, RANGE, save), *flags]
    assert _record(folder, [*argv, *layout(*first[:2])], int(np.prod(first)), kill_at=4) != 0
    assert not _account(save)["complete"]
    if resharded:  # another number of data-parallel ranks needs no resharding
        assert reshard(save) == save / "iter_0000002"
    assert _record(folder, [*argv, *layout(*then[:2])], int(np.prod(then))) == 0

    assert consumed(folder) == _expected(tiny_corpus)
    account = _account(save)
    assert account["complete"] and account["tokens"] == STEPS * GLOBAL_BATCH * SEQ_LENGTH
    # Step 3 was done, logged, and lost with the kill in step 4.
    assert account["replayed"] == [[3, 3]]
    assert account["tokens_computed"] == (STEPS + 1) * GLOBAL_BATCH * SEQ_LENGTH
    assert len(_losses(save)) == STEPS
    if first[1] == 1:  # its initial weights are the reference's (pipeline stages are seeded differently)
        np.testing.assert_allclose(_losses(save), _losses(reference), rtol=2e-5)


def test_a_killed_run_ends_with_the_same_numbers(reference, tiny_corpus, tmp_path, job):
    save, folder = tmp_path / "run", tmp_path / "records"
    argv = [*MODEL, *recipe(tiny_corpus, RANGE, save), "--save-interval", "2"]
    assert _record(folder, argv, 1, kill_at=6) != 0
    # Megatron rewrites its tracker in place; a kill there leaves it empty, and Megatron then exits with 0.
    (save / "latest_checkpointed_iteration.txt").write_text("")
    # A save that was killed half-way must not count.
    shutil.copytree(save / "iter_0000004", save / "iter_0000005")
    next((save / "iter_0000005").glob("*.distcp")).write_bytes(b"half")
    job(["pretrain", *argv]).ok()
    assert _losses(save) == _losses(reference)
    assert _account(save)["final_loss"] == _account(reference)["final_loss"]
    assert _account(save)["replayed"] == [[5, 5]]


def test_sigterm_saves_and_the_rerun_goes_on(reference, tiny_corpus, tmp_path, job):
    save = tmp_path / "run"
    argv = ["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, save), "--exit-signal-handler"]
    running = start(argv, log=tmp_path / "log.txt")
    wait_for_progress((save / "losses.csv").exists, "the first steps", lambda: content(tmp_path))
    for rank in running.ranks:
        os.kill(rank, signal.SIGTERM)
    running.wait(GENEROUS)
    running.close()
    assert (save / "latest_checkpointed_iteration.txt").exists()
    job(argv).ok()
    assert _losses(save) == _losses(reference)
    assert _account(save)["complete"]


def test_a_finished_run_ends_at_once_and_leaves_everything_as_it_is(reference, tiny_corpus, job):
    before = (reference / "account.json").read_bytes(), (reference / "losses.csv").read_bytes()
    again = job(["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, reference)]).ok()
    assert "nothing to do" in again.output
    assert before == ((reference / "account.json").read_bytes(), (reference / "losses.csv").read_bytes())


def test_a_finished_run_has_no_steps_left_for_another_save(reference, tiny_corpus, tmp_path, job):
    """Megatron's sampler would end every rank with a traceback."""
    asked = ["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, reference), "--save", tmp_path / "other"]
    refused = job(asked)
    assert refused.returncode == 2 and "Traceback" not in refused.output, refused.output[-2000:]
    assert (
        f"--load: expected a run with steps left of the {STEPS} that are asked for, got {reference}" in refused.output
    )
    assert "--pretrained-checkpoint" in refused.output and not (tmp_path / "other").exists()


def test_killed_after_its_last_save_it_only_closes_its_account(reference, tiny_corpus, tmp_path, job):
    """All samples are consumed: Megatron's sampler would refuse to start."""
    save = tmp_path / "run"
    shutil.copytree(reference, save)
    account, whole = _account(save), _account(save)
    account.update(complete=False, parameters_nonzero=None, final_loss=None, initial_loss=None, final=None)
    del account["attempts"][-1]["seconds"]
    (save / "account.json").write_text(json.dumps(account))
    job(["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, save)], nproc=2).ok()
    closed = _account(save)
    assert closed["attempts"][-1].pop("seconds") >= 0 and closed.pop("wall_seconds") >= 0
    del whole["wall_seconds"], whole["attempts"][-1]["seconds"]
    assert closed == whole and closed["complete"]


def test_the_account_says_what_the_run_was(reference, tiny_corpus):
    account = _account(reference)
    assert account["complete"] and account["start"] == "random" and account["initial"] is None
    assert account["range"] == [16, 16 + STEPS * GLOBAL_BATCH] and account["steps"] == STEPS
    assert account["stream"]["seed"] == 3 and account["stream"]["blend"] == [[None, str(tiny_corpus)]]
    assert account["initial_loss"] == _losses(reference)[0] and account["final_loss"] == _losses(reference)[-1]
    # Counted by hand: 2 embeddings, 4 layers of qkv, proj, gate and up, down, 2 norms, and the final norm.
    linears = 4 * (48 * (6 + 2 * 2) * 10 + 6 * 10 * 48 + 3 * 96 * 48)
    assert account["parameters"] == 2 * 384 * 48 + linears + 4 * 2 * 48 + 48
    assert account["parameters_nonzero"] == account["parameters"]
    saved = open_checkpoint(reference)
    weights = {"iteration": STEPS, "fingerprint": saved.fingerprint(), "full_hash": saved.full_hash()}
    assert account["final"] == weights
    (attempt,) = account["attempts"]
    assert attempt["device"] == artifacts.device() and attempt["versions"] == artifacts.versions()
    attention = 4 * 2 * 2 * SEQ_LENGTH * 6 * 10
    per_token = 3 * (2 * linears + attention + 2 * 48 * 384)
    assert account["flops_executed"] == per_token * account["tokens"]


def test_shape_from_takes_the_arguments_and_none_of_the_weights(reference, tiny_corpus, tmp_path, job):
    save = tmp_path / "scratch"
    job(["pretrain", "--shape-from", reference, *recipe(tiny_corpus, RANGE, save)]).ok()
    # The same seed and shape: the same run as the one that gave its shape, from the start.
    assert _losses(save) == _losses(reference)
    assert _account(save)["start"] == "random"
    assert _account(save)["arguments"]["init_method_std"] == 0.05


def test_a_pretrained_start_is_below_a_random_one(reference, tiny_corpus, tmp_path, job):
    save = tmp_path / "continued"
    argv = ["pretrain", "--pretrained-checkpoint", reference,
            *recipe(tiny_corpus, "64:112", save)]  # fmt: skip
    job(argv, nproc=2).ok()
    account = _account(save)
    assert account["start"] == "continued" and account["initial"]["path"] == str(reference)
    assert account["initial_loss"] < _account(reference)["initial_loss"] - 0.2
    assert account["final_loss"] < account["initial_loss"]


def test_a_replicate_permutes_the_range_the_same_way_for_both_arms(tiny_corpus, tmp_path):
    orders = []
    for name, more in (("plain", []), ("a", ["--stream-permutation-seed", 5]), ("b", ["--stream-permutation-seed", 5])):
        argv = [*MODEL, *recipe(tiny_corpus, RANGE, None, *more)]
        assert _record(tmp_path / name, argv, 1) == 0
        orders.append(consumed(tmp_path / name))
    plain, a, b = orders
    assert a == b and a != plain
    flat = [sorted(row for rows in order.values() for row in rows) for order in orders]
    assert flat[0] == flat[1]


REFUSED = [
    ("another range in the same save directory", ["--stream-range", "64:112"], "--save"),
    ("not whole batches", ["--stream-range", "0:13"], "a multiple of --global-batch-size 8 samples"),
    ("a contradicting number of steps", ["--train-iters", "7"], "--train-iters"),
    ("steps without samples", ["--global-batch-size", "0"], "--global-batch-size"),
    ("a save that divides by zero after the last step", ["--save-interval", "0"], "--save-interval"),
    ("a seed that Megatron asserts", ["--seed", "0"], "--seed: expected a number from 1 to 4294967295, got 0"),
    ("a seed that NumPy has not", ["--stream-permutation-seed", str(1 << 32)], "--stream-permutation-seed"),
    ("a split of a stream", ["--split", "9,1,0"], "--split"),
    ("validation without text", ["--eval-iters", "2"], "--valid-data-path"),
    ("FP8 without a GPU", ["--fp8-format", "hybrid", "--transformer-impl", "transformer_engine"], "--fp8-format"),
    ("Transformer Engine without a GPU", ["--transformer-impl", "transformer_engine"], "--transformer-impl"),
    ("both half precisions", ["--bf16", "--fp16"], "--bf16, --fp16: expected at most one of them, got both"),
    (
        "more shards than ranks",
        ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"],
        "--pipeline-model-parallel-size: expected sizes whose product divides the number of ranks, 1, got 2, 2",
    ),
    ("NCCL without a GPU", ["--distributed-backend", "nccl"], "--distributed-backend"),
]


@pytest.mark.parametrize(
    ("flags", "says"),
    [case[1:] for case in REFUSED if not (WITH_TE and case[0].endswith("without a GPU"))],  # one is simulated there
    ids=[case[0] for case in REFUSED if not (WITH_TE and case[0].endswith("without a GPU"))],
)
def test_refused_before_anything_starts(reference, tiny_corpus, job, flags, says):
    before = (reference / "losses.csv").read_bytes()
    refused = job(["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, reference), *flags])
    assert refused.returncode == 2, refused.output[-2000:]
    assert says in refused.output and "Traceback" not in refused.output
    assert (reference / "losses.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("split", "empty"),
    [
        ("969,30,1", "test"),
        ("9,1,0", None),
        ("98,1,1", "validation"),
        ("1,0,0", None),
        ("1,1", None),
        ("1,9999,0", "training"),
    ],
)
def test_a_split_with_an_empty_part_is_refused(tmp_path, split, empty):
    """20 documents: Megatron's GPTDataset would loop endlessly over a part without tokens."""
    from megatron_prune.data.indexed import write_index
    from megatron_prune.errors import UsageError
    from megatron_prune.training.data import refuse_empty_parts

    prefix = tmp_path / "corpus"
    write_index(f"{prefix}.idx", [np.full(20, 5)], [np.ones(20, np.int64)], "int32")
    Path(f"{prefix}.bin").write_bytes(np.zeros(100, np.int32).tobytes())
    corpora = {
        "data_path": [str(prefix)],
        "data_args_path": None,
        "per_split_data_args_path": None,
        "train_data_path": None,
    }
    args = argparse.Namespace(
        **corpora, valid_data_path=None, test_data_path=None, split=split, stream_range=None, mock_data=False
    )
    if empty is None:
        refuse_empty_parts(args)
    else:
        says = f"--split: expected .*, got {split} .the {empty} part of {prefix} is empty, of 20 documents"
        with pytest.raises(UsageError, match=says):
            refuse_empty_parts(args)


def test_a_split_that_nobody_gave_is_checked_before_anything_starts(tmp_path, job):
    from megatron_prune.data.indexed import write_index

    prefix = tmp_path / "corpus"
    write_index(f"{prefix}.idx", [np.full(20, 50)], [np.ones(20, np.int64)], "int32")
    Path(f"{prefix}.bin").write_bytes(np.zeros(1000, np.int32).tobytes())
    recipe = "--seq-length 32 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3".split()
    refused = job(["pretrain", *MODEL, *recipe, "--data-path", prefix])
    assert refused.returncode == 2 and "(the default) (the test part of" in refused.output, refused.output[-2000:]
    assert "Traceback" not in refused.output


def test_a_range_beyond_the_stream_is_refused(tiny_corpus, tmp_path, job):
    refused = job(["pretrain", *MODEL, *recipe(tiny_corpus, f"0:{GLOBAL_BATCH * 10**6}", tmp_path / "x")])
    assert refused.returncode == 2 and "does not wrap" in refused.output


def test_samples_that_the_start_has_seen_are_refused(reference, tiny_corpus, tmp_path, job):
    """The parent took 16:64; also when a pruning lies between."""
    from megatron_prune.checkpoint.reader import open_checkpoint
    from megatron_prune.structured.apply import apply_plan
    from tests.training.small import any_plan

    pruned = tmp_path / "pruned"
    apply_plan(reference, any_plan(open_checkpoint(reference)), pruned)
    for parent in (reference, pruned):
        argv = ["pretrain", "--pretrained-checkpoint", parent]
        refused = job([*argv, *recipe(tiny_corpus, "56:72", tmp_path / "x")])
        assert refused.returncode == 2, refused.output[-2000:]
        assert "both would see 56:64" in refused.output and "Traceback" not in refused.output
    job([*argv, *recipe(tiny_corpus, "56:72", tmp_path / "allowed"), "--stream-allow-seen"]).ok()
    job([*argv, *recipe(tiny_corpus, "64:80", tmp_path / "disjoint")]).ok()
    account = _account(tmp_path / "disjoint")
    assert account["start"] == "pruned" and [stage["range"] for stage in lineage.trainings(account["lineage"])] == [
        [16, 64]
    ]


def test_a_checkpoint_of_another_shape_is_refused(reference, tiny_corpus, tmp_path, job):
    wrong = [word if word != "96" else "64" for word in MODEL]
    argv = ["pretrain", *wrong, "--pretrained-checkpoint", reference, *recipe(tiny_corpus, "64:112", tmp_path / "x")]
    refused = job(argv)
    assert refused.returncode == 2
    assert "--ffn-hidden-size: expected 96, as in" in refused.output


def test_a_truncated_shard_is_refused(reference, tiny_corpus, tmp_path, job):
    broken = tmp_path / "broken"
    shutil.copytree(reference, broken)
    shard = max(broken.glob("iter_*/*.distcp"), key=lambda file: file.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    argv = ["pretrain", "--pretrained-checkpoint", broken,
            *recipe(tiny_corpus, RANGE, tmp_path / "x")]  # fmt: skip
    refused = job(argv)
    assert refused.returncode == 2 and "Traceback" not in refused.output
    assert "truncated" in refused.output


def test_virtual_pipeline_consumes_the_same_samples(tiny_corpus, tmp_path):
    flags = [*layout(1, 2), "--num-layers-per-virtual-pipeline-stage", "1"]
    assert _record(tmp_path, [*MODEL, *recipe(tiny_corpus, RANGE, None), *flags], 2) == 0
    assert consumed(tmp_path) == _expected(tiny_corpus)


def test_tensorboard_and_wandb_see_the_losses(reference, tiny_corpus, tmp_path, job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--tensorboard-dir", tmp_path / "tb", "--wandb-project", "p", "--wandb-exp-name", "e",
             "--wandb-save-dir", tmp_path / "wandb"]  # fmt: skip
    argv = ["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, tmp_path / "run"), *flags]
    job(argv, env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"}).ok()
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    np.testing.assert_allclose([e.value for e in events.Scalars("lm loss")], _losses(reference), rtol=1e-6)
    assert list((tmp_path / "wandb").rglob("*.wandb")), "no offline run was written"


def test_a_trained_import_is_exported_with_its_tokenizer(tiny_parent, tiny_corpus, tmp_path, job):
    """Also after the checkpoint that it started from has moved away."""
    import subprocess

    start, save, back = tmp_path / "start", tmp_path / "run", tmp_path / "hf"
    shutil.copytree(tiny_parent, start)
    argv = ["pretrain", "--pretrained-checkpoint", start]
    job([*argv, *recipe(tiny_corpus, "0:16", save)]).ok()
    start.rename(tmp_path / "moved")
    tool = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    subprocess.run([sys.executable, tool, "export", "--load", save, "--hf", back], check=True)

    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    model = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert model(tokenizer("def f():", return_tensors="pt").input_ids).logits.isfinite().all()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("directory", marks=pytest.mark.slow),
        "shard",
        pytest.param("index", marks=pytest.mark.slow),
        "metadata",
    ],
)
def test_killed_during_a_save_nothing_half_written_is_taken(reference, tiny_corpus, tmp_path, job, moment):
    """SIGKILL once part of the second save appears; two ranks, so that one can be ahead of the other."""

    save = tmp_path / "run"
    argv = ["pretrain", *MODEL, *recipe(tiny_corpus, RANGE, save), "--save-interval", "2"]
    folder = save / "iter_0000004"
    shown = {
        "directory": folder.exists,
        "shard": lambda: any(folder.glob("*.distcp")),
        "index": lambda: (folder / ".metadata").exists(),
        "metadata": lambda: (folder / "metadata.json").exists(),
    }[moment]
    with start(argv, nproc=2, log=tmp_path / "log.txt") as running:
        while not shown():
            assert running.returncode is None
        kill_ranks(running)
        assert running.wait(60) != 0
    assert not _account(save)["complete"]
    job(argv, nproc=2).ok()
    # Data-parallel sums differ from the one-process reference in their last bits only.
    np.testing.assert_allclose(_losses(save), _losses(reference), rtol=2e-5)
    assert _account(save)["complete"] and len(_losses(save)) == STEPS

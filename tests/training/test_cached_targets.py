"""``pretrain --objective distill --teacher-cache``: the losses of the online teacher, with few words too."""

from __future__ import annotations

import argparse
import json
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.errors import UsageError
from megatron_prune.training import distillation
from tests import tiny
from tests.training.small import GLOBAL_BATCH, SEQ_LENGTH, layout, recipe
from tests.training.small_masked import losses

STEPS = 3
CACHE_RANGE = "60:100"
RANGE = 64, 64 + STEPS * GLOBAL_BATCH
DISTILL = "--objective distill --distill-alpha 0.7".split()


@pytest.fixture(scope="module")
def student(tiny_hf, tmp_path_factory):
    """A narrower model of half the depth: Hugging Face, and Megatron."""
    source = tiny_hf("llama-gqa", layers=2, seed=5, hidden_size=72, intermediate_size=120)
    checkpoint = tmp_path_factory.mktemp("student") / "checkpoint"
    import_hf(source, checkpoint)
    return source, checkpoint


@pytest.fixture(scope="module")
def cache(tiny_parent, tiny_corpus, tmp_path_factory, job):
    """``cache(k)``: of the stream's samples 60 to 99, as float32; made once for each k."""
    folder = tmp_path_factory.mktemp("caches")

    def get(k: int):
        if not (folder / f"{k}").exists():
            words = f"--seq-length {SEQ_LENGTH} --stream-seed 3 --stream-range {CACHE_RANGE} --top-k {k}"
            argv = ["teach", "--load", tiny_parent, "--train-data-path", tiny_corpus, *words.split()]
            argv += ["--micro-batch-size", "2", "--dtype", "float32", "--shard-samples", "7"]
            job([*argv, "--output", folder / f"{k}"]).ok()
        return folder / f"{k}"

    return get


def flags(student, corpus, save, *more):
    where = f"{RANGE[0]}:{RANGE[1]}"
    return ["pretrain", "--pretrained-checkpoint", student[1], *DISTILL, *recipe(corpus, where, save), *more]


def distillation_losses(output: str) -> list[str]:
    """T² · KL of every step, as Megatron prints it."""
    return re.findall(r"iteration +\d+/.*distillation loss: ([0-9.E+-]+)", output)


@pytest.mark.parametrize("more", [[], ["--distill-temperature", "2", "--distill-kl", "reverse"]], ids=["plain", "soft"])
def test_with_all_words_it_is_the_online_teacher_to_the_last_float(
    more, student, cache, tiny_parent, tiny_corpus, tmp_path, job
):
    """In another order of samples too: they are found by their numbers."""
    made = []
    for name, of in (
        ("online", ["--teacher", tiny_parent]), ("offline", ["--teacher-cache", cache(tiny.VOCABULARY)]),
    ):  # fmt: skip
        argv = flags(student, tiny_corpus, tmp_path / name, *of, "--stream-permutation-seed", "5", *more)
        made.append(job(argv).ok().output)
    online, offline = tmp_path / "online", tmp_path / "offline"
    assert distillation_losses(made[0]) == distillation_losses(made[1]) and len(distillation_losses(made[0])) == STEPS
    for column in ("loss", "grad_norm"):
        assert losses(online, column) == losses(offline, column)
    assert open_checkpoint(online).full_hash() == open_checkpoint(offline).full_hash()
    account, other = (json.loads((save / "account.json").read_text()) for save in (offline, online))
    assert account["flops_teacher"] == other["flops_teacher"] > 0
    assert account["objective"] | {"online": True} == other["objective"] | {"cache": account["objective"]["cache"]}
    manifest = json.loads((cache(tiny.VOCABULARY) / "manifest.json").read_text())
    held = account["objective"]["cache"]
    assert {name: held[name] for name in ("range", "flops", "bytes", "dtype")} == {
        "range": [60, 100], "flops": manifest["flops"], "bytes": manifest["bytes"], "dtype": "float32",
    }  # fmt: skip


@pytest.fixture(scope="module")
def truncated(student, cache, tiny_corpus, tmp_path_factory, job):
    """The run at k = 64 on one process: (its save, its output)."""
    save = tmp_path_factory.mktemp("truncated") / "run"
    return save, job(flags(student, tiny_corpus, save, "--teacher-cache", cache(64))).ok().output


def test_with_some_words_the_divergence_is_of_these_and_the_rest(student, truncated, tiny_hf, tiny_corpus):
    """At the first step, in float64. What is lost is the mass of the rest times the divergence within it."""
    import transformers

    from megatron_prune.data.streams import Stream

    stream = Stream.build(str(tiny_corpus), SEQ_LENGTH, 3)
    tokens = torch.stack([stream[sample]["tokens"] for sample in range(RANGE[0], RANGE[0] + GLOBAL_BATCH)])
    with torch.no_grad():
        log_q, log_p = (
            transformers.LlamaForCausalLM.from_pretrained(folder).double()(tokens).logits.log_softmax(-1)
            for folder in (student[0], tiny_hf("llama-gqa", layers=4))
        )
    top = log_p.topk(64).indices
    both = torch.stack([log_p, log_q])  # [2, samples, S, vocabulary]
    rest = both.scatter(-1, top.expand(2, *top.shape), -torch.inf)
    events = torch.cat([both.gather(-1, top.expand(2, *top.shape)), rest.logsumexp(-1, keepdim=True)], -1)
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = (events[0].exp() * (events[0] - events[1])).sum(-1)
    mass = events[0, ..., -1].exp()
    within = rest - rest.logsumexp(-1, keepdim=True)
    of_the_rest = torch.where(rest[0].isinf(), 0, within[0].exp() * (within[0] - within[1])).sum(-1)
    torch.testing.assert_close(whole - expected, mass * of_the_rest, rtol=1e-9, atol=1e-12)  # the bound that is stated
    assert 0 < float((whole - expected).mean()) < float(mass.mean() * of_the_rest.max())
    found = float(distillation_losses(truncated[1])[0])
    np.testing.assert_allclose(found, float(expected.mean()), rtol=1e-6)
    assert found < float(whole.mean())


@pytest.mark.parametrize(
    ("tp", "pp", "nproc", "more"),
    [(2, 2, 4, ["--num-workers", "2"]), pytest.param(3, 1, 3, [], marks=pytest.mark.slow),
     pytest.param(1, 2, 4, ["--use-distributed-optimizer"], marks=pytest.mark.slow)],
)  # fmt: skip
def test_at_every_layout_the_losses_are_the_same(
    tp, pp, nproc, more, student, cache, truncated, tiny_corpus, tmp_path, job
):
    save = tmp_path / "run"
    done = job(flags(student, tiny_corpus, save, "--teacher-cache", cache(64), *layout(tp, pp), *more), nproc=nproc)
    found, expected = (
        np.array(distillation_losses(output), dtype=float) for output in (done.ok().output, truncated[1])
    )
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    np.testing.assert_allclose(losses(save), losses(truncated[0]), rtol=2e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--stream-seed", "4"], "--stream-seed 4, got {cache}, a cache of --stream-seed 3"),
        (["--stream-range", "84:108"], "samples 84:108, got {cache}, a cache of samples 60:100"),
        (["--teacher", "{student}"], "a teacher with the weights {print}, got {cache}, a cache of the teacher "),
    ],
    ids=["stream", "range", "teacher"],
)
def test_a_cache_of_something_else_is_refused(more, said, student, cache, tiny_corpus, tmp_path, job):
    names = {"student": student[1], "cache": cache(64), "print": open_checkpoint(student[1]).fingerprint()[:12]}
    more = [word.format(**names) for word in more]
    done = job(flags(student, tiny_corpus, tmp_path / "run", "--teacher-cache", cache(64), *more))
    assert done.returncode == 2 and "Traceback" not in done.output
    assert "--teacher-cache: expected one of " + said.format(**names) in done.output


def test_the_rest_of_a_cache_is_not_softened(cache):
    given = {"objective": "distill", "distill_alpha": "1", "distill_kl": "forward"}
    for words, temperature, refused in (
        (64, "1", False), (64, "2", True), (64, "1:2", True), (tiny.VOCABULARY, "2", False),
    ):  # fmt: skip
        args = argparse.Namespace(**given, distill_temperature=temperature, teacher_cache=str(cache(words)))
        if not refused:
            assert distillation.stated(args)["name"] == "distill"
            continue
        with pytest.raises(
            UsageError, match=rf"--distill-temperature: expected 1 with --teacher-cache, got {temperature}"
        ):
            distillation.stated(args)


def test_a_damaged_shard_ends_the_run_in_one_line(student, cache, tiny_corpus, tmp_path, job):
    damaged = tmp_path / "cache"
    shutil.copytree(cache(64), damaged)
    path = damaged / "shard-00001.safetensors"  # samples 67 to 73
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["log_probabilities"][1, 2, 3] = torch.nan
    path.write_bytes(safetensors.torch.save(tensors))
    done = job(flags(student, tiny_corpus, tmp_path / "run", "--teacher-cache", damaged))
    assert done.returncode == 2 and "Traceback" not in done.output
    assert "shard-00001.safetensors is damaged: sample 68: expected finite log-probabilities" in done.output
    path.write_bytes(path.read_bytes()[:-1])
    done = job(flags(student, tiny_corpus, tmp_path / "run", "--teacher-cache", damaged))
    assert done.returncode == 2 and "shard-00001.safetensors is damaged: expected a file of" in done.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stream_range": None}, "--stream-range: expected START:END with --teacher-cache, got nothing"),
        ({"dynamic_batch_every": 2}, "--dynamic-batch-every: expected no such flag with --teacher-cache"),
        ({"batch_schedule": "x.json"}, "--batch-schedule: expected no such flag with --teacher-cache"),
        ({"reset_position_ids": True}, "--reset-position-ids: expected no such flag with --teacher-cache"),
        ({"reset_attention_mask": True}, "--reset-attention-mask: expected no such flag with --teacher-cache"),
        ({"distill_hidden_states": ("1:2",)}, "--distill-hidden-states: expected no such flag with --teacher-cache"),
        ({"objective": "lm"}, "--teacher-cache: expected --objective distill with it, got it alone"),
    ],
)
def test_flags_with_which_a_cache_says_nothing_are_refused(changes, said):
    given = {
        "objective": "distill", "teacher": None, "teacher_cache": "/cache", "stream_range": "0:8",
        "dynamic_batch_every": None, "batch_schedule": None, "reset_position_ids": False, "reset_attention_mask": False,
        "distill_hidden_states": (),
    }  # fmt: skip
    with pytest.raises(UsageError, match=said):
        distillation.complete_arguments(argparse.Namespace(**given | changes), lambda flag: flag == "--teacher-cache")

"""``teach``: the same cache at every layout and after a kill, against Hugging Face in float64."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.engine.launch import start_function
from megatron_prune.training.teacher_cache import open_cache
from tests.distributed_work import FunctionCall
from tests.training.small import SEQ_LENGTH, layout

RANGE = 5, 24  # 19 samples: 7 shards of 3, the last of 1
K = 17


def flags(parent: Path, corpus: Path, output: Path, *more: object) -> list[str]:
    words = (
        f"--load {parent} --train-data-path {corpus} --seq-length {SEQ_LENGTH} --stream-seed 3 --top-k {K} "
        f"--stream-range {RANGE[0]}:{RANGE[1]} --shard-samples 3 --dtype float32 --output {output}"
    ).split()
    return [*words, *map(str, more)]


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(cache.iterdir())}


def ties(words: int, width: int) -> torch.Tensor:
    """Logits [2, 3, width] of few different values, so that most words have equals; zeros of both signs; padding."""
    draws = torch.Generator().manual_seed(words)
    logits = torch.randint(-4, 4, (2, 3, width), generator=draws).float() / 2
    logits[logits == 0] *= torch.randint(0, 2, (int((logits == 0).sum()),), generator=draws) * 2.0 - 1
    logits[..., words:] = torch.finfo(torch.float32).min
    return logits


def best_of_shards(words: int, width: int, k: int) -> list[torch.Tensor]:
    """``top_k`` of this rank's share of ``ties``."""
    from megatron_prune.training import distillation_loss, teach
    from megatron_prune.training.distillation_loss import Shard

    distillation_loss._PART["cpu"] = 12  # so that there are several parts
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shard = Shard(words, rank, torch.distributed.group.WORLD)
    found = teach.top_k(ties(words, width).chunk(ranks, -1)[rank], k, shard)
    return [found.ids, found.log_probabilities, found.log_rest]


@pytest.mark.parametrize(("words", "width", "k"), [(13, 18, 4), (5, 18, 5), (17, 18, 8)])
def test_the_best_of_shards_are_the_best_of_all_and_of_equals_the_lowest_id(distributed, words, width, k):
    """Three ranks of six embeddings: some have words and padding, or padding alone, or fewer words than k."""
    logits = ties(words, width)[..., :words].double().numpy()
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rest = np.copy(logs)
    np.put_along_axis(rest, order, -np.inf, -1)
    for ids, log_probabilities, log_rest in distributed(best_of_shards, 3, words, width, k):
        assert np.array_equal(ids, order)
        np.testing.assert_allclose(log_probabilities, np.take_along_axis(logs, order, -1), rtol=1e-6, atol=1e-6)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(log_rest, np.log(np.exp(rest).sum(-1)), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def cache(tiny_parent, tiny_corpus, tmp_path_factory, job):
    """The cache of one process, never interrupted."""
    output = tmp_path_factory.mktemp("cache") / "cache"
    said = job(["teach", *flags(tiny_parent, tiny_corpus, output)]).ok().output
    assert "the top 17 of 379 words per token, uint16 and float32: 106 bytes per token, 0.1 MB for 608 tokens" in said
    return output


@pytest.fixture(scope="module")
def samples(tiny_corpus):
    """Tokens of the stream's samples, cut along Megatron's one-epoch order."""
    from megatron_prune.data.streams import Stream

    stream = Stream.build(str(tiny_corpus), SEQ_LENGTH, 3)
    return [stream[sample]["tokens"] for sample in range(*RANGE)]


def test_it_says_what_hugging_face_says_in_float64(cache, samples, tiny_hf, tiny_parent, tiny_corpus):
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(tiny_hf("llama-gqa", layers=4)).double()
    found = open_cache(cache)
    with torch.no_grad():
        for sample, tokens in zip(range(*RANGE), samples, strict=True):
            expected = model(tokens[None]).logits[0].log_softmax(-1)  # [S, vocabulary]
            held = found.read(sample)
            ids, logs = held["ids"].long(), held["log_probabilities"]
            np.testing.assert_allclose(logs, expected.gather(-1, ids), rtol=0, atol=2e-5)
            np.testing.assert_allclose(logs, expected.topk(K).values, rtol=0, atol=2e-5)
            rest = expected.scatter(-1, ids, -torch.inf).logsumexp(-1)
            np.testing.assert_allclose(held["rest"], rest, rtol=0, atol=2e-5)
            assert (torch.sort(ids).values.diff() > 0).all()  # each word once
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["teacher"]["fingerprint"] == open_checkpoint(tiny_parent).fingerprint()
    assert manifest["bytes_per_token"] == 17 * (2 + 4) + 4 and manifest["bytes"] == 106 * 19 * SEQ_LENGTH
    assert manifest["flops"] == open_checkpoint(tiny_parent).shape.forward_flops(SEQ_LENGTH) * 19
    assert [entry["bytes"] for entry in manifest["shards"]] == [
        len(content) for name, content in files(cache).items() if name.startswith("shard")
    ]
    tokenizer = json.loads(Path(f"{tiny_corpus}.json").read_text())["tokenizer"]["fingerprint"]
    assert manifest["tokenizers"] == [tokenizer]


def test_stages_and_replicas_write_the_same_bytes(cache, tiny_parent, tiny_corpus, tmp_path, job):
    output = tmp_path / "cache"
    job(["teach", *flags(tiny_parent, tiny_corpus, output, *layout(1, 2))], nproc=4).ok()
    assert files(output) == files(cache)


def test_tensor_parallel_ranks_find_the_same_words(cache, tiny_parent, tiny_corpus, tmp_path, job):
    output = tmp_path / "cache"
    job(["teach", *flags(tiny_parent, tiny_corpus, output, *layout(2))], nproc=2).ok()
    one, two = open_cache(cache), open_cache(output)
    for sample in range(*RANGE):
        ours, theirs = one.read(sample), two.read(sample)
        for name in ("log_probabilities", "rest"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)
        # Sums are rounded otherwise, so that words which are nearly equal may change places.
        logs = ours["log_probabilities"]
        near = torch.zeros_like(ours["ids"], dtype=torch.bool)
        near[:, 1:] |= logs.diff() > -1e-5
        near[:, :-1] |= logs.diff() > -1e-5
        near[:, -1] = True  # the next word may be as near
        assert torch.equal(ours["ids"][~near], theirs["ids"][~near]) and near[:, :-1].float().mean() < 0.02


def killed(argv: list[str], at: int) -> int:
    """``teach`` in this rank, which is killed before it writes the shard ``at``."""
    from megatron_prune.__main__ import main
    from megatron_prune.training import teacher_cache

    written = teacher_cache.write_shard

    def write(folder, taught, shard, tensors):
        if shard == at:
            (folder / f".shard-{at:05d}.safetensors.partial-12345678").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        written(folder, taught, shard, tensors)

    teacher_cache.write_shard = write
    return main(["teach", *argv])


def test_killed_and_resumed_it_has_the_same_bytes(cache, tiny_parent, tiny_corpus, tmp_path, job):
    output = tmp_path / "cache"
    argv = flags(tiny_parent, tiny_corpus, output)
    call = FunctionCall(
        file=str(sys.modules[killed.__module__].__file__), module=killed.__module__, function="killed",
        arguments=pickle.dumps(((argv, 2), {})), results=str(tmp_path),
    )  # fmt: skip
    with start_function(call, nproc=1, log=tmp_path / "log.txt") as running:
        assert running.wait(240) != 0
    assert {"shard-00000.safetensors", "shard-00001.safetensors"} < set(files(output))
    assert "shard-00002.safetensors" not in files(output)
    with pytest.raises(Exception, match="of which 2 of 7 shards exist; run the same teach again, and it continues"):
        open_cache(output)
    other = job(["teach", *flags(tiny_parent, tiny_corpus, output, "--dtype", "float16")])
    assert other.returncode == 2 and "a cache of another dtype" in other.output
    assert "2 exist already" in job(["teach", *argv]).ok().output
    assert files(output) == files(cache)

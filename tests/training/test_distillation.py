"""``pretrain --objective distill`` with an online teacher."""

from __future__ import annotations

import argparse
import json
import re

import numpy as np
import pytest
import torch

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert.huggingface import import_hf
from megatron_prune.errors import UsageError
from megatron_prune.training import distillation, teacher
from tests.conftest import WITH_TE
from tests.training import distillation_oracle as oracle
from tests.training.small import GLOBAL_BATCH, layout, recipe
from tests.training.small_masked import losses, run_function, start_from
from tests.training.test_masked_oracle import record_batches

STEPS = 4
RANGE = f"64:{64 + STEPS * GLOBAL_BATCH}"
ALPHA, TEMPERATURE = (0.2, 0.8), (1.0, 2.5)  # at the first and the last step
DISTILL = "--objective distill --distill-alpha 0.2:0.8 --distill-temperature 1:2.5 --distill-kl reverse".split()
CLIP = 0.5
ON_TE = pytest.mark.skipif(not WITH_TE, reason="Megatron's local RMSNorm cannot do it")
HIDDEN = {"distill_hidden_states": ("1:2",)}


@pytest.fixture(scope="module")
def student(tiny_hf, tmp_path_factory):
    """A narrower model of half the depth, with the teacher's vocabulary: Hugging Face, and Megatron."""
    source = tiny_hf("llama-gqa", layers=2, seed=5, hidden_size=72, intermediate_size=120)
    checkpoint = tmp_path_factory.mktemp("student") / "checkpoint"
    import_hf(source, checkpoint)
    return source, checkpoint


def flags(student, parent, corpus, save, *more):
    start = ["--pretrained-checkpoint", student[1], "--teacher", parent, *DISTILL]
    return [*start, *recipe(corpus, RANGE, save), "--clip-grad", CLIP, *more]


def distillation_losses(output: str) -> list[float]:
    """T² · KL of every step, from Megatron's log."""
    return [float(found) for found in re.findall(r"iteration +\d+/.*distillation loss: ([0-9.E+-]+)", output)]


def plain_loop(student_folder, teacher_folder, batches, rates):
    """CE, T² · KL and the norm of the gradient of every step: transformers in float64, torch's AdamW."""
    model, parent, optimizer = oracle.student_and_teacher(student_folder, teacher_folder)
    parameters = list(model.parameters())
    found = []
    for step in range(STEPS):
        share = step / (STEPS - 1)
        alpha, temperature = (first + (last - first) * share for first, last in (ALPHA, TEMPERATURE))
        tokens, labels = (
            torch.tensor(np.concatenate([batch[place] for batch in batches if batch[0] == step])) for place in (1, 2)
        )
        optimizer.zero_grad()
        with torch.no_grad():
            theirs = parent(tokens).logits
        mixed, lm, divergence = oracle.full(model(tokens).logits, theirs, labels, alpha, temperature, True)
        mixed.mean().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        found.append((float(lm.mean().detach()), float(divergence.mean().detach()), norm))
    return [list(column) for column in zip(*found, strict=True)]


@pytest.fixture(scope="module")
def reference(student, tiny_hf, tiny_parent, tiny_corpus, tmp_path_factory):
    """A run on one process: (its save, CE, T² · KL and norms that a plain loop has on its batches)."""
    folder = tmp_path_factory.mktemp("reference")
    save, batches = folder / "run", folder / "batches.json"
    argv = [str(word) for word in flags(student, tiny_parent, tiny_corpus, save)]
    code, output = run_function(record_batches, folder / "ranks", 1, argv, str(batches))
    assert code == 0, output[-4000:]
    rates = [0.0, *losses(save, "learning_rate")]  # Megatron logs the next step's; the warm-up begins at 0
    expected = plain_loop(student[0], tiny_hf("llama-gqa", layers=4), json.loads(batches.read_text()), rates)
    return save, output, expected


def check(save, output, expected):
    lm, divergence, norms = expected
    np.testing.assert_allclose(losses(save), lm, rtol=2e-5)
    np.testing.assert_allclose(losses(save)[0], lm[0], rtol=1e-6)
    logged = [
        divergence[0],
        np.mean(divergence[:2]),
        *divergence[2:],
    ]  # step 2 is logged with step 1
    np.testing.assert_allclose(distillation_losses(output), logged, rtol=2e-5)
    np.testing.assert_allclose(distillation_losses(output)[0], divergence[0], rtol=1e-6)  # of which seven digits
    np.testing.assert_allclose(losses(save, "grad_norm"), norms, rtol=1e-4)
    np.testing.assert_allclose(losses(save, "grad_norm")[0], norms[0], rtol=2e-6)
    assert min(norms) > CLIP and lm[-1] < lm[0]


def test_a_run_is_a_plain_loop_in_float64(reference):
    check(*reference)


@pytest.mark.parametrize(
    ("tp", "pp", "nproc", "more"),
    [
        (2, 2, 4, []),
        (1, 1, 2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather".split()),
        pytest.param(3, 1, 3, [], marks=pytest.mark.slow),
        pytest.param(2, 1, 2, ["--sequence-parallel"], marks=ON_TE),
        pytest.param(2, 2, 4, ["--sequence-parallel"], marks=ON_TE),
        pytest.param(1, 2, 4, ["--use-distributed-optimizer"], marks=pytest.mark.slow),
        pytest.param(1, 1, 1, ["--micro-batch-size", "8", "--calculate-per-token-loss"], marks=pytest.mark.slow),
    ],
)
def test_so_it_is_at_other_layouts(tp, pp, nproc, more, reference, student, tiny_parent, tiny_corpus, tmp_path, job):
    argv = flags(student, tiny_parent, tiny_corpus, tmp_path / "run", *layout(tp, pp), *more)
    done = job(["pretrain", *argv], nproc=nproc).ok()
    check(tmp_path / "run", done.output, reference[2])


def test_resumed_at_another_layout_it_is_the_same_run(reference, student, tiny_parent, tiny_corpus, tmp_path, job):
    """And its checkpoint holds the student alone."""
    save = tmp_path / "run"
    argv = flags(student, tiny_parent, tiny_corpus, save)
    job(["pretrain", *argv, *layout(2), "--exit-interval", "2", "--save-interval", "2"], nproc=2).ok()
    assert open_checkpoint(save).iteration == 2
    job(["pretrain", *argv, *layout(1, 2)], nproc=2).ok()
    np.testing.assert_allclose(losses(save), losses(reference[0]), rtol=2e-5)
    account, other = (json.loads((each / "account.json").read_text()) for each in (save, reference[0]))
    assert account["complete"] and account["objective"] == other["objective"]
    checkpoint, parent = open_checkpoint(save), open_checkpoint(tiny_parent)
    assert checkpoint.shape == open_checkpoint(student[1]).shape
    assert account["objective"] == {
        "name": "distill", "alpha": [0.2, 0.8], "temperature": [1.0, 2.5], "kl": "reverse", "online": True,
        "teacher": parent.fingerprint(), "top_k": None,
    }  # fmt: skip
    assert account["flops_teacher"] == parent.shape.forward_flops(32) * STEPS * GLOBAL_BATCH
    changed = ["1" if word == "1:2.5" else word for word in argv]
    refused = job(["pretrain", *changed])
    assert refused.returncode == 2 and "holds a run with objective" in refused.output


@pytest.mark.parametrize(
    ("more", "nproc"),
    [
        (["--distill-temperature", "2", *layout(1, 2)], 2),
        pytest.param(["--distill-kl", "reverse", "--bf16", *layout(2)], 2, marks=pytest.mark.slow),
    ],
)
def test_a_student_that_starts_as_its_teacher_does_not_move(more, nproc, tiny_parent, tiny_corpus, tmp_path, job):
    """KL 0 and no weight changed by a bit, although Adam would make steps of the learning rate out of any rounding."""
    save = tmp_path / "run"
    argv = ["--pretrained-checkpoint", tiny_parent, "--teacher", tiny_parent, "--objective", "distill"]
    argv += [*recipe(tiny_corpus, RANGE, save), "--weight-decay", "0", *more]
    done = job(["pretrain", *argv], nproc=nproc).ok()
    assert distillation_losses(done.output) == [0.0] * STEPS
    before, after = open_checkpoint(tiny_parent), open_checkpoint(save)
    dtype = torch.bfloat16 if "--bf16" in more else torch.float32
    for name in before.names:
        assert torch.equal(before.read(name).to(dtype), after.read(name).to(dtype)), name


def test_a_sparse_student_keeps_its_zeros_and_is_validated_on_text_alone(
    tiny_pruned, tiny_parent, tiny_corpus, tmp_path, job
):
    pruned, save = tiny_pruned("unstructured"), tmp_path / "run"
    argv = start_from(pruned, "--teacher", tiny_parent, *DISTILL, *recipe(tiny_corpus, RANGE, save), *layout(2))
    argv += ["--valid-data-path", tiny_corpus, "--eval-iters", "1", "--eval-interval", "2"]
    done = job(["pretrain", *argv], nproc=2).ok()
    trained = open_checkpoint(save)
    for name, kept in pruned.kept.items():
        values = trained.read(name)
        assert not values[~kept].any() and values[kept].any(), name
    assert all(found > 0 for found in distillation_losses(done.output))
    validated = [line for line in done.output.splitlines() if "validation loss at" in line]
    assert validated and all("lm loss value" in line and "distillation" not in line for line in validated)
    account = json.loads((save / "account.json").read_text())
    assert account["masks"] and account["objective"]["name"] == "distill"


def test_a_teacher_that_is_not_there_is_refused(tiny_parent, tiny_corpus, tmp_path, job):
    argv = ["--shape-from", tiny_parent, "--teacher", tmp_path / "none", *DISTILL]
    done = job(["pretrain", *argv, *recipe(tiny_corpus, RANGE, None)])
    assert done.returncode == 2 and "Traceback" not in done.output
    assert "--teacher: expected the directory of a checkpoint, got" in done.output


def asked(**changes) -> argparse.Namespace:
    """Arguments of a run that distils, before Megatron validates them."""
    given = {
        "objective": "distill", "teacher": "/parent", "teacher_cache": None, "distill_alpha": "1",
        "distill_temperature": "1", "distill_kl": "forward", "cuda_graph_impl": "none",
        "num_layers_per_virtual_pipeline_stage": None, "num_virtual_stages_per_pipeline_rank": None,
        "pipeline_model_parallel_layout": None, "logits_save_dir": None,
        "distill_hidden_states": (), "distill_hidden_weight": 1.0, "pipeline_model_parallel_size": 1,
        "recompute_granularity": None, "fp16": False, "calculate_per_token_loss": False, "use_torch_fsdp2": False,
    }  # fmt: skip
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ({"objective": "lm"}, "--teacher", "--teacher: expected --objective distill with it"),
        ({"objective": "lm"}, "--distill-alpha", "--distill-alpha: expected --objective distill with it"),
        ({"objective": "lm"}, "--distill-temperature", "--distill-temperature: expected --objective distill"),
        ({"objective": "lm"}, "--distill-kl", "--distill-kl: expected --objective distill with it"),
        ({"objective": "lm"}, "--distill-hidden-states", "--distill-hidden-states: expected --objective distill"),
        ({}, "--distill-hidden-weight", "--distill-hidden-weight: expected --distill-hidden-states with it"),
        ({"distill_hidden_states": ("3",)}, "", "--distill-hidden-states: expected STUDENT:TEACHER"),
        (HIDDEN | {"distill_hidden_weight": 0.0}, "", "--distill-hidden-weight: expected a number above 0"),
        (HIDDEN | {"pipeline_model_parallel_size": 2}, "", "--pipeline-model-parallel-size: expected 1"),
        (HIDDEN | {"recompute_granularity": "full"}, "", "--recompute-granularity: expected selective"),
        (HIDDEN | {"fp16": True}, "", "--fp16: expected --bf16 or neither"),
        (HIDDEN | {"calculate_per_token_loss": True}, "", "--calculate-per-token-loss: expected off"),
        (HIDDEN | {"use_torch_fsdp2": True}, "", "--use-torch-fsdp2: expected off"),
        (
            {"teacher": None},
            "",
            "--objective: expected --teacher CHECKPOINT or --teacher-cache DIR with it, got distill alone",
        ),
        ({"distill_alpha": "1.5"}, "", "--distill-alpha: expected a share from 0 to 1"),
        ({"distill_alpha": "0:x"}, "", "--distill-alpha: expected a share from 0 to 1"),
        ({"distill_temperature": "1:0"}, "", "--distill-temperature: expected a number above 0"),
        ({"distill_temperature": "inf"}, "", "--distill-temperature: expected a number above 0"),
        ({"cuda_graph_impl": "full_iteration"}, "", "--cuda-graph-impl: expected another"),
        ({"logits_save_dir": "logits"}, "", "--logits-save-dir: expected no such flag with it, got logits"),
        ({"num_virtual_stages_per_pipeline_rank": 2}, "", "--num-virtual-stages-per-pipeline-rank: expected no such"),
        ({"pipeline_model_parallel_layout": "t|t"}, "", "--pipeline-model-parallel-layout: expected no such flag"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(changes, given, said):
    with pytest.raises(UsageError) as refused:
        distillation.complete_arguments(asked(**changes), lambda flag: flag == given)
    assert str(refused.value).startswith(said)


def test_flags_that_agree_pass():
    changes = {"distill_alpha": "0:1", "distill_temperature": "2.5"} | HIDDEN
    distillation.complete_arguments(asked(**changes), lambda flag: True)
    distillation.complete_arguments(asked(objective="lm"), lambda flag: False)


def of_student(parent, **changes) -> argparse.Namespace:
    given = {
        "teacher": str(parent), "pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2, "seq_length": 32,
        "vocab_size": 379, "padded_vocab_size": 384, "load": None, "shape_from": str(parent), "ckpt_step": None,
        "pretrained_checkpoint": None,
    }  # fmt: skip
    return argparse.Namespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 300}, "with 379 words"),
        ({"padded_vocab_size": 512}, "with 384 embeddings, with padding"),
        ({"pipeline_model_parallel_size": 3}, "with 4 layers"),
        ({"tensor_model_parallel_size": 4}, "with 6 query groups"),
        ({"tensor_model_parallel_size": 5}, "with 12 attention heads"),
    ],
)
def test_a_teacher_that_cannot_teach_this_student_is_refused(changes, said, tiny_parent):
    with pytest.raises(UsageError, match="^--teacher: expected ") as refused:
        teacher.arguments(of_student(tiny_parent, **changes))
    assert said in str(refused.value)


def test_a_teacher_with_another_tokenizer_is_refused(tiny_parent, tiny_hf, tmp_path):
    """The words of two ids changed places."""
    from megatron_prune.checkpoint.reader import HUGGINGFACE_FOLDER

    other = tmp_path / "other"
    import_hf(tiny_hf("llama-gqa", layers=4), other)
    file = other / HUGGINGFACE_FOLDER / "tokenizer.json"
    held = json.loads(file.read_text())
    words = held["model"]["vocab"]
    one, two = list(words)[100:102]
    words[one], words[two] = words[two], words[one]
    file.write_text(json.dumps(held))
    with pytest.raises(UsageError, match="whose tokenizer is another"):
        teacher.arguments(of_student(other, shape_from=str(tiny_parent)))

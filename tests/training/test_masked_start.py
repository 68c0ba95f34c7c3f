"""Where a masked run may start (pruned weights, a new model under the same masks or random ones), and where not."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch

from megatron_prune.checkpoint.layout import weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.masks import open_masks
from megatron_prune.training.masked import MaskChoice, RandomMasks, say_that_masks_know_the_start
from tests import tiny
from tests.training.small import GLOBAL_BATCH, SEQ_LENGTH, layout, recipe
from tests.training.small_masked import (
    ADAM,
    account,
    assert_zero_in_checkpoint,
    leave_with,
    run_function,
    start_from,
)

RANGE = "64:88"
STEPS = 3


def keep_initial(argv: list[str], folder: str) -> None:
    """``pretrain`` in this rank; its parameters and fp32 masters before the first step go to ``folder``."""
    from megatron.core.utils import unwrap_model
    from megatron.training import training

    from megatron_prune.__main__ import main

    setup = training.setup_model_and_optimizer

    def set_up(*positional, **named):
        found = setup(*positional, **named)
        initial = {}
        for name, parameter in unwrap_model(found[0])[0].named_parameters():
            initial[name] = parameter.detach().clone()
            if getattr(parameter, "main_param", None) is not None:
                initial[f"master of {name}"] = parameter.main_param.detach().clone()
        Path(folder, f"initial-{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(initial))
        return found

    training.setup_model_and_optimizer = set_up
    leave_with(main(["pretrain", *argv]))


def _logical(name: str) -> str:
    """The name that a checkpoint has for a parameter of Megatron's local layers."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def initial(argv: list, folder: Path) -> dict[str, torch.Tensor]:
    code, output = run_function(keep_initial, folder, 1, [str(word) for word in argv], str(folder))
    assert code == 0, output[-4000:]
    return pickle.loads((folder / "initial-0.pickle").read_bytes())


@pytest.mark.parametrize("flags", [[], ["--bf16"]], ids=["fp32", "bf16"])
def test_a_sparse_scratch_inherits_nothing(tiny_pruned, tiny_corpus, tmp_path, flags):
    """Every parameter is the dense scratch run's of the same seed, and zero where a mask removes."""
    pruned = tiny_pruned("2:4")
    argv = ["--shape-from", pruned.path, *flags]
    dense = initial([*argv, *recipe(tiny_corpus, RANGE, tmp_path / "dense")], tmp_path / "a")
    sparse = initial([*argv, "--masks", pruned.masks, *recipe(tiny_corpus, RANGE, tmp_path / "sparse")], tmp_path / "b")
    parent = open_checkpoint(pruned.path)
    assert dense.keys() == sparse.keys()
    masked, masters = 0, 0
    for name, value in sparse.items():
        plain = name.removeprefix("master of ")
        if plain in pruned.kept:
            assert torch.equal(value, torch.where(pruned.kept[plain], dense[name], 0)), name
            masked += 1
        else:
            assert torch.equal(value, dense[name]), name
        masters += name != plain
        assert not torch.equal(value.float(), parent.read(_logical(plain))), name  # gains are 1 here, not there
    assert masked == len(pruned.kept) * (2 if flags else 1) and masters == (len(sparse) // 2 if flags else 0)

    save = tmp_path / "sparse"
    assert_zero_in_checkpoint(save / "iter_0000003", pruned.kept, moments=ADAM)
    found = account(save)
    assert found["start"] == "random" and found["initial"] is None
    assert found["masks"] == open_masks(pruned.masks).hash
    shape = parent.shape
    removed = sum(int((~mask).sum()) for mask in pruned.kept.values())
    tokens = STEPS * GLOBAL_BATCH * SEQ_LENGTH
    assert found["parameters"] == shape.parameters()
    assert found["parameters_nonzero"] == shape.parameters() - removed - 2 * tiny.PADDING * shape.hidden_size
    assert found["flops_executed"] - found["flops_theoretical"] == 3 * 2 * removed * tokens
    assert found["flops_executed"] == account(tmp_path / "dense")["flops_executed"]


@pytest.mark.parametrize("pattern", [pytest.param("2:4", marks=pytest.mark.slow), "unstructured"])
def test_random_masks_are_the_same_at_every_layout(tiny_pruned, tiny_corpus, tmp_path, job, pattern):
    pruned = tiny_pruned(pattern)
    argv = ["--shape-from", pruned.path, "--masks", pruned.masks, "--random-masks"]
    hashes = []
    for name, seed, (tp, pp), nproc in (
        ("one", 5, (1, 1), 1), ("dp", 5, (1, 1), 2), ("tp-pp", 5, (2, 2), 4), ("tp", 5, (3, 1), 3),
        ("other", 6, (1, 1), 1),
    ):  # fmt: skip
        save = tmp_path / name
        words = [*argv, seed, *recipe(tiny_corpus, RANGE, save), *layout(tp, pp)]
        job(["pretrain", *words], nproc=nproc).ok()
        hashes.append(open_masks(save / "masks").hash)
        assert account(save)["masks"] == hashes[-1]
    assert len(set(hashes[:4])) == 1 and hashes[4] != hashes[0]

    drawn, given = open_masks(tmp_path / "one" / "masks"), open_masks(pruned.masks)
    assert drawn.entries.keys() == given.entries.keys()
    group = 4 if pattern == "2:4" else None
    kept = {}
    for name, mask in pruned.kept.items():
        kept[name] = drawn.read(name)
        counts = [m.view(m.shape[0], -1, group or m.shape[1]).sum(-1) for m in (kept[name], mask)]
        assert torch.equal(*counts), name
        assert drawn.entries[name].pattern == pattern
        same = (kept[name] == mask).double().mean()
        assert 0.4 < same < 0.6, (name, same)
    for name in ("one", "tp-pp"):
        assert_zero_in_checkpoint(tmp_path / name / "iter_0000003", kept, moments=ADAM)


def test_a_run_under_random_masks_is_resumed_by_the_same_command(tiny_pruned, tiny_corpus, tmp_path, job):
    pruned, save = tiny_pruned("2:4"), tmp_path / "run"
    argv = ["pretrain", "--shape-from", pruned.path, "--masks", pruned.masks, *recipe(tiny_corpus, RANGE, save)]
    job([*argv, "--random-masks", "5", "--exit-interval", "2"]).ok()
    refused = job([*argv, "--random-masks", "6"])
    assert refused.returncode == 2 and "--masks" in refused.output, refused.output[-2000:]
    refused = job(argv)
    assert refused.returncode == 2 and "--masks" in refused.output, refused.output[-2000:]
    job([*argv, "--random-masks", "5"]).ok()
    assert account(save)["complete"] and [a["from_step"] for a in account(save)["attempts"]] == [1, 3]


def test_weights_that_are_not_zero_under_the_masks_are_refused(tiny_parent, tiny_pruned, tiny_corpus, tmp_path, job):
    """The dense parent: on every rank, and at PP=2 by the name of the first layer's tensor."""
    masks = tiny_pruned("2:4").masks
    argv = ["--masks", masks, *recipe(tiny_corpus, RANGE, tmp_path / "run")]
    for flags, nproc in (([], 1), ([*layout(1, 2), "--bf16"], 2)):
        refused = job(["pretrain", *argv, "--pretrained-checkpoint", tiny_parent, *flags], nproc=nproc)
        assert refused.returncode == 2 and "Traceback" not in refused.output, refused.output[-3000:]
        first = f"--pretrained-checkpoint {tiny_parent}: the weight decoder.layers.0.self_attention.linear_qkv.weight"
        assert first in refused.output
    assert not (tmp_path / "run").exists()  # so that the next run can have the right masks


def test_an_optimizer_state_that_would_move_zeros_is_refused(tiny_pruned, tiny_corpus, tmp_path, job):
    pruned, dense = tiny_pruned("2:4"), tmp_path / "dense"
    start = ["pretrain"]
    filled = [
        *start, "--pretrained-checkpoint", pruned.path, *recipe(tiny_corpus, RANGE, dense, "--exit-interval", 2)
    ]  # fmt: skip
    refused = job(filled)
    assert refused.returncode == 2 and not dense.exists(), refused.output[-2000:]
    assert f"--masks: expected {pruned.masks}" in refused.output
    assert "--let-zeros-fill" in refused.output
    job([*filled, "--let-zeros-fill"]).ok()
    assert account(dense)["masks"] is None

    words = recipe(tiny_corpus, RANGE, tmp_path / "run")
    words[words.index("--load") + 1] = str(dense)
    refused = job([*start, "--masks", pruned.masks, *words])
    assert refused.returncode == 2 and "would move the zeros" in refused.output, refused.output[-2000:]
    # Its weights are no longer zero under the masks, so only the flag is accepted.
    refused = job([*start, "--masks", pruned.masks, *words, "--no-load-optim"])
    assert refused.returncode == 2 and f"--load {dense}: the weight" in refused.output, refused.output[-2000:]
    refused = job([*start, "--masks", pruned.masks, *recipe(tiny_corpus, RANGE, dense)])
    assert refused.returncode == 2 and "holds a dense run" in refused.output

    # A pruned release has no optimizer state: --load starts from it.
    words[words.index("--load") + 1] = str(pruned.path)
    job([*start, "--masks", pruned.masks, *words]).ok()
    assert account(tmp_path / "run")["start"] == "pruned"


REFUSED = [
    (["--optimizer", "muon"], "--optimizer"),
    (["--optimizer", "dist_muon"], "--optimizer"),
    (["--optimizer", "lion"], "--optimizer"),
    (["--use-megatron-fsdp"], "--use-megatron-fsdp"),
    (["--use-torch-fsdp2"], "--use-torch-fsdp2"),
    (["--tensor-parallel-num-weight-shards", "2"], "--tensor-parallel-num-weight-shards"),
    (["--reuse-grad-buf-for-mxfp8-param-ag"], "--reuse-grad-buf-for-mxfp8-param-ag"),
    (["--cuda-graph-impl", "full_iteration"], "--cuda-graph-impl"),
    (["--optimizer-cpu-offload"], "--optimizer-cpu-offload"),
    (["--random-masks", "1"], "--random-masks"),
    (["--let-zeros-fill"], "--let-zeros-fill"),
    (["--num-layers", "3"], "num_layers is 4 there and 3"),
]


@pytest.mark.parametrize(("flags", "says"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_refused_before_anything_starts(tiny_pruned, tiny_corpus, tmp_path, job, flags, says):
    pruned, save = tiny_pruned("2:4"), tmp_path / "run"
    argv = ["pretrain", *start_from(pruned, *recipe(tiny_corpus, RANGE, save))]
    if "--num-layers" in flags:  # a model of other masks
        argv = ["pretrain", "--shape-from", pruned.path, "--masks", _of_three_layers(pruned, tmp_path),
                *recipe(tiny_corpus, RANGE, save)]  # fmt: skip
        flags, says = [], "num_layers is 3 there and 4"
    refused = job([*argv, *flags])
    assert refused.returncode == 2 and "Traceback" not in refused.output, refused.output[-3000:]
    assert says in refused.output and not save.exists()


def test_fp4_is_refused():
    """Without a GPU another check comes first."""
    import argparse

    from megatron_prune.errors import UsageError
    from megatron_prune.training.masked import refuse_unfit_arguments

    fine = argparse.Namespace(
        save=None, load=None, finetune=False, masks="m", random_masks=None, optimizer="adam",
        use_torch_fsdp2=False, tensor_parallel_num_weight_shards=None, tensor_model_parallel_size=1, fp4=None,
        let_zeros_fill=False, reuse_grad_buf_for_mxfp8_param_ag=False, cuda_graph_impl="local", cuda_graph_modules=[],
        cuda_graph_scope_deprecated=None, optimizer_cpu_offload=False,
    )  # fmt: skip
    refuse_unfit_arguments(fine)
    fine.fp4 = "e2m1"
    with pytest.raises(UsageError, match="--fp4-format"):
        refuse_unfit_arguments(fine)


def _of_three_layers(pruned, tmp_path: Path) -> Path:
    from dataclasses import replace

    from megatron_prune.masks import write_single

    shape = replace(open_checkpoint(pruned.path).shape, num_layers=3)
    names = {weight.name for weight in weights(shape)}
    write_single(tmp_path / "of-three", shape, [(n, m, "2:4") for n, m in pruned.kept.items() if n in names])
    return tmp_path / "of-three"


def test_masks_under_the_seed_of_their_parent_are_no_start_from_scratch(tiny_pruned, tmp_path, capsys):
    pruned, root = tiny_pruned("2:4"), tmp_path / "seeded"
    source, masks = open_checkpoint(pruned.path), open_masks(pruned.masks)
    with CheckpointWriter(root, args=source.args | {"seed": 7}, dtype=torch.float32, pruning=source.pruning) as writer:
        for name in source.names:
            writer.add(name, source.spec(name).shape, source.row_blocks(name))
    for seed, choice, told in (
        (7, MaskChoice(masks, False, "the new model"), True),
        (8, MaskChoice(masks, False, "the new model"), False),
        (7, MaskChoice(RandomMasks(masks, 1), False, "the new model"), False),
        (7, MaskChoice(masks, True, "the new model"), False),  # it has begun, and has said it
    ):
        say_that_masks_know_the_start(argparse.Namespace(shape_from=str(root), load=None, seed=seed), choice)
        assert ("--seed 7 was also the seed of the model" in capsys.readouterr().out) == told

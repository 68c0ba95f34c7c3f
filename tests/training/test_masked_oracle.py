"""A masked run against a plain loop: transformers' model, torch's AdamW, weights multiplied after every step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from tests.training.small import layout, recipe
from tests.training.small_masked import Kept, leave_with, losses, run_function

STEPS = 8
RANGE = f"64:{64 + 8 * STEPS}"
DECAY, CLIP = 0.1, 0.5  # the clip is below the norms, so that every step is clipped


def record_batches(argv: list[str], file: str) -> None:
    """``pretrain`` in this rank; writes the samples of its steps to ``file``: [step, tokens [b, S], labels [b, S]]."""
    from megatron.training import get_args

    from megatron_prune.__main__ import main
    from megatron_prune.engine import forward

    original, batches = forward.get_batch, []

    def recording(iterator, vp_stage):
        batch = original(iterator, vp_stage)
        batches.append([get_args().curr_iteration, batch["tokens"].tolist(), batch["labels"].tolist()])
        return batch

    forward.get_batch = recording
    leave_with(main(["pretrain", *argv]))
    Path(file).write_text(json.dumps(batches))


def matrices(kept: Kept, layers: int, groups: int, head: int) -> dict[str, torch.Tensor]:
    """The masks by the names of transformers: q, k and v taken out of qkv group by group, gate and up out of fc1."""
    found = {}
    for layer in range(layers):
        for ours, theirs in (
            ("self_attention.linear_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("self_attention.linear_proj", ("self_attn.o_proj",)),
            ("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj")),
            ("mlp.linear_fc2", ("mlp.down_proj",)),
        ):
            mask = kept.get(f"decoder.layers.{layer}.{ours}.weight")
            if mask is None:
                continue
            if len(theirs) == 3:
                each = mask.view(groups, -1, head, mask.shape[1])  # [G, heads of a group + 2, d, in]
                parts = [each[:, :-2], each[:, -2:-1], each[:, -1:]]
            else:
                parts = mask.chunk(len(theirs))
            for name, part in zip(theirs, parts, strict=True):
                found[f"model.layers.{layer}.{name}.weight"] = part.reshape(-1, mask.shape[1])
    return found


def plain_loop(
    folder: Path, masks: dict[str, torch.Tensor], batches: list, rates: list[float]
) -> tuple[list[float], list[float], torch.nn.Module]:
    """Losses and norms of the kept gradients of every step, and the trained model."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    parameters = dict(model.named_parameters())
    assert masks.keys() <= parameters.keys()

    def multiply() -> None:
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name] *= mask

    multiply()
    decayed = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.999)
    )
    found, norms = [], []
    for step in range(STEPS):
        mine = [(tokens, labels) for number, tokens, labels in batches if number == step]
        optimizer.zero_grad()
        total = 0.0
        for tokens, labels in mine:
            logits = model(torch.tensor(tokens)).logits  # [b, S, vocabulary]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(labels).flatten()) / len(mine)
            loss.backward()
            total += loss.item()
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].grad *= mask
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
        multiply()
        found.append(total)
    return found, norms, model


def test_losses_and_clip_norms_are_those_of_a_plain_loop(tiny_pruned, tiny_hf, tiny_corpus, tmp_path, job):
    pruned, save = tiny_pruned("unstructured"), tmp_path / "run"
    start = ["--pretrained-checkpoint", pruned.path, "--masks", pruned.masks]
    flags = ["--clip-grad", CLIP]
    argv = [*start, *recipe(tiny_corpus, RANGE, save), *flags]
    code, output = run_function(
        record_batches, tmp_path / "ranks", 1, [str(word) for word in argv], str(tmp_path / "batches.json")
    )
    assert code == 0, output[-4000:]
    masks = matrices(pruned.kept, layers=4, groups=6, head=12)
    expected, norms, model = plain_loop(
        tiny_hf("llama-gqa", layers=4), masks, json.loads((tmp_path / "batches.json").read_text()),
        [0.0, *losses(save, "learning_rate")],  # Megatron logs the next step's; the warm-up begins at 0
    )  # fmt: skip
    np.testing.assert_allclose(losses(save), expected, rtol=2e-5)
    np.testing.assert_allclose(losses(save, "grad_norm"), norms, rtol=1e-4)
    assert min(norms) > CLIP and expected[-1] < expected[0]

    other = tmp_path / "other"
    job(["pretrain", *start, *recipe(tiny_corpus, RANGE, other), *flags, *layout(2, 2)], nproc=4).ok()
    np.testing.assert_allclose(losses(other), expected, rtol=2e-5)
    np.testing.assert_allclose(losses(other, "grad_norm"), norms, rtol=1e-4)

    from megatron_prune.checkpoint.reader import open_checkpoint

    trained = open_checkpoint(other)
    down = dict(model.named_parameters())["model.layers.3.mlp.down_proj.weight"].detach()
    np.testing.assert_allclose(trained.read("decoder.layers.3.mlp.linear_fc2.weight"), down, atol=2e-5)

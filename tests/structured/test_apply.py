"""``apply``: bit-equal to an independent slicing of the Hugging Face model, atomic, and refusing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from megatron_prune.checkpoint.reader import Checkpoint, open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError, MegatronPruneError, PlanError
from megatron_prune.methods import options
from megatron_prune.structured import apply, plan
from megatron_prune.structured.candidates import Question
from megatron_prune.structured.statistics import Statistics, tensor_shapes
from tests import tiny

LAYERS = 3
HEAD = tiny.BASE["head_dim"]  # channels


def statistics(parent: Checkpoint, seed: int = 0) -> Statistics:
    """Made-up statistics: what is kept is then no regular pattern."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.rand(size, generator=generator, dtype=torch.float64)
        for name, size in tensor_shapes(parent.shape).items()
    }
    run = {"prefix": "p", "corpus": "c", "sampling": "sequential", "seed": None, "windows": [0, 1, 2]}
    return Statistics(tensors, parent.shape, parent.fingerprint(), 64, 3, 30.0, (run,))


def make(parent: Checkpoint, method: str, **sizes: int) -> plan.PruningPlan:
    target = replace(parent.shape, **sizes)  # type: ignore[arg-type]
    seed = 5 if method == "random" else None
    question = Question(method, options.STRUCTURED[method](), parent.shape, (target,), parent.fingerprint(), seed)
    return plan.make(question, ratio=None, ratio_of="linears", statistics=statistics(parent))


def sliced(state: dict[str, torch.Tensor], made: plan.PruningPlan) -> dict[str, torch.Tensor]:
    """The pruned Hugging Face model, cut from the parent's state dict by q/k/v and gate/up names."""
    source = made.source
    hidden = list(made.kept_hidden or range(source.hidden_size))
    result = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in state:
            result[name] = state[name][:, hidden]
    result["model.norm.weight"] = state["model.norm.weight"][hidden]
    for new, old in enumerate(made.kept_layers):
        heads = list(made.kept_heads[new]) if made.kept_heads else list(range(source.num_attention_heads))
        per_group = source.num_attention_heads // source.num_query_groups
        groups = sorted({head // per_group for head in heads})
        ffn = list(made.kept_ffn[new]) if made.kept_ffn else list(range(source.ffn_hidden_size))
        q_rows = [h * HEAD + i for h in heads for i in range(HEAD)]
        kv_rows = [g * HEAD + i for g in groups for i in range(HEAD)]
        before, after = f"model.layers.{old}.", f"model.layers.{new}."
        for part, rows, columns in (
            ("self_attn.q_proj", q_rows, hidden),
            ("self_attn.k_proj", kv_rows, hidden),
            ("self_attn.v_proj", kv_rows, hidden),
            ("self_attn.o_proj", hidden, q_rows),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ):
            result[f"{after}{part}.weight"] = state[f"{before}{part}.weight"][rows][:, columns]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            result[f"{after}{norm}.weight"] = state[f"{before}{norm}.weight"][hidden]
    return result


# transformers refuses a Llama whose hidden size is no multiple of its heads, so these are.
CUTS: dict[str, tuple[str, dict[str, int]]] = {
    "depth": ("shortgpt", {"num_layers": 2}),
    "hidden": ("minitron-width", {"hidden_size": 60}),
    "heads": ("minitron-width", {"num_attention_heads": 6}),
    "ffn": ("minitron-width", {"ffn_hidden_size": 72}),
    "width": (
        "minitron-width",
        {"hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 4, "ffn_hidden_size": 96},
    ),
    "random": (
        "random",
        {
            "num_layers": 1,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "num_query_groups": 3,
            "ffn_hidden_size": 51,
        },
    ),
}
MODELS = ("llama-gqa", "llama-mha-tied", "llama-gqa-tied-rope", "mistral-gqa")


@pytest.fixture(scope="module")
def parents(tiny_hf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``parents(name)``: the imported checkpoint of ``tiny_hf(name, layers=3)``."""
    folder = tmp_path_factory.mktemp("parents")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            import_hf(tiny_hf(name, layers=LAYERS), folder / name)
        return folder / name

    return get


def sizes_for(parent: Checkpoint, cut: str) -> dict[str, int]:
    """The cut's sizes; multi-head attention stays multi-head."""
    sizes = dict(CUTS[cut][1])
    if parent.shape.heads_per_group == 1 and "num_attention_heads" in sizes:
        sizes["num_query_groups"] = sizes["num_attention_heads"]
    return sizes


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("model", MODELS)
def test_weights_are_bit_equal_to_an_independent_slicing(
    parents: Callable[[str], Path], tiny_hf: Callable[..., Path], tmp_path: Path, model: str, cut: str
) -> None:
    import transformers

    parent = open_checkpoint(parents(model))
    made = make(parent, CUTS[cut][0], **sizes_for(parent, cut))
    apply.apply_plan(parents(model), made, tmp_path / "pruned")
    export_hf(tmp_path / "pruned", tmp_path / "hf")

    original = safetensors.torch.load_file(tiny_hf(model, layers=LAYERS) / "model.safetensors")
    expected = sliced(original, made)
    found = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name

    # And the exported directory is a model of that shape: loaded by transformers, it gives the
    # logits of the sliced weights in a configuration written here.
    config = transformers.AutoConfig.from_pretrained(tiny_hf(model, layers=LAYERS))
    config.num_hidden_layers, config.hidden_size = made.target.num_layers, made.target.hidden_size
    config.num_attention_heads = made.target.num_attention_heads
    config.num_key_value_heads = made.target.num_query_groups
    config.intermediate_size, config.head_dim = made.target.ffn_hidden_size, HEAD
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    missing, unexpected = theirs.load_state_dict(expected, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    tokens = torch.arange(48)[None] * 7 % tiny.VOCABULARY
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


def logits_of_checkpoint(load: str, tokens: list[int], layout: list[str]) -> list[list[float]] | None:
    """Logits [S, V] that Megatron computes after its own ``--load --use-checkpoint-args``; None off rank 0."""
    from megatron_prune.engine import cpu

    cpu.prepare()
    import megatron.training  # noqa: F401

    cpu.prepare_megatron()
    from megatron_prune.engine import runtime

    def complete(args: Any, argv: list[str]) -> None:
        args.seq_length, args.micro_batch_size = len(tokens), 1

    args = runtime.start("evaluate", ["--load", load, "--use-checkpoint-args", *layout], complete=complete)
    runtime.initialize(args)
    (model,) = runtime.load_model(args)
    ids = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad():
        logits = model(ids, positions, None, runtime_gather_output=True)  # [1, S, V]
    return logits[0].tolist() if args.rank == 0 else None


@pytest.mark.parametrize(
    ("model", "cut"), [("llama-gqa", "width"), ("llama-mha-tied", "random"), ("llama-gqa-tied-rope", "depth")]
)
def test_megatron_loads_the_result_on_another_layout(
    parents: Callable[[str], Path],
    distributed: Callable[..., list[Any]],
    tmp_path: Path,
    model: str,
    cut: str,
) -> None:
    """Logits of the pruned checkpoint at TP=1 and at another TP against transformers: within 1e-3."""
    import transformers

    parent = open_checkpoint(parents(model))
    made = make(parent, CUTS[cut][0], **sizes_for(parent, cut))
    apply.apply_plan(parents(model), made, tmp_path / "pruned")
    export_hf(tmp_path / "pruned", tmp_path / "hf")
    tokens = (torch.arange(48) * 11 % tiny.VOCABULARY).tolist()
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = hf(torch.tensor([tokens])).logits[0]
    for tp in (1, 3 if cut == "random" else 2):
        layout = ["--tensor-model-parallel-size", str(tp)]
        found = distributed(logits_of_checkpoint, tp, str(tmp_path / "pruned"), tokens, layout)[0]
        assert found is not None
        error = (torch.tensor(found)[:, : expected.shape[1]] - expected).abs().max()
        assert error < 1e-3, (tp, float(error))


def test_provenance_is_a_chain(parents: Callable[[str], Path], tmp_path: Path) -> None:
    parent = open_checkpoint(parents("llama-gqa"))
    first = make(parent, "shortgpt", num_layers=2)
    apply.apply_plan(parents("llama-gqa"), first, tmp_path / "one")
    one = open_checkpoint(tmp_path / "one")
    second = make(one, "minitron-width", ffn_hidden_size=96)
    apply.apply_plan(tmp_path / "one", second, tmp_path / "two")
    two = open_checkpoint(tmp_path / "two")
    assert [entry["method"] for entry in two.pruning] == ["shortgpt", "minitron-width"]
    assert two.pruning[0] == one.pruning[0]
    entry = two.pruning[1]
    assert entry["parent"]["fingerprint"] == one.fingerprint() != parent.fingerprint()
    assert (entry["plan"], entry["statistics"]) == (second.hash, second.statistics)
    assert (entry["tokens"], entry["flops"]) == (192, 3 * one.shape.forward_flops(64))
    assert entry["calibration"]["calibrations"][0]["windows"] == [0, 1, 2]
    assert entry["versions"]["torch"] == importlib.metadata.version("torch")
    assert (two.iteration, two.release, two.shape) == (0, True, second.target)
    assert two.args["num_layers"] == 2 and two.args["ffn_hidden_size"] == 96
    assert two.args["consumed_train_samples"] == 0


def test_tokenizer_files_are_carried_along(parents: Callable[[str], Path], tmp_path: Path) -> None:
    parent = open_checkpoint(parents("llama-gqa"))
    apply.apply_plan(parents("llama-gqa"), make(parent, "shortgpt", num_layers=2), tmp_path / "pruned")
    pruned = open_checkpoint(tmp_path / "pruned")
    assert parent.huggingface is not None and pruned.huggingface is not None
    assert (pruned.huggingface / "tokenizer.json").read_bytes() == (parent.huggingface / "tokenizer.json").read_bytes()


def test_a_plan_for_another_parent_is_refused(
    parents: Callable[[str], Path], tiny_hf: Callable[..., Path], tmp_path: Path
) -> None:
    import_hf(tiny_hf("llama-gqa", layers=LAYERS, seed=1), tmp_path / "other")
    made = make(open_checkpoint(parents("llama-gqa")), "shortgpt", num_layers=2)
    with pytest.raises(PlanError, match="for another parent: expected the weights"):
        apply.apply_plan(tmp_path / "other", made, tmp_path / "pruned")
    with pytest.raises(PlanError, match="for another parent: expected ModelShape"):
        apply.apply_plan(parents("llama-mha-tied"), made, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_an_existing_result_and_a_truncated_parent_are_refused(parents: Callable[[str], Path], tmp_path: Path) -> None:
    made = make(open_checkpoint(parents("llama-gqa")), "shortgpt", num_layers=2)
    apply.apply_plan(parents("llama-gqa"), made, tmp_path / "pruned")
    with pytest.raises(MegatronPruneError, match="already exists"):
        apply.apply_plan(parents("llama-gqa"), made, tmp_path / "pruned")
    damaged = tmp_path / "damaged"
    shutil.copytree(parents("llama-gqa"), damaged)
    shard = next((damaged / "release").glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=shard.name):
        apply.apply_plan(damaged, made, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_small_blocks_make_the_same_weights(
    parents: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cuts across block borders: one row at a time, some blocks with nothing to keep."""
    parent = open_checkpoint(parents("llama-gqa"))
    made = make(parent, "random", **CUTS["random"][1])
    apply.apply_plan(parents("llama-gqa"), made, tmp_path / "large")
    monkeypatch.setattr(apply, "BLOCK_BYTES", 1000)
    apply.apply_plan(parents("llama-gqa"), made, tmp_path / "small")
    large, small = open_checkpoint(tmp_path / "large"), open_checkpoint(tmp_path / "small")
    assert large.fingerprint() == small.fingerprint()
    assert all(torch.equal(large.read(name), small.read(name)) for name in large.names)


def test_megatrons_second_name_for_the_depth_is_cut_too(tiny_parent: Path, tmp_path: Path) -> None:
    """Checkpoints of Megatron's own trainings hold ``encoder_num_layers``; it is what some of its tools read."""
    parent = open_checkpoint(tiny_parent)
    with CheckpointWriter(
        tmp_path / "parent", args={**parent.args, "encoder_num_layers": parent.shape.num_layers}, dtype=torch.float32
    ) as writer:
        for name in parent.names:
            writer.add(name, parent.spec(name).shape, [parent.read(name)])
    stored = open_checkpoint(tmp_path / "parent")
    apply.apply_plan(tmp_path / "parent", make(stored, "random", num_layers=2), tmp_path / "pruned")
    args = open_checkpoint(tmp_path / "pruned").args
    assert args["num_layers"] == args["encoder_num_layers"] == 2

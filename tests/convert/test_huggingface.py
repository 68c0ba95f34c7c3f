"""Import and export: bit-identical tensors, configs that transformers reads, and refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_prune.artifacts import read_json
from megatron_prune.checkpoint.layout import ModelShape, weights
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.convert import huggingface, safetensors_io
from megatron_prune.convert.config import args_from_config, config_from_args
from megatron_prune.convert.families import FAMILIES
from megatron_prune.convert.huggingface import export_hf, import_hf
from megatron_prune.errors import CheckpointError, MegatronPruneError
from megatron_prune.structured import plan
from megatron_prune.structured.apply import apply_plan
from tests import tiny
from tests.checkpoint import small
from tests.tiny import HF_MODELS


def tensors(folder):
    """Every tensor of a Hugging Face directory, read by safetensors."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        other = second[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("name", HF_MODELS)
@pytest.mark.parametrize("tp", [1, 2])
def test_export_after_import_is_bit_identical(name, tp, tiny_hf, tmp_path):
    source = tiny_hf(name)
    import_hf(source, tmp_path / "checkpoint", tensor_model_parallel_size=tp)
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_bits(tensors(source), tensors(tmp_path / "back"))
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    assert meaning(tmp_path / "back") == meaning(source)


def meaning(folder):
    """A config as transformers reads it, without derived values and stamps."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).to_dict()
    # transformers 5 puts rope_scaling into rope_parameters, and keeps no rope_theta of its own.
    return {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path", "rope_theta")}


@pytest.mark.parametrize("vocabulary", [1, 127, 129, 389])
@pytest.mark.parametrize("tied", [False, True])
def test_padded_vocabulary_is_cut_again(vocabulary, tied, tiny_hf, tmp_path):
    changes = {"vocab_size": vocabulary, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 0}
    source = tiny_hf("llama-gqa", layers=1, **changes)
    padding = {"make_vocab_size_divisible_by": 32, "tensor_model_parallel_size": 4}
    checkpoint = import_hf(source, tmp_path / "checkpoint", **padding)
    padded = -(-vocabulary // 128) * 128
    assert checkpoint.shape.padded_vocab_size == padded and checkpoint.args["vocab_size"] == vocabulary
    assert not checkpoint.read_rows("embedding.word_embeddings.weight", vocabulary, padded).any()
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_bits(tensors(source), tensors(tmp_path / "back"))


@pytest.mark.parametrize("block", [1, 100, 5000])
def test_small_blocks_and_shards(block, tiny_hf, tmp_path, monkeypatch):
    """Many source shards, blocks that split segments, many target shards."""
    source = tiny_hf("llama-gqa")
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    model.load_state_dict(tensors(source))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    monkeypatch.setattr(huggingface, "BLOCK_BYTES", block)
    import_hf(tmp_path / "sharded", tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back", max_shard_bytes=90_000)
    assert_same_bits(tensors(tmp_path / "sharded"), tensors(tmp_path / "back"))
    index = read_json(tmp_path / "back" / safetensors_io.INDEX)
    assert set(index["weight_map"].values()) == {f.name for f in (tmp_path / "back").glob("*.safetensors")}
    loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "back"))
    loaded.load_state_dict(tensors(tmp_path / "back"))


def test_dtype_casts_every_weight(tiny_hf, tmp_path):
    checkpoint = import_hf(tiny_hf("llama-gqa"), tmp_path / "checkpoint", dtype=torch.bfloat16)
    assert {checkpoint.spec(name).dtype for name in checkpoint.names} == {torch.bfloat16}
    assert checkpoint.args["params_dtype"] == torch.bfloat16
    embedding = tensors(tiny_hf("llama-gqa"))["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(checkpoint.read("embedding.word_embeddings.weight")[: len(embedding)], embedding)


def test_the_layout_inside_fused_weights(tiny_hf, tmp_path):
    """Written out by hand, from Megatron's description: groups of [queries; key; value], then gate over up."""
    source = tensors(tiny_hf("llama-gqa"))
    checkpoint = import_hf(tiny_hf("llama-gqa"), tmp_path / "checkpoint")
    q, k, v = (source[f"model.layers.1.self_attn.{x}_proj.weight"] for x in "qkv")
    d, groups, per_group = 12, 6, 2
    rows = []
    for g in range(groups):
        rows += [q[g * per_group * d : (g + 1) * per_group * d], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
    assert torch.equal(checkpoint.read("decoder.layers.1.self_attention.linear_qkv.weight"), torch.cat(rows))
    gate, up = (source[f"model.layers.1.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(checkpoint.read("decoder.layers.1.mlp.linear_fc1.weight"), torch.cat([gate, up]))


def test_the_tokenizer_is_found_by_later_stages(tiny_hf, tmp_path):
    checkpoint = import_hf(tiny_hf("llama-gqa"), tmp_path / "checkpoint")
    assert checkpoint.args["tokenizer_type"] == "HuggingFaceTokenizer"
    assert checkpoint.args["tokenizer_model"] == str(tmp_path / "checkpoint" / "huggingface")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(checkpoint.huggingface)("hello")["input_ids"]


def test_a_tokenizer_is_found_in_the_save_and_nowhere_else(tiny_hf, tmp_path):
    """Training copies the folder to its save; a path in the stored arguments is not followed."""
    parent = import_hf(tiny_hf("mistral-gqa"), tmp_path / "parent")
    assert parent.args["tokenizer_model"] == str(tmp_path / "parent" / "huggingface")
    (tmp_path / "run").mkdir()
    parent.directory.rename(tmp_path / "run" / "iter_0000007")
    assert open_checkpoint(tmp_path / "run").huggingface is None
    export_hf(tmp_path / "run", tmp_path / "bare")
    assert not (tmp_path / "bare" / "tokenizer.json").exists()
    assert read_json(tmp_path / "bare" / "config.json")["model_type"] == "llama"
    shutil.copytree(tmp_path / "parent" / "huggingface", tmp_path / "run" / "huggingface")
    export_hf(tmp_path / "run", tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert read_json(tmp_path / "hf" / "config.json")["model_type"] == "mistral"


def test_a_full_disk_leaves_no_export(tiny_hf, tmp_path, monkeypatch):
    import_hf(tiny_hf("llama-gqa"), tmp_path / "checkpoint")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_io, "write_file", fail)
    with pytest.raises(CheckpointError, match="no space left while writing .*hf"):
        export_hf(tmp_path / "checkpoint", tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_a_model_that_was_pretrained_here_is_exported(tmp_path):
    """No Hugging Face config came with it."""
    made = small.write(tmp_path / "made", small.ARGS | {"rotary_base": 5000, "max_position_embeddings": 99})
    export_hf(made, tmp_path / "hf")
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.rope_parameters["rope_theta"] == 5000 and config.max_position_embeddings == 99
    assert config.head_dim == 10 and config.num_key_value_heads == 2 and config.rms_norm_eps == 3e-4
    assert config.vocab_size == 125
    LlamaForCausalLM(config).load_state_dict(tensors(tmp_path / "hf"))


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 3e-4, 0.25])
def test_the_norms_epsilon_is_the_models_own_both_ways(epsilon):
    args = args_from_config(BASE | {"rms_norm_eps": epsilon})
    assert args["layernorm_epsilon"] == epsilon
    assert config_from_args(args, torch.float32)["rms_norm_eps"] == epsilon
    assert config_from_args(args, torch.float32, BASE | {"rms_norm_eps": 1e-2})["rms_norm_eps"] == epsilon


def test_an_epsilon_that_a_config_leaves_out_is_transformers_default():
    from transformers import LlamaConfig

    assert args_from_config(dict(BASE))["layernorm_epsilon"] == LlamaConfig(**BASE).rms_norm_eps


BASE = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 32.0, **LLAMA3}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 32.0, **LLAMA3}},
    ],
)
def test_scaled_rope_in_the_old_and_the_new_form(rope):
    args = args_from_config(BASE | rope)
    assert (args["rotary_base"], args["use_rope_scaling"], args["rope_scaling_factor"]) == (500000, True, 32.0)
    back = config_from_args(args, torch.bfloat16)
    assert back["rope_theta"] == 5e5 and back["rope_scaling"] == {"rope_type": "llama3", "factor": 32.0, **LLAMA3}
    assert back["rope_parameters"] == {"rope_type": "llama3", "factor": 32.0, "rope_theta": 5e5, **LLAMA3}
    assert back["torch_dtype"] == back["dtype"] == "bfloat16"


PLAIN_ROPE = [{"rope_theta": 1e4}, {}, {"rope_scaling": None}, {"rope_parameters": {"rope_theta": 1e4}}]


@pytest.mark.parametrize("rope", PLAIN_ROPE)
def test_plain_rope_in_the_old_and_the_new_form(rope):
    args = args_from_config(BASE | rope)
    assert args["rotary_base"] == 10000 and args["use_rope_scaling"] is False
    assert config_from_args(args, torch.float32)["rope_scaling"] is None


def test_a_width_that_heads_do_not_divide_is_exported_as_a_model_that_transformers_loads(tiny_hf, tmp_path):
    """transformers 5 refuses a Llama whose hidden size is not a multiple of its heads, as after width pruning."""
    parent = import_hf(tiny_hf("llama-gqa"), tmp_path / "parent")
    shape = dataclasses.replace(parent.shape, hidden_size=80)
    kept = plan.PruningPlan(
        method="by-hand", settings={}, seed=None, ratio=None, ratio_of="linears", source=parent.shape, target=shape,
        parent=parent.fingerprint(), kept_layers=(0, 1), kept_hidden=tuple(range(80)),
    )  # fmt: skip
    apply_plan(parent.root, kept, tmp_path / "cut")
    export_hf(tmp_path / "cut", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    # The same numbers in a Llama whose sizes are set after the check.
    config = transformers.LlamaConfig.from_pretrained(tiny_hf("llama-gqa"))
    object.__setattr__(config, "hidden_size", 80)
    llama = transformers.LlamaForCausalLM(config).double().eval()
    llama.load_state_dict(model.state_dict())
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, llama(tokens).logits)
    again = import_hf(tmp_path / "hf", tmp_path / "again")
    assert again.fingerprint() == open_checkpoint(tmp_path / "cut").fingerprint()


def test_head_size_of_its_own():
    args = args_from_config(BASE | {"head_dim": 32})
    assert args["kv_channels"] == 32 and config_from_args(args, torch.float32)["head_dim"] == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "qwen2_moe"},
            "model_type 'qwen2_moe' is not supported: expected one of llama, mistral, qwen2, ",
        ),
        ({"attention_bias": True}, "attention_bias=True and mlp_bias=False, but Megatron has one switch for both"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "'dynamic', expected default, linear, llama3 or yarn",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, "factor=2.5, .*whole numbers"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn without its factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "YaRN with mscale=0.7"),
        (
            {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}},
            "low_freq_factor=2",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (
            {"model_type": "qwen2", "layer_types": ["sliding"], "use_sliding_window": True},
            "layer_types=.*expected 2 of",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1, 2]}, "no_rope_layers=.*expected 2 zeros and ones"),
        ({"model_type": "gpt_neox", "use_parallel_residual": "yes"}, "use_parallel_residual=.yes"),
        # What a stranger could write there.
        ({"model_type": "qwen2", "layer_types": [[1], {}], "use_sliding_window": True}, "layer_types=.*expected 2 of"),
        ({"model_type": "qwen3", "max_window_layers": "2", "use_sliding_window": True}, "max_window_layers='2', exp"),
        ({"model_type": "smollm3", "no_rope_layers": [[], 1]}, "no_rope_layers=.*expected 2 zeros and ones"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval=0, expected a whole number"),
        ({"model_type": "starcoder2", "hidden_act": ["gelu"]}, r"the activation \['gelu'\], expected"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": "long"}},
            "original_max_position_embeddings='long', expected a",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_models_that_cannot_be_represented_are_refused(change, message, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(BASE | change))
    with pytest.raises(CheckpointError, match=message):
        import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("window", [None, 2048, 4096])
def test_a_sliding_window_without_effect_is_accepted(window):
    args = args_from_config(BASE | {"model_type": "mistral", "sliding_window": window})
    assert args["max_position_embeddings"] == 2048


def test_a_sliding_window_is_kept_through_an_import_within_it(tiny_hf, tmp_path):
    source = tiny_hf("mistral-gqa", sliding_window=64, layers=1)
    checkpoint = import_hf(source, tmp_path / "checkpoint", max_position_embeddings=64)
    assert checkpoint.args["max_position_embeddings"] == 64
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert meaning(tmp_path / "back") == meaning(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"add_qkv_bias": True, "qk_layernorm": True}, "qk_layernorm=True, .*no other supported family"),
        ({"swiglu": False}, "swiglu=False"),
        ({"normalization": "LayerNorm"}, "normalization=LayerNorm"),
        ({"position_embedding_type": "learned_absolute", "max_position_embeddings": 64}, "position_embedding_type"),
        ({"rotary_percent": 0.5, "qk_layernorm": True}, "=True"),
        ({"window_size": (4, 2)}, "window_size=.*, expected tokens on the left and 0"),
    ],
)
def test_exports_that_no_llama_can_say_are_refused(change, message, tmp_path):
    made = small.write(tmp_path / "made", small.ARGS | change)
    with pytest.raises(CheckpointError, match=message):
        export_hf(made, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.fixture
def damaged(tiny_hf, tmp_path):
    return shutil.copytree(tiny_hf("llama-gqa"), tmp_path / "hf")


def test_a_truncated_file_is_refused(damaged, tmp_path):
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged"):
        import_hf(damaged, tmp_path / "checkpoint")


def test_pickled_weights_are_not_read(damaged, tmp_path):
    (damaged / "model.safetensors").rename(damaged / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        import_hf(damaged, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(95)}), r"model.norm.weight has shape \[95\]"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}),
            "not part of its model, LlamaForCausalLM: .*q_proj.bias",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(96, dtype=torch.int8)}), "stored as I8"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(192, 96, dtype=torch.float16)}),
            "differ in type",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, damaged, tmp_path):
    content = load_file(damaged / "model.safetensors")
    change(content)
    save_file(content, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        import_hf(damaged, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_tensors_of_several_types_are_cast_where_a_type_is_given(damaged, tmp_path):
    content = load_file(damaged / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    content[name] = content[name].half()
    save_file(content, damaged / "model.safetensors", metadata={"format": "pt"})
    made = import_hf(damaged, tmp_path / "checkpoint", dtype=torch.bfloat16)
    fused = made.read("decoder.layers.0.mlp.linear_fc1.weight")
    gate = content["model.layers.0.mlp.gate_proj.weight"]
    assert torch.equal(fused, torch.cat([gate.bfloat16(), content[name].bfloat16()]))


def test_old_rotary_buffers_and_a_tied_output_layer_are_ignored(tiny_hf, tmp_path):
    source = shutil.copytree(tiny_hf("llama-mha-tied"), tmp_path / "hf")
    content = load_file(source / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    extra["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
    save_file(content | extra, source / "model.safetensors", metadata={"format": "pt"})
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "back")
    assert_same_bits(content, tensors(tmp_path / "back"))


@pytest.mark.parametrize("name", ["../model.safetensors", "gone.safetensors"])
def test_an_index_that_leaves_the_directory_is_refused(name, damaged, tmp_path):
    shutil.move(damaged / "model.safetensors", tmp_path / "model.safetensors")
    (damaged / safetensors_io.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="is missing"):
        import_hf(damaged, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["./nothing", "nothing", "/a/b"])
def test_what_is_neither_a_directory_nor_a_hub_name_is_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="neither a directory nor a name"):
        import_hf(name, tmp_path / "checkpoint")


def test_a_hub_name_is_downloaded(tiny_hf, tmp_path, monkeypatch):
    import huggingface_hub

    def download(name, allow_patterns):
        if name != "owner/model":
            raise OSError("offline")
        assert "*.safetensors" in allow_patterns and not any(p.endswith((".bin", "*")) for p in allow_patterns)
        return str(tiny_hf("llama-gqa"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    import_hf("owner/model", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="could not be downloaded from the Hugging Face Hub: offline"):
        import_hf("owner/other", tmp_path / "other")


def test_every_weight_comes_from_exactly_the_rows_of_the_model(tiny_hf):
    """The table covers every row of every tensor once."""
    shape = ModelShape.from_args(args_from_config(read_json(tiny_hf("llama-gqa") / "config.json")))
    covered = {}
    for layout in weights(shape):
        for segment in huggingface.segments(layout, shape, tiny.VOCABULARY, FAMILIES["llama"]):
            if segment.name is not None:
                covered.setdefault(segment.name, []).extend(range(segment.start, segment.stop))
    source = tensors(tiny_hf("llama-gqa"))
    assert covered.keys() == source.keys()
    for name, rows in covered.items():
        assert sorted(rows) == list(range(len(source[name]))), name


def test_the_tool_both_ways(tiny_hf, tmp_path):
    def tool(*words):
        command = [sys.executable, str(small.TOOLS / "convert_checkpoint.py"), *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True)

    done = tool("import", "--hf", tiny_hf("llama-gqa"), "--save", tmp_path / "checkpoint", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "checkpoint").args["bf16"] is True
    done = tool("export", "--load", tmp_path / "checkpoint" / "release", "--hf", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert tensors(tmp_path / "back")["model.norm.weight"].dtype == torch.bfloat16
    done = tool("export", "--load", tmp_path / "checkpoint", "--hf", tmp_path / "back")
    assert done.returncode == 2 and "already exists" in done.stderr and "Traceback" not in done.stderr


def test_an_existing_target_is_refused(tiny_hf, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").write_text("keep")
    with pytest.raises(MegatronPruneError, match="already exists"):
        import_hf(tiny_hf("llama-gqa"), tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint" / "mine").read_text() == "keep"

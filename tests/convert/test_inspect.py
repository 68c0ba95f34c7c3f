"""The inspector shows what was written."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from megatron_prune.__main__ import main
from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.checkpoint.writer import CheckpointWriter
from megatron_prune.convert import inspect
from megatron_prune.convert.huggingface import import_hf
from tests.checkpoint import small


@pytest.fixture
def half_zero(tmp_path):
    """Every other column of layer 2's fc2 is zero."""
    chain = [{"method": "magnitude", "ratio": 0.5}]
    with CheckpointWriter(tmp_path / "made", args=small.ARGS, dtype=torch.float32, pruning=chain) as writer:
        for name, tensor in small.tensors().items():
            if name == "decoder.layers.2.mlp.linear_fc2.weight":
                tensor[:, ::2] = 0
            writer.add(name, tensor.shape, tensor.split(10))
    return tmp_path / "made"


@pytest.fixture
def tool(capsys):
    """The verb in this process (a new process costs seconds of imports)."""

    def run(*words):
        code = main(["inspect", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_json_has_everything(half_zero, tool):
    code, out, _ = tool(half_zero, "--json", "--sparsity", "--verify-integrity")
    assert code == 0
    found = json.loads(out)
    checkpoint = open_checkpoint(half_zero)
    assert found["fingerprint"] == checkpoint.fingerprint()
    assert found["tensors"].keys() == set(checkpoint.names)
    entry = found["tensors"]["decoder.layers.2.mlp.linear_fc2.weight"]
    assert entry["shape"] == [32, 48] and entry["dtype"] == "float32" and entry["shards"] == 4
    assert entry["zeros"] == 32 * 24 and entry["sparsity"] == 0.5
    assert entry["stored_as"] == ["decoder.layers.mlp.linear_fc2.weight"]
    assert found["parameters"] == checkpoint.shape.parameters()
    assert found["parameters_nonzero"] == found["parameters"] - 32 * 24
    assert found["sparsity_linear"] == 32 * 24 / checkpoint.shape.linear_parameters()
    assert found["pruning"] == [{"method": "magnitude", "ratio": 0.5}]
    assert found["args"]["hidden_size"] == 32 and found["args"]["params_dtype"] == "float32"


def test_the_tree_shows_like_layers_once(half_zero, tool):
    code, out, _ = tool(half_zero, "--sparsity")
    assert code == 0
    lines = [line.lstrip("│├└─ ") for line in out.splitlines()]
    assert "layers 0 to 1" in lines and "layer 2" in lines and "layer 3" in lines
    assert "mlp.linear_fc2.weight  [32, 48] float32, 4 shards, 50.00% zero" in lines
    assert "magnitude" in lines and any("hidden_size 32, " in line for line in lines)


def test_full_hash_sees_every_number_whatever_the_blocks(tmp_path, tool):
    first, second = (small.write(tmp_path / str(rows), block_rows=rows) for rows in (3, 1000))
    hashes = [json.loads(tool(path, "--json", "--full-hash")[1])["full_hash"] for path in (first, second)]
    assert hashes[0] == hashes[1]
    changed = small.tensors()
    changed["output_layer.weight"][77, 13] += 1  # not among the elements of the fingerprint
    with CheckpointWriter(tmp_path / "changed", args=small.ARGS, dtype=torch.float32) as writer:
        for name, tensor in changed.items():
            writer.add(name, tensor.shape, [tensor])
    other = open_checkpoint(tmp_path / "changed")
    assert other.fingerprint() == open_checkpoint(first).fingerprint()
    assert other.full_hash() != hashes[0]


def test_without_a_scan_no_sparsity_is_claimed(half_zero, tool):
    assert "zero" not in tool(half_zero)[1].replace(str(half_zero), "")


def test_flags_that_megatron_forgets(tiny_hf, tmp_path):
    made = import_hf(tiny_hf("llama-gqa-tied-rope"), tmp_path / "made", dtype=torch.bfloat16)
    words = " ".join(inspect.flags(made))
    for flag in ("--bf16", "--use-rope-scaling", "--rope-scaling-factor 32.0", "--norm-epsilon 0.0003"):
        assert flag in words
    assert "ignores --rope-scaling-factor 32.0" in inspect.warnings(made)[0]
    plain = import_hf(tiny_hf("llama-gqa"), tmp_path / "plain")
    assert "rope" not in " ".join(inspect.flags(plain)) and inspect.warnings(plain) == []


def test_flags_are_megatrons(tiny_hf, tmp_path):
    """Megatron's own parser accepts them, and they agree with the checkpoint."""
    code = (
        "import sys, json\n"
        "from megatron_prune.engine import cpu; cpu.prepare()\n"
        "from megatron.training.arguments import parse_args\n"
        "args = parse_args()\n"
        "print('FOUND', json.dumps({k: getattr(args, k) for k in json.loads(sys.stdin.read())}))\n"
    )
    made = import_hf(tiny_hf("llama-mha-rope"), tmp_path / "made")
    names = ["use_rope_scaling", "rope_scaling_factor", "layernorm_epsilon", "init_method_std", "vocab_size"]
    words = [word for flag in inspect.flags(made) for word in flag.split()]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], input=json.dumps(names), capture_output=True, text=True, check=True
    )
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FOUND"))[6:])
    assert found == {name: made.args[name] for name in names}


def test_what_is_no_checkpoint_is_refused(tmp_path, tool):
    code, out, err = tool(tmp_path / "nothing")
    assert code == 2 and out == "" and "expected the directory of a Megatron checkpoint" in err

"""Verdicts for 8, 64 and 1024 GPUs, and a wrong configuration of each kind caught with its reason."""

from __future__ import annotations

import re

import pytest

from megatron_prune.checkpoint.reader import open_checkpoint
from megatron_prune.cli.cluster_commands import preflight_main, split_preflight
from megatron_prune.errors import CommandLineError, UsageError
from tests.convert import family_models
from tests.preflight import commands
from tests.preflight.commands import FP8, LLAMA, finding, reasons, train

SP = "--tensor-model-parallel-size 2 --sequence-parallel"
WIDE = "--hidden-size 2432 --ffn-hidden-size 6144"
DEEP = "--num-layers 12"
# name: (GPUs, command line); each of them runs.
GOOD = {
    "parent on 8": ("--gpus 8", train(SP)),
    "parent on 64": ("--gpus 64", train(SP)),
    "parent on 1024": ("--gpus 1024", train("--tensor-model-parallel-size 4 --sequence-parallel")),
    "parent on 64, FP8": ("--gpus 64", train(SP, FP8)),
    "width 62.5% on 8": ("--gpus 8", train("", WIDE)),
    "width 62.5% on 1024": ("--gpus 1024", train(SP, WIDE)),
    "12 layers on 64, PP 2": (
        "--gpus 64",
        train("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettttttt|tttttL", DEEP),
    ),
    "virtual stages": (
        "--gpus 64", train(f"{SP} --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 4"),
    ),
    "context parallel": ("--gpus 64", train(f"{SP} --context-parallel-size 2")),
    "without Apex": ("--gpus 64 --installed te", train(SP)),
}  # fmt: skip
# name: (preflight's flags, command line, what the reason says)
BAD = {
    "unknown flag": ("--gpus 8", train(SP, "--no-such-flag"), "arguments: .*--no-such-flag"),
    "world": (
        "--gpus 64 --gpus-per-node 4", train("--tensor-model-parallel-size 24"),
        "arguments: --tensor-model-parallel-size.* the number of ranks, 64, got .*",
    ),
    "batch": ("--gpus 8", train(SP, "--global-batch-size 6 --stream-range 0:600"),
              r"--global-batch-size: expected a multiple of 4, got 6"),
    "nothing installed": ("--gpus 64 --installed none", train(SP), "arguments: --transformer-impl: .*pip install"),
    "range": ("--gpus 8", train(SP, "--stream-range 0:51201"), "arguments: --stream-range.*a multiple of --global"),
    "layers by stages": ("--gpus 64", train("--pipeline-model-parallel-size 8", "--num-layers 12"),
                         "arguments: .*layers should be divisible"),
    "heads": (
        "--gpus 48", train("--tensor-model-parallel-size 3"),
        "dimensions: --tensor-model-parallel-size 3 does not divide --num-attention-heads 32",
    ),
    "groups": (
        "--gpus 64",
        train("--tensor-model-parallel-size 8", "--num-attention-heads 24 --kv-channels 128 --num-query-groups 12"),
        "parallel-size 8 does not divide --num-query-groups 12",
    ),
    "ffn": (
        "--gpus 16", train("--tensor-model-parallel-size 2", "--ffn-hidden-size 14337"),
        "parallel-size 2 does not divide --ffn-hidden-size 14337",
    ),
    "vocabulary": (
        "--gpus 64", train("--tensor-model-parallel-size 8", "--padded-vocab-size 128257"),
        "parallel-size 8 does not divide --padded-vocab-size 128257",
    ),
    "FP8 and 16": ("--gpus 64", train(SP, FP8, "--ffn-hidden-size 4728"), "arguments: --fp8-preset.*ffn-hidden-size"),
    "FP8 on Ampere": (
        "--gpus 64 --gpu a100-80gb", train(SP, FP8),
        r"arguments: --fp8-preset: expected .* compute capability 8\.0 has, got current",
    ),
    "MXFP8 on Hopper": ("--gpus 64", train(SP, "--fp8-format e4m3 --fp8-recipe mxfp8"), "arguments: .*Blackwell"),
    "memory": ("--gpus 8", train(""), r"memory: stage 0 needs .* of 85\.5 GB.*(recompute|parallel)"),
    "host memory": (
        "--gpus 64 --host-memory-gb 400", train(SP, "--dist-ckpt-optim-fully-reshardable"),
        "host memory: .*gathering 385.*leave --dist-ckpt-optim-fully-reshardable out",
    ),
    "too short a corpus": ("--gpus 64 --corpus-tokens 400M", train(SP), "data: .*0.400B tokens declared, 0.419B"),
    "positions": (
        "--gpus 8", train(SP, "--max-position-embeddings 4096"),
        r"arguments: --seq-length: expected at most 4096, got 8192",
    ),
    "overlap": ("--gpus 8", [w for w in train(SP) if w != "--overlap-grad-reduce"],
                "arguments: Must use --overlap-param-gather with --overlap-grad-reduce"),
    "vocabulary unknown": ("--gpus 8", [w for w in train(SP) if w not in ("--padded-vocab-size", "128256")],
                           "arguments: --padded-vocab-size is not given"),
    "calibrate with virtual stages": (
        "--gpus 8",
        ["calibrate", *LLAMA.split(), "--load", "/not/here", "--calibration-data-path", "/not/here", "--output",
         "s.safetensors", "--num-layers-per-virtual-pipeline-stage", "4"],
        "arguments: --num-layers-per-virtual-pipeline-stage: expected .*, got 4",
    ),
}  # fmt: skip
# Runs, but inefficiently.
POOR = {
    "TP across nodes": ("--gpus 64 --gpus-per-node 4", train("--tensor-model-parallel-size 8"), "beyond a node of 4"),
    "bubble": ("--gpus 1024", train(f"{SP} --pipeline-model-parallel-size 4"), "the pipeline waits 43%"),
    "stages": ("--gpus 64", train(f"{SP} --pipeline-model-parallel-size 4", "--num-layers 8"),
               r"stages: layers \[2, 2, 2, 2\].*--pipeline-model-parallel-layout"),
    "tiles": ("--gpus 64", train(SP, "--ffn-hidden-size 4736", "--hidden-size 1544"), "dimensions: no multiples of 64"),
}  # fmt: skip
# Undecided: `parent on 64` takes 50 GB of an H100's 85.5 without its reserve.
UNDECIDED = {
    "a little below full": (
        "--gpus 64 --reserve-gb 30",
        train(SP),
        "memory: .* GB below full.*three steps of this command",
    ),
    "a little above full": (
        "--gpus 64 --reserve-gb 40",
        train(SP),
        "memory: .* GB above full.*three steps of this command",
    ),
    "host": ("--gpus 64 --host-memory-gb 53", train(SP), "host memory: .* of 53"),
}


@pytest.fixture(scope="module")
def answered(distributed) -> dict[str, dict]:
    """All of the above in one rank."""
    asked = {name: [*flags.split(), *line] for name, (flags, line) in GOOD.items()}
    asked |= {name: [*flags.split(), *line] for name, (flags, line, _) in (BAD | POOR | UNDECIDED).items()}
    [found] = distributed(commands.answers, 1, list(asked.values()))
    return dict(zip(asked, found, strict=True))


@pytest.mark.parametrize("name", GOOD)
def test_what_will_run(name, answered) -> None:
    answer = answered[name]
    assert (answer["verdict"], answer["code"]) == ("yes", 0), reasons(answer, "no") + reasons(answer, "look")
    assert finding(answer, "memory")["facts"]["stages"]


@pytest.mark.parametrize("name", BAD)
def test_what_will_not_and_why(name, answered) -> None:
    answer = answered[name]
    assert (answer["verdict"], answer["code"]) == ("no", 1)
    assert re.search(BAD[name][2], reasons(answer, "no"), re.DOTALL), reasons(answer, "no")


@pytest.mark.parametrize("name", POOR)
def test_what_will_run_badly(name, answered) -> None:
    answer = answered[name]
    assert re.search(POOR[name][2], reasons(answer, "look")), answer["findings"]
    assert (answer["verdict"], answer["code"]) == ("yes", 0)  # it runs


@pytest.mark.parametrize("name", UNDECIDED)
def test_what_an_estimate_does_not_decide(name, answered) -> None:
    """Three answers, three exit codes; the reason says what would decide."""
    answer = answered[name]
    assert (answer["verdict"], answer["code"]) == ("look", 3)
    assert re.search(UNDECIDED[name][2], reasons(answer, "look"), re.DOTALL), reasons(answer, "look")


def test_what_was_built_is_the_model(answered) -> None:
    """8.03B parameters; 30.5 GB of weights, gradients and shards of optimizer state on each of 64 GPUs."""
    answer = answered["parent on 64"]
    assert answer["parameters"] == 8_030_261_248
    [stage] = finding(answer, "memory")["facts"]["stages"]
    parameters = 4_015_263_744  # per rank: half of the matrices, all of the norms
    assert stage["weights"] == 2 * parameters and stage["gradients"] == 4 * parameters
    assert stage["optimizer"] == 12 * parameters // 32
    spent = finding(answer, "time")["facts"]
    a_token = 6 * (8_030_261_248 - 128256 * 4096 - 65 * 4096)  # of every matrix but the embedding
    a_token += 3 * 4 * 8192 * 4096 * 32  # attention's two products, not causal
    assert spent["flops"] == a_token * 8192 * 512
    assert spent["gpu_hours"] == pytest.approx(spent["flops"] * 100 / (989e12 * 0.4) / 3600)


def test_what_is_installed_there_is_said(answered) -> None:
    """Simulated for this machine, which has neither package."""
    container, plain = (finding(answered[name], "installed") for name in ("parent on 64", "without Apex"))
    assert container["reason"].startswith("--installed te,apex,flash-attn:") and not container["facts"]["off"]
    assert plain["facts"]["off"] == ["gradient accumulation fusion (NVIDIA Apex)"]


def test_uneven_stages_are_those_asked_for(answered) -> None:
    stages = finding(answered["12 layers on 64, PP 2"], "stages")
    assert stages["facts"]["layers"] == [7, 5] and stages["verdict"] == "yes"


def test_masks_corpora_and_checkpoints_that_are_here_are_read(
    distributed, tiny_parent, tiny_corpus, tiny_hf, tmp_path
) -> None:
    shape = open_checkpoint(tiny_parent).shape
    start = ["pretrain", "--pretrained-checkpoint", str(tiny_parent)]
    recipe = "--seq-length 32 --micro-batch-size 1 --global-batch-size 8 --lr 1e-3 --bf16".split()
    recipe += ["--data-path", str(tiny_corpus), "--save", str(tmp_path / "run")]
    sparse = ["sparsify", "--load", str(tiny_parent), "--method", "wanda", "--pattern", "2:4"]
    sparse += ["--calibration-data-path", str(tiny_corpus), "--calibration-seq-length", "32", "--save", "x"]
    alone = ["sparsify", "--method", "magnitude", "--ratio", "0.5", "--save", "x", "--load"]
    large = tmp_path / "70b.flags"  # of a model that fits on no GPU
    large.write_text(LLAMA.replace("-layers 32", "-layers 80").replace("-size 4096", "-size 8192"))
    before = sorted(tmp_path.rglob("*"))
    lines = [
        ["--gpus", "4", *start, *recipe, "--stream-range", "0:80"],
        ["--gpus", "4", *start, *recipe, "--stream-range", "0:8000000"],
        ["--gpus", "4", *start, *recipe, "--stream-range", "0:80", "--masks", str(tiny_parent)],
        ["--gpus", "4", "pretrain", "--pretrained-checkpoint", str(tiny_parent), "--num-layers", "2",
         *LLAMA.split()[2:], *recipe, "--stream-range", "0:80", "--max-position-embeddings", "8192"],
        ["--gpus", "4", *sparse, "--tensor-model-parallel-size", "2", "--calibration-sequences", "4"],
        ["--gpus", "4", *sparse, "--calibration-sequences", "4000000"],
        ["--gpus", "1", "pretrain", "--shape-from", str(tmp_path), *recipe, "--stream-range", "0:80"],
        ["--gpus", "1", *alone, str(tiny_parent)],
        ["--gpus", "1", "--model", str(large), *alone, "/not/here"],
    ]  # fmt: skip
    [found] = distributed(commands.answers, 1, lines)
    assert [answer["verdict"] for answer in found] == ["yes", "no", "no", "no", "yes", "no", "no", "yes", "yes"], found
    assert found[0]["parameters"] == shape.parameters()
    assert finding(found[0], "start")["verdict"] == "yes"
    assert "does not wrap" in reasons(found[1], "no")
    assert "masks:" in reasons(found[2], "no")
    assert "--num-layers: expected" in reasons(found[3], "no")
    assert "got 4000000 (" in reasons(found[5], "no")
    assert "arguments:" in reasons(found[6], "no")
    assert "start:" in reasons(found[7], "yes") and "start:" in reasons(found[8], "not checked")
    assert all("no model is built" in finding(answer, "memory")["reason"] for answer in found[7:])
    assert sorted(tmp_path.rglob("*")) == before  # preflight writes nothing


def test_a_checkpoint_that_is_not_here_may_be_described(distributed, tmp_path) -> None:
    model = tmp_path / "model.flags"
    model.write_text(f"# Llama 3.1 8B\n{LLAMA}")
    recipe = train("--tensor-model-parallel-size 2", model="")[1:]
    lines = [
        ["--gpus", "64", "--model", str(model), "pretrain", *recipe, "--pretrained-checkpoint", "/not/here",
         "--masks", "/not/here/masks"],
        ["--gpus", "64", "--model", str(model), "pretrain", *recipe, "--shape-from=/not/here"],
    ]  # fmt: skip
    [[pruned, scratch]] = distributed(commands.answers, 1, lines)
    assert pruned["verdict"] == scratch["verdict"] == "yes", pruned["findings"]
    assert pruned["parameters"] == scratch["parameters"] == 8_030_261_248
    unchecked = reasons(pruned, "not checked")
    assert "--pretrained-checkpoint /not/here" in unchecked and "--masks /not/here/masks" in unchecked
    assert "--shape-from /not/here" in reasons(scratch, "not checked")
    held = [finding(answer, "memory")["facts"]["stages"][0]["masks"] for answer in (pruned, scratch)]
    assert held == [3_489_660_928, 0]  # one byte for each weight of half the linears


def test_the_config_of_a_published_model_is_enough(distributed, tmp_path) -> None:
    """Before a checkpoint that is not here, and for a run from random weights."""
    recipe = train("", "--seq-length 1024", model="")[1:]
    hf = {name: str(family_models.write_published(tmp_path / name, name)) for name in family_models.PUBLISHED}
    lines = [
        ["--gpus", "64", "--hf", hf["Qwen3-8B"], "pretrain", *recipe, "--pretrained-checkpoint", "/not/here"],
        ["--gpus", "64", "--hf", hf["Minitron-4B"], "evaluate", "--load", "/not/here", "--data-path", "/not/here",
         "--output", str(tmp_path / "scores.json"), "--seq-length", "4096", "--bf16"],
        ["--gpus", "8", "--hf", f"{hf['gpt2']}/config.json", "pretrain", *recipe],
    ]  # fmt: skip
    [found] = distributed(commands.answers, 1, lines)
    assert [answer["verdict"] for answer in found] == ["yes"] * 3, found
    assert [one["parameters"] for one in found] == [
        family_models.PUBLISHED[name][1] for name in ("Qwen3-8B", "Minitron-4B", "gpt2")
    ]
    assert "--pretrained-checkpoint /not/here" in reasons(found[0], "not checked")


def test_a_launcher_before_the_verb_is_skipped() -> None:
    words = "--gpus 16 torchrun --nnodes 2 -m megatron_prune pretrain --lr 1".split()
    assert split_preflight(words) == (["--gpus", "16"], "pretrain", ["--lr", "1"])


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("--gpus 8 plan --load X", "preflight"),
        ("--gpus 8", "VERB: expected one of pretrain"),
        ("--gpus 12 pretrain --lr 1", "--gpus"),
        ("--gpus 0 pretrain --lr 1", "--gpus"),
        ("--gpus 8 pretrain --shape-from /not/here", "--model.*not/here"),
        ("--gpus 8 calibrate --load /not/here", "--model.*not/here"),
        ("--gpus 8 --model /no/file pretrain --shape-from /not/here", "--model"),
        ("--gpus 8 --hf no/model pretrain --shape-from /not/here", "--hf: expected a config.json.*got no/model"),
        ("--gpus 8 --hf x --model y pretrain --shape-from /not/here", "--model, --hf: expected at most one"),
        ("--gpus 8 --mfu 40 pretrain --lr 1", "--mfu"),
        ("--gpus 8 --corpus-tokens many pretrain --lr 1", "--corpus-tokens"),
        ("--gpus 8 --installed te,cuda pretrain --lr 1", "--installed: expected .*, got cuda"),
    ],
)
def test_what_preflight_itself_refuses(line, names) -> None:
    with pytest.raises((UsageError, CommandLineError), match=names):
        preflight_main(line.split())

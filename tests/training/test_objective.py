"""What an account says about an objective: which settings are compared, and that a cache is paid for once."""

from __future__ import annotations

import argparse

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prune.checkpoint.layout import ModelShape
from megatron_prune.errors import AccountError, UsageError
from megatron_prune.training import lineage, objective
from megatron_prune.training.account import ACCOUNT, Account, AccountRecorder, total_flops
from megatron_prune.training.recomputation import recomputed_flops

CACHE = {"hash": "c1", "range": [100, 300], "dtype": "float16", "bytes": 12_345, "flops": 2_000}
GIVEN = {"alpha": [1.0, 0.5], "temperature": 2.0, "kl": "forward", "teacher": "weights of the parent"}


def account(**fields: object) -> Account:
    given: dict[str, object] = {
        "start": "random", "stream": None, "range": [0, 16], "permutation_seed": 1, "global_batch_size": 4,
        "micro_batch_size": 4, "seq_length": 8, "steps": 4, "seed": 1, "parameters": 10, "flops_executed": 700,
        "flops_theoretical": 700, "unique_tokens": 128, "arguments": {}, "initial": None, "lineage": [],
    }  # fmt: skip
    return Account(**given | fields)  # type: ignore[arg-type]


def test_a_run_whose_account_says_nothing_else_learns_from_the_text_alone():
    assert objective.of({}) == objective.of(vars(account())) == {"name": "lm"}
    assert objective.words(objective.LM) == "lm" and account().flops_teacher == 0


def test_the_cache_that_was_read_is_no_setting_but_its_k_is():
    online, cached = objective.distill(**GIVEN), objective.distill(**GIVEN, top_k=64, cache=CACHE)
    other = objective.distill(**GIVEN, top_k=64, cache=CACHE | {"hash": "c2", "range": [0, 300]})
    assert objective.settings(cached) == objective.settings(other)
    assert objective.settings(cached) != objective.settings(online)
    wider = objective.distill(**GIVEN, top_k=64, cache=CACHE | {"dtype": "float32"})
    assert objective.settings(cached) != objective.settings(wider)
    assert objective.settings(cached) != objective.settings(objective.distill(**GIVEN, top_k=128, cache=CACHE))
    assert objective.settings(online) != objective.settings(objective.distill(**GIVEN | {"kl": "reverse"}))
    assert objective.words(cached) == "distill: alpha 1 to 0.5, temperature 2, forward KL, cache of the top 64"
    assert objective.words(online) == "distill: alpha 1 to 0.5, temperature 2, forward KL, online"


def test_a_cache_that_does_not_say_what_it_cost_is_refused():
    with pytest.raises(KeyError, match="flops"):
        objective.distill(**GIVEN, top_k=64, cache={name: CACHE[name] for name in ("hash", "range", "bytes")})


def test_an_account_that_does_not_say_how_it_was_distilled_is_refused():
    stated = objective.distill(**GIVEN, top_k=64, cache=CACHE)
    for damaged, missing in (
        ({}, None),
        ({"alpha": 1.0}, "name"),
        ({name: value for name, value in stated.items() if name != "kl"}, "kl"),
        (stated | {"cache": {"hash": "c1"}}, "range, bytes, flops"),
    ):
        if missing is None:
            assert objective.of({"objective": damaged}) == objective.LM
            continue
        with pytest.raises(AccountError, match=f"expected .*{missing}"):
            objective.of({"objective": damaged})


def test_a_cache_is_paid_for_once_and_an_online_teacher_per_run():
    cached = {"objective": objective.distill(**GIVEN, top_k=64, cache=CACHE), "flops_teacher": 160}
    online = {"objective": objective.distill(**GIVEN), "flops_teacher": 160}
    assert objective.flops_in_cache(CACHE, 16) == 160
    assert objective.paid([cached, cached]) == 2_000
    assert objective.paid([online, online]) == 320
    assert objective.paid([cached, online, cached, {}]) == 2_160


def test_a_distilled_stage_counts_its_teacher_and_says_so():
    asked = objective.distill(**GIVEN)
    made = vars(account(objective=asked, flops_teacher=160))
    stage = lineage.trained(made, run="here", end="w")
    assert stage["flops"] == 860 and stage["objective"] == asked
    plain = lineage.trained(vars(account()), run="here", end="w")
    assert plain["flops"] == 700 and "objective" not in plain


def test_a_run_resumes_only_with_its_own_objective(tmp_path):
    account(objective=objective.distill(**GIVEN)).write(tmp_path)
    account(objective=objective.distill(**GIVEN)).adopt(tmp_path)
    with pytest.raises(UsageError, match="holds a run with objective") as refused:
        account().adopt(tmp_path)
    assert "lm" in str(refused.value) and (tmp_path / ACCOUNT).exists()


def test_flops_that_a_machine_repeated_are_entries_of_their_own(tmp_path):
    """Replayed steps count with their recomputation, and with their teacher if it ran in the job."""
    online, cached = objective.distill(**GIVEN), objective.distill(**GIVEN, top_k=64, cache=CACHE)
    for asked, replayed in ((objective.LM, 200 + 50), (online, 200 + 50 + 100), (cached, 200 + 50)):
        made = account(objective=asked, flops_executed=800, flops_teacher=0 if asked == objective.LM else 400)
        made.flops_recomputed, made.replayed = 200, [[2, 2]]
        AccountRecorder(made, tmp_path).finish(final={}, parameters_nonzero=10)
        assert made.flops_replayed == replayed
        assert total_flops(vars(made)) == 800 + made.flops_teacher  # equal FLOPs counts every sample once


def test_what_is_recomputed_follows_megatrons_flags(monkeypatch):
    shape = ModelShape.from_args({
        "num_layers": 8, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "padded_vocab_size": 128,
        "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope",
    })  # fmt: skip
    mlp, attention = 2 * 16 * 3 * 32 * 64, 2 * 2 * 16 * 16 * 32
    layer = shape.layer_flops(0, 16)
    assert layer == mlp + attention + 2 * 16 * 4 * 32 * 32
    config = TransformerConfig(num_layers=8, hidden_size=32, num_attention_heads=4, pipeline_model_parallel_size=2,
                               virtual_pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)  # fmt: skip
    monkeypatch.setattr("megatron.training.arguments.core_transformer_config_from_args", lambda args: config)
    for granularity, method, number, modules, expected in (
        (None, None, None, ["core_attn"], 0),
        ("full", "uniform", 2, None, 8 * layer),
        ("full", "block", 1, None, 4 * layer),  # one of two in each of four virtual stages
        ("full", "block", 9, None, 8 * layer),
        ("selective", None, None, None, 8 * attention),
        ("selective", None, None, ["mlp", "layernorm"], 8 * mlp),
        ("selective", None, None, ["layernorm"], 0),
    ):
        args = argparse.Namespace(
            seq_length=16, recompute_granularity=granularity, recompute_method=method, recompute_num_layers=number,
            recompute_modules=modules, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2,
        )  # fmt: skip
        assert recomputed_flops(args, shape) == expected

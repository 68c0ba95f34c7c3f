"""Every argument of Megatron's model, set to another value: its checkpoint alone has the same loss, or is refused."""

from __future__ import annotations

from tests.checkpoint import argument_guard

# In every run: one that this package restores, one that is refused, one that splits the model (with dropout).
SAMPLE = {"window_size": "equal", "softmax_type": "refused", "tensor_model_parallel_size": "equal"}


def test_a_sample(distributed, tmp_path):
    [found] = distributed(argument_guard.examine, 1, list(SAMPLE), str(tmp_path))
    assert {one.argument: one.outcome for one in found} == SAMPLE, found

"""A teacher's cache (``teacher_cache.py``) as the targets of a training run.

The data loader reads a sample's targets together with its tokens, so that its workers read ahead. They reach the first
tensor-parallel rank of the last stage with the batch; from there they go to the other tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_prune.data.streams import TEACHER_PREFIX
from megatron_prune.training.distillation_loss import TopKTargets
from megatron_prune.training.teacher_cache import DTYPES, IDS, LOG_PROBABILITIES, REST, TeacherCache


class WithTargets(torch.utils.data.Dataset[dict[str, Any]]):
    """The ``samples`` of a range with what the teacher says on each: the tensors of ``TeacherCache.read`` under their
    names after ``TEACHER_PREFIX``."""

    def __init__(self, samples: Any, cache: Any):
        self.samples, self.cache = samples, cache

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        targets = self.cache.read(self.samples.sample(int(position)))
        return {**self.samples[position], **{TEACHER_PREFIX + name: tensor for name, tensor in targets.items()}}


class CachedTargets:
    """The ``TargetProvider`` of a run that reads ``cache``, whose data set is ``WithTargets``."""

    def __init__(self, cache: TeacherCache):
        self.cache = cache

    def targets(self, batch: Mapping[str, Any]) -> TopKTargets:
        """The targets of this rank's share of a micro-batch. Collective over the tensor-parallel ranks."""
        from megatron.core import parallel_state as mpu

        taught, shape = self.cache.taught, tuple(batch["labels"].shape)  # [b, s]
        group, device = mpu.get_tensor_model_parallel_group(), batch["labels"].device
        found: dict[str, torch.Tensor] = {}
        for name, dtype, last in (
            (IDS, torch.int32, (taught.k,)), (LOG_PROBABILITIES, DTYPES[taught.dtype], (taught.k,)),
            (REST, torch.float32, ()),
        ):  # fmt: skip
            if mpu.get_tensor_model_parallel_rank() == 0:
                found[name] = batch[TEACHER_PREFIX + name].contiguous()
            else:
                found[name] = torch.empty(*shape, *last, dtype=dtype, device=device)
            if group.size() > 1:
                content = found[name].view(torch.uint8)
                torch.distributed.broadcast(content, mpu.get_tensor_model_parallel_src_rank(), group=group)
        return TopKTargets(found[IDS], found[LOG_PROBABILITIES], found[REST])

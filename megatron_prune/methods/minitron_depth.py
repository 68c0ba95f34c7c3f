"""Minitron-depth (2407.14679, 2408.11796): remove the run of consecutive layers that affects the loss least.

To remove n = L − K layers there are K + 1 candidates: layers i … i+n−1, for every start i. The model is run without
each of them on the calibration text, and the candidate with the lowest LM loss is chosen (among equal losses, the
lower start). The reference minimizes |loss − dense loss|, which would penalize a candidate that is better than the
dense model.

``--score-by task`` instead maximizes accuracy on a multiple-choice task of the user's own (format:
data/multiple_choice.py). The reference's |score − dense score| would penalize improvements here too. Few examples
produce many ties: the lower LM loss breaks them, then the lower start. So every candidate is run on both texts, and
the plan keeps both numbers.

All candidates are scored in one load of the model, by skipping layers (calibration/scoring.py).
"""

from __future__ import annotations

from megatron_prune.errors import UsageError
from megatron_prune.methods.base import DEPTH, Method, PruningRequest, Selection, TaskFile
from megatron_prune.methods.options import METRICS, MinitronDepthOptions


class MinitronDepth(Method[MinitronDepthOptions]):
    dimensions = DEPTH

    def task(self, settings: MinitronDepthOptions) -> TaskFile | None:
        path, metric = settings.task_data, settings.task_metric
        if settings.score_by == "task":
            if path is None:
                raise UsageError("--task-data", got="nothing", expected="a file of examples with --score-by task")
            return TaskFile(path, metric or METRICS[0])
        for flag, value in (("--task-data", path), ("--task-metric", metric)):
            if value is not None:
                raise UsageError(flag, got=f"{value} alone", expected="--score-by task with it")
        return None

    def needs_scores(self, settings: MinitronDepthOptions) -> bool:
        return True

    def needs(self, settings: MinitronDepthOptions) -> tuple[str, ...]:
        return ()

    def candidates(self, request: PruningRequest[MinitronDepthOptions]) -> list[Selection]:
        layers, kept = request.source.num_layers, request.target.num_layers
        removed = layers - kept
        return [Selection((*range(start), *range(start + removed, layers))) for start in range(kept + 1)]


METHOD = MinitronDepth()

"""ShortGPT (2403.03853): remove the layers that change the direction of the residual stream least.

Block Influence of layer l is 1 − the mean over all token positions of the cosine between the block's input and
output (residual included). The K layers with the highest stay, in their original order.
"""

from __future__ import annotations

from megatron_prune.methods.base import DEPTH, PruningRequest, RankingMethod, Selection
from megatron_prune.methods.options import NoOptions
from megatron_prune.methods.ranking import keep_highest


class ShortGPT(RankingMethod[NoOptions]):
    dimensions = DEPTH

    def needs(self, settings: NoOptions) -> tuple[str, ...]:
        return ("block_influence",)

    def select(self, request: PruningRequest[NoOptions]) -> Selection:
        # A sum over tokens ranks like their mean.
        layers, near = keep_highest(request.statistics["block_influence"], request.target.num_layers, "layer")
        return Selection(layers, near_ties=tuple(near))


METHOD = ShortGPT()

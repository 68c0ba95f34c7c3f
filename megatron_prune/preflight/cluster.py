"""The machines that a job is meant for: how many GPUs, of which kind, how many share a node."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.errors import UsageError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: bytes of memory, dense bf16 FLOPs a second (no sparsity), compute capability.

    Memory is what the driver reports, FLOPs are NVIDIA's data sheets for the SXM form.
    """

    memory: int
    flops: float
    capability: tuple[int, int]


MIB = 2**20
GPUS = {
    "a100-80gb": Gpu(81_920 * MIB, 312e12, (8, 0)),
    "h100": Gpu(81_559 * MIB, 989e12, (9, 0)),
    "h200": Gpu(143_771 * MIB, 989e12, (9, 0)),
    "b200": Gpu(183_359 * MIB, 2250e12, (10, 0)),
}


@dataclass(frozen=True)
class Cluster:
    """``gpus`` GPUs of one ``kind``, ``per_node`` of them in a node."""

    gpus: int
    kind: str = "h100"
    per_node: int = 8

    def __post_init__(self) -> None:
        if self.gpus < 1 or self.per_node < 1:
            raise UsageError("--gpus, --gpus-per-node", given=f"{self.gpus}, {self.per_node}", allowed="at least 1")
        if self.kind not in GPUS:
            raise UsageError("--gpu", given=self.kind, allowed=", ".join(GPUS))
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise UsageError("--gpus", given=self.gpus, allowed=f"whole nodes of {self.per_node}")

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.kind]

    @property
    def local_ranks(self) -> int:
        """Ranks on each node of the job."""
        return min(self.gpus, self.per_node)

    def __str__(self) -> str:
        return f"{self.gpus} x {self.kind}"

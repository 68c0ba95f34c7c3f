"""The residual stream of the calibration windows, carried through a pipeline stage block by block.

All windows of this data-parallel replica are held on the CPU, each [s, 1, h] (in a sequence-parallel model this
rank's tokens of each, [s/TP, 1, h]); one at a time is on the device. Blocks
run inside Megatron's own ``GPTModel.forward`` with everything else taken out, so that embedding, rotary embeddings,
attention masks and precision contexts are those of any other forward pass. Stages hand windows on point to point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import unwrap_model

from megatron_prune.engine import fp8, spec


class Stream:
    """What the next block of this stage reads: ``states``, one [s, 1, h] a window, on the CPU."""

    def __init__(self, stage: Any, windows: Sequence[torch.Tensor]):
        """``windows`` are this replica's, int64 [s + 1] each; only their number matters on later stages."""
        self._model = unwrap_model(stage)  # without the casts of its wrapper, which are for whole models
        self._windows = windows
        self.states: list[torch.Tensor] = []

    @torch.no_grad()
    def enter(self, seq_length: int) -> None:
        """Embed the windows on the first stage; receive them from the stage before on the others."""
        if mpu.is_pipeline_first_stage(ignore_virtual=True):
            self.states = []
            with _only(self._model, []):
                for window in self._windows:
                    tokens = window[None, :-1].cuda()  # [1, s]
                    positions = torch.arange(seq_length, device=tokens.device)[None]  # [1, s]
                    self.states.append(self._model(tokens, positions, None).cpu())
            return
        config = self._model.config
        dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
        group = mpu.get_pipeline_model_parallel_group()
        tokens_here = seq_length // spec.sequence_ranks(config)
        received = torch.empty(
            tokens_here, 1, config.hidden_size, dtype=dtype, device=torch.cuda.current_device()
        )  # [s, 1, h] or [s/TP, 1, h]
        self.states = []
        for _ in self._windows:
            torch.distributed.recv(received, group=group, group_src=group.rank() - 1)
            self.states.append(received.clone() if received.device.type == "cpu" else received.cpu())

    @torch.no_grad()
    def run(self, block: Any) -> None:
        """Run ``block`` on every window and forget what comes out: its hooks have seen what goes in."""
        fp8.cast_weights_again(block)
        with _only(self._model, [block]):
            for state in self.states:
                self._forward(state)

    @torch.no_grad()
    def advance(self, block: Any) -> None:
        """Replace the states by what ``block`` makes of them, with its weights as they are now."""
        fp8.cast_weights_again(block)
        with _only(self._model, [block]):
            for number, state in enumerate(self.states):
                self.states[number] = self._forward(state).cpu()

    def leave(self) -> None:
        """Send the states to the next stage, and forget them."""
        group = mpu.get_pipeline_model_parallel_group()
        for state in self.states:
            torch.distributed.send(state.cuda().contiguous(), group=group, group_dst=group.rank() + 1)
        self.states = []

    def _forward(self, state: torch.Tensor) -> torch.Tensor:
        state = state.cuda()
        self._model.set_input_tensor(state)  # where a stage that does not embed looks
        output: torch.Tensor = self._model(None, None, None, decoder_input=state)
        return output


@contextlib.contextmanager
def _only(model: Any, blocks: Sequence[Any]) -> Iterator[None]:
    """``model`` gives back what these blocks make of its input: no other block, final norm or output layer."""
    decoder = model.decoder
    whole = decoder.layers, decoder.final_layernorm, model.post_process
    decoder.layers, decoder.final_layernorm, model.post_process = torch.nn.ModuleList(blocks), None, False
    try:
        yield
    finally:
        decoder.layers, decoder.final_layernorm, model.post_process = whole
        model.set_input_tensor(None)

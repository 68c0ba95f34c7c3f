"""Run while launch/Dockerfile.ngc is built: what the image compiled works with the numpy that pip installed.

Imports alone do not show it: torch imports with a numpy that it cannot convert. A build has no GPU, and Transformer
Engine's kernels need one, so that its extension is called without a kernel then; with a GPU a layer runs too.
"""

import importlib

import megatron.core  # noqa: F401
import numpy
import torch

import megatron_prune  # noqa: F401


def main() -> None:
    import transformer_engine.pytorch as te  # of the image

    array = torch.from_numpy(numpy.ones(1))
    if array.item() != 1 or array.numpy().sum() != 1:
        raise SystemExit(f"torch.from_numpy(numpy.ones(1)): expected 1, got {array}")
    importlib.import_module("transformer_engine_torch").get_cublasLt_version()
    if torch.cuda.is_available():
        out = te.Linear(16, 16).cuda()(torch.ones(16, 16, device="cuda"))
        if not out.isfinite().all():
            raise SystemExit("Transformer Engine's Linear: expected finite values")
    print(f"numpy {numpy.__version__}, torch {torch.__version__}: arrays convert, Transformer Engine answers")


if __name__ == "__main__":
    main()

"""DeepSpeed on CPU ranks: no operator is compiled, and no warning of its own is an error."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn

is_installed = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not is_installed, reason="deepspeed is not installed")


def deepspeed() -> Any:
    """The package, on this CPU rank."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
    warnings.simplefilter("ignore")
    import deepspeed as package

    gc.freeze()  # every ZeRO-3 engine collects garbage, and would look at all of torch each time
    logging.disable(logging.WARNING)
    # NOTE: `deepspeed.comm.torch` is PyTorch itself there. A killed compile of the operator for
    # shared memory would leave a lock on which every later run waits.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    # PyTorch computes in fp16 on a CPU, which DeepSpeed takes for impossible.
    accelerator = sys.modules["deepspeed.accelerator"].get_accelerator()  # type: ignore[attr-defined]
    accelerator.is_fp16_supported = lambda: True
    return package


def config(stage: int, dtype: torch.dtype, accumulate: int, **zero: Any) -> dict[str, Any]:
    """What a CPU rank needs beside the stage. zero: further options of "zero_optimization"."""
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # else 1, and the plain twin has none
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    if dtype == torch.bfloat16:
        found["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if dtype == torch.float16:
        scaling = {"initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}
        found["fp16"] = {"enabled": True, **scaling}
    return found


def engine(
    model: nn.Module,
    stage: int,
    dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    **zero: Any,
) -> Any:
    """A DeepSpeed engine around `model`, with SGD on what it trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.5)
    options = config(stage, dtype, accumulate, **zero)
    return deepspeed().initialize(model=model, optimizer=optimizer, config=options)[0]

"""torchtitan's own train entry on CPUs that gloo joins. It knows GPUs only: what it asks of one is answered here.

Each rank writes into the folder of TITAN_RECORD what its steps were (losses and norms), the batch and the gradients of
the first step, before they are clipped, and logits of the trained model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._utils

torch.set_num_threads(1)
torch._utils._get_available_device_type = lambda: "cpu"
for name, answer in {
    "current_device": 0,
    "get_device_name": "CPU",
    "get_device_properties": SimpleNamespace(total_memory=1 << 30),
    "reset_peak_memory_stats": None,
    "empty_cache": None,
    "memory_stats": {},
}.items():
    setattr(torch.cpu, name, lambda *_, _answer=answer: _answer)

from torchtitan import train  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.distributed import utils  # noqa: E402

from flash_xlstm.integrations.torchtitan import trainer  # noqa: E402

utils.set_pg_timeouts = lambda **_: None  # its barrier names GPUs
steps, first = [], {}


def log(self, step, loss, largest_loss, norm, **_):
    steps.append({"step": step, "loss": loss, "largest_loss": largest_loss, "norm": norm})


def log_validation(self, loss, step):
    steps.append({"step": step, "validation": loss})


def clip(parameters, *args, whole=utils.clip_grad_norm_, **kwargs):
    if "gradients" not in first:
        first["gradients"] = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone() for p in parameters]
    return whole(parameters, *args, **kwargs)


def prepare(input_dict, labels, cp, prepared=trainer.with_labels):
    first.setdefault("batch", {**input_dict, "labels": labels})
    return prepared(input_dict, labels, cp)


def close(self, closed=trainer.XLSTMTrainer.close):
    if self.parallel_dims.cp == 1:
        with torch.no_grad():
            first["logits"] = self.model_parts[0].eval()(torch.arange(24).view(2, 12))
    closed(self)


trainer.XLSTMTrainer.close = close
metrics.MetricsProcessor.log, metrics.MetricsProcessor.log_validation = log, log_validation
utils.clip_grad_norm_, trainer.with_labels = clip, prepare

if __name__ == "__main__":
    train.main()
    folder, rank = Path(os.environ["TITAN_RECORD"]), os.environ["RANK"]
    (folder / f"steps-{rank}.json").write_text(json.dumps(steps))
    torch.save(first, folder / f"first-{rank}.pt")

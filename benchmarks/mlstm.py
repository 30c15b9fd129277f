"""Subject mlstm: forward, and forward + backward, beside the plain PyTorch chunkwise form in the same run."""

from __future__ import annotations

import argparse

import torch

from flash_xlstm import ops, reference
from run import median_time_ms, peak_memory_bytes

# name: batch, seq, heads, dqk, dv
SETTINGS = {
    "tfla-2048": (32, 2048, 8, 256, 512),
    "tfla-65536": (1, 65536, 8, 256, 512),
    "small": (4, 1024, 4, 64, 128),
    "square": (8, 2048, 8, 128, 128),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FORMS = {"flash_xlstm": ops.mlstm, "plain_pytorch_chunkwise": reference.mlstm_chunkwise}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--device", default="cuda")


def inputs(setting: str, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """q, k, v, i, f: standard normal, gates in float32, forget gates around 3."""
    batch, seq, heads, dqk, dv = SETTINGS[setting]
    generator = torch.Generator(device).manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    q, k, v = (new(batch, seq, heads, d).to(dtype) for d in (dqk, dqk, dv))
    return [q, k, v, new(batch, seq, heads), new(batch, seq, heads) + 3.0]


def flops(setting: str, backward: bool, chunk: int = 64) -> float:
    """Multiplications and additions of the products, over whole chunks of 64 tokens, nothing computed twice."""
    batch, seq, heads, dqk, dv = SETTINGS[setting]
    per_token = chunk * (dqk + dv) + 2 * dqk * dv
    if backward:
        per_token += chunk * (3 * dqk + 2 * dv) + 4 * dqk * dv
    return 2.0 * batch * seq * heads * per_token


def run(args: argparse.Namespace) -> list[dict]:
    device = torch.device(args.device)
    rows = []
    for setting in args.settings:
        for dtype_name in args.dtypes:
            tensors = inputs(setting, DTYPES[dtype_name], device)
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            dh = torch.randn_like(tensors[2])

            for form_name in args.forms:
                form = FORMS[form_name]

                def forward(form=form, tensors=tensors):
                    with torch.no_grad():
                        return form(*tensors)

                def forward_backward(form=form, leaves=leaves, dh=dh):
                    return torch.autograd.grad(form(*leaves), leaves, dh)

                for name, call in (("forward", forward), ("forward+backward", forward_backward)):
                    row = {"setting": setting, "dtype": dtype_name, "pass": name, "form": form_name}
                    try:
                        row["time_ms"] = median_time_ms(call, device)
                        row["tflops"] = flops(setting, name != "forward") / row["time_ms"] / 1e9
                        if device.type == "cuda":
                            row["peak_memory_mib"] = peak_memory_bytes(call) / 2**20
                    except torch.cuda.OutOfMemoryError:
                        row["error"] = "out of memory"
                        torch.cuda.empty_cache()
                    rows.append(row)
    return rows

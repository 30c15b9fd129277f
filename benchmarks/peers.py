"""The mLSTM's peers: each peer's call, layout and dtypes."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, order=True)
class Point:
    """One setting of the mLSTM."""

    batch: int
    seq: int
    heads: int
    dqk: int
    dv: int

    @property
    def rows(self) -> int:
        """Tokens times heads."""
        return self.batch * self.seq * self.heads

    def flops(self, backward: bool) -> float:
        """Operations of the products at chunks of 128 tokens, nothing computed twice; a multiply-add is two."""
        count = importlib.import_module("flash_xlstm.ops.flops").mlstm_flops
        sizes = self.batch, self.seq, self.heads, self.dqk, self.dv
        return float(count(*sizes) + (count(*sizes, backward=True) if backward else 0))

    def bytes_moved(self, backward: bool, item: int) -> float:
        """q, k, v, i, f read and h written; backward also reads q, k, v, i, f, dh and writes dq, dk, dv, di, df. Gates
        are float32."""
        per_row = item * (2 * self.dqk + 2 * self.dv) + 8
        if backward:
            per_row += item * (4 * self.dqk + 3 * self.dv) + 16
        return float(self.rows * per_row)

    def state_bytes(self, chunk: int, item: int) -> float:
        """One c for each chunk."""
        return self.rows / chunk * self.dqk * self.dv * item


Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    load: Callable[[], Call]  # imports the package
    layout: str  # seq_first: (batch, seq, heads, dim); heads_first: (batch, heads, seq, dim); gla; attention; mamba2
    chunk: int  # chunk of the states that it keeps in memory, for the estimate; 0: none
    state_item: int = 4
    triton: bool = False  # compiles per setting


def _ours() -> Call:
    return importlib.import_module("flash_xlstm.ops").mlstm


def _ours_sig() -> Call:
    return importlib.import_module("flash_xlstm.ops").mlstm_sig


def _plain() -> Call:
    return importlib.import_module("flash_xlstm.reference").mlstm_chunkwise


def _mlstm_kernels(name: str, chunk_size: int) -> Callable[[], Call]:
    def load() -> Call:
        kernel = importlib.import_module("mlstm_kernels.torch").get_mlstm_kernel(f"chunkwise--{name}")
        # torch.compile, which compiles its gate sums, gives up after 8 shapes
        torch._dynamo.config.recompile_limit = 1024
        return lambda q, k, v, i, f: kernel(q, k, v, i, f, chunk_size=chunk_size)

    return load


def _simple_gla() -> Call:
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    # its autotuner measures each configuration for 20 ms, not 100
    testing = importlib.import_module("triton.testing")
    if not isinstance(testing.do_bench, functools.partial):
        testing.do_bench = functools.partial(testing.do_bench, warmup=5, rep=20)
    return lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0]


def _cudnn_attention() -> Call:
    attention = importlib.import_module("torch.nn.attention")

    def call(q, k, v):
        with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call


def _mamba2() -> Call:
    # The SSD op is Triton and Python. The package's __init__ imports compiled modules, and is not run.
    if "mamba_ssm" not in sys.modules:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None:
            raise ModuleNotFoundError("No module named 'mamba_ssm'")
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return lambda x, dt, a, b, c: scan(x, dt, a, b, c, chunk_size=256)


PEERS = {
    "flash_xlstm": Peer(_ours, "seq_first", chunk=128, state_item=2),
    "flash_xlstm_sig": Peer(_ours_sig, "seq_first", chunk=128, state_item=2),
    "tfla": Peer(_mlstm_kernels("triton_xl_chunk", 128), "heads_first", chunk=128, triton=True),
    "simple_gla": Peer(_simple_gla, "gla", chunk=64, triton=True),
    "cudnn_attention": Peer(_cudnn_attention, "attention", chunk=0),
    "mamba2": Peer(_mamba2, "mamba2", chunk=256, triton=True),
    "tfla_limit_chunk": Peer(_mlstm_kernels("triton_limit_chunk", 64), "heads_first", chunk=64, triton=True),
    "tfla_siging": Peer(_mlstm_kernels("triton_xl_chunk_siging", 128), "heads_first", chunk=128, triton=True),
    "plain_pytorch": Peer(_plain, "seq_first", chunk=64, state_item=16),
}

OTHER_WORK = ("attention", "mamba2")  # layouts of peers that compute another function of the same width


def other_heads(name: str, point: Point) -> int:
    """Heads of such a peer: attention's heads of 128, or Mamba-2's of 64 at twice the width, as in its layers."""
    return point.heads * point.dv // 128 if PEERS[name].layout == "attention" else 2 * point.heads * point.dv // 64


def refusal(name: str, point: Point) -> str | None:
    """The reason for which a peer does not run a setting, or None."""
    if name.startswith("tfla"):
        # their kernels compute a state's offset in 32 bits, and would write elsewhere beyond
        state = (point.seq // PEERS[name].chunk + 1) * point.dqk * point.dv
        if (point.batch * point.heads - 1) * state >= 2**31:
            return "its offsets of the states overflow 32 bits"
    if PEERS[name].layout == "attention":
        if point.heads * point.dv % 128:
            return "heads x dv is no multiple of 128"
        seconds = 2.0 * point.batch * point.seq**2 * point.heads * point.dv / 6e14
        if seconds > 0.15:
            return f"quadratic in seq: about {seconds:.2f} s a forward call"
    return None


def memory_estimate(name: str, point: Point, backward: bool, item: int) -> float:
    """A rough estimate of the peak bytes: inputs and outputs, one more copy where layouts differ, the kept states."""
    states = point.state_bytes(PEERS[name].chunk, PEERS[name].state_item) if PEERS[name].chunk else 0.0
    return point.bytes_moved(backward, item) * 1.3 + states * (2 if backward else 1)


def tensors(
    name: str, point: Point, dtype: torch.dtype, device: torch.device | str, forget_gate: float = 3.0
) -> list[Tensor]:
    """The peer's inputs, contiguous in its layout: standard normal, f around `forget_gate`; i and f in float32."""
    torch.manual_seed(0)
    new = lambda *shape, dtype=dtype: torch.randn(*shape, dtype=dtype, device=device)  # noqa: E731
    b, s, h = point.batch, point.seq, point.heads
    layout = PEERS[name].layout
    if layout == "attention":
        return [new(b, other_heads(name, point), s, 128) for _ in range(3)]
    if layout == "mamba2":  # x, dt, A, B, C: small steps, decay rates of 1 to 16, one group with a state of 64
        heads, state = other_heads(name, point), 64
        dt = F.softplus(new(b, s, heads, dtype=torch.float32) - 4.0)
        rates = -torch.linspace(1.0, 16.0, heads, device=device)
        return [new(b, s, heads, 64), dt, rates, new(b, s, 1, state), new(b, s, 1, state)]
    lead = (b, h, s) if layout == "heads_first" else (b, s, h)
    products = [new(*lead, d) for d in (point.dqk, point.dqk, point.dv)]
    i, f = new(*lead, dtype=torch.float32), new(*lead, dtype=torch.float32) + forget_gate
    return [*products, F.logsigmoid(f)] if layout == "gla" else [*products, i, f]

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import os
import subprocess
import sys

import pytest
import torch

import flash_xlstm.ops
import flash_xlstm.training


def run(code: str, **environment: str) -> str:
    """The output of a fresh interpreter, or its messages on failure."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_build_info():
    info = flash_xlstm.build_info()
    assert set(info) == {
        "version", "commit", "cuda", "architectures", "compiler", "cpu_isa", "torch_built", "torch_running",
    }  # fmt: skip
    assert all(isinstance(value, str) for value in info.values())
    assert info["version"] == flash_xlstm.__version__ == importlib.metadata.version("flash-xlstm")
    assert info["torch_running"] == torch.__version__
    assert info["compiler"] and info["cpu_isa"] and info["torch_built"] and info["commit"]
    assert bool(info["cuda"]) == bool(info["architectures"])
    info["version"] = "changed"
    assert flash_xlstm.build_info()["version"] != "changed"


def test_every_operator_has_cpu_and_cuda_kernels_and_a_fake():
    # A CPU-only build has the CUDA entry too, which raises that there are no kernels.
    families = ("mlstm", "mlstm_sig", "soft_cap")
    for name in (*families, *(f"{family}_backward" for family in families), "mlstm_step", "mlstm_prefill"):
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"flash_xlstm::{name}", key), (name, key)


def test_core_needs_only_torch_and_numpy():
    """A forward, a backward and a step with every optional package blocked."""
    print(
        run("""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "safetensors", "tokenizers", "tqdm", "matplotlib", "pytest"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
import torch, flash_xlstm
from flash_xlstm import nn, ops, reference
q, k, v = (torch.randn(1, 9, 2, 4, requires_grad=True) for _ in range(3))
i, f = (torch.randn(1, 9, 2, requires_grad=True) for _ in range(2))
h, state = ops.mlstm(q, k, v, i, f, return_final_state=True)
h.sum().backward()
with torch.no_grad():
    ops.mlstm_step(q[:, 0], k[:, 0], v[:, 0], i[:, 0], f[:, 0], tuple(t.detach() for t in state))
flash_xlstm.build_info()
assert not {"transformers", "tqdm", "matplotlib"} & set(sys.modules)
""")
    )


def test_works_where_no_gpu_can_be_seen():
    """A package with CUDA kernels neither needs a driver nor initializes one."""
    assert run(
        """
import torch
from flash_xlstm import ops
print(ops.soft_cap(torch.ones(3), 1.0).sum().item() > 2.2, torch.cuda.is_initialized())
""",
        CUDA_VISIBLE_DEVICES="",
    ) == "True False"  # fmt: skip


def test_import_is_light():
    """It imports nothing else, not even torch. The ops import neither the model nor the compiler."""
    assert run("import sys, flash_xlstm; print('torch' in sys.modules or 'numpy' in sys.modules)") == "False"
    loaded = "[name for name in ('transformers', 'torch._inductor', 'flash_xlstm.models') if name in sys.modules]"
    assert run(f"import sys, flash_xlstm.nn; print({loaded})") == "[]"


@pytest.mark.parametrize(
    "code",
    [
        "import flash_xlstm; flash_xlstm.ops.mlstm, flash_xlstm.nn.mLSTMLayer, flash_xlstm.reference.soft_cap",
        "import flash_xlstm; assert flash_xlstm.__version__ == flash_xlstm.build_info()['version']",
        "from flash_xlstm import __version__, build_info, nn, ops, reference",
        "from flash_xlstm.ops import mlstm; import torch; torch.ops.flash_xlstm.mlstm",
        "from flash_xlstm import distributed; distributed.fsdp; assert callable(distributed.parallelize)",
        "import flash_xlstm; assert not hasattr(flash_xlstm, 'nonsense')",
        "import flash_xlstm; assert {'ops', 'nn', 'build_info', '__name__'} <= set(dir(flash_xlstm))",
    ],
)
def test_names_are_there_at_first_use(code):
    run(code)


def test_no_submodule_hides_a_function():
    run("""
import importlib, pkgutil, flash_xlstm.distributed as package
for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"{package.__name__}.{module.name}")
assert all(callable(getattr(package, name)) for name in package.__all__)
""")


def test_ops_are_compiled_at_their_first_use():
    run("""
import torch, flash_xlstm
f = torch.compile(lambda x: flash_xlstm.ops.soft_cap(x, 2.0), backend="eager", fullgraph=True)
x = torch.randn(5)
assert torch.equal(f(x), flash_xlstm.ops.soft_cap(x, 2.0))
""")


@pytest.mark.parametrize("package", [flash_xlstm, flash_xlstm.training])
def test_type_checkers_see_the_names(package):
    (block,) = (node for node in ast.parse(inspect.getsource(package)).body if isinstance(node, ast.If))
    homes = {name.asname: part.module for part in block.body for name in part.names}
    assert sorted(homes) == sorted(package.__all__)
    for name, home in homes.items():
        value = getattr(package, name)
        assert value is getattr(sys.modules[home], name, None) or value is sys.modules[f"{home}.{name}"]


def test_is_typed():
    files = importlib.metadata.files("flash-xlstm") or []
    package = os.path.dirname(flash_xlstm.__file__)
    assert os.path.exists(os.path.join(package, "py.typed")) or any(str(f).endswith("py.typed") for f in files)

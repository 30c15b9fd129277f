"""Makes a repository for Hugging Face `kernels`: `python hub/build.py OUT`, in an environment with torch and cmake.

OUT/build/VARIANT holds what `kernels.get_local_kernel(OUT)` loads, of CUDA where nvcc is found (FLASH_XLSTM_CUDA as in
any build). The operators' namespace is the kernel's id: its name, its backend and the commit, so that several versions
can be loaded into one process. OUT/build.toml describes it in the form of kernel-builder.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = "2.11"  # the stable ABI's version, TORCH_TARGET_VERSION of CMakeLists.txt
VERSION = 0  # of the repository: 0 is the hub's number for what may still change
OPS = """import torch

from . import {kernel}  # noqa: F401 - registers the operators

ops = torch.ops.{kernel}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{kernel}::{{op_name}}"
"""


def command(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def configured(folder: Path, name: str) -> str:
    """An entry of CMake's cache, or ""."""
    lines = (folder / "CMakeCache.txt").read_text().splitlines()
    return next((line.partition("=")[2] for line in lines if line.startswith(f"{name}:")), "")


def compile_module(folder: Path, kernel: str) -> Path:
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "FLASH_XLSTM_KERNEL": kernel,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": command(sys.executable, "-m", "pybind11", "--cmakedir"),
    }
    flags = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *flags], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    return folder / f"{kernel}.abi3.so"


def cuda_version(folder: Path) -> str:
    """The CUDA release of a configured build, as 13.0, or ""."""
    compiler = configured(folder, "CMAKE_CUDA_COMPILER")
    if not compiler or compiler.endswith("NOTFOUND"):
        return ""
    return command(compiler, "--version").rpartition("release ")[2].partition(",")[0]


def capabilities(architectures: str) -> list[str]:
    """CMake's 80-real;90a-real;90-virtual as 8.0, 9.0a and 9.0+PTX."""
    found = []
    for architecture in architectures.split(";"):
        number, _, kind = architecture.partition("-")
        digits, letter = number.rstrip("a"), "a" if number.endswith("a") else ""
        found.append(f"{digits[:-1]}.{digits[-1]}{letter}" + ("+PTX" if kind == "virtual" else ""))
    return found


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    commit = command("git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*").replace("-", "_")
    with_cuda = os.environ.get("FLASH_XLSTM_CUDA") != "0" and bool(os.environ.get("CUDACXX") or shutil.which("nvcc"))
    backend = "cuda" if with_cuda else "cpu"
    kernel, build = f"_flash_xlstm_{backend}_{commit}", out / f"objects-{backend}"
    module = compile_module(build, kernel)
    cuda = cuda_version(build) if with_cuda else ""

    kind = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    variant = out / "build" / f"torch-stable-abi{TORCH.replace('.', '')}-{kind}-{platform.machine()}-linux"
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(ROOT / "hub" / "flash_xlstm", variant, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(module, variant)
    (variant / "_ops.py").write_text(OPS.format(kernel=kernel))
    about: dict[str, object] = {"type": backend}
    if cuda:
        about["archs"] = capabilities(configured(build, "CMAKE_CUDA_ARCHITECTURES"))
    metadata = {
        "name": "flash-xlstm",
        "id": kernel,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": about,
        "digest": {"algorithm": "sha256", "files": digests(variant)},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    shutil.copy(ROOT / "hub" / "build.toml", out)
    print(variant)


if __name__ == "__main__":
    main()

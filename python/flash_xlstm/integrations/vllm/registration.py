"""What the plugin changes in vLLM, in one table, and the check that this vLLM has it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

SUPPORTED = "0.32 to 0.33"
_SUPPORTED = ((0, 32), (0, 33))
ARCHITECTURE = "xLSTMForCausalLM"
MODEL_TYPE = "xlstm"
BACKEND = "FLASH_XLSTM"
OPERATOR = "vllm::flash_xlstm_mlstm"

_HERE = "flash_xlstm.integrations.vllm"

# Every symbol of vLLM that the plugin changes. Only the first is documented for plugins.
PATCHED = {
    "models": ("vllm", "ModelRegistry.register_model"),
    "model_settings": ("vllm.model_executor.models.config", "MODELS_CONFIG_MAP"),
    "arch_convertors": ("vllm.transformers_utils.model_arch_config_convertor", "MODEL_ARCH_CONFIG_CONVERTORS"),
    "config_classes": ("vllm.transformers_utils.config", "_CONFIG_REGISTRY"),
    "config_modules": ("vllm.transformers_utils.configs", "_CLASS_TO_MODULE"),
    "backends": ("vllm.v1.attention.backends.registry", "MambaAttentionBackendEnum"),
    "attention_ops": ("vllm.config.compilation", "CompilationConfig._attention_ops"),
}

_logger = logging.getLogger("vllm.flash_xlstm")  # below vLLM's logger, which has the handler


def find_patched() -> dict[str, Any]:
    """The symbols of `PATCHED` in the installed vLLM.

    Raises:
        ImportError: vLLM or one of them is absent. The line names it, the installed version and the supported range.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ImportError(f'flash_xlstm serves on vLLM {SUPPORTED}; install it with: pip install "flash-xlstm[vllm]"')
    found = {}
    for name, (module, path) in PATCHED.items():
        try:
            symbol: Any = importlib.import_module(module)
            for part in path.split("."):
                symbol = getattr(symbol, part)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"flash_xlstm serves on vLLM {SUPPORTED}; the installed version, {_version()}, has no {module}.{path}"
            ) from error
        found[name] = symbol
    return found


def _version() -> str:
    return getattr(importlib.import_module("vllm"), "__version__", "unknown")


def register() -> None:
    """Makes vLLM serve checkpoints of model type ``xlstm``. Calls after the first change nothing.

    vLLM calls it in each of its processes. It imports neither the model nor the kernels.

    Raises:
        ImportError: as :func:`find_patched`.
    """
    vllm = find_patched()
    release = tuple(int(part) for part in _version().split(".")[:2] if part.isdigit())
    if not _SUPPORTED[0] <= release <= _SUPPORTED[1]:
        _logger.warning("flash_xlstm is tested with vLLM %s; this is %s", SUPPORTED, _version())
    vllm["models"](ARCHITECTURE, f"{_HERE}.model:xLSTMForCausalLM")
    vllm["model_settings"][ARCHITECTURE] = _settings.xLSTMSettings
    vllm["arch_convertors"][MODEL_TYPE] = _settings.xLSTMConvertor
    vllm["config_modules"]["xLSTMConfig"] = "flash_xlstm.models.configuration_xlstm"
    vllm["config_classes"][MODEL_TYPE] = "xLSTMConfig"
    if BACKEND not in vllm["backends"].__members__:
        vllm["backends"].register(BACKEND, f"{_HERE}.backend.xLSTMBackend")
    if OPERATOR not in vllm["attention_ops"]:
        vllm["attention_ops"].append(OPERATOR)


# At import, whose errors vLLM logs before it goes on with other models. An error of `register` would end it.
find_patched()
_settings = importlib.import_module(f"{_HERE}.settings")

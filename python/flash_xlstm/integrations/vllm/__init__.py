"""xLSTM checkpoints on vLLM: its scheduler, cache and server, this package's kernels.

vLLM finds the plugin by its entry point. ``vllm serve FOLDER`` and ``vllm.LLM(FOLDER)`` then take a Hugging Face xLSTM
checkpoint without a flag. Needs vLLM 0.32 or 0.33: ``pip install "flash-xlstm[vllm]"``. docs/serving.md has the rest.
"""

from flash_xlstm.integrations.vllm.registration import register

__all__ = ["register"]

"""Each of these runs in a process of its own: registration and imports hold for a whole process."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def _run(code: str, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr


def test_auto_classes_use_ours(make_ours, make_stock, tmp_path):
    ours = make_ours()
    make_stock(ours).save_pretrained(tmp_path)
    _run(
        """
        import sys
        import torch
        import flash_xlstm.models as models
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        models.register()
        models.register()  # again does no harm
        path = sys.argv[1]
        config = AutoConfig.from_pretrained(path)
        assert type(config) is models.xLSTMConfig, type(config)
        model = AutoModelForCausalLM.from_pretrained(path, weight_mode="fused")
        assert type(model) is models.xLSTMForCausalLM, type(model)
        assert model.config.weight_mode == "fused"
        assert type(AutoModel.from_pretrained(path)) is models.xLSTMModel
        assert type(AutoModelForCausalLM.from_config(config)) is models.xLSTMForCausalLM
        print(model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False))
        """,
        str(tmp_path),
    )


def test_transformers_is_optional():
    _run(
        """
        import sys
        sys.modules["transformers"] = None  # as if it were not installed
        import flash_xlstm
        import flash_xlstm.nn
        try:
            import flash_xlstm.models
        except ImportError as error:
            assert 'pip install "flash-xlstm[hf]"' in str(error), error
        else:
            raise AssertionError("imported without transformers")
        """
    )


def test_the_package_does_not_import_transformers():
    _run(
        """
        import sys
        import flash_xlstm
        import flash_xlstm.nn
        assert "transformers" not in sys.modules
        """
    )

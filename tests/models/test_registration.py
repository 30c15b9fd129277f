"""Registration in transformers. Each test runs in a process of its own, because registration and imports affect the
whole process."""

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

        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
        from transformers.modeling_layers import GenericForSequenceClassification

        for auto, head in (
            (AutoModelForSequenceClassification, models.xLSTMForSequenceClassification),
            (AutoModelForTokenClassification, models.xLSTMForTokenClassification),
        ):
            classifier = auto.from_pretrained(path, num_labels=3)
            assert type(classifier) is head, type(classifier)
            assert classifier.backbone.embeddings.weight.equal(model.backbone.embeddings.weight)

        class Plain(GenericForSequenceClassification, models.xLSTMPreTrainedModel):
            base_model_prefix = "backbone"

        plain = Plain.from_pretrained(path, num_labels=3, pad_token_id=0)
        assert type(plain.backbone) is models.xLSTMModel
        assert plain(torch.tensor([[5, 6, 0], [7, 8, 9]])).logits.shape == (2, 3)
        """,
        str(tmp_path),
    )


def test_classes_looked_up_by_name_are_ours(make_ours, make_stock, tmp_path):
    make_stock(make_ours()).save_pretrained(tmp_path)
    _run(
        """
        import sys
        import transformers
        import flash_xlstm.models as models
        from transformers import AutoConfig, AutoModelForCausalLM, xLSTMForCausalLM as imported_before

        path = sys.argv[1]
        names = ("xLSTMConfig", "xLSTMPreTrainedModel", "xLSTMModel", "xLSTMForCausalLM")
        stock = {name: getattr(transformers, name) for name in names}
        models.unregister()  # nothing to undo
        for _ in range(2):
            models.register()
            models.register()
            for name in names:
                ours = getattr(models, name)
                assert getattr(transformers, name) is getattr(transformers.models.xlstm, name) is ours, name
            config = AutoConfig.from_pretrained(path)
            model = getattr(transformers, config.architectures[0]).from_pretrained(path)
            assert type(model) is models.xLSTMForCausalLM, type(model)
            # transformers' own are whole, at their place
            from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM
            assert xLSTMForCausalLM is imported_before is stock["xLSTMForCausalLM"]
            theirs = xLSTMForCausalLM.from_pretrained(path)
            assert type(theirs.config) is stock["xLSTMConfig"] and type(theirs.backbone) is stock["xLSTMModel"]

            models.unregister()
            models.unregister()
            assert all(getattr(transformers, name) is stock[name] for name in names)
            assert all(getattr(transformers.models.xlstm, name) is stock[name] for name in names)
            assert type(AutoConfig.from_pretrained(path)) is stock["xLSTMConfig"]
            assert type(AutoModelForCausalLM.from_pretrained(path)) is stock["xLSTMForCausalLM"]
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

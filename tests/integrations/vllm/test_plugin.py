"""What the plugin tells vLLM, and how a step's metadata is made. No engine runs."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")

from vllm.config.compilation import CompilationConfig, CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from flash_xlstm.integrations.vllm import registration


def configure(folder, **options):
    registration.register()
    args = EngineArgs(str(folder), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **options)
    return args.create_engine_config()


def test_entry_point():
    (found,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="flash_xlstm")
    assert found.load() is registration.register


def test_registering_again_changes_nothing():
    registration.register()
    backends, operators = list(MambaAttentionBackendEnum), list(CompilationConfig._attention_ops)
    registration.register()
    assert list(MambaAttentionBackendEnum) == backends and CompilationConfig._attention_ops == operators
    assert operators.count("vllm::flash_xlstm_mlstm") == 1
    backend = MambaAttentionBackendEnum["FLASH_XLSTM"].get_class()
    assert backend.get_name() == "FLASH_XLSTM" and backend.is_ssm()


def test_registering_imports_neither_model_nor_kernels():
    code = (
        "import sys, flash_xlstm.integrations.vllm as plugin; plugin.register(); "
        "print([name for name in sys.modules if name.startswith(('flash_xlstm.models', 'flash_xlstm.ops'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", registration.PATCHED)
def test_an_absent_symbol_is_named(monkeypatch, name):
    module, _ = registration.PATCHED[name]
    monkeypatch.setitem(registration.PATCHED, name, (module, "no_such_name"))
    with pytest.raises(ImportError, match=rf"^flash_xlstm serves on vLLM 0.32 to 0.33; .*no {module}.no_such_name$"):
        registration.find_patched()


def test_another_version_is_told(monkeypatch, caplog):
    monkeypatch.setattr(importlib.import_module("vllm"), "__version__", "0.34.1")
    monkeypatch.setattr(registration._logger, "propagate", True)
    with caplog.at_level("WARNING", "vllm.flash_xlstm"):
        logger = registration._logger
        logger.addHandler(caplog.handler)
        registration.register()
        logger.removeHandler(caplog.handler)
    assert "flash_xlstm is tested with vLLM 0.32 to 0.33; this is 0.34" in caplog.text


def test_the_operator_splits_captured_pieces():
    registration.register()
    importlib.import_module("flash_xlstm.integrations.vllm.layer")
    config = CompilationConfig(mode=CompilationMode.VLLM_COMPILE)
    config.set_splitting_ops_for_v1(all2all_backend="")
    assert "vllm::flash_xlstm_mlstm" in config.splitting_ops
    assert torch.ops.vllm.flash_xlstm_mlstm.default._schema.arguments[2].is_write


def test_block_size_length_and_heads(served):
    config = configure(served.folder)
    assert config.model_config.max_model_len == config.cache_config.mamba_block_size == 131_072
    assert config.model_config.get_num_attention_heads(config.parallel_config) == 4
    assert type(config.model_config.hf_config).__module__ == "flash_xlstm.models.configuration_xlstm"
    assert configure(served.folder, max_model_len=3_000_000).model_config.max_model_len == 3_000_000
    assert configure(served.folder, max_model_len=-1).model_config.max_model_len == 131_072
    caching = configure(served.folder, enable_prefix_caching=True, block_size=64)
    assert (caching.cache_config.mamba_cache_mode, caching.cache_config.mamba_block_size) == ("align", 64)


def test_a_length_in_the_configuration_is_kept(served, tmp_path):
    served.make_checkpoint(tmp_path, max_position_embeddings=4096)
    assert configure(tmp_path).model_config.max_model_len == 4096
    with pytest.raises(ValueError, match="5000"):
        configure(tmp_path, max_model_len=5000)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({}, {"tensor_parallel_size": 3}, "is 3; it must divide num_heads, which is 4"),
        ({"ffn_round_up_to_multiple_of": 1, "ffn_proj_factor": 2.02}, {"tensor_parallel_size": 4}, "divide ffn_dim"),
        ({}, {"mamba_ssm_cache_dtype": "float16"}, "mamba_ssm_cache_dtype is 'float16'; .* float32 or bfloat16"),
        ({"inference_state_dtype": "float16"}, {}, "inference_state_dtype is 'float16'"),
        (
            {"num_heads": 1, "qk_dim_factor": 7 / 64, "v_dim_factor": 1 / 64},
            {"mamba_ssm_cache_dtype": "bfloat16"},
            "multiple of 4 bytes",
        ),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
    ],
)
def test_what_cannot_run_is_refused(served, tmp_path, model, options, message):
    served.make_checkpoint(tmp_path, **model)
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, **options)


@pytest.mark.parametrize(("flag", "dtype"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_states_of_one_head_a_rank(served, tmp_path, flag, dtype):
    """c and n of every block are aligned, although a head's m has 4 bytes, and m holds the heads only."""
    from flash_xlstm.integrations.vllm.layer import xLSTMLayer
    from flash_xlstm.integrations.vllm.model import xLSTMForCausalLM

    served.make_checkpoint(tmp_path, num_heads=1)
    config = configure(tmp_path, mamba_ssm_cache_dtype=flag)
    shapes = xLSTMForCausalLM.get_mamba_state_shape_from_config(config)
    dtypes = xLSTMForCausalLM.get_mamba_state_dtype_from_config(config)
    assert shapes == ((1, 32, 64), (1, 32), (4,)) and dtypes == (dtype, torch.float32, torch.float32)
    assert len(xLSTMForCausalLM.get_mamba_state_copy_func()) == 3
    page = MambaSpec(shapes=shapes, dtypes=dtypes, block_size=16).page_size_bytes
    assert page % 16 == 0
    bound = xLSTMLayer.__new__(xLSTMLayer)
    torch.nn.Module.__init__(bound)
    bound.heads, bound._state_shape, bound._c_dtype = 1, shapes, dtype
    memory = torch.zeros(5 * page + 16, dtype=torch.int8)
    memory = memory[-memory.data_ptr() % 16 :][: 5 * page]
    bound.bind_kv_cache(memory.view(5, 1, 1, page))
    c, n, m = bound.state
    assert [tuple(t.shape) for t in bound.state] == [(5, 1, 32, 64), (5, 1, 32), (5, 1)]
    assert all(t[slot].data_ptr() % 16 == 0 for t in (c, n) for slot in range(5))
    m.fill_(1)
    assert c.count_nonzero() == n.count_nonzero() == 0


def batch(computed, queries, prompt, blocks, padded=0):
    """Rows that have read `computed` tokens of a prompt of `prompt`, and read `queries` more, as either runner tells
    them: V1 and V2 make the same fields, and pad with rows of block 0 without tokens."""
    computed, queries, prompt = (torch.tensor([*t, *[0] * padded]) for t in (computed, queries, prompt))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), queries.cumsum(0)]).int()
    seq_lens = (computed + queries).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens.clone(),
        num_reqs=len(queries),
        num_actual_tokens=int(starts[-1]) + padded,
        max_query_len=int(queries.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.tensor([*blocks, *[0] * padded], dtype=torch.int32)[:, None],
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        is_prefilling=computed < prompt,
    )


@pytest.fixture
def builder(served):
    from flash_xlstm.integrations.vllm.backend import xLSTMMetadataBuilder
    from flash_xlstm.integrations.vllm.model import xLSTMForCausalLM

    config = configure(served.folder, max_num_seqs=8)
    spec = MambaSpec(
        shapes=xLSTMForCausalLM.get_mamba_state_shape_from_config(config),
        dtypes=xLSTMForCausalLM.get_mamba_state_dtype_from_config(config),
        block_size=config.cache_config.mamba_block_size,
    )
    return xLSTMMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))


def test_a_batch_of_both_kinds(builder):
    # two that decode; one token left of a prompt; a chunk that goes on; prompts that begin, of one token and of five
    made = builder.build(0, batch([9, 5, 16, 16, 0, 0], [1, 1, 1, 4, 1, 5], [4, 5, 17, 30, 1, 5], [3, 1, 6, 2, 5, 4]))
    assert (made.num_decodes, made.num_prefills, made.num_decode_tokens, made.num_prefill_tokens) == (3, 3, 3, 10)
    assert made.slots_d.tolist() == [3, 1, 6]
    assert made.slots_p.tolist() == [2, 5, 4]
    assert made.fresh_p.tolist() == [False, True, True]
    assert made.query_start_loc_p.tolist() == [0, 4, 5, 10]
    assert made.slots_d.dtype == made.slots_p.dtype == torch.int32


def test_prompts_of_one_token_are_not_decodes(builder):
    made = builder.build(0, batch([0, 0], [1, 1], [1, 1], [3, 1]))
    assert (made.num_decodes, made.num_prefills) == (0, 2) and made.slots_d is None
    assert made.fresh_p.tolist() == [True, True]


def test_padding_is_left_out(builder):
    common = batch([9, 5], [1, 1], [4, 5], [3, 1], padded=2)
    table = common.block_table_tensor.clone()
    made = builder.build(0, common)
    assert made.slots_d.tolist() == [3, 1, -1, -1]
    assert torch.equal(common.block_table_tensor, table)  # vLLM's own


def test_graphs_read_one_buffer(builder):
    builder.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    captured = builder.build_for_cudagraph_capture(batch([1] * 4, [1] * 4, [1] * 4, [0] * 4))
    assert captured.slots_d.tolist() == [-1] * 4
    made = builder.build(0, batch([9, 5], [1, 1], [4, 5], [3, 1], padded=2))
    assert made.slots_d.data_ptr() == captured.slots_d.data_ptr()
    assert captured.slots_d.tolist() == [3, 1, -1, -1]
    other = builder.update_block_table(made, torch.tensor([[7], [8], [0], [0]], dtype=torch.int32), None)
    assert other.slots_d.tolist() == [7, 8, -1, -1]

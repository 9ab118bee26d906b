"""What estimates say that a sequence takes of vLLM's KV cache is what a running vLLM gives it."""

from __future__ import annotations

import pytest
from vllm_cases import CHECKPOINT, texts
from vllm_engine import BLOCK, Ask, opened

from plt_eval.estimate.memory import pages
from plt_model import PLTConfig


@pytest.mark.parametrize("loops", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_decoding_request_holds_the_bytes_that_estimates_say(loops: int) -> None:
    config = PLTConfig.from_pretrained(CHECKPOINT, plt_num_loops=loops)
    token = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    with opened(CHECKPOINT, {"hf_overrides": {"plt_num_loops": loops}, "enable_prefix_caching": False}) as engine:
        cache, pool = engine.scheduler.kv_cache_config, engine.scheduler.kv_cache_manager.block_pool
        block = sum({t.offset: t.size for t in cache.kv_cache_tensors}.values()) // cache.num_blocks
        free, execute, held = pool.get_num_free_blocks(), engine.core.model_executor.execute_model, dict[int, int]()

        def watched(*args: object, **more: object) -> object:
            (request,) = engine.scheduler.running
            if request.num_output_tokens:
                held[request.num_tokens] = (free - pool.get_num_free_blocks()) * block
            return execute(*args, **more)

        engine.core.model_executor.execute_model = watched
        engine.run(Ask(texts(loops)["long"].prompt, new=70))
    assert block == token * BLOCK, "a token of context takes what it takes at R=1"
    assert len(held) == 69
    for tokens, taken in held.items():
        said = pages(config, tokens, "float32", block=BLOCK)
        if 1 <= tokens % BLOCK <= config.window:  # the window lies in two blocks
            assert taken == said.total, f"at {tokens} tokens"
        assert said.shared <= taken <= said.total, f"at {tokens} tokens"

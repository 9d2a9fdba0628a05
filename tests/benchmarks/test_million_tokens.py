"""A million tokens, read in chunks and continued: the recipe of `docs/guides/long-context.md` at its full length."""

import pytest
import torch

from dfn_hf import DFNConfig, DFNForCausalLM
from dfn_hf.benchmarks.harness.environment import peak_memory_mib, run_isolated
from dfn_hf.hub.cache_size import cache_bytes_per_token

LENGTH = 2**20
SHORT = 2**12
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1}


def generate_after(length, chunk_length):
    """Generate five tokens after random ones; return them and the peak memory of the process in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DFNForCausalLM(DFNConfig(**SIZES)).eval()
    context = torch.randint(64, (1, length))
    continued = model.generate(context, prefill_chunk_size=chunk_length, max_new_tokens=5, do_sample=False)
    return continued[0, length:].tolist(), peak_memory_mib("cpu")


@pytest.mark.slow
def test_generation_continues_a_million_tokens_read_in_chunks():
    tokens, peak = run_isolated(generate_after, LENGTH, 2**16)
    _, idle = run_isolated(generate_after, SHORT, SHORT)
    others, _ = run_isolated(generate_after, LENGTH, 100_000)
    assert tokens == others and len(tokens) == 5
    assert peak - idle < 3 * cache_bytes_per_token(DFNConfig(**SIZES)) * LENGTH / 2**20

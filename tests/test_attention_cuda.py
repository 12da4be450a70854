"""On a GPU: attention read from a real forward in bfloat16, by the kernel, is what the maps say."""

from __future__ import annotations

import pytest
import torch

from cagsr.attention import AttentionRegion, PromptAttentionReader, rows

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_the_kernel_reads_what_eager_maps_say(
    dtype: torch.dtype, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    prompt, response = 70, 20
    lengths = torch.tensor([70, 41, 55] if padded else [70, 70, 70])
    prompts = torch.arange(prompt) >= prompt - lengths[:, None]
    real = torch.cat([prompts, torch.ones(3, response, dtype=torch.bool)], 1).cuda()
    inputs = {
        "input_ids": torch.randint(3, 96, real.shape, device="cuda"),
        "attention_mask": real.long(),
        "position_ids": (real.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    region = AttentionRegion.left_padded(prompts.cuda(), real[:, prompt:])
    kernel, calls = rows._kernel(torch.device("cuda")), list[int]()
    assert kernel is not None
    monkeypatch.setattr(rows, "_kernel", lambda device: lambda *args: (calls.append(1), kernel(*args)))
    with torch.no_grad(), PromptAttentionReader(model, layers="all").read(region) as reading:
        model(**inputs)
    assert len(calls) >= 2  # it was not read by the reference, without a word
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions
    expected = sum(layer[:, :, prompt - 1 : -1, :prompt].float().mean(1) for layer in maps) / 2
    expected = expected * region.valid(expected.device)
    torch.testing.assert_close(reading.attention, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-3)

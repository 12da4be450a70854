"""A compiled model is read as well: the same attention, the same output, compiled once for all readings."""

import pytest
import torch

from cagsr.attention import PromptAttentionReader
from test_attention_models import batch_for, captured_attention, tiny_model


@pytest.mark.parametrize(
    ("name", "layers"), [("llama", {"num_hidden_layers": 2}), ("bart", {"encoder_layers": 1, "decoder_layers": 1})]
)
def test_a_compiled_model_is_read(name, layers):
    torch._dynamo.reset()
    model = tiny_model(name, changes=layers, attn_implementation="sdpa")  # few: tracing takes seconds a layer
    batch = batch_for(name, model, "left")
    expected = captured_attention(model, batch)
    compiled = torch.compile(model, backend="eager")  # needs no C++ compiler; the tracing is the same
    graphs = []
    try:
        with torch.no_grad():
            logits = compiled(**batch.inputs).logits  # compiled before anybody reads
            reader = PromptAttentionReader(compiled, layers="all")
            for _ in range(3):
                with reader.read(batch.region) as reading:
                    inside = compiled(**batch.inputs).logits
                torch.testing.assert_close(reading.attention, expected, rtol=0, atol=1e-6)
                torch.testing.assert_close(inside, logits, rtol=0, atol=1e-5)
                compiled(**batch.inputs)
                graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    finally:
        torch._dynamo.reset()
    assert graphs[0] == graphs[1] == graphs[2], "each reading compiled the model anew"

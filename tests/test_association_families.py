"""What is recorded for association, in every family."""

import numpy as np
import pytest
import torch

from cases import CONFIGS, model_of
from patchclamp.dependence.association import recorded
from patchclamp.parts import gated
from test_parts import examples


@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"gemma2", "gemma3", "cohere", "granite"}))
def test_what_the_last_residual_stream_contributes_is_the_logit_difference(name: str):
    """In every family whose logits are not scaled or capped: write . d / s of all that there is, and what the norm's bias gives."""
    dtype = torch.float32 if name in ("gpt_oss", "mixtral", "qwen3_moe") else torch.float64  # experts do not run in float64
    model = model_of(name, dtype=dtype)
    some, last = examples(3), f"L{model.layers - 1}.resid.post"
    found = recorded(gated(model, [last]), some, last=1)[last][:, 0]
    batch = some.batch()
    with torch.no_grad():
        logits = model.target_logits(batch)[0]
        bias = model.anatomy.unembed(model.anatomy.norm(torch.zeros(1, 1, model.width, dtype=model.dtype)))[0].expand_as(logits)
    wanted = [(table.gather(1, batch.answers) - table.gather(1, batch.wrong))[:, 0] for table in (logits, bias)]
    # norms of Llama's kind compute in float32
    np.testing.assert_allclose(found, (wanted[0] - wanted[1]).double().numpy(), rtol=1e-3, atol=1e-4)

"""Export to ONNX: in ONNX Runtime, the graphs answer as the model does."""

import pytest
import torch
from conftest import MOE, make_model, make_processor


pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
import export_onnx
import onnxruntime


@pytest.fixture(scope="module", params=["dense", "moe"])
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("onnx") / request.param
    model = make_model({"use_qk_norm": True} | MOE if request.param == "moe" else None)
    export_onnx.export(model, folder)
    return model, make_processor(), folder


def test_onnx_runtime_gives_the_greedy_tokens(exported):
    model, processor, folder = exported
    assert export_onnx.verify(model, processor, folder) == 3 * export_onnx.NEW_TOKENS
    model.lm_head.weight.data.mul_(-1)
    with pytest.raises(ValueError, match="gives the tokens"):
        export_onnx.verify(model, processor, folder)
    model.lm_head.weight.data.mul_(-1)


def test_several_sequences_at_once(exported):
    model, _, folder = exported
    decoder = onnxruntime.InferenceSession(folder / "decoder.onnx")
    embeddings = torch.randn(3, 7, 32)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :4] = 0  # padding on the left
    cache = {each.name: torch.zeros(3, each.shape[1], 0, each.shape[3]).numpy() for each in decoder.get_inputs()[2:]}
    logits, *_ = decoder.run(None, {"inputs_embeds": embeddings.numpy(), "attention_mask": mask.numpy(), **cache})
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings, attention_mask=mask).logits
    torch.testing.assert_close(torch.from_numpy(logits)[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)

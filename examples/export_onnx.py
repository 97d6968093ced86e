"""Export a model to ONNX, and check that ONNX Runtime gives the same greedy tokens.

    python examples/export_onnx.py --model runs/quickstart/model --output runs/quickstart/onnx

Three graphs in float32: `vision_encoder` (images to vectors in the decoder's space), `embed_tokens` (token ids to such
vectors) and `decoder` (vectors and a cache to logits and a longer cache), for any number of sequences, tokens and images.
`generate` below is all it takes to run them, and needs neither torch nor transformers. Exporting needs
`pip install -e ".[onnx]"`, and takes a minute or more.
"""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache, GenerationConfig
from transformers.utils import logging as transformers_logging

from minimind_v_hf.chat import load_model
from minimind_v_hf.modeling_minimind_v import CACHE
from minimind_v_hf.scripts import errors_in_one_line


try:
    import onnx_ir
    import onnxruntime
    import onnxscript  # noqa: F401 - without it, the exporter fails later and obscurely
    from transformers.exporters import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
except ImportError as error:  # main() says so; --help works without it
    MISSING: str | None = error.name
else:
    MISSING = None

NEW_TOKENS = 16


def generate(
    sessions: "dict[str, onnxruntime.InferenceSession]",
    input_ids: np.ndarray,
    pixel_values: np.ndarray | None,
    image_token_id: int,
    max_new_tokens: int,
    eos_token_id: int | None = None,
) -> list[int]:
    """The greedy answer to one prompt.

    Args:
        sessions: `vision_encoder`, `embed_tokens` and `decoder`.
        input_ids: int64 (1, tokens), with the image tokens of every image.
        pixel_values: float32 (images, 3, height, width), or None.
        image_token_id: stands where an image's vectors go.
        max_new_tokens: longest answer.
        eos_token_id: ends the answer, as its last token.
    """
    decoder = sessions["decoder"]
    (embeddings,) = sessions["embed_tokens"].run(None, {"input": input_ids})  # (1, tokens, width)
    if pixel_values is not None:
        (images,) = sessions["vision_encoder"].run(None, {"pixel_values": pixel_values})
        embeddings[input_ids == image_token_id] = images.reshape(-1, images.shape[-1])
    # Keys and values of each layer, (1, heads, tokens so far, width of a head), and no tokens yet
    cache = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in decoder.get_inputs()
        if len(each.shape) == 4
    }
    length, answer = input_ids.shape[1], []
    while len(answer) < max_new_tokens and (not answer or answer[-1] != eos_token_id):
        mask = np.ones((1, length), np.int64)
        logits, *longer = decoder.run(None, {"inputs_embeds": embeddings, "attention_mask": mask, **cache})
        cache = dict(zip(cache, longer, strict=True))
        answer.append(int(logits[0, -1].argmax()))
        length += 1
        (embeddings,) = sessions["embed_tokens"].run(None, {"input": np.array([answer[-1:]])})
    return answer


class VisionEncoder(nn.Module):
    """The encoder and the projector, as one module with one tensor in and one out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output


def export(model, folder: Path) -> None:
    """Write the three graphs, and their weights beside them, into a folder."""
    size, width = model.config.vision_config.image_size, model.config.get_text_config().hidden_size
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.zeros(2, 3, dtype=torch.long), cache=cache)
    # No axis of the samples that may vary has the size 1, which the tracer would take for a constant
    batch = {0: Dim.AUTO}
    tokens = {0: Dim.AUTO, 1: Dim.AUTO}
    cached = {0: Dim.AUTO, 2: Dim.AUTO}
    graphs = {
        "vision_encoder": (VisionEncoder(model), {"pixel_values": (torch.rand(2, 3, size, size), batch)}),
        "embed_tokens": (model.get_input_embeddings(), {"input": (torch.zeros(2, 4, dtype=torch.long), tokens)}),
        "decoder": (
            model,
            {
                "inputs_embeds": (torch.rand(2, 4, width), tokens),
                "attention_mask": (torch.ones(2, 7, dtype=torch.long), tokens),
                CACHE: (cache, [cached] * 2 * len(cache.layers)),
            },
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, (module, arguments) in graphs.items():
        samples = {key: sample for key, (sample, _) in arguments.items()}
        shapes = {key: shape for key, (_, shape) in arguments.items()}
        exported = OnnxExporter().export(module, samples, config=OnnxConfig(dynamic=True, dynamic_shapes=shapes))
        # Before transformers 5.23, the exporter gives torch's ONNXProgram
        program = exported.program if hasattr(exported, "program") else exported.model
        onnx_ir.save(program, folder / f"{name}.onnx", external_data=f"{name}.onnx.data")


def verify(model, processor, folder: Path) -> int:
    """Compare greedy tokens with transformers, for prompts with no, one and two images.

    Returns:
        How many tokens were compared.

    Raises:
        ValueError: they differ.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {path.stem: onnxruntime.InferenceSession(path, options) for path in folder.glob("*.onnx")}
    # The folder's own may have penalties, which generate() would take over from it
    model.generation_config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    size = model.config.vision_config.image_size
    for count in range(3):
        images = [np.random.default_rng(n).integers(0, 256, (size, size, 3), dtype=np.uint8) for n in range(count)]
        prompt = [{"role": "user", "content": "<image>" * count + "\nWhat is this?"}]
        text = processor.apply_chat_template(prompt, add_generation_prompt=True)
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
        expected = model.generate(**inputs)[0, ids.shape[1] :].tolist()
        pixels = None if pixels is None else pixels.numpy()
        answer = generate(sessions, ids.numpy(), pixels, processor.image_token_id, NEW_TOKENS)
        if answer != expected:
            raise ValueError(f"with {count} images ONNX Runtime gives the tokens {answer}, and transformers {expected}")
    return 3 * NEW_TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    arguments = parser.parse_args()
    if MISSING:
        parser.exit(2, f'export_onnx.py: error: exporting needs {MISSING}: pip install -e ".[onnx]"\n')
    transformers_logging.set_verbosity_error()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # what other models would lack
    with errors_in_one_line():
        model, processor = load_model(arguments.model)
    model.cpu()
    export(model, arguments.output)
    processor.save_pretrained(arguments.output)
    try:
        count = verify(model, processor, arguments.output)
    except ValueError as error:
        print(f"The exported model gives other answers: {error}", file=sys.stderr)
        sys.exit(1)
    size = sum(path.stat().st_size for path in arguments.output.glob("*.onnx*"))
    print(f"{count} greedy tokens are equal. Written to {arguments.output}: {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

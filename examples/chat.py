"""Ask a saved model about a picture; the answer appears as it is written.

    python examples/chat.py --model runs/quickstart/model --image photo.jpg "What colour is the shape at the top left?"

Only transformers is needed, not this package: a saved folder brings its own code.
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", help="what to ask")
    parser.add_argument("--model", required=True, help="folder or Hub id of a saved model")
    parser.add_argument("--image", action="append", default=[], help="path or URL of a picture; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token (default)")
    arguments = parser.parse_args()

    # ── Model ──
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, trust_remote_code=True).to(device).eval()

    # ── Question ──
    content = [{"type": "image", "path": path} for path in arguments.image]
    content.append({"type": "text", "text": ("\n" if content else "") + arguments.question})
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except ValueError as error:
        parser.error(str(error))

    # ── Answer ──
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {"do_sample": False}
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs.to(device), **sampling, max_new_tokens=arguments.max_new_tokens, streamer=streamer)


if __name__ == "__main__":
    main()

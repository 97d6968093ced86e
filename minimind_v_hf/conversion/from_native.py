"""Native MiniMind-V weights to a complete Hub folder, with every tensor accounted for."""

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..chat import refuse_other_weights
from ..configuration_minimind_v import MiniMindVConfig
from ..model_card import model_card, parameter_counts, table
from ..preparation import prepare_tokenizer
from ..processing_minimind_v import MiniMindVProcessor
from .architecture import IMAGE_TOKENS, RELEASES, Architecture, detect
from .audit import ENCODER_PREFIX, Audit, audit_tensors
from .folders import check_output, empty_model, load_config, new_folder
from .key_table import from_native, key_table
from .native_files import read_native_weights
from .report import ConversionError, explained, print_table, warn
from .verification import verify


def convert(
    weights: str | Path,
    vision_tower: str | None,
    tokenizer: str,
    output: str | Path,
    *,
    num_attention_heads: int | None = None,
    num_experts_per_tok: int | None = None,
    overwrite: bool = False,
) -> None:
    """Convert native weights, print what was found, and try the written folder in a fresh process.

    Args:
        weights: a `.pth` file, a resume checkpoint, or a native folder with pytorch_model.bin and config.json.
        vision_tower: folder or Hub id of the image encoder; of CLIP or SigLIP, the vision half is taken. None makes a
            language model of a language model's weights.
        tokenizer: folder or Hub id of the tokenizer that the model was trained with.
        output: the folder to write.
        num_attention_heads: query heads, which MiniMind2 files do not tell; 8 by default, with a warning.
        num_experts_per_tok: 2 by default, for minimind-3 1.
        overwrite: replace a model folder that is there already.

    Raises:
        ConversionError: what was given is damaged, or does not fit together. Nothing is left half-written.
    """
    # ── Tokenizer and encoder ──
    weights, output = Path(weights), Path(output)
    check_output(output, overwrite, [weights, Path(vision_tower or weights), Path(tokenizer)])
    with explained(f"--tokenizer {tokenizer}: no tokenizer can be loaded from there"):
        native_tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    if native_tokenizer.eos_token_id is None:
        raise ConversionError(f"--tokenizer {tokenizer}: it has no eos_token, so an answer would have no end")
    image_token_id, vision_config = None, None
    if vision_tower:
        with explained(f"--tokenizer {tokenizer}: no image token can be made"):
            image_tokenizer = prepare_tokenizer(native_tokenizer)
        image_token_id = image_tokenizer.convert_tokens_to_ids(image_tokenizer.image_token)
        vision_config, image_processor = load_preprocessing(vision_tower)

    # ── What the file holds ──
    native = read_native_weights(weights)
    options = {"num_attention_heads": num_attention_heads, "num_experts_per_tok": num_experts_per_tok}
    options["vocab_size"] = len(native_tokenizer)
    shapes = {name: tuple(tensor.shape) for name, tensor in native.tensors.items()}
    with explained(f"the architecture of {weights} cannot be read"):
        architecture = detect(shapes, native.config, options, vision_config, image_token_id)
    config = architecture.config
    print_table(f"Architecture of {weights}", architecture.rows)
    warn_of_doubts(architecture, native_tokenizer)
    if architecture.has_projector and not vision_tower:
        raise ConversionError("these weights have a projector, so they need their image encoder: pass --vision-tower")
    rows = key_table(config, architecture.generation)
    if not architecture.has_projector:
        rows = [row for row in rows if not row.native[0].startswith("vision_proj.")]
    model = empty_model(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    audit = audit_tensors(native.tensors, rows, parameters, config.get_text_config().tie_word_embeddings)
    if native.other_entries:
        audit.ignored["the state of the training"] = native.other_entries
    print_table("Tensors of the file", audit.rows())
    audit.raise_if_spoiled(weights)

    # ── The model ──
    language_dtype = reduce(torch.promote_types, {native.tensors[name].dtype for name in audit.used})
    state_dict = {name: tensor.to(language_dtype) for name, tensor in from_native(native.tensors, rows).items()}
    processor, notes = native_tokenizer, []
    if vision_tower:
        with explained(f"--vision-tower {vision_tower}: its preprocessing cannot be used"):
            processor = MiniMindVProcessor.build(image_processor, image_tokenizer, config)
        tower = load_vision_tower(vision_tower, config.vision_config, native.tensors)
        state_dict |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.items()}
        if not architecture.has_projector:
            notes = ["The projector is freshly initialised: these weights are a language model's. Train it on images first."]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                projector = type(model.model.multi_modal_projector)(config).apply(model._init_weights).to(language_dtype)
            state_dict |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.tie_weights()
    tokens = {f"{kind}_token_id": getattr(native_tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**tokens, do_sample=True, temperature=0.65, top_p=0.85)  # as the native scripts
    print_table("Parameters", [(part, f"{count / 1e6:.1f}M") for part, count in parameter_counts(model).items()])

    # ── The folder ──
    with new_folder(output) as staging:
        model.save_pretrained(staging)
        model.config.dtype = language_dtype  # transformers writes that of the first tensor, which is the encoder's
        model.config.save_pretrained(staging)
        processor.save_pretrained(staging)
        card = converted_card(output.resolve().name, weights.name, model, architecture, audit, notes)
        (staging / "README.md").write_text(card, encoding="utf-8")
        difference = verify(model, staging, remote_code=True)
    print(f"\nA fresh process without this package loads the folder; its logits differ by {difference:.1e} at most.")
    print(f"Written to {output}", flush=True)
    for note in notes:
        warn(note)


# ── The encoder ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load_preprocessing(source: str) -> tuple[PreTrainedConfig, BaseImageProcessor]:
    """Configuration (of CLIP and SigLIP, of the vision half) and image processor. Raises ConversionError if they do not fit."""
    what = f"--vision-tower {source}"
    vision_config = load_config(source, what)
    with explained(f"{what}: no encoder for MiniMind-V"):
        vision_config = MiniMindVConfig(vision_config=vision_config).vision_config
    advice = "take preprocessor_config.json from where the encoder was published"
    with explained(f"{what}: its preprocessing cannot be read, {advice}"):
        image_processor = AutoImageProcessor.from_pretrained(source)
        size = vision_config.image_size
        pixels = image_processor(torch.zeros(3, size, 2 * size, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    if pixels.shape != (1, 3, size, size):
        given = "x".join(map(str, pixels.shape[1:]))
        raise ConversionError(f"{what}: its preprocessing gives {given} pixels, its encoder wants 3x{size}x{size}")
    return vision_config, image_processor


def load_vision_tower(
    source: str, vision_config: PreTrainedConfig, native: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The encoder's weights, and nothing of a text half.

    Raises ConversionError where one is missing, or differs from that of the encoder inside a resume checkpoint.
    """
    with explained(f"--vision-tower {source}: its weights cannot be loaded"):
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True, "dtype": "auto", "trust_remote_code": False}
        model, loading = AutoModel.from_pretrained(source, config=vision_config, **options)
        no_part = re.compile(r"(text_model|text_projection|visual_projection|logit_scale|logit_bias)\b|.*position_ids")
        loading["unexpected_keys"] = [name for name in loading["unexpected_keys"] if not no_part.match(name)]
        refuse_other_weights(source, model, loading)
    tower = model.state_dict()
    inside = {name.removeprefix(ENCODER_PREFIX).removeprefix("vision_model."): tensor for name, tensor in native.items()}
    for name, a in tower.items():
        b = inside.get(name, a)
        if not (torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a)):  # either may have been rounded
            raise ConversionError(f"--vision-tower differs from the encoder in --weights, in {name}: pass that of the training")
    return tower


# ── What the user reads ──────────────────────────────────────────────────────────────────────────────────────────────


def warn_of_doubts(architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell what cannot be known from the weights, or is unusual."""
    release, expected = RELEASES[architecture.generation], IMAGE_TOKENS[architecture.generation]
    if architecture.heads_are_assumed:
        heads = architecture.config.get_text_config().num_attention_heads
        warn(
            f"num_attention_heads={heads} is assumed, as in every published {release}: the weights do not tell. Look it up in "
            "the native configuration that this model was trained with (num_attention_heads or n_heads), and pass "
            "--num-attention-heads where it is another: with a wrong one the model answers nonsense"
        )
    given = getattr(architecture.config, "image_seq_length", expected)
    if given != expected:
        warn(f"{release} is released with {expected} image tokens, but this encoder gives {given}")
    tokenizer_is_3 = "<|image_pad|>" in tokenizer.get_added_vocab()
    if tokenizer_is_3 != (architecture.generation == "minimind-3"):
        of = "of minimind-3" if tokenizer_is_3 else "not of minimind-3"
        warn(f"the tokenizer is {of}, the weights are {release}: do they belong together?")


def converted_card(
    name: str, source: str, model: PreTrainedModel, architecture: Architecture, audit: Audit, notes: list[str]
) -> str:
    """The README.md of a converted folder."""
    kind = "MiniMind-V" if isinstance(model.config, MiniMindVConfig) else "MiniMind"
    summary = "\n\n".join([f"A {kind} for transformers, converted from the native weights `{source}`.", *notes])
    conversion = (
        "Of the tensors in the file, none is unknown, missing or misshapen. After writing, the folder was loaded in a fresh "
        "process; its logits were those of the converted model."
    )
    conversion += "\n\n" + table(audit.rows(), ("tensors", "", ""))
    sections = {"Architecture": table(architecture.rows, ("", "", "known from")), "Conversion": conversion}
    return model_card(name, model, summary, sections, license="apache-2.0", language=["zh", "en"])

"""Native MiniMind-V weights to a complete Hub folder, with every tensor accounted for."""

from pathlib import Path

import torch
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
)
from transformers.utils import has_file

from ..model_card import model_card, parameter_counts, table
from ..preparation import prepare_tokenizer
from ..processing_minimind_v import MiniMindVProcessor
from .architecture import IMAGE_TOKENS, RELEASES, Architecture, detect
from .audit import ENCODER_PREFIX, Audit, audit_tensors
from .folders import check_output, empty_model, load_config, new_folder, save_model
from .key_table import Row, key_table
from .native_files import ConversionError, NativeWeights, first_line, read_native_weights
from .report import print_table, shorten, warn
from .verification import verify


NATIVE_SAMPLING = {"do_sample": True, "temperature": 0.65, "top_p": 0.85}
"""How the native scripts answer."""

FRESH_PROJECTOR = (
    "The weights were a language model's alone, so the projector is freshly initialised: "
    "this model makes nothing of an image before it is trained on images."
)
_OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_MAX_SIZES = {
    "image_size": 4096,
    "patch_size": 4096,
    "hidden_size": 65536,
    "num_hidden_layers": 1024,
    "num_attention_heads": 1024,
}


def convert(
    weights: str | Path,
    vision_tower: str | None,
    tokenizer: str,
    output: str | Path,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    num_attention_heads: int | None = None,
    num_experts_per_tok: int | None = None,
    inference_rope_scaling: bool = False,
    max_position_embeddings: int | None = None,
    overwrite: bool = False,
) -> None:
    """Convert native weights, print what was found, and try the written folder in a fresh process.

    Args:
        weights: a `.pth` file of any release, dense or mixture of experts, a resume checkpoint, or a native folder with
            pytorch_model.bin and config.json.
        vision_tower: folder or Hub id of the image encoder; of CLIP or SigLIP, the vision half is taken. None makes a
            language model of a language model's weights.
        tokenizer: folder or Hub id of the tokenizer that the model was trained with.
        output: the folder to write.
        name: of the model in its card; by default the folder's.
        dtype: of all weights; by default as they are in their files.
        num_attention_heads: query heads, which MiniMind2 files do not tell; 8 by default.
        num_experts_per_tok: 2 by default, for minimind-3 1.
        inference_rope_scaling: longer contexts with YaRN, as the native option of this name.
        max_position_embeddings: longest sequence in tokens; 32,768 by default.
        overwrite: replace a model folder that is there already.

    Raises:
        ConversionError: what was given is damaged, or does not fit together. Nothing is left half-written.
    """
    # ── What can be checked before reading the weights ──
    weights_path, output = Path(weights), Path(output)
    check_output(output, overwrite, [weights_path, Path(vision_tower or weights), Path(tokenizer)])
    native_tokenizer = load_tokenizer(tokenizer)
    image_tokenizer, vision_config, image_processor = native_tokenizer, None, None
    if vision_tower:
        image_tokenizer = with_image_token(native_tokenizer)
        vision_config = load_vision_config(vision_tower)
        image_processor = load_image_processor(vision_tower, vision_config)

    # ── What the file holds ──
    native = read_native_weights(weights_path)
    architecture = detect(
        {name: tuple(tensor.shape) for name, tensor in native.tensors.items()},
        native.config,
        vision_config,
        image_tokenizer.convert_tokens_to_ids(image_tokenizer.image_token) if vision_tower else None,
        num_attention_heads=num_attention_heads,
        num_experts_per_tok=num_experts_per_tok,
        inference_rope_scaling=inference_rope_scaling,
        max_position_embeddings=max_position_embeddings,
    )
    config = architecture.config
    print_table(f"Architecture of {weights}", architecture.rows)
    if architecture.has_projector and vision_config is None:
        raise ConversionError("these weights have a projector, so they need their image encoder: pass --vision-tower")
    rows = [
        row
        for row in key_table(config, architecture.generation)
        if architecture.has_projector or not row.native[0].startswith("vision_proj.")
    ]
    parameters = dict(empty_model(config).named_parameters(remove_duplicate=False))
    audit = audit_tensors(native, rows, parameters, config.get_text_config().tie_word_embeddings)
    report_audit(audit, native)
    audit.raise_if_spoiled(weights)
    check_fit(architecture, image_tokenizer)
    processor = MiniMindVProcessor.build(image_processor, image_tokenizer, config) if vision_tower else native_tokenizer

    # ── The model ──
    language_dtype = dtype or stored_dtype(native, audit)
    tower = None
    if vision_tower:
        tower = load_vision_tower(vision_tower, config.vision_config)
        compare_encoders(tower, native)
        tower = tower.to(dtype) if dtype else tower
    model = build_model(architecture, native, rows, tower, language_dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=native_tokenizer.bos_token_id,
        eos_token_id=native_tokenizer.eos_token_id,
        pad_token_id=native_tokenizer.pad_token_id,
        **NATIVE_SAMPLING,
    )
    counts = parameter_counts(model)
    print_table("Parameters", [(part, f"{count / 1e6:.1f}M") for part, count in counts.items()])

    # ── The folder ──
    warnings = [FRESH_PROJECTOR] if tower is not None and not architecture.has_projector else []
    warnings += [audit.not_finite_warning] if audit.not_finite else []
    with new_folder(output) as staging:
        save_model(model, staging, language_dtype)
        processor.save_pretrained(staging)
        card = converted_card(name or output.resolve().name, weights_path.name, model, architecture, audit, warnings)
        (staging / "README.md").write_text(card, encoding="utf-8")
        difference = verify(model, staging, remote_code=True)
    print(f"\nA fresh process without this package loads the folder; its logits differ by {difference:.1e} at most.")
    print(f"Written to {output}", flush=True)
    for warning in warnings:
        warn(warning)


# ── Tokenizer and encoder ────────────────────────────────────────────────────────────────────────────────────────────


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises ConversionError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer.json makes the parsers raise
        raise ConversionError(f"--tokenizer {source}: no tokenizer can be loaded from there ({first_line(error)})") from None
    if tokenizer.eos_token_id is None:
        raise ConversionError(f"--tokenizer {source}: it has no eos_token, so an answer would have no end")
    return tokenizer


def load_vision_config(source: str) -> PreTrainedConfig:
    """The encoder's configuration; of a whole CLIP or SigLIP, its vision half. Raises ConversionError where there is none."""
    config = load_config(source, f"--vision-tower {source}")
    config = getattr(config, "vision_config", config)
    for field, largest in _MAX_SIZES.items():
        size = getattr(config, field, None)
        if type(size) is not int or not 1 <= size <= largest:
            kind = f"--vision-tower {source}: a {config.model_type}"
            raise ConversionError(f"{kind} with {field}={size!r}, where an integer from 1 to {largest} was expected")
    return config


def load_image_processor(source: str, vision_config: PreTrainedConfig) -> BaseImageProcessor:
    """The encoder's own preprocessing; where its folder has none, that of the published CLIP or SigLIP, with a warning.

    Raises:
        ConversionError: there is none, it cannot be read, or it does not fit the encoder.
    """
    what, size = f"--vision-tower {source}", vision_config.image_size
    published = {
        "clip_vision_model": lambda: CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        "siglip_vision_model": lambda: SiglipImageProcessorPil(size={"height": size, "width": size}),
    }
    if any(has_file(source, file) for file in ("preprocessor_config.json", "processor_config.json")):
        try:
            image_processor = AutoImageProcessor.from_pretrained(source)
        except Exception as error:  # whatever a damaged file makes its class raise
            raise ConversionError(f"{what}: its preprocessing cannot be read ({first_line(error)})") from None
    elif vision_config.model_type in published:
        image_processor = published[vision_config.model_type]()
        warn(f"{source} has no preprocessor_config.json: images are prepared as for the published {vision_config.model_type}")
    else:
        raise ConversionError(f"{what}: it has no preprocessor_config.json")
    try:
        black = torch.zeros(3, size, 2 * size, dtype=torch.uint8)
        pixels = torch.stack([image_processor(image, return_tensors="pt")["pixel_values"][0] for image in (black, black + 255)])
    except Exception as error:  # as above
        raise ConversionError(f"{what}: its preprocessing fails on a black image ({first_line(error)})") from None
    if pixels.shape != (2, 3, size, size):
        given = "x".join(map(str, pixels.shape[1:]))
        raise ConversionError(f"{what}: its preprocessing gives {given} pixels, its encoder wants 3x{size}x{size}")
    if not pixels.isfinite().all():
        raise ConversionError(f"{what}: its preprocessing gives NaN or infinite pixels for a black image")
    if torch.equal(pixels[0], pixels[1]):
        raise ConversionError(f"{what}: its preprocessing makes the same of a black and of a white image")
    return image_processor


def with_image_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with an image token and its chat template. Raises ConversionError where another id would change."""
    try:
        prepared = prepare_tokenizer(tokenizer)
    except ValueError as error:
        raise ConversionError(f"--tokenizer: {first_line(error)}") from None
    before, after = tokenizer.get_vocab(), prepared.get_vocab()
    image_token_id = after[prepared.image_token]
    if len(prepared) != len(tokenizer):
        raise ConversionError("--tokenizer has no image token, and no unreachable byte whose id could become one")
    changed = [token for token in before if after.get(token) != before[token] and before[token] != image_token_id]
    if changed or after.keys() - before.keys() - {prepared.image_token}:
        raise ConversionError(f"--tokenizer: the image token displaces others ({shorten(sorted(changed))})")
    return prepared


def load_vision_tower(source: str, vision_config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder with its weights, and nothing of a text half.

    Raises:
        ConversionError: weights are missing, unknown, misshapen, NaN or infinite.
    """
    try:
        tower, info = AutoModel.from_pretrained(
            source,
            config=vision_config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype="auto",
            trust_remote_code=False,
        )
    except Exception as error:  # whatever damaged files make their readers raise
        raise ConversionError(f"--vision-tower {source}: its weights cannot be loaded ({first_line(error)})") from None
    problems = {
        "missing": info["missing_keys"],
        "misshapen": [item[0] for item in info["mismatched_keys"]],
        "unknown": [n for n in info["unexpected_keys"] if not n.startswith(_OTHER_HALF) and "position_ids" not in n],
        "NaN or infinite": [name for name, tensor in tower.state_dict().items() if not tensor.isfinite().all()],
    }
    for problem, names in problems.items():
        if names:
            raise ConversionError(f"--vision-tower {source}: {len(names)} {problem} tensors: {shorten(sorted(names))}")
    return tower


def compare_encoders(tower: PreTrainedModel, native: NativeWeights) -> None:
    """Make sure that the encoder inside a resume checkpoint is the one that was given.

    Raises:
        ConversionError: they differ.
    """
    pairs = [
        (full_name, ours, native.tensors[full_name])
        for name, ours in tower.state_dict().items()
        for full_name in (f"{ENCODER_PREFIX}vision_model.{name}", ENCODER_PREFIX + name)
        if full_name in native.tensors
    ]
    # Either may have been rounded
    different = [
        name
        for name, ours, theirs in pairs
        if not (torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(theirs.to(ours.dtype), ours))
    ]
    if different:
        raise ConversionError(
            f"the encoder inside {native.path} differs from --vision-tower in {len(different)} of {len(pairs)} tensors "
            f"({shorten(different)}): pass the encoder that the model was trained with"
        )


def check_fit(architecture: Architecture, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the weights with tokenizer and encoder.

    Raises:
        ConversionError: the tokenizer has another size.
    """
    config, release = architecture.config, RELEASES[architecture.generation]
    vocab_size = config.get_text_config().vocab_size
    if len(tokenizer) != vocab_size:
        raise ConversionError(
            f"--tokenizer has {len(tokenizer)} ids, but the embedding in the weights has {vocab_size} rows: "
            "it is another model's"
        )
    expected = IMAGE_TOKENS[architecture.generation]
    if getattr(config, "image_seq_length", expected) != expected:
        warn(f"{release} is released with {expected} image tokens, but this encoder gives {config.image_seq_length}")
    tokenizer_is_3 = "<|image_pad|>" in tokenizer.get_added_vocab()
    if tokenizer_is_3 != (architecture.generation == "minimind-3"):
        of = "of minimind-3" if tokenizer_is_3 else "not of minimind-3"
        warn(f"the tokenizer is {of}, the weights are {release}: do they belong together?")


# ── The model and its card ───────────────────────────────────────────────────────────────────────────────────────────


def stored_dtype(native: NativeWeights, audit: Audit) -> torch.dtype:
    """The dtype of the file; the one that holds all of them where they differ."""
    first, *others = {native.tensors[name].dtype for name in audit.used}
    for other in others:
        first = torch.promote_types(first, other)
    return first


def build_model(
    architecture: Architecture, native: NativeWeights, rows: list[Row], tower: PreTrainedModel | None, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with its weights. Native tensors are let go of as they are used: two copies are never in memory."""
    model = empty_model(architecture.config)
    state_dict = {}
    for row in rows:
        state_dict[row.ours] = row.transform.from_native([native.tensors.pop(name) for name in row.native]).to(dtype)
    if tower is not None:
        state_dict |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
        if not architecture.has_projector:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                projector = type(model.model.multi_modal_projector)(architecture.config).apply(model._init_weights)
            state_dict |= {f"model.multi_modal_projector.{name}": t.to(dtype) for name, t in projector.state_dict().items()}
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def converted_card(
    name: str, source: str, model: PreTrainedModel, architecture: Architecture, audit: Audit, warnings: list[str]
) -> str:
    """The README.md of a converted folder."""
    has_vision = hasattr(model.config, "vision_config")
    kind, origin = ("vision-language model", "MiniMind-V") if has_vision else ("language model", "MiniMind")
    summary = f"A tiny {kind}, converted from the native {origin} weights `{source}` for transformers."
    conversion = f"From {RELEASES[architecture.generation]} weights, language model in {model.lm_head.weight.dtype}.\n"
    ignored = sum(map(len, audit.ignored.values()))
    conversion += f"Of the {len(audit.used) + ignored} tensors in the file, {len(audit.used)} are used"
    conversion += f" and {ignored} ignored:\n" if ignored else "; none is unknown, missing or misshapen."
    conversion += "".join(f"\n* {len(names)}: {reason}" for reason, names in audit.ignored.items())
    conversion += "\n\nAfter writing, the folder was loaded in a fresh process; its logits were those of the converted model."
    sections = {"Architecture": table(architecture.rows, ("", "", "known from")), "Conversion": conversion}
    summary = "\n\n".join([summary, *(f"**{warning}**" for warning in warnings)])
    return model_card(name, model, summary, sections, license="apache-2.0", language=["zh", "en"])


def report_audit(audit: Audit, native: NativeWeights) -> None:
    """Print what becomes of each tensor."""
    rows: list[tuple[str, object, str]] = [("used", len(audit.used), "")]
    rows += [("ignored", len(names), f"{reason}: {shorten(names)}") for reason, names in audit.ignored.items()]
    if native.other_entries:
        rows.append(("left out", len(native.other_entries), f"the state of the training: {', '.join(native.other_entries)}"))
    rows += [("not finite", count, name) for name, count in audit.not_finite]
    print_table(f"Tensors ({len(native.tensors)} in the file)", rows)
    if audit.problems:
        print_table("Problems: tensor, found, expected", audit.problems)

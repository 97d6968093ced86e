"""Native MiniMind-V weights to a complete Hub folder, with every tensor accounted for.

    python convert/from_native.py --weights sft_vlm_512.pth --vision-tower openai/clip-vit-base-patch16 \\
        --tokenizer path/to/minimind-v/model --output MiniMind2-Small-V

The weights are a `.pth` file of any release, dense or mixture of experts, a resume checkpoint, or a native folder with
pytorch_model.bin and config.json. Language-model weights without --vision-tower become a language model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers import (
    AutoConfig,
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
from transformers.models.auto.image_processing_auto import AutoImageProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert.architecture import IMAGE_TOKENS, RELEASES, Architecture, Options, detect
from convert.audit import ENCODER_PREFIX, Audit, audit_tensors
from convert.key_table import Row, key_table
from convert.model_card import FRESH_PROJECTOR, active_parameters, model_card, not_finite_warning, parameter_counts
from convert.native_files import ConversionError, NativeWeights, read_native_weights
from convert.output import (
    check_output,
    computing_in_float32,
    largest_difference,
    new_folder,
    run_in_fresh_process,
    sample_inputs,
    save_model,
)
from convert.report import print_table, run, shorten, warn
from minimind_v_hf import MiniMindForCausalLM, MiniMindVForConditionalGeneration, MiniMindVProcessor
from minimind_v_hf.preparation import prepare_tokenizer


NATIVE_SAMPLING = {"do_sample": True, "temperature": 0.65, "top_p": 0.85}
"""How the native scripts answer."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-5  # between the logits of two processes, times the largest logit

_OTHER_HALF = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and convert. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, help="native .pth file, or native folder")
    parser.add_argument(
        "--vision-tower", help="folder or Hub id of the image encoder (of CLIP or SigLIP, the vision half is taken)"
    )
    parser.add_argument("--tokenizer", required=True, help="folder or Hub id of the tokenizer that the model was trained with")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights (default: as they are in their files)")
    parser.add_argument(
        "--num-attention-heads", type=int, metavar="N", help="query heads, which MiniMind2 files do not tell (default: 8)"
    )
    parser.add_argument("--num-experts-per-tok", type=int, metavar="N", help="experts per token (default: 2, for minimind-3 1)")
    parser.add_argument(
        "--inference-rope-scaling", action="store_true", help="longer contexts with YaRN, as the native option of this name"
    )
    parser.add_argument("--max-position-embeddings", type=int, metavar="N", help="longest sequence in tokens (default: 32768)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there already")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the folder too")
    parser.add_argument("--private", action="store_true", help="create the Hub repository as a private one")
    arguments = parser.parse_args(argv)
    return run(lambda: convert(arguments))


def convert(arguments: argparse.Namespace) -> None:
    """The whole conversion, from the arguments of the command line.

    Raises:
        ConversionError: something is wrong with what was given; nothing is left half-written.
    """
    # ── What can be checked before reading the weights ──
    sources = [arguments.weights, Path(arguments.vision_tower or arguments.weights), Path(arguments.tokenizer)]
    check_output(arguments.output, arguments.overwrite, sources)
    if arguments.push_to_hub:
        check_hub(arguments.push_to_hub)
    elif arguments.private:
        raise ConversionError("--private says how to create a Hub repository: pass --push-to-hub user/name too")
    tokenizer = load_tokenizer(arguments.tokenizer)
    vision_config = processor = None
    is_published = False
    if arguments.vision_tower:
        vision_config = load_vision_config(arguments.vision_tower)
        image_processor, is_published = load_image_processor(arguments.vision_tower, vision_config)
        processor = build_processor(image_processor, tokenizer, vision_config)

    # ── What the file holds ──
    weights = read_native_weights(arguments.weights)
    options = Options(
        arguments.num_attention_heads,
        arguments.num_experts_per_tok,
        arguments.inference_rope_scaling,
        arguments.max_position_embeddings,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    architecture = detect(shapes, options, weights.config, vision_config, processor.image_token_id if processor else None)
    print_table(f"Architecture of {arguments.weights}", architecture.rows)
    if architecture.has_projector and vision_config is None:
        raise ConversionError("these weights have a projector, so they need their image encoder: pass --vision-tower")

    table = native_table(architecture)
    audit = audit_tensors(
        weights, architecture, table, dict(empty_model(architecture.config).named_parameters(remove_duplicate=False))
    )
    report_audit(audit, weights)
    audit.raise_if_spoiled(arguments.weights)
    check_fit(architecture, tokenizer, processor)
    if processor is not None and is_published:
        published = architecture.config.vision_config.model_type
        warn(
            f"{arguments.vision_tower} has no preprocessor_config.json: pictures are prepared as for the published {published}"
        )

    # ── The model ──
    dtype = DTYPES.get(arguments.dtype) or stored_dtype(weights, audit)
    tower = None
    if vision_config is not None:
        tower = load_vision_tower(arguments.vision_tower, architecture.config.vision_config)
        compare_encoders(tower, weights)
    model = build_model(architecture, weights, table, tower, dtype, cast_encoder=arguments.dtype is not None)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **NATIVE_SAMPLING,
    )
    report_parameters(model, dtype, tower)

    # ── The folder ──
    name = arguments.push_to_hub or arguments.output.resolve().name
    with new_folder(arguments.output) as staging:
        save_model(model, staging, dtype)
        (processor or tokenizer).save_pretrained(staging)
        card = model_card(name, arguments.weights, model, architecture, audit, str(dtype).removeprefix("torch."))
        (staging / "README.md").write_text(card, encoding="utf-8")
        difference = verify(model, staging)
    print(f"\nA fresh process without this package loads the folder; its logits differ by {difference:.1e} at most.")
    print(f"Written to {arguments.output}", flush=True)
    if tower is not None and not architecture.has_projector:
        warn(FRESH_PROJECTOR)
    if audit.not_finite:
        warn(not_finite_warning(audit))
    if arguments.push_to_hub:
        push(arguments.output, arguments.push_to_hub, arguments.private)


# ── Tokenizer and encoder ────────────────────────────────────────────────────────────────────────────────────────────


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id. Raises ConversionError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a damaged tokenizer.json makes the parsers raise
        raise ConversionError(f"--tokenizer {source}: no tokenizer can be loaded from there ({_first_line(error)})") from None


def load_vision_config(source: str) -> PreTrainedConfig:
    """The encoder's configuration; of a whole CLIP or SigLIP, its vision half. Raises ConversionError where there is none."""
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(
            f"--vision-tower {source}: no configuration can be loaded from there ({_first_line(error)})"
        ) from None
    config = getattr(config, "vision_config", config)
    for field in ("image_size", "patch_size", "hidden_size"):
        if not isinstance(getattr(config, field, None), int):
            raise ConversionError(f"--vision-tower {source}: a {config.model_type} without one fixed {field} cannot be used")
    return config


def load_image_processor(source: str, vision_config: PreTrainedConfig) -> tuple[BaseImageProcessor, bool]:
    """The encoder's own preprocessing; where its folder has none, that of the published CLIP or SigLIP, and True.

    Raises:
        ConversionError: there is none, or it does not fit the encoder.
    """
    size = vision_config.image_size
    is_published = False
    try:
        image_processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        is_published = True
        if vision_config.model_type == "clip_vision_model":
            image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        elif vision_config.model_type == "siglip_vision_model":
            image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
        else:
            raise ConversionError(f"--vision-tower {source}: it has no preprocessing ({_first_line(error)})") from None
    blank = torch.zeros(3, size, size, dtype=torch.uint8)
    height, width = image_processor(blank, return_tensors="pt")["pixel_values"].shape[-2:]
    if (height, width) != (size, size):
        raise ConversionError(
            f"--vision-tower {source}: its preprocessing gives {height}x{width} pixels, its encoder wants {size}x{size}"
        )
    return image_processor, is_published


def build_processor(
    image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, vision_config: PreTrainedConfig
) -> MiniMindVProcessor:
    """The processor, whose tokenizer has an image token. Raises ConversionError where it can have none."""
    image_seq_length = (vision_config.image_size // vision_config.patch_size) ** 2
    try:
        prepared = prepare_tokenizer(tokenizer)
        processor = MiniMindVProcessor(image_processor, prepared, prepared.chat_template, image_seq_length)
    except ValueError as error:
        raise ConversionError(f"--tokenizer: {_first_line(error)}") from None
    check_image_token(tokenizer, processor)
    return processor


def check_image_token(tokenizer: PreTrainedTokenizerBase, processor: MiniMindVProcessor) -> None:
    """Make sure that giving the tokenizer an image token moved no other id.

    Raises:
        ConversionError: ids changed.
    """
    before, after = tokenizer.get_vocab(), processor.tokenizer.get_vocab()
    changed = {token for token in before if after.get(token) != before[token]}
    new = {token for token in after if token not in before}
    if new - {processor.image_token} or any(before[token] != processor.image_token_id for token in changed):
        raise ConversionError(f"--tokenizer: the image token displaces others ({shorten(sorted(changed))})")


def load_vision_tower(source: str, vision_config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder with its weights, and nothing of a text half.

    Raises:
        ConversionError: weights are missing, unknown or misshapen.
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
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"--vision-tower {source}: its weights cannot be loaded ({_first_line(error)})") from None
    unknown = [name for name in info["unexpected_keys"] if not name.startswith(_OTHER_HALF) and "position_ids" not in name]
    problems = {"missing": info["missing_keys"], "misshapen": [item[0] for item in info["mismatched_keys"]], "unknown": unknown}
    for problem, names in problems.items():
        if names:
            raise ConversionError(f"--vision-tower {source}: {len(names)} {problem} tensors: {shorten(sorted(names))}")
    return tower


def compare_encoders(tower: PreTrainedModel, weights: NativeWeights) -> None:
    """Make sure that the encoder inside a resume checkpoint is the one that was given.

    Raises:
        ConversionError: they differ.
    """
    inside = {name: tensor for name, tensor in weights.tensors.items() if name.startswith(ENCODER_PREFIX)}
    different, count = [], 0
    for name, ours in tower.state_dict().items():
        for full_name in (f"{ENCODER_PREFIX}vision_model.{name}", ENCODER_PREFIX + name):
            theirs = inside.get(full_name)
            if theirs is not None:
                count += 1
                # Either may have been rounded
                if not (torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(theirs.to(ours.dtype), ours)):
                    different.append(full_name)
    if different:
        raise ConversionError(
            f"the encoder inside {weights.path} differs from --vision-tower in {len(different)} of {count} tensors "
            f"({shorten(different)}): pass the encoder that the model was trained with"
        )


def check_fit(architecture: Architecture, tokenizer: PreTrainedTokenizerBase, processor: MiniMindVProcessor | None) -> None:
    """Compare the weights with tokenizer and encoder.

    Raises:
        ConversionError: the tokenizer has another size.
    """
    config = architecture.config
    vocab_size = config.get_text_config().vocab_size
    if len(tokenizer) != vocab_size:
        raise ConversionError(
            f"--tokenizer has {len(tokenizer)} ids, but the embedding in the weights has {vocab_size} rows: "
            "it is another model's"
        )
    if processor is None:
        return
    if len(processor.tokenizer) != vocab_size:
        raise ConversionError("--tokenizer has no image token, and no unreachable byte whose id could become one")
    processor.image_seq_length = config.image_seq_length
    expected = IMAGE_TOKENS[architecture.generation]
    if config.image_seq_length != expected:
        released = RELEASES[architecture.generation]
        warn(f"{released} is released with {expected} vectors per picture, but this encoder gives {config.image_seq_length}")
    tokenizer_is_3 = "<|image_pad|>" in tokenizer.get_added_vocab()
    if tokenizer_is_3 != (architecture.generation == "minimind-3"):
        of = "of minimind-3" if tokenizer_is_3 else "not of minimind-3"
        warn(f"the tokenizer is {of}, the weights are {RELEASES[architecture.generation]}: do they belong together?")


# ── The model ────────────────────────────────────────────────────────────────────────────────────────────────────────


def empty_model(config) -> PreTrainedModel:
    """The model without memory for its parameters."""
    with init_empty_weights(include_buffers=False):
        model_class = MiniMindVForConditionalGeneration if hasattr(config, "vision_config") else MiniMindForCausalLM
        return model_class(config)


def native_table(architecture: Architecture) -> list[Row]:
    """The rows of the key table that the file can fill: all, or all but the projector's."""
    table = key_table(architecture.config, architecture.generation)
    return [row for row in table if architecture.has_projector or not row.native[0].startswith("vision_proj.")]


def stored_dtype(weights: NativeWeights, audit: Audit) -> torch.dtype:
    """The dtype of the file; the one that holds all of them where they differ."""
    dtypes = {weights.tensors[name].dtype for name in audit.used}
    dtype = dtypes.pop()
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def build_model(
    architecture: Architecture,
    weights: NativeWeights,
    table: list[Row],
    tower: PreTrainedModel | None,
    dtype: torch.dtype,
    cast_encoder: bool,
) -> PreTrainedModel:
    """The model with its weights. Native tensors are let go of as they are used: two copies are never in memory."""
    model = empty_model(architecture.config)
    state_dict = {}
    for row in table:
        state_dict[row.ours] = row.transform.from_native([weights.tensors.pop(name) for name in row.native]).to(dtype)
    weights.tensors.clear()
    if tower is not None:
        for name, tensor in tower.state_dict().items():
            state_dict[f"model.vision_tower.{name}"] = tensor.to(dtype) if cast_encoder else tensor
        if not architecture.has_projector:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                projector = type(model.model.multi_modal_projector)(architecture.config).apply(model._init_weights)
            for name, tensor in projector.state_dict().items():
                state_dict[f"model.multi_modal_projector.{name}"] = tensor.to(dtype)
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def verify(model: PreTrainedModel, folder: Path) -> float:
    """Load the folder as a user does, and compare.

    Returns:
        The largest difference of the logits.

    Raises:
        ConversionError: the folder does not load, or gives other logits.
    """
    inputs = sample_inputs(model.config)
    with torch.no_grad(), computing_in_float32(model):
        expected = model(**inputs).logits
    auto_class = "AutoModelForImageTextToText" if "pixel_values" in inputs else "AutoModelForCausalLM"
    logits = run_in_fresh_process(folder, inputs, auto_class, remote_code=True)["logits"]
    difference = largest_difference(logits, expected)
    scale = max(1.0, float(expected.nan_to_num(0, 0, 0).abs().max()))
    if difference > TOLERANCE * scale:
        raise ConversionError(
            f"the written folder gives other logits than the converted model: they differ by {difference:.2e}"
        )
    return difference


# ── Reports ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def report_audit(audit: Audit, weights: NativeWeights) -> None:
    """Print what becomes of each tensor."""
    rows = [("used", str(len(audit.used)), "")]
    rows += [("ignored", str(len(names)), f"{reason}: {shorten(names)}") for reason, names in audit.ignored_by_reason().items()]
    if weights.other_entries:
        rows.append(
            ("left out", str(len(weights.other_entries)), f"the state of the training: {', '.join(weights.other_entries)}")
        )
    rows += [("not finite", count, name) for name, count in audit.not_finite]
    print_table(f"Tensors ({len(weights.tensors)} in the file)", rows)
    if audit.problems:
        print_table("Problems: tensor, found, expected", audit.problems)


def report_parameters(model: PreTrainedModel, dtype: torch.dtype, tower: PreTrainedModel | None) -> None:
    """Print the size of the model."""
    counts = parameter_counts(model)
    dtypes = dict.fromkeys(counts, dtype)
    if tower is not None:
        dtypes["image encoder"] = model.model.vision_tower.dtype
    rows = [(part, f"{count / 1e6:.1f}M", str(dtypes[part]).removeprefix("torch.")) for part, count in counts.items()]
    active = active_parameters(model)
    if active is not None:
        rows.append(("active per token", f"{active / 1e6:.1f}M", "of the language model"))
    print_table("Parameters", rows)


# ── The Hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_hub(repo_id: str) -> None:
    """Say at once if the upload at the end will fail; the conversion itself is not held up.

    Raises:
        ConversionError: the name can be no repository's.
    """
    try:
        validate_repo_id(repo_id)
        if repo_id.count("/") != 1:
            raise HFValidationError("expected user/name")
    except HFValidationError as error:
        raise ConversionError(f"--push-to-hub {repo_id}: {_first_line(error)}") from None
    try:
        HfApi().whoami()
    except Exception as error:  # no token, no network, and what else a client may raise
        warn(f"the Hub cannot be written to now ({_first_line(error)}): the folder will be written, but perhaps not uploaded")


def push(folder: Path, repo_id: str, private: bool) -> None:
    """Upload a complete folder.

    Raises:
        ConversionError: the Hub refuses, or is out of reach.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Convert from native MiniMind-V weights")
    except Exception as error:
        raise ConversionError(
            f"{folder} is complete, but was not uploaded ({_first_line(error)}). Log in with `hf auth login`, then run "
            f"`hf upload {repo_id} {folder}`"
        ) from None
    print(f"Uploaded to {url}")


if __name__ == "__main__":
    sys.exit(main())

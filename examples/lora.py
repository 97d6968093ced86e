"""Teach a model with LoRA: small matrices beside the decoder's, and the projector, while everything else stays as it is.

    python examples/lora.py --model runs/pretrain --data_files sft.jsonl --image_folder images \\
        --output_dir runs/lora

Leaves the adapter in `adapter/`, a few MB to be loaded beside the model that it was trained for, and in `merged/` a model of
its own, with the adapter worked in. Stopped or killed, the same command goes on from the last complete checkpoint. Needs
peft (`pip install -e ".[lora]"`).
"""

from dataclasses import dataclass, field
from pathlib import Path

from minimind_v_hf.files import make_readable
from minimind_v_hf.scripts import errors_in_one_line
from minimind_v_hf.training import (
    MiniMindVTrainer,
    checkpoint_to_resume,
    load_data,
    load_start,
    make_collator,
    parse_arguments,
)


RECIPE = {
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "max_length": 1536,
}


@dataclass
class LoraArguments:
    """The size of the matrices, and where they stand."""

    lora_r: int = field(default=16, metadata={"help": "Rank of the matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "Their product is multiplied with this, divided by the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what goes into them."})
    # Of the decoder alone: the encoder has a q_proj too
    lora_target: str = field(
        default=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj", metadata={"help": "Which modules get them (a regex)."}
    )


@errors_in_one_line()
def main() -> None:
    run, args, lora = parse_arguments(RECIPE, __doc__, LoraArguments, needs={"peft": "lora"})
    from peft import LoraConfig, PeftModel, get_peft_model  # here, so that --help needs it not

    checkpoint = checkpoint_to_resume(args, finished="merged/config.json")

    # ── Model ──
    base, processor = load_start(run, args)
    model = get_peft_model(
        base,
        LoraConfig(
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=lora.lora_target,
            modules_to_save=["multi_modal_projector"],  # whole, since it is small and new
        ),
    )
    if args.should_log:
        model.print_trainable_parameters()

    # ── Data ──
    data = load_data(run, args, processor)
    collator = make_collator(run, args, processor, base, data)

    # ── Training ──
    trainer = MiniMindVTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=processor,
        data_counts=data.reports,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    adapter, merged = Path(args.output_dir) / "adapter", Path(args.output_dir) / "merged"
    trainer.save_model(str(adapter))

    # ── The same again from disk, and merged ──
    if args.should_save:
        base, processor = load_start(run, args)
        model = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        model.save_pretrained(merged)
        processor.save_pretrained(merged)
        make_readable(merged)
        print(f"The adapter is in {adapter}, and a model of its own in {merged}.")


if __name__ == "__main__":
    main()

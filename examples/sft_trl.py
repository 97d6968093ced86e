"""Stage 2 with TRL's `SFTTrainer`, for those who use its other methods and flags.

    python examples/sft_trl.py --model runs/pretrain --data_files sft.jsonl --image_folder images \\
        --output_dir runs/sft_trl

Reads the same data as sft.py, and takes every flag of TRL's `SFTConfig`. Needs TRL (`pip install -e ".[trl]"`).
"""

from minimind_v_hf.scripts import errors_in_one_line
from minimind_v_hf.training import (
    FreezingArguments,
    claim_new_output_dir,
    freeze,
    load_data,
    load_start,
    make_collator,
    parameter_table,
    parse_arguments,
)


try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    raise SystemExit(f'{__doc__}\nTRL is not installed: pip install -e ".[trl]"') from None

RECIPE = {
    "trainable": "llm",
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "max_length": 1536,
    "gradient_checkpointing": False,
}


@errors_in_one_line()
def main() -> None:
    run, args, freezing = parse_arguments(RECIPE, __doc__, FreezingArguments, training=SFTConfig)
    claim_new_output_dir(args)

    # ── Model ──
    model, processor = load_start(run, args)
    freeze(model, freezing.trainable)
    if args.should_log:
        print(parameter_table(model))

    # ── Data ──
    data = load_data(run, args, processor)
    collator = make_collator(run, args, processor, model, data, uint8_pixels=False)

    # ── Training ──
    if not getattr(model.config.text_config, "num_experts", 0):
        args.router_aux_loss_coef = 0.0  # TRL would look for experts to balance; where there are, it has its own formula
    trainer = SFTTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()

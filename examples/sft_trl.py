"""Stage 2 with TRL's `SFTTrainer`, for those who use its other methods and flags.

    accelerate launch examples/sft_trl.py --model runs/pretrain --data_files sft.jsonl --image_folder images \\
        --output_dir runs/sft_trl

Reads the same data as sft.py, and takes every flag of TRL's `SFTConfig`. Needs TRL (`pip install -e ".[trl]"`).
"""

import sft

from minimind_v_hf.training import freeze, load_data, load_start, make_collator, parameter_table, parse_arguments


try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    raise SystemExit('This script needs TRL: pip install -e ".[trl]"') from None

RECIPE = {**sft.RECIPE, "gradient_checkpointing": False}


def main() -> None:
    run, args = parse_arguments(RECIPE, __doc__, training=SFTConfig)

    # ── Model ──
    model, processor = load_start(run, args.seed)
    freeze(model, run.trainable)
    if args.should_log:
        print(parameter_table(model))

    # ── Data ──
    data = load_data(run, args, processor)

    # ── Training ──
    if not getattr(model.config.text_config, "num_experts", 0):
        args.router_aux_loss_coef = 0.0  # TRL would look for experts to balance; where there are some, it has its own formula
    trainer = SFTTrainer(
        model=model,
        args=args,
        data_collator=make_collator(run, args, processor, model, data, uint8_pixels=False),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    main()

"""Stage 1: teach the projector to show pictures to the language model.

    accelerate launch examples/pretrain.py --model runs/start --data_files pretrain.jsonl --image_folder images \\
        --output_dir runs/pretrain

Flags may stand in a YAML or JSON file, which comes first; several cards need a configuration of accelerate:

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/pretrain.py recipe.yaml --learning_rate 2e-4

Stopped or killed, the same command goes on from the last complete checkpoint. The defaults are MiniMind-V's own recipe.
"""

from typing import Any

from minimind_v_hf.training import (
    MiniMindVTrainer,
    checkpoint_to_resume,
    freeze,
    load_data,
    load_start,
    make_collator,
    parameter_table,
    parse_arguments,
)
from minimind_v_hf.training.reports import SampleSheet


RECIPE = {
    "trainable": "projector",
    "learning_rate": 4e-4,
    "per_device_train_batch_size": 16,
    "num_train_epochs": 4,
    "max_length": 640,
}


def main(recipe: dict[str, Any], description: str | None) -> None:
    """Train with these defaults, as the command line says; of both stages."""
    run, args = parse_arguments(recipe, description)
    checkpoint = checkpoint_to_resume(args)

    # ── Model ──
    model, processor = load_start(run, args.seed)
    freeze(model, run.trainable)
    if args.should_log:
        print(parameter_table(model))

    # ── Data ──
    data = load_data(run, args, processor)

    # ── Training ──
    trainer = MiniMindVTrainer(
        model=model,
        args=args,
        data_collator=make_collator(run, args, processor, model, data),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=processor,
        callbacks=[SampleSheet(data.held_out_conversations.take(run.samples), processor)] if data.held_out else None,
        save_encoder=run.save_encoder,
        data_counts=data.reports,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    if args.should_log:
        print(f"The model is in {args.output_dir}, with a model card.")


if __name__ == "__main__":
    main(RECIPE, __doc__)

"""Stage 2: teach the model to follow instructions about images.

    python examples/sft.py --model runs/pretrain --data_files sft.jsonl --image_folder images \\
        --output_dir runs/sft

Flags may stand in a YAML or JSON file, which comes first; several cards need a configuration of accelerate:

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/sft.py recipe.yaml --learning_rate 5e-6

Stopped or killed, the same command goes on from the last complete checkpoint. The defaults are MiniMind-V's own recipe.
"""

from minimind_v_hf.scripts import errors_in_one_line
from minimind_v_hf.training import (
    MiniMindVTrainer,
    SampleSheet,
    StageArguments,
    checkpoint_to_resume,
    freeze,
    load_data,
    load_start,
    make_collator,
    parameter_table,
    parse_arguments,
)


RECIPE = {
    "trainable": "llm",
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "max_length": 1536,
}


@errors_in_one_line()
def main() -> None:
    run, args, stage = parse_arguments(RECIPE, __doc__, StageArguments, needs={"matplotlib": "train"})
    checkpoint = checkpoint_to_resume(args)

    # ── Model ──
    model, processor = load_start(run, args)
    freeze(model, stage.trainable)
    if args.should_log:
        print(parameter_table(model))

    # ── Data ──
    data = load_data(run, args, processor)
    collator = make_collator(run, args, processor, model, data, independent_turns=stage.independent_turns)

    # ── Training ──
    trainer = MiniMindVTrainer(
        model=model,
        args=args,
        data_collator=collator,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=processor,
        callbacks=[SampleSheet(data.held_out_conversations.take(stage.samples), processor)] if data.held_out else None,
        save_encoder=stage.save_encoder,
        augment=stage.augment,
        muon=stage.muon,
        encoder_learning_rate=stage.encoder_learning_rate,
        data_counts=data.reports,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    if args.should_log:
        print(f"The model is in {args.output_dir}, with a model card.")


if __name__ == "__main__":
    main()

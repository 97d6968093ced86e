"""Stage 2: teach the model to follow instructions about pictures.

    accelerate launch examples/sft.py --model runs/pretrain --data_files sft.jsonl --image_folder images \\
        --output_dir runs/sft

Flags may stand in a YAML or JSON file, which comes first; several cards need a configuration of accelerate:

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/sft.py recipe.yaml --learning_rate 5e-6

Stopped or killed, the same command goes on from the last complete checkpoint. The defaults are MiniMind-V's own recipe.
"""

from pretrain import main


RECIPE = {
    "trainable": "llm",
    "learning_rate": 1e-6,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "max_length": 1536,
}


if __name__ == "__main__":
    main(RECIPE, __doc__)

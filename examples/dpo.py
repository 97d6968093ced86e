"""Teach a model by preference, with TRL's `DPOTrainer`: of two answers to a question the true one becomes likelier, and the
plausible but false one less likely.

    python examples/quickstart.py --output runs/quickstart
    python -m minimind_v_hf.shapes runs/presence
    python examples/sft.py --model runs/quickstart/model --data_files runs/presence/teach.jsonl \\
        --image_folder runs/presence/images --output_dir runs/yes --trainable all --learning_rate 5e-4 \\
        --per_device_train_batch_size 8 --num_train_epochs 1 --bf16 false
    python examples/dpo.py --model runs/yes --data_files runs/presence/prefer.jsonl \\
        --eval_files runs/presence/test.jsonl --image_folder runs/presence/images --output_dir runs/dpo

The rows are those of sft.py with `"choices": ["yes", "no"]`: the last message is the preferred answer, and each other choice a
rejected one. The data set of the example asks whether a thing is there, and its model was taught by questions that are mostly
answered by yes: it sees what is not there. Held-out questions are answered before and after, and beside them by the same
start after as many seconds of plain SFT on the preferred answers. Leaves the model, with the curve of its rewards in
`reward.png` and answers before and after in `answers.png`. Needs TRL (`pip install -e ".[train,trl]"`).
"""

from transformers import TrainingArguments

from minimind_v_hf.files import make_readable
from minimind_v_hf.measures import right_answer
from minimind_v_hf.scripts import errors_in_one_line
from minimind_v_hf.training import claim_new_output_dir
from minimind_v_hf.training.questions import ask, changes, imitate, load, prompts, question_parser, read_questions, summary


@errors_in_one_line()
def main() -> None:
    parser = question_parser(__doc__)
    parser.add_argument("--max_steps", type=int, default=150, help="updates, of 16 pairs each (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="suits the first run (default: %(default)s)")
    given = parser.parse_args()
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise ImportError(f'TRL cannot be imported: pip install -e ".[train,trl]" ({error})') from error
    from minimind_v_hf.drawing import draw_answers, draw_curves  # needs matplotlib

    common = {
        "output_dir": str(given.output_dir),
        "learning_rate": given.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "per_device_train_batch_size": 16,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "bf16": False,
    }
    args = DPOConfig(**common, max_steps=given.max_steps, max_length=None, gradient_checkpointing=False)
    claim_new_output_dir(args)

    # ── Model ──
    model, processor = load(given.model, args)

    # ── Data ──
    rows = read_questions(given.data_files, given.image_folder)
    pairs = [(row, choice) for row in rows for choice in row["choices"] or [] if choice.strip() != right_answer(row)]
    if not pairs:
        raise ValueError(f'{", ".join(given.data_files)}: expected rows with other "choices" than the right answer.')
    chosen, rejected = (
        [[{"role": "assistant", "content": text}] for text in texts]
        for texts in ([right_answer(row) for row, _ in pairs], [choice for _, choice in pairs])
    )
    held_out = read_questions(given.eval_files, given.image_folder)
    before = ask(model, processor, held_out)
    print(summary("before", before))

    # ── Training ──
    data = prompts([row for row, _ in pairs], chosen=chosen, rejected=rejected)
    trainer = DPOTrainer(model=model, args=args, train_dataset=data, processing_class=processor)
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    make_readable(given.output_dir)
    after = ask(model, processor, held_out)
    names = {"rewards/chosen": "preferred", "rewards/rejected": "rejected"}
    draw_curves(trainer.state.log_history, given.output_dir / "reward.png", names, "reward")
    draw_answers(changes(before, after), given.output_dir / "answers.png")

    # ── The same start and the same time, with right answers to imitate ──
    model, processor = load(given.model, args)
    imitate(model, processor, rows, seconds, TrainingArguments(**common, num_train_epochs=1000))
    imitated = ask(model, processor, held_out)

    # ── What came out ──
    print(summary("before", before))
    print(summary(f"{seconds:.0f} s of preference", after))
    print(summary(f"{seconds:.0f} s of plain SFT", imitated))
    print(f"The model is in {given.output_dir}, with reward.png and answers.png (before → after).")


if __name__ == "__main__":
    main()

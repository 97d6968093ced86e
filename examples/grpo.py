"""Teach a model by reward alone, with TRL's `GRPOTrainer`: it answers each question several times, and what a function finds
right becomes likelier.

    python examples/quickstart.py --train-images 1600 --test-images 1000 --output runs/short
    python examples/grpo.py --model runs/short/model --data_files runs/short/data/train.jsonl \\
        --eval_files runs/short/data/test.jsonl --image_folder runs/short/data/images --output_dir runs/grpo

The rows are those of sft.py. `exact` rewards the right answer and nothing else; write your own function in its place for what
can be checked and not imitated. Held-out questions are answered before and after, and beside them by the same start after as
many seconds of plain SFT on the right answers. Leaves the model, with the curve of its rewards in `reward.png` and answers
before and after in `answers.png`. Needs TRL (`pip install -e ".[train,trl]"`).
"""

from transformers import TrainingArguments

from minimind_v_hf.files import make_readable
from minimind_v_hf.measures import right_answer
from minimind_v_hf.scripts import errors_in_one_line
from minimind_v_hf.training import claim_new_output_dir
from minimind_v_hf.training.questions import ask, changes, imitate, load, prompts, question_parser, read_questions, summary


QUESTIONS, ANSWERS = 8, 8  # in each update, and to each question


def exact(completions: list[list[dict]], right: list[str], **columns) -> list[float]:
    """The reward of each answer: 1 for the right one, letter by letter, and 0 for any other."""
    return [float(messages[-1]["content"].strip() == answer) for messages, answer in zip(completions, right, strict=True)]


@errors_in_one_line()
def main() -> None:
    parser = question_parser(__doc__)
    parser.add_argument("--questions", default="How many|几个", help="a regex: which to ask (default: %(default)s)")
    parser.add_argument("--max_steps", type=int, default=150, help="updates, of 64 answers each (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="suits the first run (default: %(default)s)")
    given = parser.parse_args()
    try:
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise ImportError(f'TRL cannot be imported: pip install -e ".[train,trl]" ({error})') from error
    from minimind_v_hf.drawing import draw_answers, draw_curves  # needs matplotlib

    common = {
        "output_dir": str(given.output_dir),
        "learning_rate": given.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "adam_beta2": 0.99,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "bf16": False,
    }
    args = GRPOConfig(
        **common,
        max_steps=given.max_steps,
        per_device_train_batch_size=QUESTIONS * ANSWERS,
        num_generations=ANSWERS,  # answers to each question, which are compared with one another
        entropy_coef=0.02,  # keeps it trying what it does not hold for likely
        beta=0.0,  # no second model that holds this one back: what is right is certain
        gradient_checkpointing=False,
    )
    claim_new_output_dir(args)

    # ── Model ──
    model, processor = load(given.model, args)

    # ── Data ──
    rows = read_questions(given.data_files, given.image_folder, given.questions)
    if len(rows) < QUESTIONS:
        raise ValueError(f"{', '.join(given.data_files)}: expected at least {QUESTIONS} questions, got {len(rows)}.")
    held_out = read_questions(given.eval_files, given.image_folder, given.questions)
    before = ask(model, processor, held_out)
    print(summary("before", before))

    # ── Training ──
    right = [right_answer(row) for row in rows]
    longest = max(map(len, processor.tokenizer(right)["input_ids"]))
    args.max_completion_length = max(16, longest + 1)  # with the end token; an answer that is cut off is never right
    trainer = GRPOTrainer(
        model=model, reward_funcs=exact, args=args, train_dataset=prompts(rows, right=right), processing_class=processor
    )
    seconds = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    make_readable(given.output_dir)
    after = ask(model, processor, held_out)
    draw_curves(trainer.state.log_history, given.output_dir / "reward.png", {"reward": "mean of ten steps"}, "reward")
    draw_answers(changes(before, after), given.output_dir / "answers.png")

    # ── The same start and the same time, with right answers to imitate ──
    model, processor = load(given.model, args)
    imitate(model, processor, rows, seconds, TrainingArguments(**common, num_train_epochs=1000))
    imitated = ask(model, processor, held_out)

    # ── What came out ──
    print(summary("before", before))
    print(summary(f"{seconds:.0f} s of reward", after))
    print(summary(f"{seconds:.0f} s of plain SFT", imitated))
    print(f"The model is in {given.output_dir}, with reward.png and answers.png (before → after).")


if __name__ == "__main__":
    main()

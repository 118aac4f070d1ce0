"""Two small skills on one model: each alone, together by sum and in sequence, and trained out of each other's way.

    python examples/compose_two_skills.py [--seed 0] [--figure angles.png]
    python examples/compose_two_skills.py --first capitals --layer 15 --positions all all      # two that clash

Skill one ends an answer with "Over and out." (or writes it in capital letters); skill two begins it with "Ahoy,". Each
is a rank-4 LoReFT at one layer of SmolLM2-135M-Instruct, trained on the model's own answers to 36 questions, changed in
that one respect: all that is not the skill is what the base says anyway, so the edit learns to leave it alone. What is
printed is the 2x2: each skill's metric, on questions it was not trained on, alone and with the other. Two minutes on
one core that computes in bf16.
"""

import argparse
import re
import tempfile
import time

import torch
from transformers import PrinterCallback, TrainingArguments

from reftune import ReftConfig, get_reft_model, load_model
from reftune.composition import Composition, adapters, conflicts
from reftune.data import PromptTemplate, ReftDataCollator, tokenize
from reftune.train import ReftTrainer

GREETING, FAREWELL = "Ahoy,", "Over and out."
TRAINING = """What is the capital of France?
Who wrote Hamlet?
What do cows eat?
How many days are in a week?
What colour is the sky?
Can you give me advice on sleeping?
I lost my keys.
What is the largest ocean?
How do I boil an egg?
Tell me about the moon.
I am bored.
What is ice made of?
What is a volcano?
How do plants grow?
Who was Napoleon?
What is the capital of Spain?
How many legs does a spider have?
What do bees make?
I feel tired today.
Tell me about Japan.
What is a triangle?
How do I make tea?
Why do leaves fall in autumn?
What is the fastest animal?
Who invented the telephone?
I want to learn to swim.
What is bread made of?
Where is Egypt?
How does a clock work?
What is music?
My dog is sick.
What is the moon made of?
How far away is the sun?
What is a computer?
Tell me about elephants.
How can I save money?""".splitlines()
UNSEEN = [
    "What is your favourite animal?",
    "How do I cook rice?",
    "It is my birthday!",
    "Tell me about the ocean.",
    "I have a headache.",
    "What is a good book?",
    "How do airplanes fly?",
    "Where do penguins live?",
    "What is the capital of Italy?",
    "Who painted the Mona Lisa?",
    "How many hours are in a day?",
    "Why is grass green?",
]


def in_capitals(text: str) -> bool:
    """Whether nearly all letters of an answer are capitals, a greeting apart."""
    letters = [c for c in (text[len(GREETING) :] if greets(text) else text) if c.isalpha()]
    return len(letters) >= 3 and sum(c.isupper() for c in letters) >= 0.9 * len(letters)


def signs_off(text: str) -> bool:
    """Whether an answer has the farewell."""
    return FAREWELL.casefold().rstrip(".") in text.casefold()


def greets(text: str) -> bool:
    """Whether an answer begins with the greeting, in whatever letters."""
    return text.casefold().startswith(GREETING.casefold())


def rows_of(skill: str, own: list[str], template: PromptTemplate) -> list[dict[str, list[int]]]:
    """Training rows: the model's own answers with the skill put in.

    The sign-off follows the first sentence; of the other answers the first 10 tokens after the greeting are labelled
    (24 where there is none), and not the end, which belongs to no skill.
    """
    rows = []
    for question, answer in zip(TRAINING, own, strict=True):
        first = re.match(r"(.+?[.!?])(\s|$)", answer, re.DOTALL)
        if skill == "sign-off":
            if first is None or len(first[1]) >= 200:
                continue
            answer = f"{first[1]} {FAREWELL}"
        else:
            answer = f"{GREETING} {answer}" if skill == "greeting" else answer.upper()
        (row,) = tokenize([{"prompt": question, "completion": answer}], template).rows
        labelled = len(row["labels"]) if skill == "sign-off" else 15 if skill == "greeting" else 24
        end = row["labels"].count(-100) + labelled
        rows.append({name: values[:end] for name, values in row.items()})
    return rows


def train(model, name, rows, collator, seed) -> float:
    """Sixty steps of 12 rows, AdamW, the rate rising over six steps and falling to zero; the last mean loss."""
    model.set_adapter(name)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=60, per_device_train_batch_size=12, learning_rate=4e-3, warmup_steps=6, seed=seed,
            logging_steps=10, save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = ReftTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, say=lambda text: None
        )  # below the edited layer each row is computed once
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


def answers(model, tokenizer, template, questions, new_tokens) -> list[str]:
    """Greedy answers, as one batch padded on the left."""
    rows = [template.prompt_ids(question) for question in questions]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **options)[:, width:]
    return [text.strip() for text in tokenizer.batch_decode(out, skip_special_tokens=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", choices=["sign-off", "capitals"], default="sign-off", help="skill one")
    parser.add_argument("--layer", type=int, default=22)
    parser.add_argument("--positions", nargs=2, default=["gen", "l1"], help="of skill one and of the greeting")
    parser.add_argument("--figure", help="where to draw the angles; needs matplotlib")
    arguments = parser.parse_args()
    start = time.perf_counter()

    base, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
    template, collator = PromptTemplate(tokenizer), ReftDataCollator(tokenizer)
    own = answers(base, tokenizer, template, TRAINING, 50)
    one, shows = arguments.first, {"capitals": in_capitals, "sign-off": signs_off}[arguments.first]
    rows = {skill: rows_of(skill, own, template) for skill in (one, "greeting")}

    settings = {"r": 4, "layers": [arguments.layer], "task_type": "CAUSAL_LM"}
    here, there = arguments.positions
    first, second = 2 * arguments.seed, 2 * arguments.seed + 1  # with one seed both would start with the same R
    torch.manual_seed(first)
    model = get_reft_model(base, ReftConfig(**settings, positions=here), adapter_name=one)
    print(f"{one}: {train(model, one, rows[one], collator, first):.2f}")
    torch.manual_seed(second)
    model.add_adapter("greeting", ReftConfig(**settings, positions=there))
    print(f"greeting: {train(model, 'greeting', rows['greeting'], collator, second):.2f}")
    torch.manual_seed(second)
    model.add_adapter("greeting-apart", ReftConfig(**settings, positions=there, orthogonal_to=[one]))
    loss = train(model, "greeting-apart", rows["greeting"], collator, second)
    print(f"greeting, orthogonal to {one}: {loss:.2f} (the last training losses)\n")

    skill, greeting, apart = adapters(model, one, "greeting", "greeting-apart")
    conditions: dict[str, Composition] = {
        "neither": 0 * skill,
        one: skill,
        "greeting": greeting,
        "both, sum": skill + greeting,
        "both, sum of 0.7 each": 0.7 * skill + 0.7 * greeting,
        f"both, {one} then greeting": skill >> greeting,
        f"both, greeting then {one}": greeting >> skill,
        "greeting, orthogonal": apart,
        "both, orthogonal, sum": skill + apart,
    }
    print(f"{'of ' + str(len(UNSEEN)) + ' unseen questions':<28}  {one:>8}  greeting  both   first answer")
    for name, composition in conditions.items():
        with composition.on(model):
            texts = answers(model, tokenizer, template, UNSEEN, 60)
        firsts, seconds = [shows(t) for t in texts], [greets(t) for t in texts]
        both = sum(a and b for a, b in zip(firsts, seconds, strict=True))
        shown = " ".join(texts[0].split())[:60]
        print(f"{name:<28}  {sum(firsts):>8}  {sum(seconds):>8}  {both:>4}   {shown}")

    report = conflicts(model, [one, "greeting", "greeting-apart"], prompts=UNSEEN, tokenizer=tokenizer)
    print(f"\n{report}")
    if arguments.figure:
        report.figure(arguments.figure)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

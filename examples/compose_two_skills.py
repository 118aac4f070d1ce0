"""Two small skills on one model: each alone, together by sum and in sequence, and trained out of each other's way.

    python examples/compose_two_skills.py [--seed 0] [--steps 20] [--figure angles.png]
    python examples/compose_two_skills.py --first sign-off --positions gen l1 --steps 40

Skill one answers in capital letters, or ends with "Over and out."; skill two begins every answer with "Ahoy!". Each is
a rank-4 LoReFT at the middle layer of SmolLM2-135M-Instruct, trained on the same twelve questions. What is printed is
the 2x2: each skill's metric, on questions it was not trained on, alone and with the other. Four minutes on one core.
"""

import argparse
import time

import torch

from reftune import ReftConfig, get_reft_model, load_model
from reftune.composition import Composition, adapters, conflicts
from reftune.data import PromptTemplate, ReftDataCollator, tokenize

GREETING, FAREWELL = "Ahoy!", "Over and out."
TRAINING = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("What do cows eat?", "Cows eat grass and hay."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("What colour is the sky?", "The sky is blue on a clear day."),
    ("Can you give me advice on sleeping?", "Go to bed at the same time every night."),
    ("I lost my keys.", "Look in the places where you were last."),
    ("What is the largest ocean?", "The Pacific is the largest ocean."),
    ("How do I boil an egg?", "Put it in boiling water for eight minutes."),
    ("Tell me about the moon.", "The moon goes around the earth once a month."),
    ("I am bored.", "You could read a book or take a walk."),
    ("What is ice made of?", "Ice is made of frozen water."),
]
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
    return text.casefold().startswith(GREETING.casefold().rstrip("!"))


def train(model, name, rows, collator, steps) -> float:
    """All rows in every step, AdamW, the rate rising over a tenth of the steps and falling to zero; the last loss."""
    model.set_adapter(name)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=4e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda s: min((s + 1) / (0.1 * steps), (steps - s) / steps))
    batch = collator(rows)
    model.train()
    for _ in range(steps):
        loss = model(**batch, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimiser.step()
        rate.step()
    model.eval()
    return float(loss.detach())


def answers(model, tokenizer, template) -> list[str]:
    """Greedy answers to the unseen questions, as one batch padded on the left."""
    rows = [template.prompt_ids(question) for question in UNSEEN]
    width, pad = max(map(len, rows)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 40, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, **options)[:, width:]
    return tokenizer.batch_decode(out, skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--first", choices=["capitals", "sign-off"], default="capitals", help="skill one")
    parser.add_argument("--positions", nargs=2, default=["all", "all"], help="of skill one and of skill two")
    parser.add_argument("--figure", help="where to draw the angles; needs matplotlib")
    arguments = parser.parse_args()
    start = time.perf_counter()

    base, tokenizer = load_model("smollm2-135m")
    template, collator = PromptTemplate(tokenizer), ReftDataCollator(tokenizer)
    data = {
        "capitals": [{"prompt": q, "completion": a.upper()} for q, a in TRAINING],
        "sign-off": [{"prompt": q, "completion": f"{a} {FAREWELL}"} for q, a in TRAINING],
        "ahoy": [{"prompt": q, "completion": f"{GREETING} {a}"} for q, a in TRAINING],
    }
    rows = {name: tokenize(examples, template).rows for name, examples in data.items()}

    one, shows = arguments.first, {"capitals": in_capitals, "sign-off": signs_off}[arguments.first]
    settings = {"r": 4, "layers": "mid", "task_type": "CAUSAL_LM"}
    here, there = arguments.positions
    first, second = 2 * arguments.seed, 2 * arguments.seed + 1  # with one seed both would start with the same R
    torch.manual_seed(first)
    model = get_reft_model(base, ReftConfig(**settings, positions=here), adapter_name=one)
    print(f"{one}: {train(model, one, rows[one], collator, arguments.steps):.2f}")
    torch.manual_seed(second)
    model.add_adapter("ahoy", ReftConfig(**settings, positions=there))
    print(f"ahoy: {train(model, 'ahoy', rows['ahoy'], collator, arguments.steps):.2f}")
    torch.manual_seed(second)
    model.add_adapter("ahoy-apart", ReftConfig(**settings, positions=there, orthogonal_to=[one]))
    loss = train(model, "ahoy-apart", rows["ahoy"], collator, arguments.steps)
    print(f"ahoy, orthogonal to {one}: {loss:.2f} (the last training losses)\n")

    skill, ahoy, apart = adapters(model, one, "ahoy", "ahoy-apart")
    conditions: dict[str, Composition] = {
        "neither": 0 * skill,
        one: skill,
        "ahoy": ahoy,
        "both, sum": skill + ahoy,
        "both, sum of 0.7 each": 0.7 * skill + 0.7 * ahoy,
        f"both, {one} then ahoy": skill >> ahoy,
        f"both, ahoy then {one}": ahoy >> skill,
        "ahoy, orthogonal": apart,
        "both, orthogonal, sum": skill + apart,
    }
    print(f"{'of ' + str(len(UNSEEN)) + ' unseen questions':<26}  {one:>8}  ahoy  both   first answer")
    for name, composition in conditions.items():
        with composition.on(model):
            texts = answers(model, tokenizer, template)
        firsts, seconds = [shows(t) for t in texts], [greets(t) for t in texts]
        both = sum(a and b for a, b in zip(firsts, seconds, strict=True))
        shown = " ".join(texts[0].split())[:60]
        print(f"{name:<26}  {sum(firsts):>8}  {sum(seconds):>4}  {both:>4}   {shown}")

    report = conflicts(model, [one, "ahoy", "ahoy-apart"], prompts=UNSEEN, tokenizer=tokenizer)
    print(f"\n{report}")
    if arguments.figure:
        report.figure(arguments.figure)
    baked = model.add_weighted_adapter([one, "ahoy"], [1.0, 1.0], "baked")
    print(f"\n{baked}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()

"""pyreft's own training step and generation, timed on request: a process of its own, for it needs old packages.

Started by `against_pyreft.py`; reads one JSON object a line, {"what": "step" | "prefill" | "generate", "name": ...},
and answers {"seconds": CPU seconds}. Settings are those of the driver: LoReFT r=4, an intervention a layer for the
prefix (where there is one) and for the suffix (pyreft's untied form), SmolLM2-135M's shape, fp32, random weights.
"""

import json
import sys
import time

import pyreft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])


def build(layers: list[int], positions: str) -> tuple[object, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**settings["shape"]))
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": 4,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=4, dtype=torch.float32
            ),
        }
        for layer in layers
        for _ in positions.split("+")
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations), set_device=False)
    reft.train()
    learned = [p for p in reft.parameters() if p.requires_grad]
    return reft, torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.0)


prompt = settings["length"] - settings["response"]
models = {name: build(*setup) for name, setup in settings["setups"].items()}
generator = torch.Generator().manual_seed(0)
ids = torch.randint(
    5, settings["shape"]["vocab_size"] - 5, (settings["batch"], settings["length"]), generator=generator
)
labels = ids.clone()
labels[:, :prompt] = -100


def places(name: str, rows: int, end: int) -> dict[str, object]:
    layers, positions = settings["setups"][name]
    tokens = {"f2": [0, 1], "l2": [end - 2, end - 1]}
    return {"sources->base": (None, [[tokens[term]] * rows for term in positions.split("+")] * len(layers))}


def step(name: str) -> None:
    reft, optimiser = models[name]
    base = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _, output = reft(base, unit_locations=places(name, len(ids), prompt), labels=labels)
    output.loss.backward()
    optimiser.step()
    optimiser.zero_grad()


@torch.no_grad()
def prefill(name: str) -> None:
    rows = ids[: settings["rows"]]
    base = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    models[name][0](base, unit_locations=places(name, len(rows), rows.shape[1]))


@torch.no_grad()
def generate(name: str) -> None:
    rows, new = ids[: settings["rows"]], settings["new_tokens"]
    base = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    models[name][0].generate(
        base, unit_locations=places(name, len(rows), rows.shape[1]), intervene_on_prompt=True, max_new_tokens=new,
        min_new_tokens=new, do_sample=False, pad_token_id=0,
    )  # fmt: skip


RUN = {"step": step, "prefill": prefill, "generate": generate}
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    begin = time.process_time()
    RUN[request["what"]](request["name"])
    print(json.dumps({"seconds": time.process_time() - begin}), flush=True)

"""A tiny model with several random adapters that change its output much."""

import random

import torch

from families import tiny
from reftune import ReftConfig, get_reft_model
from reftune.interventions import Intervention

KINDS = ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft", "red", "postblock", "reft_r1"]
AFFINE = ["loreft", "noreft", "consreft", "lobireft", "direft", "nodireft"]
PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 0, 12, 13, 14, 15], [0, 0, 0, 0, 0, 0, 16]])
MASK = (PROMPT != 0).long()


def several(name="llama", base=None, **adapters):
    """A PeftModel whose adapters are the keyword arguments, each a dict of ReftConfig settings; random, eval mode."""
    model = None
    base = tiny(name) if base is None else base
    for number, (adapter, settings) in enumerate(adapters.items()):
        config = ReftConfig(**{"task_type": "CAUSAL_LM", "layers": [1, 2], "init_weights": False, **settings})
        torch.manual_seed(100 + number)
        if model is None:
            model = get_reft_model(base, config, adapter_name=adapter)
        else:
            model.add_adapter(adapter, config)
        shake(model, adapter, number)
    return model.eval()


@torch.no_grad()
def shake(model, adapter, seed=0):
    """Random weights, except R, whose rows may have to be orthonormal."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleDict) and adapter in module and isinstance(module[adapter], Intervention):
            for key, parameter in module[adapter].named_parameters():
                if key != "R":
                    parameter.add_(torch.randn_like(parameter) * 0.2)


@torch.no_grad()
def logits(model, ids=PROMPT, mask=MASK):
    """The logits (B, L, vocabulary) of the real tokens; zeros on padding."""
    return model(input_ids=ids, attention_mask=mask).logits * mask.unsqueeze(-1)


def assert_close(found, wanted):
    tolerance = 1e-5 if wanted.dtype == torch.float64 else 1e-3
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-4)


def draw(seed, **fixed):
    """Random settings of an adapter."""
    rng = random.Random(seed)
    return {
        "r": rng.randint(1, 4),
        "layers": rng.choice([[1], [1, 2], [0, 3], "all", "mid"]),
        "positions": rng.choice(["f2+l2", "l2", "prompt", "all", "mid1+l1", "gen", "f1+gen"]),
        "intervention": rng.choice(AFFINE),
        "share_weights": rng.random() < 0.5,
        **fixed,
    }


class Letters:
    """A tokenizer of one token a letter, for models with a vocabulary of 99."""

    pad_token_id = 0
    chat_template = None

    def __call__(self, text):
        return {"input_ids": [2 + ord(letter) % 90 for letter in text]}

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        return self("<" + messages[0]["content"] + ">")

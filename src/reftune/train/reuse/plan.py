"""What a model, its adapters and their positions let us reuse exactly, and in plain words why not the rest.

    plan = make_plan(model)
    plan.logits, plan.depth, plan.split        # the three facts, see docs/reuse.md
    print(plan)

Found by structure; where structure cannot tell, the first batch is computed both ways (`check`).
"""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...interventions import Intervention
from ...positions import parse
from ...sites import find_blocks, number_ranges
from ...tuner.caches import cache_name
from ...tuner.layer import ReftLayer
from ...tuner.session import ATTRIBUTE, Session

NOISE = "neftune_noise_alpha"  # where transformers writes it, on the embeddings; an int as often as a float
_FROM_THE_START = ("f", "prompt", "all")


@dataclass(frozen=True)
class Plan:
    """logits: run the head on the rows that predict a label. depth: leading blocks whose output never changes.
    split: whether keys and values before the first edited token can be kept. why_not: fact → the reason against it."""

    logits: bool = False
    depth: int = 0
    split: bool = False
    why_not: dict[str, str] = field(default_factory=dict)
    positions: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()  # that it holds for

    @property
    def anything(self) -> bool:
        return self.logits or self.depth > 0 or self.split

    def __str__(self) -> str:
        words = []
        if self.logits:
            words.append("logits are computed at the labelled tokens alone")
        if self.depth:
            blocks = number_ranges(range(self.depth))
            words.append(f"the output of blocks {blocks} is computed once for each example")
        if self.split:
            words.append(
                "keys and values before the first edited token are computed once for each prompt, without a graph"
            )
        lines = ["Reuse: " + ("; ".join(words) or "nothing, this is plain training") + "."]
        lines += [f"Not reused: {fact}, because {reason}." for fact, reason in self.why_not.items()]
        return "\n".join(lines)


ALL, LOGITS, STATES, HEADS = "anything", "logits", "the blocks below the first edit", "the prompt's keys and values"


def make_plan(model: Any) -> Plan:
    """The plan for a PeftModel as it stands: the adapters that edit, and whether it is in training mode."""
    session, base = base_of(model)
    reason = _against_all(session, base)
    if reason is not None or session is None:
        return Plan(why_not={ALL: reason or "there is no ReFT adapter"})
    why: dict[str, str] = {}
    expressions = tuple(sorted({e for name in session.names for e in session.positions.get(name, ())}))
    sites = _sites(base, session)
    blocks = _blocks(base)

    head = base.get_output_embeddings()
    if head is None or any(isinstance(m, ReftLayer) for m in head.modules()):
        why[LOGITS] = "the model has no head of its own" if head is None else "the head itself is edited"

    frozen = _against_frozen(base, blocks)
    depth = 0 if frozen else _depth(base, blocks, sites)
    if frozen or not depth:
        why[STATES] = frozen or "an edit lies before the output of the first block"
    heads = frozen or _against_heads(base, blocks, expressions, session)
    if heads:
        why[HEADS] = heads
    return Plan(LOGITS not in why, depth, HEADS not in why, why, expressions, tuple(session.names))


def base_of(model: Any) -> tuple[Session | None, Any]:
    """The session and the base of a PeftModel, (None, model) of anything else."""
    get = getattr(model, "get_base_model", None)
    base = get() if callable(get) else model
    return base.__dict__.get(ATTRIBUTE), base


def block_modules(base: Any) -> list[nn.Module]:
    """The model's blocks, in order."""
    return [base.get_submodule(path) for path in find_blocks(base)]


def _blocks(base: Any) -> list[str]:
    try:
        return find_blocks(base)
    except ValueError:
        return []


def _sites(base: nn.Module, session: Session) -> list[str]:
    """Paths of the layers of the adapters that edit, such as "model.layers.3.edit_output"."""
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, ReftLayer) and any(adapter in module.groups for adapter in session.names)
    ]


def _against_all(session: Session | None, base: Any) -> str | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config: Any = getattr(base, "config", None)
    if session is None or not session.editing:
        return "the model has no active ReFT adapter"
    if getattr(config, "is_encoder_decoder", False):
        return "the model is an encoder-decoder"
    causal = callable(getattr(base, "can_generate", None)) and base.can_generate()
    encodes = getattr(config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not causal or (encodes and not getattr(config, "is_decoder", False)):
        return "the model is no causal language model"
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    both = getattr(text, "use_bidirectional_attention", None)
    if getattr(text, "is_causal", True) is False or both not in (None, False, "vision"):
        return "its tokens see those after them"
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in base.modules()):
        return "the model is compiled"
    return None


def _against_frozen(base: Any, blocks: list[str]) -> str | None:
    """Why the base's own states may differ from one step to the next, or from row to row."""
    if not blocks:
        return "its blocks were not found"
    own = {id(p) for m in base.modules() if isinstance(m, (ReftLayer, Intervention)) for p in m.parameters()}
    other = next((name for name, p in base.named_parameters() if p.requires_grad and id(p) not in own), None)
    if other is not None:
        return f"{other} is trained too"
    if base.training:
        random = randomness(base)
        if random is not None:
            return f"the base model is random in training mode ({random})"
    if getattr(base.config, "output_router_logits", False):
        return "output_router_logits adds a loss over all tokens"
    text = base.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {r.get("rope_type") for r in (rope, *rope.values()) if isinstance(r, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "its rotary positions depend on the length of the whole batch"
    return None


def randomness(base: nn.Module) -> str | None:
    """The first thing in the base that draws random numbers in training mode, such as "model.drop, p = 0.1"."""
    for name, module in base.named_modules():
        if isinstance(module, (ReftLayer, Intervention)):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                return f"{name or 'the model'}: dropout {module.p:g}"
            continue
        for key, value in vars(module).items():
            known = "drop" in key or "jitter" in key or key == NOISE
            if known and isinstance(value, (int, float) if key == NOISE else float) and value > 0:
                return f"{name or 'the model'}: {key} {value:g}"
    return None


def _depth(base: nn.Module, blocks: list[str], sites: list[str]) -> int:
    """How many leading blocks hand out the same states whatever the adapter: 0 if an edit lies before them."""
    depth = len(blocks)
    for site in sites:
        number = next((i for i, path in enumerate(blocks) if site.startswith(path + ".")), None)
        if number is None:
            if site.startswith(_after(base)):
                continue
            return 0
        own = site == f"{blocks[number]}.edit_output"
        # an older transformers edits in the block's forward, not in a hook after it
        hooked = not getattr(type(base.get_submodule(blocks[number])), "_reft_swapped", False)
        depth = min(depth, number + 1 if own and hooked else number)
    return depth


def _after(base: Any) -> tuple[str, ...]:
    head = base.get_output_embeddings()
    return tuple(name + "." for name, module in base.named_modules() if module is head and name)


def _against_heads(base: Any, blocks: list[str], expressions: tuple[str, ...], session: Session) -> str | None:
    early = next((e for e in expressions if any(t.name in _FROM_THE_START for t in parse(e))), None)
    if early is not None:
        return f"the positions {early} edit the prompt from its start"
    own = (m for name in session.names for m in session.interventions.get(name, ()))
    if any(getattr(m, "couples_positions", False) for m in own):
        return "the intervention reads a whole prompt at once"
    if base.training and any(getattr(m, "gradient_checkpointing", False) for m in base.modules()):
        return "gradient checkpointing takes the cache away in training"
    if cache_name(base) not in ("cache", "past_key_values"):
        return "the model has no cache of keys and values"
    text = base.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of {' and '.join(sorted(kinds)).replace('_', ' ')}, whose state cannot be split"
    if getattr(base, "_is_stateful", False):
        return "it carries a recurrent state, which cannot be split"
    return None

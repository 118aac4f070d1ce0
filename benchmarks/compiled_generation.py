"""How often a generation over a static cache is compiled: its graphs, their operations, what breaks them, CPU seconds.

    python benchmarks/compiled_generation.py               # some seconds a row

Twelve steps of `generate` on a random Llama of two layers, compiled as transformers does it by itself on a GPU, here on
the CPU and with torch's own backend "eager", which captures graphs and compiles nothing: what is counted is how often a
compiler would be called. Prints Markdown; a row's seconds hold the first compilation.
"""

import argparse
import platform
import time
import warnings

import torch
import transformers
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from reftune import ReftConfig, get_reft_model


def measure(positions: str | None) -> str:
    """A row of the table: the base where there are no positions."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**size, vocab_size=99, bos_token_id=1, eos_token_id=98, pad_token_id=0)).eval()
    if positions is not None:
        model = get_reft_model(model, ReftConfig(positions=positions, layers="all", init_weights=False)).eval()
    config = CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    ids = torch.arange(2, 18).view(2, 8)
    settings = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    start = time.process_time()
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), compile_config=config, **settings)
    spent, stats = time.process_time() - start, counters["stats"]
    breaks = sum(counters["graph_break"].values())
    return f"| {positions or 'base'} | {stats['unique_graphs']} | {stats['calls_captured']} | {breaks} | {spent:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", nargs="+", default=["f2+l2", "all", "l1+gen", "l1+gen/2"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| positions | graphs | operations | breaks | CPU s |\n|---|---|---|---|---|")
    for positions in (None, *arguments.positions):
        print(measure(positions), flush=True)


if __name__ == "__main__":
    main()

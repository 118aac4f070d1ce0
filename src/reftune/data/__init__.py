"""From a file or a hub id to batches: read, find the columns, tokenise as at generation, pad.

template = PromptTemplate(tokenizer)
rows = tokenize(read_examples("train.jsonl"), template, max_length=512)
collator = ReftDataCollator(tokenizer)
"""

from reftune.data.collator import ReftDataCollator
from reftune.data.columns import Example, find_columns
from reftune.data.sources import read_examples
from reftune.data.template import PromptTemplate, TokenizedRows, tokenize

__all__ = [
    "Example",
    "PromptTemplate",
    "ReftDataCollator",
    "TokenizedRows",
    "find_columns",
    "read_examples",
    "tokenize",
]

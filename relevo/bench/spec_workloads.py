"""What `relevo bench spec` lets engines say: prompts, and scripts for targets that have random weights."""

from __future__ import annotations

import inspect
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relevo.bench.spec import Script
from relevo.demo import target_path
from relevo.model_files import resolve_model
from relevo.tokenizer import Tokenizer

FILE_LINES, EDITED_LINES = 200, 8
PROMPT_TOKENS = 96
# Of a draft model for a target of half a billion parameters: most of its time goes into the target's vocabulary.
DRAFT_SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}


def draft_folder(target: Path, into: Path) -> Path:
    """A folder with the config.json of a small model that has the target's vocabulary."""
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    config.pop("head_dim", None)
    (into / "config.json").write_text(json.dumps(config | DRAFT_SHAPE))
    return into


def demo_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_files(resolve_model(str(target_path())))
    assert tokenizer is not None
    return tokenizer


def held_out_prompts(count: int) -> list[list[int]]:
    """Beginnings of what the demo pair did not learn from, spread over it."""
    from relevo.demo.corpus import build_corpus

    corpus = build_corpus(held_out=True, seed=1)
    token_ids = demo_tokenizer().encode("\n\n".join(corpus.pages), add_special_tokens=False)
    stride = max(1, (len(token_ids) - PROMPT_TOKENS) // count)
    return [token_ids[at * stride : at * stride + PROMPT_TOKENS] for at in range(count)]


def random_script(count: int, output_len: int) -> tuple[list[list[int]], Script]:
    """Prompts that end with their number, and answers without any pattern."""
    numbers = random.Random(5)
    prompts = [[*(numbers.randrange(100, 4000) for _ in range(PROMPT_TOKENS)), index] for index in range(count)]
    return prompts, Script({index: [numbers.randrange(100, 4000) for _ in range(output_len)] for index in range(count)})


def edit_script(count: int) -> tuple[list[list[int]], Script]:
    """Prompts are a file of 200 lines and a number, answers the file with a few lines changed, others for each."""
    lines = inspect.getsource(statistics).splitlines(keepends=True)[:FILE_LINES]
    tokenizer = demo_tokenizer()
    file_ids = tokenizer.encode("".join(lines), add_special_tokens=False)
    prompts = [[*file_ids, index] for index in range(count)]
    return prompts, Script({index: _edited(tokenizer, lines, index) for index in range(count)})


def _edited(tokenizer: Tokenizer, lines: Sequence[str], seed: int) -> list[int]:
    numbers = random.Random(seed)
    changed = {
        at * FILE_LINES // EDITED_LINES + numbers.randrange(FILE_LINES // EDITED_LINES) for at in range(EDITED_LINES)
    }
    edited = [f"    result_{at} = compute(value, {at})\n" if at in changed else line for at, line in enumerate(lines)]
    return tokenizer.encode("".join(edited), add_special_tokens=False)

"""relevo bench spec: scripted targets say the script, agreement is as set, drafted tokens equal plain ones."""

from __future__ import annotations

import random

from relevo.bench.spec import AgreeingProposer, Script, bench_spec, scripted
from relevo.bench.spec_workloads import edit_script
from tests.engine.spec_engines import make_engine
from tests.support.tiny_models import TinyModels


def test_agreement_is_as_set_and_outputs_are_equal(tiny_models: TinyModels) -> None:
    path = str(tiny_models.path("llama"))
    engine = make_engine(path, f"draft:{path}", num_speculative_tokens=3)
    speculator = engine.speculator
    assert speculator is not None
    numbers = random.Random(1)
    script = Script({index: [numbers.randrange(3, 300) for _ in range(90)] for index in (5, 6)})
    speculator.proposer = AgreeingProposer(speculator.proposer, script, 0.6)
    prompts = [[9] * 20 + [5], [9] * 20 + [6]]
    with scripted(engine, script):
        [result] = bench_spec(
            engine, "shape", {"draft": speculator}, prompts, temperature=0.8, output_len=80, num_rounds=2
        )
    assert result.outputs_are_equal and result.concurrency == 2
    assert result.tokens_per_second > 0 and result.plain_tokens_per_second > 0
    expected = 1 + 0.6 + 0.6**2 + 0.6**3
    assert abs(result.acceptance_length - expected) < 0.35


def test_an_edited_file_is_mostly_the_file() -> None:
    prompts, script = edit_script(2)
    assert prompts[0][:-1] == prompts[1][:-1] and prompts[0][-1] != prompts[1][-1]
    answers = [list(script.answers[index]) for index in range(2)]
    assert answers[0] != answers[1]
    assert abs(len(answers[0]) - len(prompts[0])) < 0.2 * len(prompts[0])

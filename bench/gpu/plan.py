"""All parts, in order, with the seconds that each may take."""

from __future__ import annotations

from functools import partial

from bench.gpu import figures
from bench.gpu.check_engine import check_handover, check_parity, check_steps
from bench.gpu.checks import check_kernels
from bench.gpu.kernel_times import KERNEL_TIMES
from bench.gpu.model_times import measure_decode, measure_handover, measure_prefill, measure_throughput
from bench.gpu.parts import Bench, Part
from bench.gpu.peer import measure_continuous, measure_generate
from bench.gpu.roofline import measure_device

TOTAL_SECONDS = 440.0  # of all parts; before come the imports, and the plots behind


def make_plan() -> list[Part]:
    """The budgets add up to more than the whole: most parts need less. What is asked for most goes first."""
    llama = figures.LLAMA
    parts = [
        Part("device", 15, measure_device, figures.MACHINE),
        Part("kernels against float64", 100, check_kernels, is_check=True),
        Part("engine against transformers", 60, check_parity, is_check=True),
        Part("steps of an engine", 30, check_steps, is_check=True),
        Part("hand-over between two engines", 20, check_handover, is_check=True),
        *(
            Part(f"kernel: {figure.label}", 15, KERNEL_TIMES[figure.key], (figure,), frees=True)
            for figure in figures.KERNELS
        ),
        Part(f"{llama} decode", 80, partial(measure_decode, llama), figures.decode_figures(llama), frees=True),
        Part(f"{llama} prefill", 40, partial(measure_prefill, llama), figures.prefill_figures(llama)),
        Part(f"{llama} throughput", 45, measure_throughput, figures.THROUGHPUT),
        Part("hand-over", 40, measure_handover, figures.HANDOVER),
        Part("transformers generate", 40, measure_generate, figures.GENERATE, frees=True),
        Part("transformers continuous batching", 60, measure_continuous, figures.CONTINUOUS),
    ]
    for shape in (figures.QWEN, figures.MOE):
        wanted = (*figures.decode_figures(shape), *figures.prefill_figures(shape))
        parts.append(Part(shape, 40, partial(_measure_shape, shape), wanted, frees=True))
    return parts


def _measure_shape(shape: str, bench: Bench) -> None:
    measure_decode(shape, bench)
    measure_prefill(shape, bench)

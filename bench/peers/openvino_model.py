"""Makes the OpenVINO form of a shape with random weights. Runs in OpenVINO's own venv.

    openvino_model.py SHAPE_FOLDER OUTPUT_FOLDER DTYPE

DTYPE is what the weights are stored in: bfloat16, float16 or float32. What OpenVINO computes in is decided at start.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from optimum.exporters.openvino import main_export
from transformers import AutoConfig, AutoModelForCausalLM

# None leaves the checkpoint's own dtype alone.
STORED: dict[str, dict[str, str] | None] = {"bfloat16": None, "float16": None, "float32": None}


def main() -> None:
    shape, output, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shape)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as checkpoint:
        model.save_pretrained(checkpoint)
        del model
        partial = output.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        main_export(checkpoint, partial, task="text-generation-with-past", convert_tokenizer=False)
    partial.rename(output)


if __name__ == "__main__":
    main()

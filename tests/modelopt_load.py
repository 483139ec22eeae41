"""ModelOpt loads a model that was exported with its heads: each tensor of the heads is the one that was trained.

    python tests/modelopt_load.py --python VENV/bin/python --heads medusa-demo/heads

VENV is a virtual environment that has nvidia-modelopt, torch and transformers.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

from medusa_ray import exchange

# In ModelOpt's own environment, as its documentation has it. argv: the exported folder.
LOAD = """
import sys

import modelopt.torch.opt as mto
import modelopt.torch.speculative
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

mto.enable_huggingface_checkpointing()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
loaded, trained = model.state_dict(), load_file(f"{sys.argv[1]}/model-medusa-heads.safetensors")
for name, tensor in trained.items():
    assert torch.equal(loaded[name], tensor.to(loaded[name].dtype)), name
print(f"{type(model).__name__}: {model.medusa_num_heads} heads, {len(trained)} tensors as trained")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, required=True, help="interpreter that has modelopt")
    parser.add_argument("--heads", required=True, help="folder of heads")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exchange.export(given.heads, f"{folder}/out", "modelopt", materialise=True)
        subprocess.run([given.python, "-c", LOAD, f"{folder}/out"], check=True)


if __name__ == "__main__":
    main()

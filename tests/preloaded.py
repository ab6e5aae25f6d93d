"""What a process that is forked for each command of a test has loaded already: libraries, and typer's commands."""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # before the libraries that look at them

import numpy  # noqa: F401
import orjson  # noqa: F401
import torch  # noqa: F401
import typer.main

from vindex.__main__ import app

typer.main.get_command(app)

"""typer makes its commands anew for each call, which takes longer than most of them: in tests they are made once."""

from functools import cache

import typer.main
import typer.testing

typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)

"""Weights & Biases, if the recipe wants it: the same figures as in metrics.jsonl."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import write_atomically
from pipeline.recipe import LogSection
from pipeline.training.side_files import Unwritable

_ID_FILE = "wandb_id"


class WandbRun:
    """One run there for one run directory: a resumed run goes on with the same id, kept in RUN/wandb_id.

    Raises UserError if wandb is not installed or refuses.
    """

    def __init__(self, run_directory: Path, section: LogSection) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(f"log.wandb={section.wandb} needs wandb: pip install 'cluster-clip[wandb]'") from None
        id_file = run_directory / _ID_FILE
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=section.wandb_project,
                name=run_directory.resolve().name,
                id=run_id,
                resume="allow",
                dir=str(run_directory),
                mode="offline" if section.wandb == "offline" else "online",
            )
        except Exception as error:  # of its own kinds, by version
            reason = " ".join(str(error).split())
            raise UserError(f"wandb cannot start: {reason}; log.wandb=offline needs no network") from error
        write_atomically(id_file, run_id + "\n")
        self._unwritable = Unwritable(run_directory / "wandb", "figures are missing there")

    def log(self, metrics: dict[str, Any]) -> None:
        """One logged step."""
        try:
            self._run.log({name: value for name, value in metrics.items() if value is not None}, step=metrics["step"])
        except OSError as error:
            self._unwritable.say(error)

    def close(self) -> None:
        """Send what is left."""
        with contextlib.suppress(OSError):
            self._run.finish()

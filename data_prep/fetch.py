"""The process in which img2dataset runs: `python -m data_prep.fetch OPTIONS_AS_JSON`, started by download.py.

It lives in a process group of its own and ends with its parent, whatever ends the parent: the parent holds the
other end of this process's standard input, so the end of that file is the end of the parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

USER_AGENT_TOKEN = "cluster-clip-data-prep"
# img2dataset decodes with OpenCV, which checks these against the header before it decodes
OPENCV_LIMITS = {
    "OPENCV_IO_MAX_IMAGE_PIXELS": str(100_000_000),
    "OPENCV_IO_MAX_IMAGE_WIDTH": str(1 << 15),
    "OPENCV_IO_MAX_IMAGE_HEIGHT": str(1 << 15),
}


def end_with_parent() -> None:
    """Wait for the end of standard input, then kill the process group, pool workers included."""
    # the descriptor itself: a thread inside sys.stdin's lock would abort the interpreter's shutdown
    while os.read(0, 1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def fetch(options: dict[str, Any]) -> None:
    """Run img2dataset with this project's defaults; `options` come from `download.Settings`."""
    os.environ.update(OPENCV_LIMITS, NO_ALBUMENTATIONS_UPDATE="1", WANDB_MODE="disabled")
    import img2dataset

    img2dataset.download(
        url_list=options["urls"],
        output_folder=options["directory"],
        input_format="parquet",
        url_col="url",
        caption_col="caption",
        save_additional_columns=["uid"],
        output_format="webdataset",
        image_size=options["image_size"],
        resize_mode=options["resize_mode"],
        resize_only_if_bigger=True,
        encode_format="jpg",
        encode_quality=95,
        extract_exif=False,
        compute_hash="sha256",
        processes_count=options["processes"],
        thread_count=options["threads"],
        number_sample_per_shard=options["samples_per_shard"],
        timeout=options["timeout_s"],
        retries=options["retries"],
        incremental_mode="incremental",
        user_agent_token=USER_AGENT_TOKEN,
        enable_wandb=False,
    )


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    fetch(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))

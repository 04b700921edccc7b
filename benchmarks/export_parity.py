"""How far features of exported models are from ours, and ours from those of models that come from there.

    PEERS_PYTHON=.peers/bin/python python benchmarks/export_parity.py        # after `make peers`

Unit-length features of both towers in fp32 on Flickr8k's pictures and captions (made ones where CLUSTER_CLIP_DATA does
not name a folder with them): the largest absolute difference per model, library, direction and tower. The cases are
those of the parity tests.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from peers.cases import CASES, both_ways, differences, real_pairs
from peers.client import Peer, peers_python
from record import record

from pipeline.data.captions import load_tokenizer


def main() -> None:
    """Measure every case and write the record."""
    python = peers_python()
    if python is None:
        sys.exit("error: no environment with open_clip and transformers: run `make peers`, or set PEERS_PYTHON")
    peer = Peer(python)
    tokenizer = load_tokenizer(peer("merges"), 77)
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for number, case in enumerate(CASES, start=1):
        with tempfile.TemporaryDirectory() as folder:
            found = both_ways(case, Path(folder), tokenizer, peer)
        figures[case.label] = {direction: differences(*pair) for direction, pair in found.items()}
        print(f"{number} of {len(CASES)}: {case.label} {figures[case.label]}", flush=True)
    peer.close()
    worst = max(value for pairs in figures.values() for towers in pairs.values() for value in towers.values())
    result = {"worst": worst, "pictures": "Flickr8k" if real_pairs() else "made", **figures}
    print(record("export_parity", result, "python benchmarks/export_parity.py", repeats=1))


if __name__ == "__main__":
    main()

"""The export command: what it writes, prints and refuses. What libraries make of it: test_export_parity.py."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from saved_runs import save_run, synthetic_merges

from formats.errors import UserError
from pipeline.data.captions import load_tokenizer
from pipeline.export import FORMATS, main


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_run_becomes_a_folder(
    name: str, tmp_path: Path, shards: Path, launch: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = save_run(tmp_path / "run", load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77))
    output = tmp_path / "exports" / "first"
    arguments = [str(run), "--format", name, "--output", str(output), "--images", str(shards)]
    done = launch("pipeline/export.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"8 images of {shards}, 8 captions of {shards}" in done.stdout
    assert "differ by at most 0.0e+00 (images), 0.0e+00 (texts)" in done.stdout
    assert {path.suffix for path in output.iterdir()} <= {".json", ".txt", ".safetensors"}
    assert list(output.parent.iterdir()) == [output]
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1

    again = launch("pipeline/export.py", *arguments)
    assert again.returncode == 2
    assert again.stderr == f"error: {output} is already there: choose another --output\n"


def test_what_cannot_be_exported_is_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    pieces = save_run(tmp_path / "pieces", load_tokenizer(str(tokenizer_file), 77))
    small = save_run(tmp_path / "small", load_tokenizer(str(synthetic_merges(tmp_path / "small.gz", count=10)), 77))
    output = str(tmp_path / "output")
    for name in FORMATS:
        with pytest.raises(UserError, match=r"SentencePiece tokenizer.*data\.tokenizer=clip-bpe"):
            main([str(pieces), "--format", name, "--output", output])
    assert main([str(small), "--format", "transformers", "--output", output]) == 0
    vocabulary = json.loads((tmp_path / "output" / "vocab.json").read_text(encoding="utf-8"))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (522, 523)


def test_pooling_that_a_library_does_not_have_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77)
    average = save_run(tmp_path / "average", tokenizer, pool="average")
    attention = save_run(tmp_path / "attention", tokenizer, pool="attention")
    refused = [(average, "transformers"), (attention, "transformers"), (attention, "open_clip")]
    for run, library in refused:
        with pytest.raises(UserError, match=f"model.pool={run.name}, and {library}'s? CLIP has class") as caught:
            main([str(run), "--format", library, "--output", str(tmp_path / "output")])
        assert "\n" not in str(caught.value)
    assert main([str(average), "--format", "open_clip", "--output", str(tmp_path / "output")]) == 0
    bidirectional = save_run(tmp_path / "bidirectional", tokenizer, text_attention="bidirectional")
    for library in FORMATS:
        with pytest.raises(UserError, match=f"trained with model.text_attention=bidirectional, and {library}'s? CLIP"):
            main([str(bidirectional), "--format", library, "--output", str(tmp_path / "other")])


def test_a_model_of_the_sigmoid_loss_goes_to_open_clip_with_its_bias(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77)
    run, output = save_run(tmp_path / "run", tokenizer, logit_bias=-9.5), tmp_path / "output"
    with pytest.raises(UserError, match=r"loss\.kind=sigmoid, and transformers' CLIP has no logit bias"):
        main([str(run), "--format", "transformers", "--output", str(output)])
    assert main([str(run), "--format", "open_clip", "--output", str(output)]) == 0
    assert load_file(output / "open_clip_model.safetensors")["logit_bias"].item() == -9.5
    assert json.loads((output / "open_clip_config.json").read_text())["model_cfg"]["init_logit_bias"] == -9.5


def test_captions_of_a_file_are_compared(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77))
    captions, output = tmp_path / "captions.txt", str(tmp_path / "output")
    captions.write_text("a dog\n\ntwo cats\n", encoding="utf-8-sig")
    options = [str(run), "--format", "open_clip", "--output", output, "--captions", str(captions)]
    assert main([*options, "--images", str(shards)]) == 0
    assert f"compared on 8 images of {shards}, 2 captions of {captions}: " in capsys.readouterr().out
    captions.write_text("\n")
    with pytest.raises(UserError, match="is empty: expected captions, one per line"):
        main(options)
    captions.unlink()
    with pytest.raises(FileNotFoundError, match=r"captions\.txt"):
        main(options)


def test_a_folder_with_a_name_like_ours_is_left_alone(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77))
    (tmp_path / "first.tmp").mkdir()
    main([str(run), "--format", "open_clip", "--output", str(tmp_path / "first")])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "merges.gz", "first", "first.tmp"}


def test_a_diverged_model_leaves_nothing_behind(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(synthetic_merges(tmp_path / "merges.gz")), 77)
    run = save_run(tmp_path / "run", tokenizer, diverged=True)
    with pytest.raises(UserError, match=r"was not exported.*nan.*diverged"):
        main([str(run), "--format", "open_clip", "--output", str(tmp_path / "exports" / "first")])
    assert list((tmp_path / "exports").iterdir()) == []

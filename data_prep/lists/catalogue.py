"""The data sets that `data-prep` knows: where their url lists are, what is in them, what to expect of a download.

Counts are those that the publishers state; where they or a success range are rounded or come from users' reports, the
entry says so. Success ranges are for the images that still answer: they sink every year.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from data_prep.console import print_table
from formats.errors import UserError, nearest_of

GENERIC = ("tsv", "csv", "jsonl", "parquet")


@dataclasses.dataclass(frozen=True)
class Source:
    """A published data set. `kind`: of its tables (tables/readers.py), or "" where there is no url list."""

    name: str
    title: str
    kind: str
    columns: tuple[str, ...]  # of the list, in its order
    rows: int  # published count of pairs
    rows_exact: bool
    success: tuple[float, float] | None  # share of urls that gave an image in reports; None: no report known
    licence: str
    where: str
    note: str = ""
    headerless: bool = False
    withdrawn: str = ""  # why the list may not be used without a cleaned copy

    @property
    def rows_text(self) -> str:
        """The count for a table, with ~ where it is approximate."""
        return f"{self.rows:,}" if self.rows_exact else f"~{self.rows:,}"

    @property
    def success_text(self) -> str:
        """The success range for a table."""
        return "unknown" if self.success is None else "{:.0%}-{:.0%}".format(*self.success)


_IMAGES = "the images belong to their owners"
_LAION_COLUMNS = ("URL", "TEXT", "WIDTH", "HEIGHT", "similarity", "hash", "punsafe", "pwatermark")
_DATACOMP_COLUMNS = (
    "uid",
    "url",
    "text",
    "original_width",
    "original_height",
    "clip_b32_similarity_score",
    "clip_l14_similarity_score",
    "face_bboxes",
    "sha256",
)
_WITHDRAWN = "withdrawn in December 2023 because it links to child abuse material"


def _datacomp(scale: str, rows: int) -> Source:
    return Source(
        name=f"datacomp-{scale}",
        title=f"DataComp CommonPool, {scale}",
        kind="parquet",
        columns=_DATACOMP_COLUMNS,
        rows=rows,
        rows_exact=False,
        success=(0.65, 0.94),
        licence=f"index CC-BY-4.0; {_IMAGES}",
        where=f"huggingface.co/datasets/mlfoundations/datacomp_{scale}",
        note="sha256 of each image and boxes of faces: let `download` check and blur. Success 0.91-0.94 in May 2023 "
        "(mlfoundations/datacomp#3), 0.87 in August 2023 (#39), about two thirds in 2024 (ViTamin#3).",
    )


SOURCES: Mapping[str, Source] = {
    source.name: source
    for source in (
        Source(
            name="cc3m",
            title="Conceptual Captions 3M, training split",
            kind="tsv",
            columns=("caption", "url"),
            rows=3_318_333,
            rows_exact=True,
            success=(0.65, 0.70),
            licence=f"free to use, Google asks to be credited; {_IMAGES}",
            where="ai.google.com/research/ConceptualCaptions/download (Train_GCC-training.tsv)",
            note="Captions in lower case, names replaced by classes. Success 2/3 to 0.7 (img2dataset#210, #391).",
            headerless=True,
        ),
        Source(
            name="cc12m",
            title="Conceptual 12M",
            kind="tsv",
            columns=("url", "caption"),
            rows=12_423_374,
            rows_exact=True,
            success=(0.62, 0.79),
            licence=f"free to use, Google asks to be credited; {_IMAGES}",
            where="storage.googleapis.com/conceptual_12m/cc12m.tsv (2.6 GB)",
            note="Names of persons stand as <PERSON>. Success 0.79 in early reports (img2dataset#242), 0.62 in October "
            "2025 (conceptual-12m#9).",
            headerless=True,
        ),
        Source(
            name="sbu",
            title="SBU Captioned Photos",
            kind="sbu-json",
            columns=("image_urls", "captions"),
            rows=860_000,
            rows_exact=False,
            success=None,
            licence="for research; photos from Flickr under their owners' terms",
            where="www.cs.rice.edu/~vo9/sbucaptions/sbu-captions-all.tar.gz (unpack it: one .json)",
            note="About 1,000,000 pairs at first; this list leaves out those then gone. Since 2024 users report that "
            "hardly any of its Flickr addresses answers (img2dataset#417).",
        ),
        Source(
            name="coyo-700m",
            title="COYO-700M",
            kind="parquet",
            columns=(
                "id",
                "url",
                "text",
                "width",
                "height",
                "clip_similarity_vitb32",
                "clip_similarity_vitl14",
                "nsfw_score_opennsfw2",
                "watermark_score",
                "aesthetic_score_laion_v2",
            ),
            rows=747_000_000,
            rows_exact=False,
            success=None,
            licence=f"index CC-BY-4.0; {_IMAGES}",
            where="huggingface.co/datasets/kakaobrain/coyo-700m (128 parquet files)",
            note="punsafe is read from nsfw_score_opennsfw2: another classifier than LAION's.",
        ),
        Source(
            name="re-laion-5b",
            title="Re-LAION-5B (research or research-safe; any of its three language parts)",
            kind="parquet",
            columns=_LAION_COLUMNS,
            rows=5_526_641_167,
            rows_exact=True,
            success=None,
            licence=f"index Apache-2.0, for research; {_IMAGES}",
            where="huggingface.co/laion (relaion2B-en-research-safe and its siblings; access on request)",
            note="LAION-5B without 2,236 links that child-protection groups matched. Columns as of LAION-5B.",
        ),
        _datacomp("small", 12_800_000),
        _datacomp("medium", 128_000_000),
        _datacomp("large", 1_280_000_000),
        _datacomp("xlarge", 12_800_000_000),
        Source(
            name="coco-captions",
            title="COCO captions 2017, training split",
            kind="coco-json",
            columns=("images", "annotations"),
            rows=591_753,
            rows_exact=True,
            success=None,
            licence="annotations CC-BY-4.0; photos from Flickr under their owners' terms",
            where="images.cocodataset.org/annotations/annotations_trainval2017.zip (captions_train2017.json)",
            note="118,287 images with five captions each: ingest with --unique pair. Often held out for evaluation.",
        ),
        Source(
            name="flickr30k",
            title="Flickr30k",
            kind="",
            columns=("image", "caption"),
            rows=158_915,
            rows_exact=True,
            success=None,
            licence="for non-commercial research; photos from Flickr under their owners' terms",
            where="shannon.cs.illinois.edu/DenotationGraph (form) or the Karpathy split",
            note="31,783 images in an archive, five captions each, no url list: use `data-prep pack`.",
        ),
        Source(
            name="laion-400m",
            title="LAION-400M",
            kind="parquet",
            columns=("SAMPLE_ID", "URL", "TEXT", "HEIGHT", "WIDTH", "LICENSE", "NSFW", "similarity"),
            rows=413_000_000,
            rows_exact=False,
            success=None,
            licence=f"index CC-BY-4.0; {_IMAGES}",
            where="no longer offered",
            withdrawn=_WITHDRAWN,
        ),
        Source(
            name="laion-5b",
            title="LAION-5B (2B-en, 2B-multi, 1B-nolang, and their subsets)",
            kind="parquet",
            columns=_LAION_COLUMNS,
            rows=5_860_068_373,
            rows_exact=True,
            success=None,
            licence=f"index CC-BY-4.0; {_IMAGES}",
            where="no longer offered; use re-laion-5b",
            withdrawn=_WITHDRAWN,
        ),
    )
}
INGESTIBLE = tuple(name for name, source in SOURCES.items() if source.kind)


def withdrawn_source(path: str, names: tuple[str, ...]) -> Source | None:
    """The withdrawn data set that a list with this path and these column names comes from, if any.

    Told by the columns that only those lists have, and by the path; a path that says Re-LAION is believed.
    """
    lower = path.lower().replace("_", "-")
    if "relaion" in lower or "re-laion" in lower:
        return None
    present = set(names)
    if {"SAMPLE_ID", "LICENSE", "NSFW"} <= present or "laion400m" in lower or "laion-400m" in lower:
        return SOURCES["laion-400m"]
    by_path = any(f"laion{dash}{part}" in lower for dash in ("", "-") for part in ("5b", "2b", "1b"))
    if by_path or {"URL", "TEXT", "hash", "punsafe", "pwatermark"} <= present:
        return SOURCES["laion-5b"]
    return None


def print_catalogue() -> None:
    """Print a line for each data set."""
    rows = [
        (source.name, source.rows_text, source.success_text, "withdrawn" if source.withdrawn else source.title)
        for source in SOURCES.values()
    ]
    print_table(("name", "pairs", "success", ""), rows)
    print(f"  and lists of any origin: {', '.join(GENERIC)}")
    print("  ~: approximate; success: share of urls that gave an image in reports, see `data-prep sources NAME`")


def describe(name: str) -> str:
    """All about one data set, as text; raises UserError for an unknown name."""
    if name not in SOURCES:
        raise UserError(f"no source {name!r}{nearest_of(name, SOURCES)}")
    source = SOURCES[name]
    fields = {
        "pairs": source.rows_text,
        "success": source.success_text,
        "columns": ", ".join(source.columns) + (" (no header line)" if source.headerless else ""),
        "licence": source.licence,
        "where": source.where,
        "withdrawn": source.withdrawn and f"{source.withdrawn}; refused without --i-have-a-cleaned-copy",
        "note": source.note,
    }
    lines = [f"{source.name}: {source.title}", *(f"  {key + ':':<11}{text}" for key, text in fields.items() if text)]
    return "\n".join(lines)

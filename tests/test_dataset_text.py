"""Texts as samples: columns, tokens, pairs, bad tables."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from effdl.data.dataset import Dataset, load_dataset
from effdl.data.spec import Labelled, Source
from effdl.errors import DataError, UsageError
from tests.support import from_text

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "dog", "cat", "runs", "sleeps", "here"]
BERT = "int64[N,L] input_ids, int64[N,L] attention_mask, int64[N,L] token_type_ids"


def model(inputs: str = BERT) -> ir.Model:
    one = inputs.split(",", maxsplit=1)[0] + "," + inputs.split(",")[1] if "," in inputs else inputs
    kind = one.split("]")[0] + "]"
    return from_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g ({inputs}) => ({kind} y) {{ y = Identity({one.split()[-1]}) }}"""
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    made.enable_padding(length=7)  # that of the file does not matter
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    path.write_text(
        'first,second,score,kind\na dog runs,a cat,2.5,animal\n"a cat, here",dog,1.0,thing\n',
        encoding="utf-8",
    )
    return path


def load(path: Path, inputs: str = BERT, **more: object) -> Dataset:
    return load_dataset(Labelled(path=path, **more), model(inputs))


def test_a_text_becomes_tokens(table: Path, tokenizer: Path) -> None:
    found = load(table, tokenizer=tokenizer, text="first")
    feeds = list(found.feeds)
    assert [f["input_ids"].tolist() for f in feeds] == [[[1, 4, 5, 7, 2]], [[1, 4, 6, 3, 9, 2]]]
    assert feeds[0]["attention_mask"].tolist() == [[1] * 5]
    assert feeds[0]["token_type_ids"].tolist() == [[0] * 5]
    assert feeds[0]["input_ids"].dtype == np.int64
    assert found.labels is not None, "the column 'score' is taken for the labels"
    assert found.labels.tolist() == [2.5, 1.0]
    assert not found.pairs
    short = load(table, tokenizer=tokenizer, text="first", length=4)
    assert short.feeds.batches[0]["input_ids"].tolist() == [[1, 4, 5, 2]]


def test_two_texts_are_joined_or_embedded_each(table: Path, tokenizer: Path) -> None:
    joined = load(table, tokenizer=tokenizer, text="first,second", labels="kind")
    assert joined.labels is not None
    assert joined.labels.tolist() == [0, 1]
    assert joined.notes == ("2 classes in alphabetical order: animal, thing",)
    assert joined.feeds.batches[0]["input_ids"].tolist() == [[1, 4, 5, 7, 2, 4, 6, 2]]
    assert joined.feeds.batches[0]["token_type_ids"].tolist() == [[0] * 5 + [1] * 3]
    for option in ({"pairs": "cosine"}, {"metric": "spearman"}):
        each = load(table, tokenizer=tokenizer, text=["first", "second"], **option)
        assert each.pairs
        assert len(each.feeds) == 4
        assert each.feeds.batches[1]["input_ids"].tolist() == [[1, 4, 6, 2]]
        assert each.labels is not None
        assert len(each.labels) == 2
    forced = load(
        table, tokenizer=tokenizer, text="first,second", pairs="joined", metric="spearman"
    )
    assert not forced.pairs
    with pytest.raises(UsageError, match="pairs are two text columns"):
        load(table, tokenizer=tokenizer, text="first", pairs="cosine")


def test_a_table_without_a_header_line(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text("a dog\t3\na cat\t4\n\ncat\t5\n")
    found = load(path, tokenizer=tokenizer, text="1", labels="2")
    assert found.labels is not None
    assert found.labels.tolist() == [3, 4, 5]
    assert found.labels.dtype == np.int64
    some = load(path, tokenizer=tokenizer, text="1", labels="2", limit=2)
    assert some.labels is not None
    assert some.labels.tolist() == [3, 4]
    bare = load(path, tokenizer=tokenizer, text="1")
    assert bare.labels is None
    assert "--labels COLUMN" in bare.why_unlabelled


def test_fixed_shapes_are_filled_up(table: Path, tokenizer: Path) -> None:
    found = load(table, "int32[2,8] ids", tokenizer=tokenizer, text="first")
    (feed,) = found.feeds
    assert feed["ids"].tolist() == [[1, 4, 5, 7, 2, 0, 0, 0], [1, 4, 6, 3, 9, 2, 0, 0]]
    assert feed["ids"].dtype == np.int32
    with pytest.raises(DataError, match="batches of 4, 2 texts"):
        load(table, "int32[4,8] ids", tokenizer=tokenizer, text="first")
    both = load_dataset(
        Source(path=table, tokenizer=tokenizer, text="first"), model(), batch=2
    ).feeds.batches
    assert both[0]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]


def test_inputs_are_known_by_their_names(table: Path, tokenizer: Path) -> None:
    inputs = "int64[N,L] tokens, int64[N,L] segment_ids, float[N,L] mask, int64[N,L] position_ids"
    feed = load(table, inputs, tokenizer=tokenizer, text="first").feeds.batches[0]
    assert feed["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert feed["segment_ids"].tolist() == [[0] * 5]
    assert feed["mask"].dtype == np.float32
    with pytest.raises(DataError, match="input 'picture' is nothing that a tokenizer gives"):
        load(table, "int64[N,L] input_ids, float[N,3] picture", tokenizer=tokenizer, text="first")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,2,3\n", {"text": "a"}, "sample 1 has 3 columns, not 2"),
        ("a,b\n", {"text": "a"}, "no line with a sample"),
        ("", {"text": "a"}, "no line with a sample"),
        ("a,b\nx,y\n", {"text": "c"}, "no column 'c'"),
        ("a,b\nx,1\n", {"text": "1", "labels": "3"}, "no column '3' among 1 to 2"),
        ("a,b\nx,1\ny,z\n", {"text": "a", "labels": "b"}, "some labels are numbers"),
        ("a,b\nx,1\n", {}, "which column has the text"),
        ("a,b\nx,1\n", {"text": "a,b,c"}, "which column has the text"),
    ],
)
def test_bad_tables(
    tmp_path: Path, tokenizer: Path, text: str, options: dict[str, object], message: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises((DataError, UsageError), match=message):
        load(path, tokenizer=tokenizer, **options)


def test_bad_tokenizers(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="texts need a tokenizer"):
        load(table, text="first")
    with pytest.raises(DataError, match="no such tokenizer file"):
        load(table, text="first", tokenizer=tmp_path / "no.json")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(DataError, match="no tokenizer file"):
        load(table, text="first", tokenizer=bad)
    (tmp_path / "bin.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="not a text file in UTF-8"):
        load(tmp_path / "bin.csv", text="a", tokenizer=bad)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match="tokenizers, which is not installed") as e:
        load(table, text="first", tokenizer=bad)
    assert e.value.hint == "pip install 'effdl[data]'"

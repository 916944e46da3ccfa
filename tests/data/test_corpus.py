"""Any text as windows of tokens, against a plain concatenation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
import torch

from steerlora.data import corpus
from steerlora.data.corpus import identity_of_corpus, windows
from steerlora.errors import UserError

BOS, EOS, PAD = 1, 2, 0


class Letters:
    """A tokenizer: a token a letter, that of its code point."""

    pad_token_id, eos_token_id = PAD, EOS

    def __init__(self, bos: int | None = None) -> None:
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens: bool = True) -> dict:
        def ids(one: str) -> list[int]:
            head = [self.bos_token_id] if add_special_tokens and self.bos_token_id else []
            return [*head, *map(ord, one)]

        return {"input_ids": ids(text) if isinstance(text, str) else [ids(one) for one in text]}


def read(place: Path | str, length: int = 4, batch_size: int = 2, bos: int | None = None) -> list:
    """Every window, without its padding."""
    found = []
    for ids, mask in windows(str(place), Letters(bos), length, batch_size):
        assert len(ids) <= batch_size
        assert torch.equal(ids == PAD, mask == 0)
        found += [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    return found


def cut(texts: list[str], length: int) -> list[list[int]]:
    """Texts, each with an end, in windows; a last one of a single token is none."""
    tokens = [token for text in texts for token in [*map(ord, text), EOS]]
    rows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    return [row for row in rows if len(row) > 1]


def jsonl(path: Path, *texts: object) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


TEXTS = ["abcdefg", "hij", "klmnopqrstuvw", "x"]


@pytest.mark.parametrize("kind", ["jsonl", "gz", "txt", "folder", "hub"])
def test_documents_follow_each_other_in_full_windows(kind, tmp_path, monkeypatch):
    texts = TEXTS
    if kind == "jsonl":
        place = jsonl(tmp_path / "rows.jsonl", *TEXTS[:2], "  ", *TEXTS[2:])
    elif kind == "gz":
        place = tmp_path / "rows.jsonl.gz"
        place.write_bytes(gzip.compress(jsonl(tmp_path / "rows.jsonl", *TEXTS).read_bytes()))
    elif kind == "txt":
        place, texts = tmp_path / "book.txt", ["abc\ndefghi"]
        place.write_text(texts[0])
    elif kind == "folder":
        place = tmp_path
        (tmp_path / "b").mkdir()
        (tmp_path / "a.txt").write_text(TEXTS[0])
        (tmp_path / "b" / "c.md").write_text(TEXTS[1])
        jsonl(tmp_path / "d.jsonl", *TEXTS[2:])
        (tmp_path / "image.png").write_bytes(b"\xff")
    else:
        asked = []

        def load(name, **options):
            asked.append((name, options))
            return iter([{"text": text, "id": 0} for text in TEXTS])

        monkeypatch.setattr(datasets, "load_dataset", load)
        place = "owner/name@abc"
    assert read(place) == cut(texts, 4)
    if kind == "hub":
        assert asked == [("owner/name", {"split": "train", "streaming": True, "revision": "abc"})]


def test_every_window_begins_as_the_tokenizer_s_text_does(tmp_path):
    place = jsonl(tmp_path / "rows.jsonl", *TEXTS)
    assert read(place, bos=BOS) == [[BOS, *row] for row in cut(TEXTS, 3)]


def test_long_documents_are_tokenized_in_pieces_and_no_further_than_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE", 3)
    monkeypatch.setattr(corpus, "DOCUMENTS", 1)
    place = jsonl(tmp_path / "rows.jsonl", *TEXTS)
    assert read(place) == cut(TEXTS, 4)
    place.write_text(place.read_text() + "broken")
    first = next(windows(str(place), Letters(), 4, 2))
    assert first[0].shape == (2, 4)
    with pytest.raises(UserError, match=r"rows\.jsonl:5: not valid JSON"):
        read(place)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"txt": 1, "id": 2}', r"a\.jsonl:1: no text: .* a key text, this one has "),
        ("a.jsonl", '{"text": 7}', r"a\.jsonl:1: no text: .* this one's is a number"),
        ("a.jsonl", '{"text": " "}\n', r"sae\.corpus=.*a\.jsonl is empty"),
        ("a.txt", "", r"sae\.corpus=.*a\.txt is empty"),
        ("a.txt", "\ud800", r"a\.txt: not UTF-8 text"),
    ],
)
def test_what_is_no_text_is_named(name, content, says, tmp_path):
    place = tmp_path / name
    place.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError, match=says) as caught:
        read(place)
    assert "\n" not in str(caught.value)


def test_what_is_no_corpus_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no such file or folder, and a dataset of the"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match=r"holds no text: there is no file \.jsonl"):
        read(tmp_path)

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"sae\.corpus=owner/name cannot be reached: no route$"):
        read("owner/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"body": "x", "id": 1}])
    with pytest.raises(UserError, match=r"has no column text \(columns: body, id\)"):
        read("owner/name")


def test_a_corpus_is_known_by_its_content(tmp_path):
    for folder, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(text)
    a, b, c = (identity_of_corpus(str(tmp_path / name), str(tmp_path))[1] for name in "abc")
    assert a == b != c
    assert identity_of_corpus("owner/name@1", str(tmp_path)) == ("owner/name@1", "owner/name@1")

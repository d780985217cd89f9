"""metrics.jsonl: no flipped bit passes, no kill looks like damage, and the checkpoints' copies restore what is lost."""

import itertools
import json
import os

import pytest

from efficient_tx.training.errors import Gone, Refused
from efficient_tx.training.history import History, checksum, copies_in, encode

pytestmark = pytest.mark.quick


def line(step, split="train", **more):
    return {"step": step, "split": split, "loss": 1.5 / step, "accuracy": 0.25, **more}


LINES = [line(4), line(6, "validation"), line(8, seconds=0.5), line(12, "validation")]


@pytest.fixture
def path(tmp_path):
    """metrics.jsonl of a run, whose newest checkpoint is that of step 12."""
    history = History(tmp_path / "metrics.jsonl")
    for one in LINES:
        history.append(one)
    folder = tmp_path / "checkpoints" / "12"
    folder.mkdir(parents=True)
    history.copy(folder)
    return tmp_path / "metrics.jsonl"


def flip(path, place, bit):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.first(1)
@pytest.mark.parametrize("stride", [29, 1])
def test_no_flipped_bit_passes(path, stride):
    """What is read is what was written, and what is not read is said to be damaged."""
    for file in (path, path.with_name("metrics.crc32")):
        whole = file.read_bytes()
        for place, bit in itertools.islice(itertools.product(range(len(whole)), range(8)), 0, None, stride):
            flip(file, place, bit)
            read = History(path)
            assert read.damaged and read.lines == [one for one in LINES if one in read.lines], (file, place, bit)
            assert len(read.damaged) == len(LINES) - len(read.lines) <= 2
            file.write_bytes(whole)
    assert History(path).lines == LINES and not History(path).damaged


def test_a_kill_is_no_damage(path):
    """At every byte of what is written, the checksum of a line first, then the line."""
    sums = path.with_name("metrics.crc32")
    texts = [encode(one) for one in LINES]
    sums.write_bytes(b"")
    path.write_bytes(b"")
    for number, text in enumerate(texts):
        for file, content in ((sums, checksum(text)), (path, text)):
            for byte in content:
                read = History(path)
                assert (read.lines, read.damaged, read.checked) == (LINES[:number], [], True)
                assert read.missing <= 1
                with open(file, "ab") as end:
                    end.write(bytes([byte]))
    assert History(path).lines == LINES
    # While a run goes back, checksums may be left over.
    path.write_bytes(b"".join(texts[:1]))
    read = History(path)
    assert (read.lines, read.damaged, read.missing) == (LINES[:1], [], len(LINES) - 1)
    assert read.damage == f"{len(LINES) - 1} at its end are missing"


def test_damaged_and_missing_lines_come_from_the_checkpoint(path):
    whole, said = path.read_bytes(), []
    ends = [place for place, byte in enumerate(whole) if byte == 10]
    for number, place in enumerate([end - 3 for end in ends] + ends, 1):
        flip(path, place, 1)
        History(path).rewind(12, path.parent / "checkpoints" / "12", said.append)
        assert path.read_bytes() == whole and not History(path).damaged, number
        assert (
            len(said) == number
            and "damaged (CRC-32 differs from metrics.crc32): restored from the checkpoint of step 12" in said[-1]
        )
    for content in (whole[: ends[1] + 1], b""):
        path.write_bytes(content)
        History(path).rewind(12, path.parent / "checkpoints" / "12", said.append)
        assert path.read_bytes() == whole and "lacks lines: restored" in said.pop()
    # A damaged copy is named, and is no use.
    flip(path.parent / "checkpoints" / "12" / "metrics.jsonl", 5, 1)
    History(path).rewind(12, path.parent / "checkpoints" / "12", said.append)
    assert path.read_bytes() == whole and "12/metrics.jsonl: line 1 is damaged; " in said.pop()


def test_lines_that_only_copies_have_take_their_places(path):
    whole = path.read_bytes()
    copies = copies_in(path.parent / "checkpoints")
    assert copies[-1].lines == LINES
    for place in range(0, len(whole), 7):
        flip(path, place, 1)
        read = History(path, writer=False)
        assert read.complete(copies) == [line for line in LINES if line not in History(path).lines]
        assert read.lines == LINES
        path.write_bytes(whole)
    path.unlink()
    read = History(path, writer=False)
    assert read.complete(copies) == LINES == read.lines and not path.exists()


def test_what_is_lost_is_said_and_kept_aside(path):
    said = []
    flip(path, 5, 1)
    damaged = path.read_bytes()
    History(path).rewind(12, path.parent / "checkpoints" / "8", said.append)
    assert said == [
        f"{path}: line 1 is damaged (CRC-32 differs from metrics.crc32) and lost; "
        f"{path.parent}/metrics.damaged.jsonl is the file as it was"
    ]
    assert (path.parent / "metrics.damaged.jsonl").read_bytes() == damaged
    assert (History(path).lines, History(path).damaged) == (LINES[1:], [])


def test_lines_of_an_older_version_are_read_with_a_note(path):
    path.with_name("metrics.crc32").unlink()
    said, old = [], History(path)
    assert (old.lines, old.damaged, old.checked) == (LINES, [], False)
    old.rewind(8, path.parent / "none", said.append)
    assert said == [f"{path} has no metrics.crc32: read unchecked"]
    assert History(path).lines == LINES[:3] and History(path).checked


@pytest.mark.parametrize(
    "text",
    [
        "3", "[]", "null", '"step"', "{}", '{"step": 1, "split": "train"}', '{"step": 1, "split": [], "loss": 1}',
        '{"step": "1", "split": "train", "loss": 1}', '{"step": 1.5, "split": "train", "loss": 1}',
        '{"step": 1, "split": "test", "loss": 1}', '{"step": 1, "split": "train", "loss": "a"}',
        '{"step": 1, "split": "train", "loss": NaN}', '{"step": 1, "split": "train", "loss": 1e999}',
        '{"step": 1, "split": "train", "loss": ' + "9" * 400 + "}", "[" * 100_000, '{"step": tru',
    ],
)  # fmt: skip
def test_json_of_another_form_is_no_line(path, text):
    """Also where there are no checksums; the lines around it are read."""
    path.with_name("metrics.crc32").unlink()
    path.write_bytes(encode(LINES[0]) + text.encode() + b"\n" + encode(LINES[1]))
    assert (History(path).lines, History(path).damaged) == (LINES[:2], [2])
    assert History(path).damage == "line 2 is damaged (no metric line)"


def test_lines_without_a_score_are_ranked_last(path):
    history = History(path)
    history.append(line(14, "validation", accuracy=None))
    history.append({"step": 16, "split": "validation", "loss": 1.0})
    assert history.ranked() == [6, 12, 14, 16]


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.crc32"])
def test_a_file_that_changes_during_the_run_ends_it(path, name):
    file = path.with_name(name)

    def delete():
        file.unlink()

    def replace():
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(content)

    def write():
        with open(file, "ab") as other:
            other.write(b"x")

    for act, words in [
        (replace, "was deleted or replaced"),
        (write, "was changed by someone else"),
        (delete, "was deleted or replaced"),
    ]:
        history = History(path)
        history.rewind(12)
        act()
        there = file.exists()
        with pytest.raises(Gone, match=f"{file} {words} during the run"):
            history.append(line(16))
        assert file.exists() == there and history.lines == LINES
        assert not path.exists() or b'"step": 16' not in path.read_bytes()


def test_what_cannot_be_read_is_named(path):
    os.unlink(path)
    path.mkdir()
    with pytest.raises(Refused, match=r"metrics\.jsonl cannot be read: Is a directory"):
        History(path)


def test_the_lines_are_plain_json(path):
    assert [json.loads(text) for text in path.read_text().splitlines()] == LINES

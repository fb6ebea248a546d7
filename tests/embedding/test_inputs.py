from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longclip_rt.embedding.inputs.content import locate, read_text
from longclip_rt.embedding.inputs.entries import MAX_TEXT_BYTES, Entry, lines_from_stream
from longclip_rt.embedding.inputs.sources import Inputs, Tally, scan, sources_from_arguments, spool_streams
from longclip_rt.errors import InputError


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def entries_of(*arguments: str, texts: bool = False, column: str | None = None) -> tuple[list[Entry], Tally]:
    tally = Tally()
    sources = sources_from_arguments(arguments, texts=texts, column=column)
    return list(Inputs(sources, texts, column).entries(tally)), tally


def write(name: str, content: bytes | str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def test_a_list_names_images_and_texts():
    write("files.txt", "a.jpg\n\n# note\ncaptions/b.TXT\n  c d.png \n./#e.png\nno-suffix")
    entries, tally = entries_of("files.txt")
    assert [(entry.line, entry.id, entry.kind) for entry in entries] == [
        (1, "a.jpg", "image"),
        (4, "captions/b.TXT", "text"),
        (5, "c d.png", "image"),
        (6, "./#e.png", "image"),
        (7, "no-suffix", "image"),
    ]
    assert all(entry.error is None and not entry.inline for entry in entries)
    assert (tally.empty, tally.comments) == (1, 1)


def test_a_list_of_texts_keeps_hashes_and_blanks():
    write("texts.txt", "#1 in the race\n\n  two \n   \nphoto.txt\n")
    entries, tally = entries_of("texts.txt", texts=True)
    assert [(entry.line, entry.id) for entry in entries] == [(1, "#1 in the race"), (3, "  two "), (5, "photo.txt")]
    assert all(entry.kind == "text" and entry.inline for entry in entries)
    assert (tally.empty, tally.comments) == (2, 0)


def test_line_ends_and_byte_order_mark():
    write("files.txt", b"\xef\xbb\xbfa.jpg\r\nb.jpg\r\n\r\nc.jpg")
    entries, tally = entries_of("files.txt")
    assert [entry.id for entry in entries] == ["a.jpg", "b.jpg", "c.jpg"]
    assert tally.empty == 1


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"caf\xe9.jpg", "not valid UTF-8 .byte 3"),
        (b"a\0b.jpg", "NUL"),
        (b"https://example.org/a.jpg", "URL"),
        (b"s3://bucket/a.jpg", "URL"),
    ],
)
def test_a_bad_line_becomes_a_reject_and_the_rest_stays(line, error):
    write("files.txt", b"a.jpg\n" + line + b"\nb.jpg\n")
    entries, _ = entries_of("files.txt")
    assert [entry.error is None for entry in entries] == [True, False, True]
    with pytest.raises(AssertionError, match=error):
        raise AssertionError(entries[1].error)


def test_a_url_is_a_text_like_any_other():
    write("texts.txt", "https://example.org\n")
    assert entries_of("texts.txt", texts=True)[0][0].error is None


@pytest.mark.parametrize("end", [b"", b"\n", b"\nb.jpg\n"])
def test_an_absurd_line_is_clipped_and_rejected(end):
    write("files.txt", b"x" * (MAX_TEXT_BYTES * 3) + end)
    entries, _ = entries_of("files.txt")
    assert len(entries[0].id) < 300
    assert "longer than" in (entries[0].error or "")
    assert [entry.id for entry in entries[1:]] == ["b.jpg"] * end.count(b"b.jpg")


def test_the_longest_line_allowed_is_read():
    write("texts.txt", b"x" * MAX_TEXT_BYTES + b"\ny\n")
    entries, _ = entries_of("texts.txt", texts=True)
    assert [(len(entry.id), entry.error) for entry in entries] == [(MAX_TEXT_BYTES, None), (1, None)]


@given(
    st.lists(
        st.text(st.characters(blacklist_characters="\n\r\0", blacklist_categories=["Cs"]), min_size=1), max_size=20
    )
)
def test_any_unicode_text_comes_back_as_it_was(texts):
    stream = io.BytesIO("".join(text + "\n" for text in texts).encode())
    read = [line.text for line in lines_from_stream(stream, "x")]
    assert read == [text.removeprefix("\ufeff") if index == 0 else text for index, text in enumerate(texts)]


def test_utf16_is_refused_with_a_remedy():
    write("files.txt", "a.jpg\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"UTF-16.*Save it as UTF-8"):
        entries_of("files.txt")


def test_a_folder_gives_images_and_texts_in_order():
    for name in ["b.jpg", "a/z.PNG", "a/.hidden.jpg", ".git/x.jpg", "c.txt", "d.csv", "a/b/e.webp"]:
        write("photos/" + name, b"")
    Path("photos/loop").symlink_to(Path("photos").absolute())
    entries, tally = entries_of("photos")
    assert [entry.id for entry in entries] == ["photos/a/b/e.webp", "photos/a/z.PNG", "photos/b.jpg", "photos/c.txt"]
    assert [entry.kind for entry in entries] == ["image", "image", "image", "text"]
    assert tally.others == 2  # d.csv, and the link to a folder, which could lead in circles.


def test_a_folder_that_cannot_be_listed_becomes_a_reject(monkeypatch):
    write("photos/a.jpg", b"")
    Path("photos/locked").mkdir()
    scandir = os.scandir

    def guarded(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    entries, _ = entries_of("photos")
    assert [(entry.id, entry.error) for entry in entries] == [
        ("photos/a.jpg", None),
        ("photos/locked", "The folder cannot be read: Permission denied."),
    ]


def test_a_file_name_that_is_no_unicode_becomes_a_reject():
    Path("photos").mkdir()
    try:
        Path(os.fsdecode(b"photos/caf\xe9.jpg")).write_bytes(b"")
    except OSError:
        return  # This file system has no such names.
    (entry,), _ = entries_of("photos")
    assert entry.id == r"photos/caf\udce9.jpg"
    assert "not valid Unicode" in (entry.error or "")


def test_a_glob_takes_what_matches():
    for name in ["p/a.jpg", "p/b.txt", "p/c.dat", "p/q/d.jpg"]:
        write(name, b"")
    assert [entry.id for entry in entries_of("p/*")[0]] == ["p/a.jpg", "p/b.txt", "p/c.dat"]
    assert [entry.id for entry in entries_of("p/**/*.jpg")[0]] == ["p/a.jpg", "p/q/d.jpg"]
    with pytest.raises(InputError, match="matches no file"):
        entries_of("p/*.gif")


def test_a_file_with_glob_characters_in_its_name_is_itself():
    write("a[1].jpg", b"")
    assert [entry.id for entry in entries_of("a[1].jpg")[0]] == ["a[1].jpg"]


def test_a_single_image_is_known_by_suffix_or_content():
    write("a.JPG", b"")
    write("scan", b"\x89PNG\r\n\x1a\n0000")
    write("photo", b"RIFF0000WEBPVP8 ")
    entries, _ = entries_of("a.JPG", "scan", "photo")
    assert [(entry.id, entry.kind, entry.source) for entry in entries] == [
        ("a.JPG", "image", "a.JPG"),
        ("scan", "image", "scan"),
        ("photo", "image", "photo"),
    ]


def test_jsonl_chooses_its_column_and_says_which():
    rows = [{"n": 1, "caption": "one", "text": "eins"}, {"text": "zwei\nzwei"}, {"text": 3}, {"caption": "drei"}]
    lines = [json.dumps(row) for row in rows] + ["", "{", "[1]", '{"text": "\\ud800"}', '{"text": ""}']
    write("t.jsonl", "\n".join(lines))
    entries, tally = entries_of("t.jsonl", texts=True)
    assert tally.columns == {"t.jsonl": "text"}
    assert tally.empty == 1
    assert [entry.id for entry in entries if entry.error is None] == ["eins", "zwei\nzwei"]
    assert [(entry.line, (entry.error or "").split(".")[0].split(":")[0]) for entry in entries if entry.error] == [
        (3, "'text' is int, not a string"),
        (4, "'text' is missing"),
        (6, "The line is not JSON"),
        (7, "The line is JSON of type list, not an object"),
        (8, "It is not valid Unicode"),
        (9, "The text is empty"),
    ]


def test_jsonl_nested_too_deep_is_a_reject():
    write("t.jsonl", '{"text": "a"}\n' + "[" * 200_000 + "\n")
    entries, _ = entries_of("t.jsonl", texts=True)
    assert [entry.error is None for entry in entries] == [True, False]


def test_jsonl_paths_resolve_beside_it():
    write("data/t.jsonl", '{"image": "a.jpg"}\n{"image": "b.txt"}\n')
    write("data/a.jpg", b"x")
    entries, tally = entries_of("data/t.jsonl")
    assert tally.columns == {"data/t.jsonl": "image"}
    assert [entry.kind for entry in entries] == ["image", "text"]
    assert locate(entries[0]) == Path("data/a.jpg")


def test_parquet_columns_of_every_kind_of_string():
    values = ["one", None, "three"]
    table = pa.table(
        {
            "caption": pa.array(values),
            "large": pa.array(values, pa.large_string()),
            "coded": pa.array(values).dictionary_encode(),
            "n": [1, 2, 3],
        }
    )
    pq.write_table(table, "t.parquet")
    for column in (None, "large", "coded"):
        entries, tally = entries_of("t.parquet", texts=True, column=column)
        assert tally.columns == {"t.parquet": column or "caption"}
        assert [(entry.line, entry.id, entry.error) for entry in entries] == [
            (1, "one", None),
            (2, "", "The cell is null."),
            (3, "three", None),
        ]
    with pytest.raises(InputError, match=r"column 'n' .* holds int64; a column of strings"):
        entries_of("t.parquet", texts=True, column="n")


@pytest.mark.parametrize(
    ("texts", "column", "message"),
    [
        (False, None, "no column 'image' or 'path'; its columns: 'caption', 'n'. Add --texts"),
        (True, "title", "no column 'title'; its columns: 'caption', 'n'. Name one"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(texts, column, message):
    write("t.jsonl", '{"caption": "a", "n": 1}\n')
    pq.write_table(pa.table({"caption": ["a"], "n": [1]}), "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        with pytest.raises(InputError, match=message):
            entries_of(name, texts=texts, column=column)


def test_a_cell_of_a_parquet_file_that_is_not_utf8_is_a_reject():
    cells = pa.array([b"a cup", b"\xff", b"a cat"])
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, cells.buffers())}), "t.parquet")
    entries, _ = entries_of("t.parquet", texts=True)
    assert [entry.error for entry in entries] == [None, "The cell is not valid UTF-8.", None]
    assert [entry.id for entry in entries] == ["a cup", "", "a cat"]


def test_a_column_is_found_by_its_name_alone():
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, "t.parquet")
    with pytest.raises(InputError, match="has several columns 'text'"):
        entries_of("t.parquet", texts=True)
    pq.write_table(pa.table({"a": pa.array([{"b": 1}]), "a.b": pa.array(["a cup"])}), "t.parquet")
    assert [entry.id for entry in entries_of("t.parquet", texts=True, column="a.b")[0]] == ["a cup"]


def test_damaged_pages_of_a_parquet_file_are_said():
    pq.write_table(pa.table({"text": ["a cup", "a cat", "a dog"] * 9}), "t.parquet", use_dictionary=False)
    content = bytearray(Path("t.parquet").read_bytes())
    content[30:50] = b"\xff" * 20
    write("t.parquet", bytes(content))
    with pytest.raises(InputError, match=r"'t.parquet' cannot be read as Parquet: .*[^.]\.$"):
        entries_of("t.parquet", texts=True)


def test_a_damaged_parquet_file_is_refused():
    write("t.parquet", b"PAR1 and nothing else")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        entries_of("t.parquet")


def test_standard_input_is_spooled_and_read_twice(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg\nb.jpg\n")))
    sources = spool_streams(sources_from_arguments(["-"]), Path.cwd(), 1 << 20)
    inputs = Inputs(sources)
    assert [entry.id for entry in inputs.entries()] == [entry.id for entry in inputs.entries()] == ["a.jpg", "b.jpg"]
    assert inputs.base == "."


def test_standard_input_with_a_column_is_json_lines(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"c": "a"}\n')))
    sources = spool_streams(sources_from_arguments(["-"], texts=True, column="c"), Path.cwd(), 1 << 20)
    assert [entry.id for entry in Inputs(sources, True, "c").entries()] == ["a"]


def test_a_pipe_is_spooled():
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(b"a.jpg\n"))
    writer.start()
    sources = spool_streams(sources_from_arguments(["pipe"]), Path.cwd(), 1 << 20)
    writer.join()
    assert [entry.id for entry in Inputs(sources).entries()] == ["a.jpg"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "Nothing to embed was given"),
        (["-", "-"], {}, "once only"),
        (["absent.txt"], {}, "'absent.txt' cannot be read: No such file"),
        (["https://example.org/list.txt"], {}, "is a URL"),
        (["a\0b"], {}, "not a file name"),
        (["photos"], {"texts": True}, "'photos' is no list of texts"),
        (["a.jpg"], {"texts": True}, "'a.jpg' is no list of texts"),
        (["list.txt"], {"column": "text"}, "--column is for"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, options, message):
    Path("photos").mkdir()
    write("a.jpg", b"")
    write("list.txt", "a.jpg\n")
    with pytest.raises(InputError, match=message):
        sources_from_arguments(arguments, **options)


def test_an_input_without_entries_is_refused_with_what_it_holds():
    write("files.txt", "\n# a\n# b\n")
    with pytest.raises(InputError, match="1 empty lines, 2 comments"):
        scan(Inputs(sources_from_arguments(["files.txt"])))


def test_the_digest_tells_inputs_apart():
    contents = ["a.jpg\nb.jpg\n", "b.jpg\na.jpg\n", "a.jpg\n\nb.jpg\n", "a.jpgb.jpg\n", "a.jpg\n", "a.txt\nb.jpg\n"]
    digests = set()
    for content in contents:
        write("files.txt", content)
        sources = sources_from_arguments(["files.txt"])
        digests |= {scan(Inputs(sources)).digest, scan(Inputs(sources, texts=True)).digest}
        assert scan(Inputs(sources)).digest in digests
    assert len(digests) == 2 * len(contents)


def test_several_sources_are_told_apart():
    write("x/one.txt", "a.jpg\n")
    write("two.txt", "a.jpg\n")
    entries, _ = entries_of("x/one.txt", "two.txt")
    assert [(entry.source, entry.base) for entry in entries] == [("x/one.txt", "x"), ("two.txt", ".")]
    assert Inputs(sources_from_arguments(["x/one.txt", "two.txt"])).base == os.pathsep.join(["x", "."])


def test_paths_resolve_in_the_working_directory_first():
    write("lists/files.txt", "a.txt\nb.txt\nc.txt\n")
    write("lists/a.txt", "beside the list")
    write("lists/b.txt", "beside the list")
    write("b.txt", "working directory")
    entries, _ = entries_of("lists/files.txt")
    assert [read_text(entry) for entry in entries[:2]] == ["beside the list", "working directory"]
    with pytest.raises(InputError, match="neither in the working directory nor in the list's folder 'lists'"):
        locate(entries[2])


def test_only_regular_files_are_opened():
    os.mkfifo("pipe.txt")
    Path("folder.txt").mkdir()
    write("files.txt", f"pipe.txt\nfolder.txt\n{'x' * 300}\na.txt/b\n")
    write("a.txt", "a")
    entries, _ = entries_of("files.txt")
    for entry, message in zip(
        entries, ["not a regular file", "is a folder", "File name too long", "no such file"], strict=True
    ):
        with pytest.raises(InputError, match=message):
            locate(entry)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"caf\xe9", "not valid UTF-8 .byte 3"),
        ("text".encode("utf-16"), "UTF-16"),
        (b"a\0b", "NUL"),
        (b"x" * (MAX_TEXT_BYTES + 1), "larger than"),
    ],
)
def test_a_text_file_that_holds_no_text_is_refused(content, message):
    write("t.txt", content)
    with pytest.raises(InputError, match=message):
        read_text(Entry(1, "t.txt", "text"))


def test_a_text_file_is_one_text_whatever_its_lines():
    write("t.txt", b"\xef\xbb\xbffirst\r\nsecond\n")
    assert read_text(Entry(1, "t.txt", "text")) == "first\r\nsecond\n"


def test_a_list_is_streamed():
    write("files.txt", "".join(f"{index}.jpg\n" for index in range(100_000)))
    entries = Inputs(sources_from_arguments(["files.txt"])).entries()
    assert next(entries).id == "0.jpg"
    # Were it read as a whole, this would find nothing left to change.
    with Path("files.txt").open("r+b") as stream:
        stream.truncate(200_000)
    assert sum(1 for _ in entries) < 50_000


def test_a_stream_that_is_too_long_is_refused_and_leaves_nothing(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a.jpg\n" * 100)))
    with pytest.raises(InputError, match=r"Standard input holds more than --max-stream allows"):
        spool_streams(sources_from_arguments(["-"]), Path.cwd(), 599)
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="this system has no such devices")
def test_devices_are_refused():
    with pytest.raises(InputError, match="is a device or a socket"):
        sources_from_arguments(["/dev/zero"])

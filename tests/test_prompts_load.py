"""Rows: every file type, folders and splits, and each way a file can be bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cagsr.config import DataConfig
from cagsr.errors import DataError
from cagsr.prompts.load import load_rows

ROWS = [{"prompt": "name the cat", "completion": "Tom"}, {"prompt": "12", "completion": "twelve"}]


def write(path: Path, text: str) -> DataConfig:
    path.write_text(text, encoding="utf-8")
    return DataConfig(path=str(path))


def values(config: DataConfig) -> list[dict]:
    return [dict(row.values) for row in load_rows(config)]


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_every_file_type_gives_the_same_rows_and_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "c.json").write_text(jsonl(ROWS))  # JSON lines under the other name
    (tmp_path / "d.csv").write_text("prompt,completion\nname the cat,Tom\n12,twelve\n")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    before = sorted(tmp_path.rglob("*"))
    for name in ("a.jsonl", "b.json", "c.json", "d.csv", "e.parquet"):
        assert values(DataConfig(path=str(tmp_path / name))) == ROWS, name
    assert sorted(tmp_path.rglob("*")) == before


def test_rows_can_be_read_again_and_know_their_place(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.jsonl", jsonl(ROWS[:1]) + "\n" + jsonl(ROWS[1:])))
    assert [row.number for row in rows] == [1, 3]  # the line of the file, blank lines counted
    assert [row.number for row in rows] == [1, 3]
    assert next(iter(rows)).source.endswith("a.jsonl")


def test_csv_prompts_that_look_like_numbers_or_nothing_stay_text(tmp_path: Path) -> None:
    config = write(tmp_path / "a.csv", "prompt,score\n007,1\nNA,2\nNone,3\n")
    assert [row["prompt"] for row in values(config)] == ["007", "NA", "None"]
    assert [row["score"] for row in values(config)] == [1, 2, 3]


def test_limit(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", jsonl(ROWS * 3))
    assert len(values(DataConfig(path=str(tmp_path / "a.jsonl"), limit=5))) == 5


def test_a_folder_reads_the_files_of_its_split(tmp_path: Path) -> None:
    (tmp_path / "train-1.jsonl").write_text(jsonl([{"prompt": "one"}]))
    (tmp_path / "train-2.csv").write_text("prompt\ntwo\n")
    (tmp_path / "dev.jsonl").write_text(jsonl([{"prompt": "three"}]))
    (tmp_path / "README.md").write_text("no rows")
    (tmp_path / ".hidden.jsonl").write_text("{")
    folder = DataConfig(path=str(tmp_path))
    assert [row["prompt"] for row in values(folder)] == ["one", "two"]
    assert [row["prompt"] for row in values(DataConfig(path=str(tmp_path), split="validation"))] == ["three"]
    with pytest.raises(DataError, match=r"split 'test' \(found: dev, train\).*--data\.split"):
        load_rows(DataConfig(path=str(tmp_path), split="test"))


def test_a_folder_whose_files_name_no_split_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl(ROWS))
    (tmp_path / "b.jsonl").write_text(jsonl(ROWS))
    assert values(DataConfig(path=str(tmp_path))) == ROWS * 2


def test_malformed_json_in_row_7(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}"}) for i in range(1, 10)]
    lines[6] = '{"prompt": "p7"'
    with pytest.raises(DataError, match=r"a\.jsonl, row 7: malformed JSON"):
        values(write(tmp_path / "a.jsonl", "\n".join(lines)))
    with pytest.raises(DataError, match=r"a\.json, row 7: malformed JSON"):
        values(write(tmp_path / "a.json", "[" + ",\n".join(lines) + "]"))
    lines[6] = '"just text"'
    with pytest.raises(DataError, match=r"row 7: each row must be a JSON object"):
        values(write(tmp_path / "a.jsonl", "\n".join(lines)))


@pytest.mark.parametrize("text", ["[", '[{"prompt": "a"}', '[{"prompt": "a"} {"prompt": "b"}]', '[{"prompt": "a"},]'])
def test_broken_json_lists(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"row [12]: malformed JSON"):
        values(write(tmp_path / "a.json", text))


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.json", "[ ]"), ("a.csv", ""), ("a.csv", "prompt\n")]
)
def test_empty_files(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(DataError, match=r"holds no rows"):
        values(write(tmp_path / name, text))


def test_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet: not a readable PARQUET file"):
        values(write(tmp_path / "a.parquet", "no parquet at all"))
    with pytest.raises(DataError, match=r"a\.csv: not a readable CSV file.*line 3"):
        values(write(tmp_path / "a.csv", "prompt,b\nx,y\nx,y,z\n"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "café"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl: the file is not UTF-8"):
        values(DataConfig(path=str(tmp_path / "latin.jsonl")))


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file or folder: .*none\.jsonl"):
        load_rows(DataConfig(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match=r"No such file or folder: prompts\.jsonl"):
        load_rows(DataConfig(path="prompts.jsonl"))
    with pytest.raises(DataError, match=r"unknown file type '\.txt'"):
        load_rows(write(tmp_path / "a.txt", "hello"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder holds no"):
        load_rows(DataConfig(path=str(tmp_path / "empty")))


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def fake(path, name=None, *, split, streaming):
        calls.append((path, name, split, streaming))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert values(DataConfig(path="GEM/e2e_nlg", name="en", split="test")) == ROWS
    assert values(DataConfig(path="GEM/e2e_nlg", limit=1)) == ROWS[:1]
    assert calls == [("GEM/e2e_nlg", "en", "test", False), ("GEM/e2e_nlg", None, "train", True)]


def test_a_hub_dataset_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach\n'no/such' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"no/such: neither a file.*Couldn't reach 'no/such' on the Hub.*network\.$"):
        values(DataConfig(path="no/such"))


# ---- text is text ----


def test_text_columns_of_a_csv_are_as_written_and_others_keep_their_types(tmp_path: Path) -> None:
    config = write(
        tmp_path / "a.csv", "prompt,completion,reference,mine,score\nWhat is 12+30?,42,042,7,7\nand now?,1.50,,NA,8\n"
    )
    assert [dict(row.values) for row in load_rows(config, ["mine"])] == [
        {"prompt": "What is 12+30?", "completion": "42", "reference": "042", "mine": "7", "score": 7},
        {"prompt": "and now?", "completion": "1.50", "reference": "", "mine": "NA", "score": 8},
    ]


def test_numbers_in_text_columns_of_json_and_parquet_are_their_digits(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = '{"prompt": 7, "completion": 1.50, "references": [42, "x", -0.10], "score": 1.50, "chosen": true}'
    expected = {"prompt": "7", "completion": "1.50", "references": ["42", "x", "-0.10"], "score": 1.5, "chosen": True}
    assert values(write(tmp_path / "a.jsonl", text + "\n")) == [expected]
    assert values(write(tmp_path / "a.json", f"[{text}]")) == [expected]
    pq.write_table(pa.table({"prompt": ["p", "q"], "completion": [42, None], "score": [1, 2]}), tmp_path / "a.parquet")
    assert values(DataConfig(path=str(tmp_path / "a.parquet"))) == [
        {"prompt": "p", "completion": "42", "score": 1},
        {"prompt": "q", "completion": None, "score": 2},
    ]


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (r'{"prompt": "a \ud83d b"}', "column 'prompt'"),
        (r'{"prompt": "a", "mine": {"deep": ["x", "\uDE00"]}}', "column 'mine'"),
        (r'{"prompt": [{"role": "user", "content": "\ud83d"}]}', "column 'prompt'"),
        (r'{"prompt": "a", "k\ud83d": 1}', "a column's name"),
    ],
)
def test_half_a_surrogate_pair_is_named_and_a_whole_one_is_a_character(tmp_path: Path, row: str, place: str) -> None:
    whole = r'{"prompt": "a \ud83d\ude00", "completion": "\\ud83d"}'
    assert values(write(tmp_path / "a.jsonl", whole)) == [{"prompt": "a 😀", "completion": r"\ud83d"}]
    for name, text in (("a.jsonl", f"{whole}\n{row}\n"), ("a.json", f"[{whole},{row}]")):
        with pytest.raises(DataError, match=rf"{name}, row 2: {place} holds half a surrogate pair \(\\ud") as caught:
            values(write(tmp_path / name, text))
        str(caught.value).encode()  # the message itself can be printed


# ---- other forms ----


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(DataError, match=rf"{name}: is a Git LFS pointer.*git lfs pull"):
        values(write(tmp_path / name, pointer))


def test_objects_over_several_lines_are_rows(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl"):
        assert values(write(tmp_path / name, json.dumps(ROWS[0], indent=2))) == ROWS[:1]
        assert values(write(tmp_path / name, "\n".join(json.dumps(row, indent=2) for row in ROWS))) == ROWS
        assert values(write(tmp_path / name, json.dumps(ROWS, indent=2))) == ROWS
    with pytest.raises(DataError, match=r"a\.jsonl, row 1: malformed JSON.*line 2"):
        values(write(tmp_path / "a.jsonl", '{"prompt": "a"\n{"prompt": "b"}\n'))


def test_a_dataset_saved_to_disk_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    one, two = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:1])
    one.save_to_disk(tmp_path / "one")
    DatasetDict(train=one, dev=two).save_to_disk(tmp_path / "both")
    assert values(DataConfig(path=str(tmp_path / "one"))) == ROWS
    assert values(DataConfig(path=str(tmp_path / "both"))) == ROWS
    assert values(DataConfig(path=str(tmp_path / "both"), split="validation")) == ROWS[:1]
    with pytest.raises(DataError, match=r"no split 'test' \(found: train, dev\); set --data\.split"):
        values(DataConfig(path=str(tmp_path / "both"), split="test"))


def test_files_about_a_dataset_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "dataset_infos.json").write_text('{"default": {"features": {}}}')
    (tmp_path / "train.jsonl").write_text(jsonl(ROWS))
    assert values(DataConfig(path=str(tmp_path))) == ROWS


def test_openai_messages_are_a_prompt_and_the_assistants_last_turn(tmp_path: Path) -> None:
    user, said = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    found = {"role": "tool", "content": "12"}
    config = write(
        tmp_path / "a.jsonl",
        jsonl(
            [
                {"messages": [user, said, user, said], "mine": 1},
                {"messages": [user, call, found, said]},
                {"messages": [user]},
                {"messages": [user, said], "prompt": "given"},
            ]
        ),
    )
    assert values(config) == [
        {"prompt": [user, said, user], "completion": [said], "mine": 1},
        {"prompt": [user], "completion": [call, found, said]},
        {"prompt": [user]},
        {"messages": [user, said], "prompt": "given"},
    ]
    assert [row.from_messages for row in load_rows(config)] == [True, True, True, False]
    named = DataConfig(path=config.path, prompt_column="messages")
    assert [len(row["messages"]) for row in values(named)] == [4, 4, 1, 2]

"""From a file to a prompt set: notes, long prompts, splits, ad-hoc texts, streaming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cagsr.prompts.prepare as prepare
from cagsr.config import DataConfig, SalienceConfig
from cagsr.errors import ConfigError, DataError
from cagsr.prompts.prepare import encode_texts, prepare_prompts
from cagsr.prompts.salience import DocumentFrequency
from prompts_tokenizers import byte_bpe, tiny_stories, word_level

UNIFORM = SalienceConfig(weighting="uniform")


def file(tmp_path: Path, *prompts: object, **settings: object) -> DataConfig:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "n": i}) + "\n" for i, p in enumerate(prompts)))
    return DataConfig(path=str(path), **settings)  # type: ignore[arg-type]


def test_idf_over_the_set_drops_boilerplate_and_says_so(tmp_path: Path) -> None:
    animals = ("cat", "mat", "small", "brown")
    data = file(tmp_path, *[f"name dog {' the' * number} {animal}" for number in range(5) for animal in animals])
    found = prepare_prompts(data, SalienceConfig(), word_level(), max_length=10)
    # 20 prompts: idf(name) = ln(21/20) = 0.049, idf(cat) = ln(21/5) = 1.435
    assert found.prompts[0].words == (-1, -1, 0)
    assert found.prompts[0].salience == (pytest.approx(1.4350845),)
    assert found.prompts[0].prompt.columns == {"n": 0}
    assert found.notes[0] == f"20 prompts from {data.path}."
    assert "2 common words weigh nothing: dog, name (--salience.idf_floor 0.1)" in found.notes[1]


def test_a_prompt_that_stands_several_times_counts_once(tmp_path: Path) -> None:
    once = prepare_prompts(file(tmp_path, "name cat", "name dog"), SalienceConfig(), word_level(), max_length=10)
    often = prepare_prompts(
        file(tmp_path, *["name cat"] * 7, "name dog"), SalienceConfig(), word_level(), max_length=10
    )
    assert often.notes[0].startswith("8 prompts (2 different) from")
    assert often.frequency == once.frequency
    assert {one.salience for one in often.prompts} == {one.salience for one in once.prompts}


def test_a_table_of_another_run_is_used_as_it_is(tmp_path: Path) -> None:
    table = DocumentFrequency(9, {"cat": 2})
    found = prepare_prompts(
        file(tmp_path, "the cat sat"), SalienceConfig(), word_level(), max_length=9, frequency=table
    )
    assert found.frequency is table
    assert found.prompts[0].salience == (pytest.approx(1.6094379), pytest.approx(2.3025851))  # ln(10/2), ln(10/1)


def test_long_prompts(tmp_path: Path) -> None:
    texts = ("the cat sat", "the cat sat on the mat", "a small brown dog")
    tok = word_level()
    with pytest.raises(
        DataError, match=r"p\.jsonl, row 2: the prompt has 6 tokens, more than the limit of 4 \(what the "
    ):
        prepare_prompts(file(tmp_path, *texts), UNIFORM, tok, max_length=4)
    with pytest.raises(DataError, match=r"limit of 5 \(--data\.max_prompt_length\).*--data\.long_prompts"):
        prepare_prompts(file(tmp_path, *texts, max_prompt_length=5), UNIFORM, tok, max_length=40)
    dropped = prepare_prompts(file(tmp_path, *texts, long_prompts="drop"), UNIFORM, tok, max_length=4)
    assert [p.prompt.row for p in dropped.prompts] == [1, 3]
    assert any(note.startswith("1 of 3 prompts are longer than 4 tokens and were dropped") for note in dropped.notes)
    shortened = prepare_prompts(file(tmp_path, *texts, long_prompts="truncate"), UNIFORM, tok, max_length=4)
    assert [len(p.ids) for p in shortened.prompts] == [3, 4, 4]
    assert shortened.prompts[1].prompt.text.strip() == "sat on the mat"
    assert any("the end kept" in note for note in shortened.notes)
    with pytest.raises(DataError, match="all 3 prompts are longer than 2 tokens"):
        prepare_prompts(file(tmp_path, *texts, long_prompts="drop"), UNIFORM, tok, max_length=2)
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        prepare_prompts(file(tmp_path, *texts), UNIFORM, tok, max_length=0)


def test_long_conversations_lose_their_earliest_turns_whole(tmp_path: Path) -> None:
    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    early = [say("user", "the cat sat"), say("assistant", "on the mat")]
    late = [say("user", "a small dog"), say("assistant", "so brown"), say("user", "and a <<mat>> too")]
    system = [say("system", "be kind")]
    tok = byte_bpe(chat=True)
    marked = SalienceConfig(weighting="spans", markers=("<<", ">>"))

    def lengths(conversation: list[dict[str, str]], limit: int):
        data = file(tmp_path, conversation, long_prompts="truncate")
        return prepare_prompts(data, marked, tok, max_length=limit).prompts[0]

    whole = lengths(system + early + late, 1000)
    without_early = lengths(system + late, 1000)
    assert lengths(system + early + late, len(whole.ids)) == whole
    shortened = lengths(system + early + late, len(whole.ids) - 1)
    assert shortened.ids == without_early.ids  # system message kept, a whole exchange gone
    assert shortened.prompt.messages == without_early.prompt.messages
    assert shortened.prompt.spans == without_early.prompt.spans
    last = lengths(system + early + late, len(lengths(system + late[2:], 1000).ids) - 2)
    assert last.prompt.text.endswith("mat too<|im_end|>\n<|im_start|>assistant\n")  # then the last message's front goes


def test_a_prompt_of_template_tokens_only_names_its_row(tmp_path: Path) -> None:
    data = file(tmp_path, [{"role": "user", "content": "the cat"}], [{"role": "user", "content": "?!"}])
    with pytest.raises(DataError, match=r"p\.jsonl, row 2: the prompt holds no word, only template markers"):
        prepare_prompts(data, UNIFORM, byte_bpe(chat=True), max_length=500)


def test_notes_name_settings_without_effect(tmp_path: Path) -> None:
    data = file(tmp_path, "the <<cat>> sat", system_prompt="Be kind.")
    notes = " ".join(
        prepare_prompts(data, SalienceConfig(markers=("<<", ">>")), byte_bpe(chat=True), max_length=99).notes
    )
    assert "1 prompt from" in notes
    assert "not used: --salience.weighting is idf" in notes
    assert "chat template is not applied" in notes
    assert "--data.system_prompt has no effect" in notes
    assert "IDF weighs all words alike" in notes


def test_split_is_seeded_and_leaks_no_prompt(tmp_path: Path) -> None:
    words = ("cat", "mat", "dog", "small", "brown", "sat")
    found = prepare_prompts(file(tmp_path, *[f"the {w}" for w in words] * 3), UNIFORM, word_level(), max_length=9)
    training, held = found.split(2, seed=1)
    assert len(held.prompts) == 2
    assert len(training.prompts) == 12  # the other two copies of each held-out prompt went too
    assert not {p.prompt.text for p in held.prompts} & {p.prompt.text for p in training.prompts}
    assert [p.prompt.row for p in found.split(2, seed=1)[1].prompts] == [p.prompt.row for p in held.prompts]
    assert len({tuple(p.prompt.text for p in found.split(2, seed=s)[1].prompts) for s in range(8)}) > 1
    assert held.frequency is found.frequency
    everything, nothing = found.split(0, seed=1)
    assert (len(everything.prompts), len(nothing.prompts)) == (18, 0)
    with pytest.raises(ConfigError, match=r"--evaluation\.held_out 6 leaves no prompt"):
        found.split(6, seed=1)


def test_texts_from_the_command_line() -> None:
    encoded = encode_texts(["the cat sat", "a small dog"], word_level(), UNIFORM, 9)
    assert [p.words for p in encoded] == [(-1, 0, 1), (-1, 0, 1)]
    chat = encode_texts([[{"role": "user", "content": "the cat"}]], byte_bpe(chat=True), UNIFORM, 99)
    assert chat[0].prompt.template
    with pytest.raises(DataError, match=r"command line, row 2: the prompt .* is empty"):
        encode_texts(["the cat", " "], word_level(), UNIFORM, 9)


def test_a_streamed_set_is_read_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "FREQUENCY_ROWS", 10)
    monkeypatch.setattr(prepare, "HEAD_ROWS", 5)
    texts = [f"the cat {i}" for i in range(50)]
    texts[30] = "the cat sat on the mat with one dog"
    data = file(tmp_path, *texts, streaming=True, long_prompts="drop")
    found = prepare_prompts(data, UNIFORM, byte_bpe(), max_length=20)
    assert len(found.prompts) == 5  # only the head is held
    assert found.frequency.documents == 10
    assert "IDF is estimated on the 10 different prompts of the first rows." in found.notes
    assert found.reopen is not None
    assert len(list(found.reopen())) == 49
    training, held = found.split(3, seed=0)
    assert [p.prompt.row for p in held.prompts] == [1, 2, 3]
    assert training.reopen is not None
    assert [p.prompt.row for p in training.reopen()][:2] == [4, 5]
    with pytest.raises(ConfigError, match="streamed set"):
        found.split(5, seed=0)


def test_a_streamed_set_reports_bad_rows_when_it_meets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "FREQUENCY_ROWS", 3)
    monkeypatch.setattr(prepare, "HEAD_ROWS", 3)
    found = prepare_prompts(file(tmp_path, *["the cat"] * 6, "", streaming=True), UNIFORM, byte_bpe(), max_length=20)
    assert found.reopen is not None
    with pytest.raises(DataError, match=r"row 7: the prompt .* is empty"):
        list(found.reopen())


def test_real_stories_as_they_are() -> None:
    tok = tiny_stories()
    path = Path(__file__).parents[2] / "shared" / "data" / "tinystories" / "stories.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    data = DataConfig(path=str(path), prompt_column="text", long_prompts="truncate", limit=60)
    found = prepare_prompts(data, SalienceConfig(), tok, max_length=128)
    assert len(found.prompts) == 60
    for one in found.prompts:
        assert len(one.ids) <= 128
        assert one.ids[0] == tok.bos_token_id
        assert len(one.words) == len(one.ids)
        assert set(range(len(one.salience))) == set(one.words) - {-1}
        assert min(one.salience) > 0
    with pytest.raises(DataError, match=r"no column 'prompt' \(columns here: .*text"):
        prepare_prompts(DataConfig(path=str(path)), SalienceConfig(), tok, max_length=128)

"""Documents as passages."""

import re

import pytest

from upchatty.knowledge.blocks import Block, Reading
from upchatty.knowledge.splitting import BUDGET, Passage, estimate_tokens, split

ENGLISH = "The pump must be bled before it is started for the first time in spring. "
SENTENCES = {
    "English": ENGLISH,
    "German": "Die Pumpe muss vor der ersten Inbetriebnahme im Frühjahr entlüftet werden. ",
    "Japanese": "ポンプは春に初めて始動する前に空気を抜かなければなりません。",
    "Chinese": "水泵在春季首次启动之前必须排出空气，否则会损坏。",
    "Hindi": "पंप को वसंत में पहली बार चालू करने से पहले हवा निकालनी चाहिए। ",
    "Arabic": "هل يجب تفريغ الهواء من المضخة قبل تشغيلها لأول مرة؟ ",
    "Korean": "봄에 처음 펌프를 가동하기 전에 공기를 빼야 합니다. ",
}


def heading(text: str, level: int = 1, anchor: str | None = None, page: int | None = None) -> Block:
    return Block(kind="heading", text=text, level=level, anchor=anchor, page=page)


def paragraph(text: str, page: int | None = None) -> Block:
    return Block(kind="paragraph", text=text, page=page)


def passages_of(*blocks: Block, title: str = "Pumps", budget: int = BUDGET) -> list[Passage]:
    return split(Reading(blocks=list(blocks)), title=title, budget=budget)


def numbered(count: int, start: int = 0) -> str:
    return "".join(
        f"Valve {number} opens at {number * 7} degrees and closes later. " for number in range(start, count)
    )


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def test_a_short_document_is_one_passage_below_its_title() -> None:
    [passage] = passages_of(heading("PUMPS"), paragraph("Bleed it first."), paragraph("Then start it."))
    assert passage.text == "Bleed it first.\n\nThen start it."
    assert passage.headings == []
    assert passage.searched == "Pumps\nBleed it first.\n\nThen start it."


def test_a_passage_knows_the_headings_above_it_and_its_place() -> None:
    found = passages_of(
        heading("Use", page=3),
        paragraph(ENGLISH * 4, page=3),
        heading("Winter", 2, "winter"),
        paragraph(ENGLISH * 4, page=5),
        heading("Repair", anchor="repair"),
        paragraph(ENGLISH * 4, page=9),
    )
    places = [(passage.headings, passage.page, passage.anchor) for passage in found]
    assert places == [(["Use"], 3, None), (["Use", "Winter"], 5, "winter"), (["Repair"], 9, "repair")]
    assert found[1].searched.startswith("Pumps > Use > Winter\nThe pump")


@pytest.mark.parametrize("language", SENTENCES)
def test_long_text_is_cut_at_the_ends_of_sentences_and_nothing_is_lost(language: str) -> None:
    sentence = SENTENCES[language]
    text = "".join(f"{number} {sentence}" for number in range(150))
    found = passages_of(paragraph(text))
    assert squeezed("".join(passage.text for passage in found)) == squeezed(text)
    assert all(passage.text.endswith(sentence.strip()) for passage in found)
    assert all(passage.tokens <= BUDGET for passage in found)
    assert all(passage.tokens == 2 + estimate_tokens(passage.searched) for passage in found)
    assert len(found) > 5


@pytest.mark.parametrize(
    "text", ["x" * 9000, "word " * 3000, "水" * 3000, "a, " * 3000, "👍" * 3000, "ต้องไล่อากาศออกจากปั๊ม" * 300]
)
def test_text_without_sentences_is_cut_all_the_same(text: str) -> None:
    found = passages_of(paragraph(text))
    assert squeezed("".join(passage.text for passage in found)) == squeezed(text)
    assert all(passage.tokens <= BUDGET for passage in found)


def test_each_passage_of_a_table_has_its_header_once() -> None:
    header = "Valve | Opens at"
    rows = [
        Block(kind="table_row", text=f"V{number} | {number * 7} degrees", header=header)
        for number in range(120)
    ]
    found = passages_of(*rows)
    assert len(found) > 3
    for passage in found:
        assert passage.text.startswith(f"{header}\nV")
        assert passage.text.count(header) == 1
    assert [line for passage in found for line in passage.text.splitlines()[1:]] == [row.text for row in rows]
    assert all(passage.tokens <= BUDGET for passage in found)


def test_a_list_stays_with_the_line_before_it() -> None:
    items = [Block(kind="list_item", text=f"- {ENGLISH.strip()}") for _ in range(4)]
    filler = [paragraph(ENGLISH * 2) for _ in range(12)]
    found = passages_of(*filler, paragraph("You will need:"), *items, *filler)
    [passage] = [passage for passage in found if "You will need:" in passage.text]
    assert "You will need:\n- The pump" in passage.text


def test_code_is_kept_whole_where_it_fits_and_else_cut_between_lines() -> None:
    short = "\n".join(f"    valve_{number}.open()" for number in range(15))
    found = passages_of(paragraph(ENGLISH * 9), Block(kind="code", text=short), paragraph(ENGLISH * 9))
    assert sum(short.strip() in passage.text for passage in found) == 1
    lines = [f"    valves[{number}].open()" for number in range(200)]
    found = passages_of(Block(kind="code", text="\n".join(lines)))
    assert [line for passage in found for line in passage.text.splitlines()] == lines


def test_tiny_sections_are_put_together_below_their_own_parent() -> None:
    blocks = []
    for chapter in ("Parts", "Tools"):
        blocks += [heading(chapter), paragraph(ENGLISH * 3)]
        for number in range(6):
            blocks += [heading(f"{chapter} {number}", 2), paragraph(f"Number {number} of {chapter}.")]
    found = passages_of(*blocks)
    assert len(found) == 4
    for passage in found:
        assert not ("Parts" in passage.searched and "Tools" in passage.searched)
    assert "Parts 3\nNumber 3 of Parts." in found[1].text
    assert found[1].headings == ["Parts"]


def test_what_follows_a_remark_stands_below_the_headings_of_its_section() -> None:
    passages = passages_of(
        heading("Maintenance", 1),
        paragraph(ENGLISH * 12),
        heading("Tip", 3),
        paragraph("Bleeding takes a minute."),
        paragraph(numbered(40)),
    )
    assert {tuple(passage.headings) for passage in passages} == {("Maintenance",)}
    assert any("Tip\nBleeding takes a minute." in passage.text for passage in passages)


def test_no_passage_is_a_heading_alone() -> None:
    found = passages_of(
        heading("Use"),
        paragraph(ENGLISH * 5),
        heading("See also", 2),
        heading("Repair"),
        paragraph(ENGLISH * 5),
    )
    assert [passage.headings for passage in found] == [["Use"], ["Repair"]]
    assert "See also" in found[0].text
    [only] = passages_of(heading("Nothing but a heading"))
    assert only.text == "Nothing but a heading"
    assert passages_of() == passages_of(paragraph(" \n")) == []


def test_an_insertion_changes_only_the_passages_near_it() -> None:
    """Of a text without a single heading, at its beginning."""
    text = [numbered(start + 5, start) for start in range(0, 2000, 5)]
    before = {passage.hash for passage in passages_of(*map(paragraph, text))}
    after = {passage.hash for passage in passages_of(*map(paragraph, ["A new first paragraph.", *text]))}
    assert len(after - before) <= 6
    assert len(before & after) > 0.95 * len(before)


def test_a_change_inside_one_long_paragraph_changes_only_the_passages_near_it() -> None:
    text = numbered(2000)
    before = {passage.hash for passage in passages_of(paragraph(text))}
    after = {
        passage.hash for passage in passages_of(paragraph(text.replace("Valve 900 ", "The tap, no. 900, ")))
    }
    assert 1 <= len(after - before) <= 8


def test_long_titles_and_headings_leave_room_for_the_text() -> None:
    path = [heading("A heading that goes on and on " * 20, level) for level in range(1, 7)]
    found = passages_of(*path, paragraph(numbered(60)), title="A title that never ends " * 100, budget=128)
    assert all(passage.tokens <= 128 + 64 for passage in found)
    assert squeezed("".join(passage.text for passage in found)) == squeezed(numbered(60))


@pytest.mark.parametrize("budget", [1, 40, 100, 500])
def test_the_budget_holds_for_everything(budget: int) -> None:
    row = Block(
        kind="table_row", text=" | ".join(["cell of a wide table"] * 90), header=" | ".join(["wide"] * 90)
    )
    found = passages_of(row, paragraph(numbered(80)), Block(kind="code", text="x = 1;" * 400), budget=budget)
    assert all(passage.tokens <= max(budget, 32) for passage in found)

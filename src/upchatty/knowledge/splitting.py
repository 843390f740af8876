"""A document's text as passages: pieces that say one thing, short enough to be embedded whole.

Passages follow the document's structure. Where a section has to be cut, the place depends on the text
around it only, and not on how much came before: an insertion changes the passages near it and leaves those
behind it as they are, so that a document that is read again is embedded only where it changed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from zlib import crc32

from msgspec import Struct

from upchatty.knowledge.blocks import Block, Reading

BUDGET = 256
"""Tokens that a passage has at most, with its headings: where the default embedding model's makers cut."""

SMALLEST = 32  # tokens of a budget
ENDS = 2  # tokens that a model puts around a text
PATH_SHARE = 1 / 3  # of the budget, that title and headings take at most
HEADING = 160  # characters of a heading, and of a title, that go into each passage
HEADER_SHARE = 1 / 3  # of the room, that a table's repeated header takes at most
TINY_SHARE = 1 / 6  # of the room; shorter sections are put together
LONE_TOKENS = 12  # a passage that is shorter goes with its neighbour's
LONG_SHARE = 1 / 2  # of the room; longer paragraphs may be cut

# Above a remark in the midst of a section, as DocBook's and Sphinx's pages have it: what follows the remark
# is the section's again, although the markup of such a heading is that of a section's.
_REMARKS = """
    note tip hint caution warning important danger attention
    hinweis anmerkung tipp warnung achtung wichtig remarque astuce avertissement
    nota consejo aviso advertencia importante avvertenza suggerimento dica opmerking waarschuwing
"""
REMARKS = frozenset(_REMARKS.split())

# What cutting at a place costs.
BETWEEN, SOFT, HARD, CLAUSE, WORD, CHARACTER = range(6)

# Where to cut: the first of these that there is a place for, as (share of the room that is filled at
# least, what the cut costs at most).
CHOICES = ((0.5, BETWEEN), (0.25, BETWEEN), (0.5, SOFT), (0.1, BETWEEN), (0.5, CHARACTER), (0.0, CHARACTER))

SENTENCES = re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？｡．।॥؟۔።፧།၊။។])[\"'”’»)\]」』）]*\s*|\n{2,}")
CLAUSES = re.compile(r"(?<=[,;:–—])\s+|(?<=[，、；：،؛፣፤])\s*|\n")
WORDS = re.compile(r"\s+")
SLICE = 8  # characters of which what has no spaces is made up

TOKENS = re.compile(
    r"[A-Za-z0-9\u00c0-\u024f]+"  # what a model for Latin letters knows whole or in parts
    r"|[^\W\d_\u1100-\u11ff\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff]+"  # other scripts: letter by letter
    r"|[^\s]"
)
KOREAN = re.compile("[\uac00-\ud7af]")
# Frequent words of English with five letters or more, which such a model has whole.
_FREQUENT = """
    about above after again against allow allowed already always another based because become before
    being below between called cannot change changes different during either every example files first
    following found given group however information large later likely login means might model names
    needed never number often option options order other others output package packages people place
    possible process program provide provides rather result results right second section server services
    several should simple since single small something specific specified standard state still system
    systems table tables their there therefore these thing things those three through under until update
    using usually value values version where whether which while without words world would years command
    commands configuration database default directory installation kernel network security service
    software source support users available certain current function functions include including memory
    method object point return returns string strings types
"""
FREQUENT = frozenset(_FREQUENT.split())


class Passage(Struct, frozen=True, kw_only=True):
    """A piece of a document, as it is found and quoted.

    Args:
        title: The document's title.
        headings: The headings above it, outermost first, without the title.
        text: Its text.
        page: The page on which it begins.
        anchor: The fragment that leads to it, without `#`.
        tokens: What the embedding model has to read, estimated.
        hash: SHA-256 of `searched`.
    """

    title: str
    headings: list[str]
    text: str
    page: int | None
    anchor: str | None
    tokens: int
    hash: str

    @property
    def searched(self) -> str:
        """What is embedded, and indexed: where it stands, and what it says."""
        return _searched([self.title, *self.headings], self.text)


@dataclass(frozen=True, slots=True)
class _Atom:
    """What is never cut.

    Args:
        text: Its text.
        tokens: Its length.
        glue: What stands between it and the atom before.
        cost: What a cut before it costs.
        header: Of a table's row, the table's header.
        block: What it is a part of.
    """

    text: str
    tokens: int
    glue: str
    cost: int
    header: str
    block: Block


@dataclass(slots=True)
class _Section:
    """The text under a heading, without that of the headings below it.

    Args:
        path: The headings above it and its own.
        heading: Its own; None before the first one.
        blocks: Its text, and in a section that was put together its parts' headings too.
        tokens: Their length.
        has_parts: Whether there are sections below it.
    """

    path: tuple[str, ...]
    heading: Block | None
    blocks: list[Block]
    tokens: int = 0
    has_parts: bool = False

    @property
    def whole(self) -> list[Block]:
        """Its text with its heading."""
        return [self.heading, *self.blocks] if self.heading else self.blocks


def split(reading: Reading, *, title: str, budget: int = BUDGET) -> list[Passage]:
    """The passages of a document, in its order; the same ones for the same text.

    Args:
        reading: The document.
        title: Its title, which goes into each passage.
        budget: How many tokens a passage has at most, with title and headings.
    """
    budget = max(budget, SMALLEST)
    title = _shortened(title, HEADING)
    passages: list[Passage] = []
    for section in _merged(_sections(reading.blocks, title), budget):
        headings = _fitting(title, section.path, int(budget * PATH_SHARE))
        above = ENDS + estimate_tokens(_searched([title, *headings], ""))
        room = max(budget - above, budget // 2)
        packed = _packed(list(_atoms(section.blocks, room)), room)
        passages += [_passage(title, headings, atoms, section, above) for atoms in packed]
    return passages


def estimate_tokens(text: str) -> int:
    """How many tokens a text is about, in the vocabulary of a BERT model for English.

    Such a model has the frequent words of English whole, and takes the words of other languages apart.

    Args:
        text: Any text.
    """
    tokens = sum(map(_word_tokens, TOKENS.findall(text)))
    if not text.isascii():
        tokens += len(KOREAN.findall(text)) * 3 // 2  # syllables are taken apart into letters
    return tokens


def _word_tokens(word: str) -> int:
    length = len(word)
    if word[0] >= "\u0250":
        return length
    if length == 1 or word in FREQUENT:
        return 1
    if word.isalpha():
        return 1 if length <= 4 else (length + 3) // 4
    if word.isdecimal():
        return 1 if length <= 2 or length == 4 else (length + 1) // 2
    return (3 * length + 3) // 4


def _passage(title: str, headings: list[str], atoms: list[_Atom], section: _Section, above: int) -> Passage:
    text, first, heading = _text(atoms), atoms[0].block, section.heading
    return Passage(
        title=title,
        headings=headings,
        text=text,
        page=first.page or (heading.page if heading else None),
        anchor=first.anchor or (heading.anchor if heading else None),
        tokens=above + estimate_tokens(text),
        hash=sha256(_searched([title, *headings], text).encode(errors="replace")).hexdigest(),
    )


def _searched(path: Sequence[str], text: str) -> str:
    above = " > ".join(filter(None, path))
    return f"{above}\n{text}" if above else text


def _shortened(text: str, longest: int) -> str:
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    return text[: longest - 1].rsplit(" ", 1)[0] + "…"


def _fitting(title: str, path: tuple[str, ...], most: int) -> list[str]:
    """The headings for which there is room: the innermost say the most."""
    headings = list(path)
    while len(headings) > 1 and estimate_tokens(_searched([title, *headings], "")) > most:
        del headings[0]
    return headings


def _sections(blocks: Sequence[Block], title: str) -> list[_Section]:
    """The sections of a document in their order; a heading that only repeats the title is left out of
    the paths."""
    sections = [_Section((), None, [])]
    above: list[tuple[int, str]] = []
    for block in blocks:
        if not block.text.strip():
            continue
        if block.kind == "heading" and not _is_remark(block):
            above = [(level, text) for level, text in above if level < block.level]
            parents = tuple(text for _, text in above if text)
            for section in reversed(sections):
                if section.path == parents:
                    section.has_parts = True
                    break
            text = _shortened(block.text, HEADING)
            above.append((block.level, "" if text.casefold() == title.casefold() else text))
            sections.append(_Section(tuple(text for _, text in above if text), block, []))
        else:
            sections[-1].blocks.append(block)
            sections[-1].tokens += estimate_tokens(block.text)
    # A heading with nothing of its own is in the paths of those below it.
    return [section for section in sections if section.blocks or (section.heading and not section.has_parts)]


def _is_remark(heading: Block) -> bool:
    return heading.text.strip().rstrip(":!").casefold() in REMARKS


def _merged(sections: list[_Section], budget: int) -> list[_Section]:
    """The sections, with neighbours that are tiny put together under what they have in common."""
    tiny = int(budget * TINY_SHARE)
    merged: list[_Section] = []
    for (is_tiny, _), run in groupby(sections, lambda section: _run(section, tiny)):
        members = list(run)
        merged += [_together(members)] if is_tiny and len(members) > 1 else members
    result: list[_Section] = []
    for section in merged:
        if result and _goes_with(result[-1], section):
            result[-1] = _joined(result[-1], section)
        else:
            result.append(section)
    if len(result) == 1 and not result[0].blocks:
        return [_Section(result[0].path[:-1], None, result[0].whole, result[0].tokens)]
    return [section if section.blocks else _alone(section) for section in result]


def _run(section: _Section, tiny: int) -> tuple[bool, object]:
    """Sections with equal ones are put together: those that are tiny and have the same parent."""
    if section.tokens < tiny and section.heading:
        return True, section.path[:-1]
    return False, id(section)


def _together(members: list[_Section]) -> _Section:
    blocks = [block for member in members for block in member.whole]
    tokens = sum(member.tokens for member in members)
    return _Section(members[0].path[:-1], None, blocks, tokens)


def _goes_with(before: _Section, section: _Section) -> bool:
    """Whether one of two neighbours is too short to be a passage, and they are near each other."""
    short = min(before.tokens, section.tokens) < LONE_TOKENS
    depth = max(len(before.path), len(section.path)) - 1
    return short and before.path[:depth] == section.path[:depth]


def _joined(before: _Section, section: _Section) -> _Section:
    """Two sections as one: the short one becomes a part of the other one."""
    tokens = before.tokens + section.tokens
    if before.tokens <= section.tokens:
        return _Section(section.path, section.heading, [*before.whole, *section.blocks], tokens)
    return _Section(before.path, before.heading, [*before.blocks, *section.whole], tokens)


def _alone(section: _Section) -> _Section:
    """A heading that has nothing below it, and no neighbour."""
    return _Section(section.path[:-1], None, section.whole, section.tokens)


def _atoms(blocks: Sequence[Block], room: int) -> Iterator[_Atom]:
    before: Block | None = None
    for block in blocks:
        header = _cut_header(block, room)
        pieces = _pieces(block, room - estimate_tokens(header))
        first_glue, first_cost = _gap(before, block)
        for index, (text, tokens, cost) in enumerate(pieces):
            if index:
                yield _Atom(text, tokens, "", cost, header, block)
            else:
                yield _Atom(text, tokens, first_glue, first_cost, header, block)
        before = block


def _cut_header(block: Block, room: int) -> str:
    """A table's header, as much of it as may be repeated."""
    most = int(room * HEADER_SHARE)
    if estimate_tokens(block.header) <= most:
        return block.header
    header = ""
    for cell in block.header.split(" | "):
        longer = f"{header} | {cell}" if header else cell
        if estimate_tokens(longer) > most:
            break
        header = longer
    return header


def _gap(before: Block | None, block: Block) -> tuple[str, int]:
    """What stands between two blocks, and what a cut between them costs."""
    if before is None:
        return "", BETWEEN
    if before.kind == "heading":
        return "\n", CHARACTER
    together = before.kind == block.kind and block.kind in ("list_item", "table_row")
    if together:
        same = before.header == block.header
        return "\n", SOFT if same else BETWEEN
    if before.kind == "paragraph" and before.text.rstrip().endswith((":", "：")) and block.kind != "heading":
        return "\n", HARD
    return "\n\n", BETWEEN


def _pieces(block: Block, room: int) -> list[tuple[str, int, int]]:
    """The parts of a block that fit, each with its tokens and what a cut before it costs."""
    tokens = estimate_tokens(block.text)
    if tokens <= room * (1 if block.kind in ("code", "table_row") else LONG_SHARE):
        return [(block.text, tokens, BETWEEN)]
    if block.kind == "code":
        cut = [(line, HARD) for line in block.text.splitlines(keepends=True)]
    elif block.kind == "table_row":
        cut = [(cell, CLAUSE) for cell in re.split(r"(?<= \| )", block.text)]
    else:
        cut = [(sentence, SOFT) for sentence in _parts(SENTENCES, block.text)]
    return [piece for text, cost in cut for piece in _shorter(text, cost, room)]


def _shorter(text: str, cost: int, room: int) -> list[tuple[str, int, int]]:
    tokens = estimate_tokens(text)
    if tokens <= room:
        return [(text, tokens, cost)]
    for pattern, own_cost in ((CLAUSES, CLAUSE), (WORDS, WORD)):
        if own_cost > cost and len(parts := _parts(pattern, text)) > 1:
            pieces = [piece for part in parts for piece in _shorter(part, own_cost, room)]
            return [(pieces[0][0], pieces[0][1], cost), *pieces[1:]]
    starts = range(0, len(text), SLICE)
    slices = [text[start : start + SLICE] for start in starts]
    return [(part, estimate_tokens(part), CHARACTER if index else cost) for index, part in enumerate(slices)]


def _parts(pattern: re.Pattern[str], text: str) -> list[str]:
    """A text cut behind each match, nothing lost."""
    ends = [match.end() for match in pattern.finditer(text) if match.end()]
    starts = [0, *ends]
    return [part for start, end in zip(starts, [*ends, len(text)], strict=True) if (part := text[start:end])]


def _packed(atoms: list[_Atom], room: int) -> Iterator[list[_Atom]]:
    """Runs of atoms of which each fits."""
    left = sum(atom.tokens for atom in atoms)
    start = 0
    while start < len(atoms):
        end = _end(atoms, start, room, left)
        yield atoms[start:end]
        left -= sum(atom.tokens for atom in atoms[start:end])
        start = end


def _end(atoms: list[_Atom], start: int, room: int, left: int) -> int:
    """Where the run that begins at an atom ends: among the places that are equally good, one that the text
    decides, so that it is the same one wherever the run began."""
    filled, header = 0, ""
    places: list[tuple[int, int]] = []  # each with what is filled before it
    for index in range(start, len(atoms)):
        atom = atoms[index]
        if index > start:
            places.append((index, filled))
        if atom.header != header:
            filled += estimate_tokens(atom.header)
            header = atom.header
        filled += atom.tokens
        if filled > room and index > start:
            break
    else:
        return len(atoms)
    for share, cost in CHOICES:
        fitting = [
            (atoms[index].cost, crc32(atoms[index].text.encode(errors="replace")), index)
            for index, before in places
            if before >= share * room and atoms[index].cost <= cost and left - before >= LONE_TOKENS
        ]
        if fitting:
            return min(fitting)[2]
    return places[-1][0]


def _text(atoms: Sequence[_Atom]) -> str:
    """The atoms as one text; a table's rows follow its header."""
    text, header = "", ""
    for index, atom in enumerate(atoms):
        glue = atom.glue if index else ""
        if atom.header and (atom.header != header or not index):
            text += f"{glue}{atom.header}\n"
            glue = ""
        header = atom.header
        text += glue + atom.text
    return text.strip("\n").rstrip()

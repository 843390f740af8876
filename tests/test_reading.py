"""Documents of every format are read with their structure; what cannot be read says why and harms nothing."""

import asyncio
import json
import zipfile
from collections.abc import AsyncIterator
from io import BytesIO

import docx
import fpdf
import openpyxl
import pikepdf
import psutil
import pytest
import pytest_asyncio

from upchatty.knowledge.blocks import Block, Reading
from upchatty.knowledge.reading import Readers, Unreadable

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGE = """<html><head><title>Turtles</title><base href="/guide/"></head><body>
<nav><ul><li><a href="home#top">Home</a></li><li><a href="mailto:a@b.c">Mail</a></li></ul></nav>
<main><section id="life"><h1>Life of turtles<a href="#life">¶</a></h1>
<p>Turtles live in the ocean for many years and come back to the beach where they were born.</p>
<p>They eat plants, jellyfish and <b>small</b> animals that they find near the coast of warm countries.</p>
<h2 id="kinds">Kinds</h2><ul><li>Green turtle<ol><li>Pacific</li></ol></li></ul>
<table><thead><tr><th>Kind</th><th>Kilograms</th></tr></thead><tr><td>Green</td><td>160</td></tr></table>
<pre>def swim():
    return 1</pre></section></main>
<footer>Imprint and cookies</footer><script>steal()</script></body></html>"""
RUSSIAN = "Черепахи живут в океане много лет и возвращаются на тот берег, где они родились. " * 4
JAPANESE = "ウミガメは長い間海で暮らし、生まれた浜辺に戻って卵を産みます。" * 6
FOLDED = "The international council met again to speak about turtles and their beaches."


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def readers() -> AsyncIterator[Readers]:
    readers = Readers(seconds=30)
    yield readers
    await readers.close()


async def read(readers: Readers, content: str | bytes, name: str | None = None, **more: object) -> Reading:
    content = content.encode() if isinstance(content, str) else content
    return await readers.read(content, name=name, **({"media_type": None} | more))  # type: ignore[arg-type]


async def problem(readers: Readers, content: str | bytes, name: str | None = None) -> str:
    with pytest.raises(Unreadable) as raised:
        await read(readers, content, name)
    return str(raised.value)


def kinds(reading: Reading) -> list[tuple[str, str]]:
    return [(block.kind, block.text) for block in reading.blocks]


def word(*, title: str = "", **extra: bytes) -> bytes:
    document = docx.Document()
    document.core_properties.title = title
    document.add_heading("Prices", 1)
    document.add_paragraph("All prices are in euros.")
    document.add_paragraph("first", style="List Bullet")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip(
        [*table.rows[0].cells, *table.rows[1].cells], ["Room", "Price", "Single", "80"], strict=True
    ):
        cell.text = text
    stream = BytesIO()
    document.save(stream)
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in extra.items():
            archive.writestr(f"word/{name}.xml", content)
    return stream.getvalue()


def pdf(pages: int = 4) -> bytes:
    document = fpdf.FPDF()
    document.set_title("On turtles")
    for number in range(1, pages + 1):
        document.add_page()
        document.set_font("helvetica", size=8)
        document.cell(text="Journal of Turtles", new_x="LMARGIN", new_y="NEXT")
        document.set_font("helvetica", size=20)
        document.cell(text=f"Chapter {'ABCDEFGH'[number - 1]}", new_x="LMARGIN", new_y="NEXT")
        document.set_font("helvetica", size=11)
        for line in ("The inter-", "national council met again to speak", "about turtles and their beaches."):
            document.cell(h=6, text=line, new_x="LMARGIN", new_y="NEXT")
        document.ln(12)
        document.cell(text=f"A paragraph of page {'ABCDEFGH'[number - 1]}.", new_x="LMARGIN", new_y="NEXT")
        document.set_y(-30)
        document.set_font("helvetica", size=8)
        document.cell(text=f"Page {number}")
    return bytes(document.output())


async def test_web_page(readers: Readers) -> None:
    url = "https://example.org/a/b.html"
    whole = await read(readers, PAGE, url=url)
    assert whole.title == "Turtles" and whole.links == [
        "https://example.org/guide/home",
        "https://example.org/guide/",
    ]
    assert ("list_item", "- Home") in kinds(whole) and "steal" not in str(whole)
    main = await read(readers, PAGE, url=url, main_content=True)
    assert [text for _, text in kinds(main) if "Imprint" in text or "Home" in text] == []
    assert kinds(main)[0] == ("heading", "Life of turtles")
    assert kinds(main)[2][1].startswith("They eat plants, jellyfish and small animals")
    kept = {block.text: block for block in main.blocks}
    assert kept["- Green turtle"].level == 0 and kept["1. Pacific"].level == 1
    assert kept["Green | 160"].header == "Kind | Kilograms" and kept["Green | 160"].anchor == "kinds"
    assert kept["def swim():\n    return 1"].kind == "code"
    assert kept["Life of turtles"].anchor == "life"
    short = await read(readers, "<html><body><p>Hi</p></body></html>", main_content=True)
    assert kinds(short) == [("paragraph", "Hi")]


async def test_markdown(readers: Readers) -> None:
    text = "---\ntitle: 'Guide'\n---\n"
    text += "# One\n\ntext `code`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n- x\n  - y\n\n```\ndo\n  it\n```\n"
    reading = await read(readers, text, "a.md")
    assert reading.title == "Guide"
    assert reading.blocks == [
        Block(kind="heading", text="One", level=1),
        Block(kind="paragraph", text="text code"),
        Block(kind="table_row", text="1 | 2", header="a | b"),
        Block(kind="list_item", text="- x"),
        Block(kind="list_item", text="- y", level=1),
        Block(kind="code", text="do\n  it"),
    ]
    assert (await read(readers, "# First\n\nx", media_type="text/markdown")).title == "First"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "windows-1251"])
async def test_russian_encodings(readers: Readers, encoding: str) -> None:
    reading = await read(readers, (RUSSIAN + "\r\n\r\n" + RUSSIAN).encode(encoding), "a.txt")
    assert kinds(reading) == [("paragraph", RUSSIAN.strip())] * 2


async def test_declared_and_guessed_encodings(readers: Readers) -> None:
    assert kinds(await read(readers, JAPANESE.encode("shift-jis"))) == [("paragraph", JAPANESE)]
    declared = f'<html><head><meta charset="shift_jis"></head><p>{JAPANESE[:5]}</p></html>'.encode(
        "shift-jis"
    )
    assert kinds(await read(readers, declared)) == [("paragraph", JAPANESE[:5])]
    sent = await read(readers, "Größe".encode("latin-1"), media_type="text/plain; charset=iso-8859-1")
    assert kinds(sent) == [("paragraph", "Größe")]
    assert kinds(await read(readers, "null\x00\x01 does not get through".replace("\x00", ""))) != []


async def test_pdf(readers: Readers) -> None:
    reading = await read(readers, pdf(), "whatever.txt")  # told by its content
    assert reading.title == "On turtles" and reading.pages == 4
    assert [(block.kind, block.text, block.page) for block in reading.blocks][:3] == [
        ("heading", "Chapter A", 1),
        ("paragraph", FOLDED, 1),
        ("paragraph", "A paragraph of page A.", 1),
    ]
    assert [block.page for block in reading.blocks if block.text == FOLDED] == [1, 2, 3, 4]
    assert "Journal" not in str(reading) and "Page" not in str(reading)


async def test_word(readers: Readers) -> None:
    reading = await read(readers, word(title="Price list"), "a.docx")
    assert reading.title == "Price list"
    assert reading.blocks == [
        Block(kind="heading", text="Prices", level=1),
        Block(kind="paragraph", text="All prices are in euros."),
        Block(kind="list_item", text="- first"),
        Block(kind="table_row", text="Single | 80", header="Room | Price"),
    ]


async def test_workbook(readers: Readers) -> None:
    workbook = openpyxl.Workbook()
    sheet = workbook.active
    sheet.title = "Rooms"
    for row in (["Room", "Price"], ["Single", 80], ["Double", 99.5], ["Empty", None]):
        sheet.append(row)
    stream = BytesIO()
    workbook.save(stream)
    reading = await read(readers, stream.getvalue())
    assert reading.blocks == [
        Block(kind="heading", text="Rooms", level=1),
        Block(kind="table_row", text="Single | 80", header="Room | Price"),
        Block(kind="table_row", text="Double | 99.5", header="Room | Price"),
        Block(kind="table_row", text="Empty | ", header="Room | Price"),
    ]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
async def test_tables_as_text(readers: Readers, separator: str) -> None:
    lines = [["Room", "Price"], ["Single", "80"], ['"A, b; c\tand\nd"', "99"]]
    reading = await read(readers, "\n".join(separator.join(line) for line in lines), "a.csv")
    assert [(block.text, block.header) for block in reading.blocks] == [
        ("Single | 80", "Room | Price"),
        ("A, b; c and d | 99", "Room | Price"),
    ]


async def test_json(readers: Readers) -> None:
    value = {
        "title": "Shop",
        "open": True,
        "at": {"city": "Graz"},
        "rooms": [{"n": 1, "p": 80}, {"n": 2}],
        "tags": ["a"],
    }
    reading = await read(readers, json.dumps(value), "a.json")
    assert reading.title == "Shop"
    assert kinds(reading) == [
        ("paragraph", "title: Shop\nopen: true"),
        ("heading", "at"),
        ("paragraph", "city: Graz"),
        ("heading", "rooms"),
        ("table_row", "1 | 80"),
        ("table_row", "2 | "),
        ("heading", "tags"),
        ("list_item", "- a"),
    ]
    lines = await read(readers, '{"a": 1}\n{"a": 2}\n', "a.jsonl")
    assert [(block.text, block.header) for block in lines.blocks] == [("1", "a"), ("2", "a")]
    assert "not valid JSON" in await problem(readers, '{"a": ', "a.json")


async def test_what_cannot_be_read_says_why(readers: Readers) -> None:
    assert await problem(readers, b" \n") == "the file is empty"
    assert await problem(readers, "<html><body><script>x</script></body></html>") == "there is no text in it"
    blank = fpdf.FPDF()
    blank.add_page()
    assert "probably scanned" in await problem(readers, bytes(blank.output()))
    locked = BytesIO()
    with pikepdf.open(BytesIO(pdf(1))) as document:
        document.save(locked, encryption=pikepdf.Encryption(owner="o", user="u"))
    assert "password" in await problem(readers, locked.getvalue())
    ole = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\x00" * 512
    assert "password" in await problem(readers, ole + "EncryptedPackage".encode("utf-16-le"))
    assert "save it as DOCX" in await problem(readers, ole + "WordDocument".encode("utf-16-le"))
    assert "damaged" in await problem(readers, b"%PDF-1.7\nnonsense")
    assert "damaged" in await problem(readers, word()[:3000])
    assert "damaged" in await problem(readers, word().replace(b"document.xml", b"documenX.xml"))
    assert "an image" in await problem(readers, b"\x89PNG\r\n\x1a\n" + b"\x00" * 100, "a.txt")
    assert "a program" in await problem(readers, b"\x7fELF\x02\x01\x01" + b"\x00" * 100)
    assert "not read" in await problem(readers, bytes(range(256)) * 9)
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../etc/passwd", "x")
    assert "it is an archive" in await problem(readers, archive.getvalue())


async def test_bombs(readers: Readers) -> None:
    bomb = word(bomb=b"\x00" * 60_000_000)
    assert len(bomb) < 200_000 and "unpacks to far more" in await problem(readers, bomb)
    laughs = b'<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b SYSTEM "file:///etc/passwd">]><x>&a;&b;</x>'
    assert "entities" in await problem(readers, word(laughs=laughs))
    page = b'<!DOCTYPE html [<!ENTITY b SYSTEM "file:///etc/passwd">]><html><p>x &b;</p></html>'
    assert "root:" not in str(await read(readers, page))
    for content, name in (("[" * 1_000_000, "a.json"), ('{"a":' * 3000 + "1" + "}" * 3000, "a.json")):
        assert "nested too deeply" in await problem(readers, content, name)
    assert "nested too deeply" in await problem(readers, "<html>" + "<div>" * 5000 + "x")
    pages = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids["
    pages += b"3 0 R " * 1_000_000 + b"]/Count 1000000>>endobj\n3 0 obj<</Type/Page/Parent 2 0 R>>endobj\n"
    assert "1,000,000 pages" in await problem(readers, pages + b"trailer<</Root 1 0 R>>\n%%EOF")
    sheet = openpyxl.Workbook()
    sheet.active["A1"] = sheet.active["XFD1048576"] = 1
    stream = BytesIO()
    sheet.save(stream)
    await problem(readers, stream.getvalue())
    assert kinds(await read(readers, "still here")) == [("paragraph", "still here")]


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "upchatty.knowledge.reading.child" in child.cmdline()
    ]


async def test_a_killed_process_costs_one_document() -> None:
    before = set(children())
    readers = Readers()
    await read(readers, "the first starts the process")
    slow = "a,b\n" + "1,2\n" * 1_000_000
    reading = asyncio.create_task(read(readers, slow, "a.csv"))
    other = asyncio.create_task(read(readers, "next"))
    await asyncio.sleep(0.1)
    (set(children()) - before).pop().kill()
    with pytest.raises(Unreadable, match="crashed"):
        await reading
    assert kinds(await other) == [("paragraph", "next")]
    await readers.close()
    assert set(children()) == before


async def test_time_and_memory_are_limited() -> None:
    readers = Readers(seconds=1)
    assert kinds(await read(readers, "in time")) == [("paragraph", "in time")]
    assert "longer than 1 seconds" in await problem(readers, "a,b\n" + "1,2\n" * 1_000_000, "a.csv")
    await readers.close()
    readers = Readers(memory=500_000_000)
    assert "more memory" in await problem(readers, "x\n\n" * 4_000_000)
    assert kinds(await read(readers, "next")) == [("paragraph", "next")]
    await readers.close()

"""Text as the terms that it is found by, in any language, without knowing which one it is.

A passage and a question that mean the same word get the same term: characters are normalised, words are
stemmed (Snowball, by PyStemmer), identifiers such as `pg_dump`, `--force` or `getName` are kept whole and
in parts, and scripts that put no spaces between words become overlapping pairs of characters. No term has
a space, a quotation mark or a backslash in it.
"""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import regex
import Stemmer

from upchatty.knowledge.stop_words import LANGUAGES, STOP_WORDS

LONGEST_TERM = 64  # characters; what is longer is data rather than a word
FEWEST_STOP_WORDS = 2  # that a language needs to be recognised beside English

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}々〆ー"
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{UNSPACED}]]"
TOKEN = regex.compile(
    rf"""
    (?P<unspaced>[{UNSPACED}][{UNSPACED}\p{{M}}]*)
    | (?P<flag>(?<![\w\-])--?[A-Za-z][\w]*(?:-\w+)*)
    | (?P<word>{LETTER}+(?:[_.\-'’,+\#@]+{LETTER}+)*(?:\+\+|\#)?)
    | (?P<name>_+{LETTER}+(?:[_.]+{LETTER}+)*)
    """,
    regex.VERBOSE | regex.VERSION1,
)
PLAIN = regex.compile(rf"{LETTER}+", regex.VERSION1)
NUMBER = regex.compile(r"v?\d+(?:[.,]\d+)+")
GROUPED = regex.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
CAMEL = regex.compile(r"\p{Lu}+(?!\p{Ll})|\p{Lu}?\p{Ll}+|\d+")
CLUSTER = regex.compile(r"\P{M}\p{M}*")
APOSTROPHES = str.maketrans("’ʼ", "''")
WITHOUT_DECOMPOSITION = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ı": "i", "æ": "ae", "œ": "oe", "ð": "d"}
)

ENGLISH = "english"
OTHER_SCRIPTS = {
    "CYRILLIC": "russian",
    "GREEK": "greek",
    "ARABIC": "arabic",
    "DEVANAGARI": "hindi",
    "TAMIL": "tamil",
    "ARMENIAN": "armenian",
}
STEMMERS = {name: Stemmer.Stemmer(name, 0) for name in {*LANGUAGES, *OTHER_SCRIPTS.values()}}


def terms(text: str) -> list[str]:
    """A passage's terms, in their order and repeated as they occur.

    Args:
        text: The passage, with what else it is to be found by.
    """
    normal = unicodedata.normalize("NFKC", text)
    language = _language(normal.casefold())
    return [term for token in _tokens(normal) for term in _indexed(token, language)]


class Asked(NamedTuple):
    """A term that a question asks for.

    Args:
        term: The term.
        word: Which word of the question it is of.
        is_alternative: Whether it would be the word's in another language: then a passage need not have it.
    """

    term: str
    word: int
    is_alternative: bool


def question_terms(text: str) -> list[Asked]:
    """The terms to look for, each once, without those that questions have in common.

    A short question does not always show its language, and a passage, such as a table's row, does not
    either; so the terms of English are looked for, too, which is what such passages are indexed as.

    Args:
        text: The question.
    """
    normal = unicodedata.normalize("NFKC", text)
    folded = normal.casefold()
    language = _language(folded)
    others = [ENGLISH] if _has_stop_word(folded) else LANGUAGES
    tokens = _tokens(normal)
    asked = [token for token in tokens if not _is_stop_word(token)] or tokens
    found: dict[str, Asked] = {}
    for word, token in enumerate(asked):
        for term in _asked(token, language):
            found.setdefault(term, Asked(term, word, is_alternative=False))
    for word, token in enumerate(asked):
        for term in (term for other in others for term in _asked(token, other)):
            found.setdefault(term, Asked(term, word, is_alternative=True))
    return list(found.values())


def content_words(text: str) -> int:
    """How many words of a text say what it is about; of unspaced scripts, two characters count as one."""
    tokens = [token for token in _tokens(unicodedata.normalize("NFKC", text)) if not _is_stop_word(token)]
    return sum((len(word) + 1) // 2 if kind == "unspaced" else 1 for kind, word in tokens)


def spoken_words(folded: str) -> list[str]:
    """The words of a text as they are written; none of scripts without spaces."""
    return [match[0] for match in PLAIN.finditer(folded)]


def _tokens(normal: str) -> list[tuple[str, str]]:
    return [(match.lastgroup or "", match[0]) for match in TOKEN.finditer(normal)]


def _is_stop_word(token: tuple[str, str]) -> bool:
    kind, text = token
    folded = text.casefold().translate(APOSTROPHES)
    return kind in ("word", "unspaced") and (folded in STOP_WORDS or folded.removesuffix("'s") in STOP_WORDS)


def _has_stop_word(folded: str) -> bool:
    return any(word in STOP_WORDS for word in PLAIN.findall(folded))


def _language(folded: str) -> str:
    """The language, among those of Latin script, that most of a text's little words belong to."""
    counts = dict.fromkeys(LANGUAGES, 0)
    for word in PLAIN.findall(folded):
        for language in STOP_WORDS.get(word, ()):
            counts[language] += 1
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] > counts[ENGLISH] else ENGLISH


def _indexed(token: tuple[str, str], language: str) -> Iterator[str]:
    kind, text = token
    if kind != "unspaced":
        yield from _of_word(text, language)
        return
    clusters = CLUSTER.findall(text)
    yield from map("".join, pairwise(clusters))
    yield from (character for character in clusters if len(clusters) == 1 or "一" <= character <= "鿿")


def _asked(token: tuple[str, str], language: str) -> Iterator[str]:
    kind, text = token
    if kind != "unspaced":
        yield from _of_word(text, language)
    elif len(clusters := CLUSTER.findall(text)) == 1:
        yield clusters[0]
    else:
        yield from map("".join, pairwise(clusters))


@lru_cache(maxsize=100_000)
def _of_word(text: str, language: str) -> tuple[str, ...]:
    """A word's terms: itself, and the parts of a name."""
    text = text.translate(APOSTROPHES).removesuffix("'s").removesuffix("'S")
    if GROUPED.fullmatch(text):
        return (text.replace(",", ""),)
    if NUMBER.fullmatch(text):
        return (text.removeprefix("v"),)
    plain = PLAIN.findall(text)
    parts = [camel for word in plain for camel in (word, *_camel(word))]
    found = [_stem(part, language) for part in parts if len(part) <= LONGEST_TERM]
    if plain != [text] and "'" not in text and "," not in text and len(text) <= LONGEST_TERM:
        found.insert(0, text.casefold())
    hangul = [part for part in plain if "가" <= part[0] <= "힣" and len(part) > 2]
    return (*found, *(a + b for part in hangul for a, b in pairwise(part)))


def _camel(word: str) -> list[str]:
    if word.islower() or word.isupper() or word.istitle() or word.isnumeric():
        return []
    return [part for part in CAMEL.findall(word) if len(part) > 2]


def _stem(word: str, language: str) -> str:
    folded = word.casefold()
    if folded.isascii():
        return str(STEMMERS[language].stemWord(folded))
    script = unicodedata.name(folded[0], "").partition(" ")[0]
    stemmed = str(STEMMERS[OTHER_SCRIPTS.get(script, language)].stemWord(folded))
    return _without_marks(stemmed) if script in ("LATIN", "GREEK", "ARABIC", "HEBREW") else _yo(stemmed)


def _without_marks(word: str) -> str:
    decomposed = unicodedata.normalize("NFD", word.translate(WITHOUT_DECOMPOSITION))
    return "".join(character for character in decomposed if not unicodedata.combining(character))


def _yo(word: str) -> str:
    """Russian is mostly written without its letter ё."""
    return word.replace("ё", "е")

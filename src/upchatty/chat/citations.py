"""Citations in an answer: markers such as [1], checked against the passages that were given.

A marker is digits in brackets, in prose. One that names no given passage is taken out, so that an answer
cannot cite what nobody showed the model. Links such as [text](url), [^1] and everything inside of code stay.
"""

import re
from typing import NamedTuple

# [1], [1, 2], and 【1】 or 【1†source】, as some models have it. Years, [2004], have four digits.
MARKER = re.compile(r"\[\s?(\d{1,3}(?:\s?[,;]\s?\d{1,3}){0,9})\s?\]|【\s?(\d{1,3})(?:†[^】\n]{0,40})?\s?】")
# What may still become a marker: it is held back until it is known.
BEGINNING = re.compile(r"\[[\d\s,;]{0,60}\Z|【[^】\n]{0,48}\Z")
GAP = "…"
OPEN = re.compile(r"[\[【][\d\s,;]*\Z")
REMEMBERED = 8  # characters
NUMBER = re.compile(r"\d+")
SPACES = " \t"
SPECIAL = re.compile(r"[`\[【]")
FENCE = 3  # backticks that begin a block of code rather than a span


class Citation(NamedTuple):
    """A marker in an answer's text, and the passages that it names, counted from 1."""

    start: int
    end: int
    numbers: list[int]


class Citations:
    """Checks the markers of an answer as it comes.

    Args:
        given: How many passages the model was given.
    """

    def __init__(self, given: int) -> None:
        self.found: list[Citation] = []
        """The markers that stay."""
        self._given = given
        self._held = ""
        self._sent = 0
        self._last = ""
        self._backticks = 0  # of the run that is being read
        self._code = 0  # backticks that end the code that is being read; 0: prose

    def check(self, text: str) -> str:
        """The next text that can be sent: what was held back, and this, without markers that name nothing."""
        text, self._held = self._held + text, ""
        if not self._code and not self._backticks and not SPECIAL.search(text):
            kept = text.rstrip(SPACES)
            self._held = text[len(kept) :]
            return self._sending(kept)
        return self._scan(text, is_end=False)

    def rest(self) -> str:
        """What is still held back at the end."""
        text, self._held = self._held, ""
        return self._scan(text, is_end=True)

    def _scan(self, text: str, *, is_end: bool) -> str:
        sent, at = [], 0
        while at < len(text):
            if text[at] == "`":
                self._backticks += 1
                sent.append(self._sending("`"))
                at += 1
                continue
            self._end_backticks()
            if self._code:
                end = _end_of_code(text, at, spans_lines=self._code >= FENCE)
                if end < len(text) and text[end] == "\n":
                    self._code = 0
                sent.append(self._sending(text[at:end]))
                at = end
                continue
            special = SPECIAL.search(text, at)
            found = special.start() if special else len(text)
            prose = text[at:found].rstrip(SPACES)
            spaces = text[at + len(prose) : found]
            sent.append(self._sending(prose))
            at = found
            if at == len(text):
                if not is_end:
                    self._held = spaces
                else:
                    sent.append(self._sending(spaces))
            elif text[at] == "`":
                sent.append(self._sending(spaces))
            elif marker := MARKER.match(text, at):
                sent.append(self._marker(spaces, marker))
                at = marker.end()
            elif not is_end and BEGINNING.match(text, at):
                self._held = spaces + text[at:]
                break
            else:
                sent.append(self._sending(spaces + text[at]))
                at += 1
        return "".join(sent)

    def _marker(self, spaces: str, marker: re.Match[str]) -> str:
        """What stays of a marker with the spaces before it."""
        numbers = [int(number) for number in NUMBER.findall(marker[1] or marker[2])]
        if numbers == [0] and not spaces and self._last[-1:].isalnum():
            return self._sending(marker[0])  # a[0]; passages are counted from 1
        known = [number for number in dict.fromkeys(numbers) if 1 <= number <= self._given]
        if not known:
            # Where taking it out would make another marker of what stands around it, something has to stay.
            return self._sending(GAP) if OPEN.search(self._last) and not spaces else ""
        start = self._sent + len(spaces)
        written = f"[{', '.join(map(str, known))}]"
        self.found.append(Citation(start, start + len(written), known))
        return self._sending(spaces + written)

    def _end_backticks(self) -> None:
        run, self._backticks = self._backticks, 0
        if not run:
            return
        if not self._code:
            self._code = run
        elif run == self._code or (self._code >= FENCE and run >= self._code):
            self._code = 0

    def _sending(self, text: str) -> str:
        self._sent += len(text)
        self._last = (self._last + text)[-REMEMBERED:]
        return text


def _end_of_code(text: str, at: int, *, spans_lines: bool) -> int:
    """Where code ends that goes on at `at`: at a backtick; and a span without an end is none, beyond its
    line."""
    ends = [found for mark in ("`" if spans_lines else "`\n") if (found := text.find(mark, at)) >= 0]
    return min(ends, default=len(text))

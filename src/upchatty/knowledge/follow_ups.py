"""Whether a question can be understood alone, or refers to what was said before."""

import unicodedata

from upchatty.knowledge.stop_words import QUESTION_WORDS
from upchatty.knowledge.words import content_words, spoken_words

MOST_EARLIER = 3  # messages that a question refers to at most
FRAGMENT, WITH_PRONOUN, AFTER_CONNECTIVE = 2, 3, 5  # content words at most

_CONNECTIVES = """and or but also und oder aber auch et mais aussi y pero también ma anche mas também maar
    ook och men också og ale ve а и или но та але και وأو و"""
CONNECTIVES = frozenset(_CONNECTIVES.split())
OPENINGS = (
    "what about ",
    "how about ",
    "what if ",
    "was ist mit ",
    "wie ist es mit ",
    "wat met ",
    "same for ",
)
_PRONOUNS = """it its they them their theirs that those this these one ones he him his she her hers then same
    others another instead
    dessen deren das dies diese dieser diesem davon dafür dazu damit dort stattdessen
    elle ils elles leur leurs cela ça ceci celui celle ceux
    él ella ellos ellas eso esto esa esos esas allí
    esso essa essi esse quello quella questo questa
    ele ela eles elas isso isto aquele aquela
    dit deze daar dess där
    он она оно они его её ее их это этот эта эти тот те там
    jego jej ich onun onlar bunun
    αυτό αυτός αυτή
    ذلك هذا هذه هناك
    यह वह वे उसका इसका"""
PRONOUNS = frozenset(_PRONOUNS.split())
UNSPACED_OPENINGS = ("那", "它", "他", "她", "这个", "這個", "それ", "その", "では", "じゃ", "แล้ว", "มัน")
UNSPACED_ENDINGS = ("呢", "は", "ล่ะ")
UNSPACED_CHARACTERS = 12  # of a question that refers to something, at most


def search_texts(conversation: list[str]) -> list[str]:
    """The question, and before it, oldest first, the messages that it refers to.

    Args:
        conversation: What the user has said, oldest first, the question last.
    """
    found = [conversation[-1]]
    for earlier in reversed(conversation[:-1]):
        if len(found) > MOST_EARLIER or not refers_to_earlier(found[0]):
            break
        found.insert(0, earlier)
    return found


def refers_to_earlier(question: str) -> bool:
    """Whether a question leaves out what it is about: it begins with "and", says "it", or has hardly any
    word of its own."""
    normal = unicodedata.normalize("NFKC", question).strip(" ¿¡?？。").casefold()
    spoken, content = spoken_words(normal), content_words(normal)
    if not spoken:
        is_short = len(normal) <= UNSPACED_CHARACTERS
        return is_short and (normal.startswith(UNSPACED_OPENINGS) or normal.endswith(UNSPACED_ENDINGS))
    if spoken[0] in CONNECTIVES or normal.startswith(OPENINGS):
        return content <= AFTER_CONNECTIVE
    if not PRONOUNS.isdisjoint(spoken):
        return content <= WITH_PRONOUN
    asks = not QUESTION_WORDS.isdisjoint(spoken)
    return content == 0 or (content <= FRAGMENT and not asks)

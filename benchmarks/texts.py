"""Texts for the benchmarks: a handbook of policies, and questions whose answers quote them."""

POLICIES = {
    "Returns": """You may send back any item within thirty days of delivery, as long as it is unused and in its
original packaging. To start a return, write to returns@acme.example with your order number and the reason.
We will email you a prepaid label within two working days. Once the parcel reaches our warehouse in Leeds, we
inspect it and refund the full price to the card you paid with, usually within five working days. Opened
software, gift cards and perishable food cannot be returned. If an item arrives damaged, send a photograph
and we will replace it free of charge.""",
    "Warranty": """Every kettle that we sell carries a guarantee of twenty-four months from the date of purchase.
The guarantee covers faults in materials and workmanship, but not limescale, drops or use outside the home.
Keep your receipt, because our repair centre in Lyon asks for it. Repairs take about ten days, and we lend you
another kettle meanwhile. After the guarantee has ended, we repair at cost and tell you the price first. The
guarantee is not transferable to another owner.""",
    "Opening hours": """The library is open from nine in the morning to six in the evening on Mondays, Tuesdays
and Thursdays, and until eight on Wednesdays. On Fridays it closes at noon for staff training. The reading room
on the second floor may be booked online for up to three hours a day by any member with a valid card. Children
under twelve must be accompanied by an adult. Food is not allowed, but water in closed bottles is welcome. Lost
books cost the price of a new copy plus a fee of four pounds.""",
    "Delivery": """Orders placed before two in the afternoon leave our warehouse on the same day. Standard delivery
takes three working days and costs five pounds; it is free for orders above fifty pounds. Express delivery
arrives the next morning before noon and costs twelve pounds. We deliver to every address in Great Britain,
including the islands, where one more day is needed. The driver calls you half an hour before the parcel
arrives. If nobody is at home, the parcel goes to a neighbour or to the nearest parcel shop, where it is kept
for seven days.""",
    "Privacy": """We keep your name, address and orders for as long as the law on accounts demands, which is six
years. Your card number is never stored on our machines. We do not sell data, and we share your address with
the carrier only. You can ask at any time what we know about you, have errors corrected, and have your account
deleted. Messages to our support are kept for one year, so that a colleague can follow up your question. Our
newsletter ends with the first click on the link at its foot.""",
}


def handbook(number: int) -> str:
    """About 1,500 tokens of instructions; each number gives another beginning.

    Args:
        number: Which one.
    """
    policies = "\n\n".join(f"{title}\n{_line(text)}" for title, text in POLICIES.items())
    intro = (
        f"You are support assistant number {number} of ACME. Answer from the policies below, quoting them."
    )
    return "\n\n".join([intro, policies, "The same policies in our former wording, for reference:", policies])


def _line(text: str) -> str:
    return " ".join(text.split())


QUOTING = "You are the support assistant of ACME. Answer from this text, quoting it.\n\n"
WORD_FOR_WORD = "You are a support assistant. When somebody asks for the policy, quote it word for word:\n\n"

COPY_QUESTIONS = [
    (QUOTING + _line(POLICIES["Warranty"]), "Please repeat the text of the policy exactly as it is written."),
    (QUOTING + _line(POLICIES["Privacy"]), "Please repeat the text of the policy exactly as it is written."),
    (WORD_FOR_WORD + _line(POLICIES["Opening hours"]), "What is the policy? Quote it word for word."),
]
"""Instructions and a question to which the default model answers by quoting them."""

OTHER_QUESTIONS = [
    (WORD_FOR_WORD + _line(POLICIES["Delivery"]), "What is the policy? Quote it word for word."),
    ("You are a helpful assistant.", "Tell me a long story about a dragon."),
]
"""The same, to which it answers in words of its own."""

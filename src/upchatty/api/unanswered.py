"""Questions that a grounded chatbot could not answer, for its owner."""

from typing import Annotated

from litestar import delete, get
from litestar.params import Parameter

from upchatty.api.errors import with_errors
from upchatty.api.paging import DEFAULT_PAGE_SIZE, After, Page, PageSize, page_of
from upchatty.api.services import Services
from upchatty.api.usage import From, To
from upchatty.chat.unanswered import UnansweredCluster
from upchatty.chat.usage import selection

ChatbotId = Annotated[str, Parameter(description="`bot_…`")]


@get("/chatbots/{chatbot_id:str}/unanswered", responses=with_errors(404))
async def list_unanswered(
    chatbot_id: ChatbotId,
    services: Services,
    *,
    limit: PageSize = DEFAULT_PAGE_SIZE,
    after: After = "",
    from_: From = None,
    to: To = None,
) -> Page[UnansweredCluster]:
    """What a grounded chatbot was asked and could not answer, like with like, the most frequent first; of
    the last 30 days, or of the time from `from` to `to`."""
    chatbot, time = await services.chatbots.get(chatbot_id), selection(from_, to)
    clusters = await services.unanswered.clusters(chatbot.id, time.start, time.end)
    ids = [cluster.id for cluster in clusters]
    if after and after not in ids:
        return page_of([], limit)  # to begin anew would have a client go round in circles
    begin = ids.index(after) + 1 if after else 0
    return page_of(clusters[begin : begin + limit + 1], limit)


@delete("/chatbots/{chatbot_id:str}/unanswered", responses=with_errors(404))
async def clear_unanswered(chatbot_id: ChatbotId, services: Services) -> None:
    """Forget the questions that a chatbot could not answer."""
    await services.unanswered.clear((await services.chatbots.get(chatbot_id)).id)

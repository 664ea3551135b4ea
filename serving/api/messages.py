"""Messages of a chat, checked, and as tokens by the model's own template."""

from collections.abc import Sequence

from serving.api.bodies import Message
from serving.api.prompts import bound
from serving.errors import ApiError
from serving.service import Service

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}  # -> as templates know it


async def read_messages(service: Service, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
    """The tokens of a chat, up to where the answer begins. Raises ApiError 400."""
    chat = service.chat
    if chat is None:
        message = f"{service.name} has no chat template: it continues texts, at /v1/completions"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    plain = [_plain(message, f"messages[{number}]") for number, message in enumerate(messages)]
    size = sum(len(message["content"]) for message in plain)
    bound(service, ["".join(message["content"] for message in plain)], "messages")
    try:
        work = lambda: chat.encode(plain, generation_prompt=generation_prompt).tolist()
        return await service.in_thread(size, work)
    except ValueError as error:
        raise ApiError(400, str(error)[:500], param="messages", code="invalid_value") from None


def _plain(message: Message, place: str) -> dict[str, str]:
    """A message as templates take it: a role and a text."""
    if message.role in ("tool", "function") or message.tool_calls or message.function_call or message.tool_call_id:
        raise ApiError(400, f"{place}: tools are not supported", param=place, code="unsupported_parameter")
    if message.role not in ROLES:
        valid = ", ".join(ROLES)
        raise ApiError(400, f"{place}.role={message.role!r} is none of {valid}", param=f"{place}.role")
    if message.audio:
        raise ApiError(400, f"{place}.audio is not supported: messages are text", param=place)
    content = message.content
    if isinstance(content, list):
        for number, part in enumerate(content):
            if part.type != "text" or part.text is None:
                where = f"{place}.content[{number}]"
                raise ApiError(400, f"{where}: only parts of type text are read, not {part.type!r}", param=where)
        content = "\n".join(part.text for part in content)
    if content is None and message.role != "assistant":
        raise ApiError(400, f"{place}.content is missing", param=f"{place}.content", code="invalid_value")
    return {"role": ROLES[message.role], "content": content or ""} | ({"name": message.name} if message.name else {})

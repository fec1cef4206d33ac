"""The prompt of a request's JSON body, checked: messages with their tools, or texts and token ids."""

import json
from collections.abc import Mapping
from typing import Any

from jaxmoe.serving.errors import ApiError


def read_messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Check the messages of a chat; content in parts becomes one text.

    Raises:
        ApiError: they are no list of messages, or a part is no text.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages is a list of at least one message", param="messages")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f'{where} is an object with a "role"; got {message!r:.80}', param=where)
    if message.get("tool_calls") is not None:
        message = {**message, "tool_calls": _past_calls(message["tool_calls"], f"{where}.tool_calls")}
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ApiError(
                    400, f'{where} has parts {{"type": "text", "text": ...}} only; got {part!r:.80}', param=where
                )
        return {**message, "content": "".join(part["text"] for part in content)}
    if content is not None and not isinstance(content, str):
        raise ApiError(400, f"{where} has a text or a list of parts as its content; got {content!r:.80}", param=where)
    return message


def _past_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message of the assistant with their arguments as objects, which is what templates are written for."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) and _is_function(call) for call in calls):
        raise ApiError(400, f'{where} is a list of {{"type": "function", "function": {{"name": ...}}}}', param=where)
    return [{**call, "function": _with_arguments(call["function"], where)} for call in calls]


def _with_arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    try:
        read = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise ApiError(400, f"{where} have arguments that are a JSON object; got {arguments!r:.80}", param=where)
    return {**function, "arguments": read}


def _is_function(value: dict[str, Any]) -> bool:
    function = value.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def read_template_variables(body: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a chat template is given beside the messages: tools, and variables of its own.

    Raises:
        ApiError: a field is of another kind.
    """
    variables = body.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict) or variables.keys() & {"messages", "add_generation_prompt", "tools"}:
        raise ApiError(
            400,
            f"chat_template_kwargs is an object of variables of the template's own; got {variables!r:.80}",
            param="chat_template_kwargs",
        )
    tools = body.get("tools")
    if not tools or body.get("tool_choice") == "none":
        return variables
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and _is_function(tool) for tool in tools):
        raise ApiError(400, 'tools is a list of {"type": "function", "function": {"name": ...}}', param="tools")
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise ApiError(
            400,
            "a response_format lets no token come that would call a tool: leave it out, or tools, or give tool_choice "
            '"none"',
            param="response_format",
        )
    return {**variables, "tools": tools}


def one_kind(body: Mapping[str, Any]) -> list[Any]:
    """The prompts of a completion as a list: of texts, or of lists of token ids.

    Raises:
        ApiError: it is neither.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(one, str) for one in prompt):
            return prompt
        if all(type(token) is int for token in prompt):
            return [prompt]
        if all(isinstance(one, list) and one and all(type(token) is int for token in one) for one in prompt):
            return prompt
    raise ApiError(
        400, f"prompt is a text, a list of texts, token ids, or a list of those; got {prompt!r:.80}", param="prompt"
    )

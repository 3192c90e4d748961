"""OpenAssistant's message trees, or flat messages that make trees, become rows {"messages": [{"role", "content"}, …]}:
at every turn the reply of the best rank, one path a tree, as in openassistant-guanaco (QLoRA, arXiv 2305.14314)."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

Node = Mapping[str, Any]
Placed = tuple[str, object]  # (place in words, row); a row that is text says why it cannot be used
_ROLES = {"prompter": "user", "assistant": "assistant"}


def is_tree(row: object) -> bool:
    """Whether a row has the shape of an exported message tree: {"prompt": {"text", "role", "replies"}}."""
    return isinstance(row, dict) and isinstance(row.get("prompt"), dict)


def is_message(row: object) -> bool:
    """Whether a row has the shape of a flat message: {"message_id", "parent_id", "text", "role", …}."""
    return isinstance(row, dict) and {"message_id", "text", "role"} <= set(row)


def from_trees(rows: Iterable[Placed]) -> Iterator[Placed]:
    """Each tree's best path. A tree that nobody answered is left out."""
    for place, row in rows:
        if isinstance(row, str):
            yield place, row
        elif not is_tree(row):
            yield place, "is no message tree: field 'prompt' must be an object with 'text', 'role' and 'replies'"
        else:
            yield from _path(place, cast(Node, row)["prompt"])


def from_messages(rows: Iterable[Placed]) -> Iterator[Placed]:
    """The best path of each tree that flat messages make by `parent_id`, in the order of the first questions."""
    nodes: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for place, row in rows:
        if isinstance(row, str):
            yield place, row
        elif not is_message(row):
            yield place, "is no message of a tree: fields 'message_id', 'parent_id', 'text' and 'role' are needed"
        else:
            node = dict(cast(Node, row), replies=[])
            if nodes.setdefault(name := str(node["message_id"]), node) is node:
                places[name] = place
            else:
                yield place, f"message_id {name!r} stands in {places[name]}, too"
    for name, node in nodes.items():
        parent = node.get("parent_id")
        if parent is not None and str(parent) in nodes:
            nodes[str(parent)]["replies"].append(node)
        elif parent is not None:
            yield places[name], f"parent_id {parent!r} is of no message here"
    for name, node in nodes.items():
        if node.get("parent_id") is None:
            yield from _path(places[name], node)


def _path(place: str, root: Node) -> Iterator[Placed]:
    messages: list[dict[str, str]] = []
    node: Node | None = root
    while node is not None:
        role, text = node.get("role"), node.get("text")
        if role not in _ROLES or not isinstance(text, str):
            yield place, f"a message's role is {role!r}. Allowed: {', '.join(_ROLES)}; its 'text' must be text"
            return
        if not text.strip():
            break
        messages.append({"role": _ROLES[role], "content": text})
        node = _best(node.get("replies"))
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if messages:
        yield place, {"messages": messages}


def _best(replies: object) -> Node | None:
    """The reply of the lowest rank; among those without a rank the first that was answered, else the first."""

    def order(reply: Node) -> tuple[float, bool]:
        rank = reply.get("rank")
        return float(rank) if isinstance(rank, int | float) else math.inf, not reply.get("replies")

    nodes = [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []
    return min((reply for reply in nodes if not reply.get("deleted")), key=order, default=None)

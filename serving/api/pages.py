"""Lists that are given out a page at a time, as the OpenAI API has them: limit, after, order."""

from fastapi import Request

from serving.errors import ApiError

MOST, USUAL = 1000, 100  # entries of a page
ORDERS = ("desc", "asc")
PAGES = [
    {"name": "limit", "in": "query", "required": False, "schema": {"type": "integer", "minimum": 1, "maximum": MOST}},
    {"name": "after", "in": "query", "required": False, "schema": {"type": "string", "maxLength": 64}},
    {"name": "order", "in": "query", "required": False, "schema": {"type": "string", "enum": list(ORDERS)}},
]


def page_of(request: Request, newest_first: list[dict], others: tuple[str, ...] = ()) -> tuple[list[dict], bool]:
    """The page that a request asks for, and whether there are more behind it. Raises ApiError 400.

    others: further parameters of the route.
    """
    asked = request.query_params
    known = (*(page["name"] for page in PAGES), *others)
    if strange := next((name for name in asked if name not in known), None):
        told = f"unrecognized parameter {strange[:64]}; there are: {', '.join(known)}"
        raise ApiError(400, told, param=strange[:64], code="unknown_parameter")
    limit, order, after = asked.get("limit", str(USUAL)), asked.get("order", ORDERS[0]), asked.get("after")
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 9 and 1 <= int(limit) <= MOST):
        raise ApiError(400, f"limit={limit[:20]!r} must be 1 to {MOST}", param="limit", code="invalid_value")
    if order not in ORDERS:
        raise ApiError(400, f"order={order[:20]!r} is none of {', '.join(ORDERS)}", param="order", code="invalid_value")
    found = newest_first if order == ORDERS[0] else newest_first[::-1]
    if after is not None:
        at = next((number for number, one in enumerate(found) if one["id"] == after), None)
        if at is None:
            raise ApiError(400, f"after={after[:64]!r} is none of this list", param="after", code="invalid_value")
        found = found[at + 1 :]
    return found[: int(limit)], len(found) > int(limit)

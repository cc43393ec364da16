"""Messages for the outlets of the usage program."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable

from usage.outlet import Message

RECORDS = "usage.records.v1"
EVENTS = "audit.events.v1"


def a_message(number: int, *, organizations: int = 50, topic: str = RECORDS, padding: int = 0) -> Message:
    """A usage record or audit event with this number, of one of so many organisations by turns."""
    organization, name = f"org-{number % organizations}", f"id-{number}"
    told = {"record_id": name, "revision": 1} if topic == RECORDS else {"event_id": name}
    value = told | {"organization_id": organization, "n": number, "padding": "x" * padding}
    message_id = f"{name}/1" if topic == RECORDS else name
    return Message(id=message_id, topic=topic, key=organization, value=json.dumps(value).encode())


def messages(count: int, *, start: int = 0, organizations: int = 50, padding: int = 0) -> list[Message]:
    """Usage records with the numbers from ``start`` on."""
    return [a_message(n, organizations=organizations, padding=padding) for n in range(start, start + count)]


def values_by_key(of: Iterable[Message]) -> dict[str, list[bytes]]:
    """Values of each organisation, in order."""
    values: dict[str, list[bytes]] = defaultdict(list)
    for message in of:
        values[message.key].append(message.value)
    return dict(values)

"""Message classes of descriptor sets in pools of their own: upb, far faster than betterproto2 (design, "Two codecs").

``make protos`` writes the sets. A private pool never meets the descriptors of an installed package.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory


def message_classes(package: str, file: str) -> Callable[[str], Any]:
    """What gives the class of a message by its full name, from a descriptor set beside a package's modules."""
    pool = descriptor_pool.DescriptorPool()
    found = descriptor_pb2.FileDescriptorSet.FromString((resources.files(package) / file).read_bytes())
    for each in found.file:
        pool.Add(each)

    def message(name: str) -> Any:
        return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))

    return message

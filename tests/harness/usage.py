"""Usage records of a stack that hands them on as files, for tests: by request id, once they are there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator

SCHEMA_PATH: Final = Path(__file__).parents[2] / "docs" / "usage-record.schema.json"

Record = dict[str, Any]


@cache
def validator() -> Draft202012Validator:
    """Of docs/usage-record.schema.json."""
    return Draft202012Validator(json.loads(SCHEMA_PATH.read_text()))


def problems_of(record: Mapping[str, Any]) -> list[str]:
    """What is wrong with a record, by the schema and by what a schema cannot say."""
    problems = [f"{error.json_path}: {error.message}" for error in validator().iter_errors(record)]
    if round(record["cost_usd"] * 1_000_000) != record["cost_micro_usd"]:
        problems.append(f"$.cost_usd: {record['cost_usd']} is not {record['cost_micro_usd']} micro-dollars")
    return problems

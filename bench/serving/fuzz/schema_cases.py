"""Requests that schemathesis makes from the server's own OpenAPI document, right ones and wrong ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pgfast.errors import MissingDependencyError, PgfastError

from ..client import Address
from .shot import CLOSED, HANGING, HUNG, Outcome

MOST_PASSES = 50
"""Over all operations; each has its own seed, and an operation without parameters has one request only."""
PER_PASS = (5, 100)
"""At least and at most, of one operation and one kind: right or wrong."""


@dataclass(slots=True)
class SchemaRun:
    """What came of it."""

    outcomes: list[Outcome] = field(default_factory=list)
    complaints: Counter[str] = field(default_factory=Counter)
    """Answers that the document does not describe, by operation and check."""
    examples: dict[str, str] = field(default_factory=dict)
    """For each complaint the first request, as a curl command, and what was found."""
    answered: bool = True
    """Whether the server was there afterwards."""


def run_schema(address: Address, count: int, seed: int) -> SchemaRun:
    """Send about so many requests.

    Args:
        address: Of the server.
        count: Requests.
        seed: Of hypothesis.

    Raises:
        MissingDependencyError: schemathesis is not installed.
        PgfastError: The document cannot be read, or has nothing to ask.
    """
    try:
        import requests
        import schemathesis
        from hypothesis import errors
    except ImportError as error:
        raise MissingDependencyError(error.name or "schemathesis", "bench") from error
    base = f"http://{address[0]}:{address[1]}"
    try:
        schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
        found: list[Any] = list(schema.get_all_operations())  # Ok, or Err, which has no ok()
        operations = [one.ok() for one in found]
    except Exception as error:  # whatever schemathesis and requests raise, it is about the document
        raise PgfastError(f"the server's /openapi.json cannot be used: {error}") from error
    run = SchemaRun()
    per_pass = min(max(count // (4 * len(operations) or 1), PER_PASS[0]), PER_PASS[1])
    with requests.Session() as session:
        for number in range(MOST_PASSES):
            before = len(run.outcomes)
            for operation in operations:
                for mode in schemathesis.GenerationMode:
                    left = min(per_pass, count - len(run.outcomes))
                    if left <= 0:
                        return run
                    try:
                        _pass(operation, mode, left, 1000 * seed + number, lambda case: _send(case, base, session, run))
                    except errors.Unsatisfiable:  # nothing about it can be wrong
                        continue
            if len(run.outcomes) == before:
                raise PgfastError("the server's /openapi.json describes no request")
    return run


def _pass(operation: Any, mode: Any, count: int, seed: int, send: Callable[[Any], None]) -> None:
    """So many requests of one operation, all right or all wrong."""
    import hypothesis

    settings = hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    given = hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    hypothesis.seed(seed)(settings(given(lambda case: send(case))))()


def _send(case: Any, base: str, session: Any, run: SchemaRun) -> None:
    import requests
    from schemathesis.core.failures import FailureGroup
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    name = f"{case.method} {case.operation.path}"
    start = time.perf_counter()
    try:
        response = case.call(base_url=base, session=session, timeout=HUNG)
    except requests.Timeout:
        run.outcomes.append(Outcome("schema", HANGING, time.perf_counter() - start))
        return
    except (requests.RequestException, OSError):
        run.outcomes.append(Outcome("schema", CLOSED, time.perf_counter() - start))
        return
    except (UnicodeError, ValueError):  # requests itself cannot send it
        return
    run.outcomes.append(Outcome("schema", str(response.status_code), time.perf_counter() - start, response.content))
    try:
        # whether a string is a picture is more than a schema can say
        case.validate_response(response, excluded_checks=[positive_data_acceptance])
    except FailureGroup as failures:
        for failure in failures.exceptions:
            said = f"{name}: {failure.title}"
            run.complaints[said] += 1
            run.examples.setdefault(said, f"{case.as_curl_command()[:500]}  ->  {' '.join(str(failure).split())[:500]}")

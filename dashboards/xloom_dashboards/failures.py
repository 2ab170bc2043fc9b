"""Shares of requests that failed, as boards and alerts both reckon them."""

from __future__ import annotations

from xloom.observability import table
from xloom_dashboards.promql import Scope, or_zero, share

# Codes with which a request ends that a router had taken: it is among the requests that ended, with outcome error, too.
OF_TAKEN = ("engine_dead", "engine_error", "no_replica_ready", "replica_lost", "router_closing")


def failed_share(scope: Scope, *matchers: str) -> str:
    """Requests that ended with an error, of those that ended."""
    failed = or_zero(scope.rate(table.REQUESTS, *matchers, 'outcome="error"'))
    return share(failed, scope.rate(table.REQUESTS, *matchers))


def server_error_share(scope: Scope) -> str:
    """Answers with a 5xx status, of all that was asked: requests that ended, and those refused before they began."""
    errors = scope.rate(table.HTTP_ERRORS, 'status=~"5.."')
    refused = scope.rate(table.HTTP_ERRORS, 'status=~"5.."', f'code!~"{"|".join(OF_TAKEN)}"')
    return share(or_zero(errors), f"({or_zero(scope.rate(table.REQUESTS))} + {or_zero(refused)})")

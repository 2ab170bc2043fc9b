"""All boards."""

from __future__ import annotations

from xloom_dashboards.board import Board
from xloom_dashboards.cluster import CLUSTER_BOARD
from xloom_dashboards.serving import SERVING
from xloom_dashboards.store import STORE
from xloom_dashboards.xlora import XLORA

BOARDS: tuple[Board, ...] = (SERVING, CLUSTER_BOARD, XLORA, STORE)

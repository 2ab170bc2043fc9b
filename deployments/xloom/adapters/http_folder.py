"""A folder of an HTTP server, known by the links on its page, which is read so far and no further.

Relies on fsspec 2026.9: `HTTPFileSystem._ls_real` reads a page whole, and finds links by an expression whose time grows
with the square of the page's length, or worse.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urljoin

from fsspec.implementations.http import HTTPFileSystem

from xloom.adapters.inner_network import client_for
from xloom.adapters.limits import Budget

MOST_PAGE = 4 * 2**20  # bytes
_PIECE = 2**16  # bytes
_LINK = re.compile(r"""href\s{0,9}=\s{0,9}["']([^"'<>\s]{1,2000})["']""", re.IGNORECASE)


def links(page: str, url: str) -> list[str]:
    """The addresses below a folder's own that its page leads to; one that ends in `/` is a folder."""
    folder = url.rstrip("/") + "/"
    found = dict.fromkeys(urljoin(folder, link) for link in _LINK.findall(page) if "?" not in link and "#" not in link)
    return [link for link in found if link.startswith(folder) and link != folder]


class HttpFolder(HTTPFileSystem):
    """fsspec's file system of one source, within its limits."""

    cachable = False

    def __init__(self, address: str, budget: Budget) -> None:
        super().__init__(get_client=client_for(address, inner=budget.inner))
        self._budget = budget

    async def _ls_real(self, url: str, detail: bool = True, **_: Any) -> Any:
        found = links(await self._page(url), url)
        kinds = ("file", "directory")
        listed = [{"name": link, "size": None, "type": kinds[link.endswith("/")]} for link in found]
        return listed if detail else sorted(found)

    async def _page(self, url: str) -> str:
        session = await self.set_session()
        async with session.get(self.encode_url(url)) as answer:
            self._raise_not_found_for_status(answer, url)
            if answer.content_type not in ("text/html", "application/octet-stream"):  # the latter: it did not say
                return ""
            page = bytearray()
            while piece := await answer.content.read(_PIECE):
                self._budget.heard()
                page += piece
                if len(page) > MOST_PAGE:
                    raise self._budget.too_large(f"a page of more than {MOST_PAGE} bytes")
        return page.decode("utf-8", "ignore")

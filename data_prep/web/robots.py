"""What sites ask of robots: robots.txt (RFC 9309) and the X-Robots-Tag header."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from protego import Protego
from yarl import URL

from data_prep.web.outcomes import OPT_OUT, FetchError

PRODUCT = "cluster-clip-data-prep"
AGENTS = (PRODUCT, "img2dataset")  # sites that name that program mean this kind of robot
OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "noml", "none"})
# directives with a value: their colon does not make them the name of a robot
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


class RobotsFiles:
    """robots.txt of every host that is asked, fetched once.

    `fetch_text` gets the url of a robots.txt and gives its text, or "" where there is none (4xx); it raises
    FetchError when the host cannot tell: then its images count as failed in the same way, and can be retried.
    """

    def __init__(self, fetch_text: Callable[[URL], Awaitable[str]]) -> None:
        self._fetch_text = fetch_text
        self._files: dict[URL, asyncio.Task[Protego]] = {}

    async def check(self, url: URL) -> None:
        """Raise FetchError when the site's robots.txt disallows this url to robots like ours, or cannot be had."""
        origin = url.origin()
        if origin not in self._files:
            self._files[origin] = asyncio.ensure_future(self._read(origin))
        task = self._files[origin]
        try:
            rules = await asyncio.shield(task)
        except FetchError as error:
            if error.retryable and self._files.get(origin) is task:
                del self._files[origin]
            raise FetchError(
                error.outcome, f"robots.txt: {error.message}", error.http_status, error.retryable, error.retry_after_s
            ) from error
        if not all(rules.can_fetch(str(url), agent) for agent in AGENTS):
            raise FetchError(OPT_OUT, "robots.txt disallows it")

    async def _read(self, origin: URL) -> Protego:
        return Protego.parse(await self._fetch_text(origin.with_path("/robots.txt")))

    async def close(self) -> None:
        """End the requests under way."""
        for task in self._files.values():
            task.cancel()
        await asyncio.gather(*self._files.values(), return_exceptions=True)


def check_header(values: Iterable[str]) -> None:
    """Raise FetchError when an X-Robots-Tag, addressed to all robots or to ours, opts out of this use."""
    for value in values:
        agent = ""
        for part in value.lower().split(","):
            name, colon, rest = part.partition(":")
            if colon and name.strip() not in _VALUED:
                agent, part = name.strip(), rest
            if part.strip() in OPT_OUTS and agent in ("", "*", *AGENTS):
                raise FetchError(OPT_OUT, f"X-Robots-Tag: {part.strip()}")

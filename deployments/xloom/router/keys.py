"""The endpoint's keys as a deployment's arguments hold them: digests, from which no key can be read."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from pydantic import SecretStr

from xloom.settings import RouterSettings, Settings

_SALT = 16  # bytes


@dataclass(frozen=True)
class KeyDigest:
    """Salted SHA-256 of a key. It stands in for random keys; a short word could be guessed from it."""

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, key: str) -> KeyDigest:
        """The digest of a key, under a salt of its own."""
        salt = secrets.token_bytes(_SALT)
        return cls(salt, _digest(salt, key))

    def matches(self, given: str) -> bool:
        """Whether a client has sent this key."""
        return hmac.compare_digest(self.digest, _digest(self.salt, given))


@dataclass(frozen=True)
class Keys:
    """Who may call: the digests of both keys, None where there is none."""

    api: KeyDigest | None = None
    admin: KeyDigest | None = None

    @classmethod
    def of(cls, router: RouterSettings) -> Keys:
        """The digests of a deployment's keys."""
        return cls(_of(router.api_key), _of(router.admin_key))


def without_keys(settings: Settings) -> Settings:
    """The settings as replicas and routers are given them."""
    router = settings.router.model_copy(update={"api_key": None, "admin_key": None})
    return settings.model_copy(update={"router": router})


def _of(key: SecretStr | None) -> KeyDigest | None:
    return KeyDigest.of(key.get_secret_value()) if key is not None else None


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode("utf-8", "surrogatepass")).digest()

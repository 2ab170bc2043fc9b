"""What `xloom doctor` finds in the settings and the files they name: what a start, or an add, would refuse."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from xloom.adapters.source_rules import is_local
from xloom.adapters.wanted import Wanted, wanted
from xloom.app import own_rules
from xloom.commands.checks import Finding
from xloom.preflight import refusals
from xloom.protocol import XloomError, some_of
from xloom.router.exposure import is_loopback
from xloom.settings import RouterSettings, Settings

if TYPE_CHECKING:
    from xloom.adapters.catalog import AdapterCatalog


def check_settings(settings: Settings) -> list[Finding]:
    """All that would be refused: by the start, the router's keys, and for each adapter and bundle on this machine."""
    found = [failed("settings", error) for error in refusals(settings)]
    found = found or [Finding("settings", "ok", "nothing that a start would refuse")]
    return [*found, *check_weights(settings), *check_keys(settings.router), *check_adapters(settings)]


def failed(check: str, error: XloomError) -> Finding:
    """An error as a finding."""
    return Finding(check, "fail", f"{error.message} [{error.code}]", error.cure)


def check_weights(settings: Settings) -> list[Finding]:
    """Hold the tensors of a local checkpoint against the model, by their files' headers: nothing is loaded."""
    source = settings.model.source
    folder = Path(source)
    if not any(folder.glob("*.safetensors")):
        return []  # a hub id, or a folder that another check is about
    try:
        from xloom.engines.transformers.checkpoint import loading_info, refuse_missing

        info = loading_info(folder)
        refuse_missing(source, info)
    except ModuleNotFoundError as error:
        return [Finding("weights", "warn", f"not looked at: the package {error.name!r} is missing")]
    except XloomError as error:
        return [failed("weights", error)]
    except Exception as error:  # of a model that Transformers does not know, or whose shapes are others
        detail = (
            f"not looked at: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        )
        return [Finding("weights", "warn", detail)]
    if extra := sorted(map(str, info["unexpected_keys"])):
        return [Finding("weights", "warn", f"{len(extra)} tensors have no place in the model: {some_of(extra)}")]
    return [Finding("weights", "ok", "the checkpoint gives all that the model has")]


def check_keys(router: RouterSettings) -> list[Finding]:
    """Who may reach the endpoint, and who may change what it serves; what a start refuses is said elsewhere."""
    local = is_loopback(router.host)
    if router.api_key is None and not local:
        detail = f"there is no API key, and the endpoint listens at {router.host}: whoever reaches it may use it"
        return [Finding("keys", "warn", detail, "Set XLOOM_API_KEY as well, or router.host: 127.0.0.1.")]
    if router.api_key is None and router.admin_key is None:
        return [Finding("keys", "ok", f"none: the endpoint is for this machine alone ({router.host})")]
    if router.admin_key is None:
        return [Finding("keys", "ok", "there is no admin key: nobody may add and remove adapters")]
    return [Finding("keys", "ok", "set")]


def check_adapters(settings: Settings) -> list[Finding]:
    """Take in each adapter and bundle that lies on this machine, as the store would, and forget it again."""
    entries = wanted(settings)
    if not entries:
        return []
    try:
        from xloom.adapters.catalog import AdapterCatalog
        from xloom.adapters.validation import base_shape

        base_shape(settings.model.source, settings.model.revision)
    except ModuleNotFoundError as error:
        return [Finding("adapters", "warn", f"not looked at: the package {error.name!r} is missing")]
    except XloomError as error:
        return [failed("adapters", error)]
    found = []
    with tempfile.TemporaryDirectory(prefix="xloom-doctor-") as folder:
        base = settings.model
        catalog = AdapterCatalog(
            Path(folder), base.source, settings.store.max_rank, [base.served_name], base_revision=base.revision
        )
        for entry in entries:
            places = [entry.source] if entry.blend is None else entry.blend.sources.values()
            away = [place for place in places if not is_local(place)]
            if away:
                found.append(Finding(f"adapter {entry.name}", "ok", f"not looked at: {away[0]} is not here"))
            else:
                found.append(_check_adapter(settings, catalog, entry))
    return found


def _check_adapter(settings: Settings, catalog: AdapterCatalog, entry: Wanted) -> Finding:
    what = "mixture" if entry.blend else "bundle" if entry.kind == "xlora" else "adapter"
    check, rules = f"{what} {entry.name}", own_rules(settings)
    stage = catalog.stage(entry.name, entry.source, entry.kind, entry.overrides, rules=rules, blend=entry.blend)
    try:
        with stage as staged:
            rank, limit = staged.entry.rank, settings.engine.max_lora_rank
            if limit != "auto" and rank > limit:
                raise XloomError(
                    "rank_too_large",
                    f"The rank of {entry.name!r} is {rank}; engine.max_lora_rank is {limit}.",
                    f"Set engine.max_lora_rank to {rank} or more, or to auto.",
                )
            return Finding(check, "ok", f"rank {rank}, {', '.join(staged.entry.targets)}")
    except XloomError as error:
        return failed(check, error)
    except Exception as error:  # whatever a damaged file makes of its readers: the other findings count as well
        return Finding(
            check, "fail", f"{entry.source} can't be read: {type(error).__name__}: {error}", "Save it again."
        )

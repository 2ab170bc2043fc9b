"""The typed settings of a deployment, and their one validation. No other file reads settings from the environment."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from xloom.protocol import XloomError

SAMPLE = Path(__file__).parent / "sample"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # no path parts, by construction

MixingMode = Literal["additive", "concatenate", "gated"]
IsqMethod = Literal["awq", "gptq", "rtn", "smoothquant"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(_Section):
    """The base model."""

    source: str = str(SAMPLE / "base")  # local folder or hub id
    served_name: str = Field("base", pattern=NAME_PATTERN)
    revision: str | None = None


class PagedAttentionSettings(_Section):
    """KV pages; the names and defaults of ADR-008's `PagedAttentionConfig`."""

    block_size: int = Field(16, ge=1)  # tokens in a page
    max_blocks: int = Field(4096, ge=2)  # pages
    gpu_memory_fraction: float = Field(0.9, gt=0, le=1)
    enable_prefix_caching: bool = True


class EngineSettings(_Section):
    """One replica's engine."""

    backend: str = "auto"  # auto, vllm, transformers, mistralrs, or a registered third party
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    max_model_len: int = Field(2048, ge=1)  # tokens
    max_num_seqs: int = Field(128, ge=1)
    paged_attention: PagedAttentionSettings = PagedAttentionSettings()
    tensor_parallel_size: int = Field(1, ge=1)
    compile: bool = True  # False: eager mode
    enable_xlora: Literal["auto"] | bool = "auto"  # auto: when a bundle is configured
    max_adapters: int = Field(8, ge=1)  # resident adapters and bundles a replica; others wait in host memory
    max_lora_rank: Literal["auto"] | int = "auto"  # a bundle's rank is the sum of its adapters' ranks
    extra_args: dict[str, Any] = {}  # any other engine argument, passed through

    @field_validator("extra_args")
    @classmethod
    def _no_secret(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if isinstance(arguments.get("hf_token"), str):
            raise ValueError("hf_token would lie in clear with the deployment: set HF_TOKEN where Ray runs")
        return arguments


class IsqSettings(_Section):
    """In-situ quantisation of the base model's weights at load; the names and defaults of ADR-008's `IsqConfig`."""

    bits: Literal[2, 4, 8, "auto"] = 4  # auto: the most that fits the memory at hand
    method: IsqMethod = "awq"
    calibration_samples: int = Field(128, ge=1)  # windows of 512 tokens
    group_size: int = Field(128, ge=1)  # input channels that share a scale, at 2 and 4 bits
    calibration: str = "sample"  # the sample's own text, a local .txt, .json or .jsonl file, or a hub dataset
    cache: str = "~/.cache/xloom/quantised"  # quantised models by content; node-local


class AdapterSettings(_Section):
    """A LoRA adapter to serve under its name."""

    name: str = Field(pattern=NAME_PATTERN)
    source: str  # local folder, hub id, or fsspec URL
    verify: bool = False  # a replica proves it before serving it: docs/check.md


class XLoraSettings(AdapterSettings):
    """An X-LoRA bundle; what is set here overrides what the bundle says."""

    top_k: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)
    mixing_mode: MixingMode | None = None  # None: the bundle's own, else additive
    routing_passes: Literal[1, 2] | None = None  # 1: another model at half the price: docs/x-lora.md; None: 2
    prefill: Literal["exact", "lagged"] | None = None  # of one pass; None: exact


class ReplicaSettings(_Section):
    """How many engine replicas, what each gets, and what makes them scale."""

    min: int = Field(1, ge=0)
    max: int = Field(1, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)  # per replica; 0 on CPU
    target_queue_depth: float = Field(8, gt=0)  # waiting requests a replica
    target_kv_occupancy: float = Field(0.8, gt=0, le=1)
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(60, ge=0)
    drain_timeout_s: float = Field(60, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaSettings:
        if self.max < self.min:
            raise ValueError(f"replicas.max ({self.max}) must not be below replicas.min ({self.min})")
        return self


class RouterSettings(_Section):
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1)
    api_key: SecretStr | None = Field(None, min_length=1)  # or XLOOM_API_KEY
    admin_key: SecretStr | None = Field(None, min_length=1)  # or XLOOM_ADMIN_KEY; without it nobody changes adapters
    allow_anonymous: bool = False  # start without an API key at an address that others reach
    front_end_args: dict[str, Any] = {}  # options of vLLM's OpenAI front end: chat_template, tool_call_parser, ...


class SourceLimits(_Section):
    """The most that one source may bring in."""

    files: int = Field(2000, ge=1)
    bytes: int = Field(8 * 2**30, ge=1)  # of all its files
    depth: int = Field(8, ge=0)  # folders in folders
    seconds: float = Field(600, gt=0)
    stall_s: float = Field(30, gt=0)  # seconds without a byte


class StoreSettings(_Section):
    """The adapter store's folders, and what may be added to it at run time."""

    path: str = "~/.cache/xloom/store"  # manifest and prepared adapters; must outlive the actor
    cache: str = "~/.cache/xloom/nodes"  # node-local copies
    max_rank: int = Field(256, ge=1, le=512)  # of one adapter, or of a bundle's sum
    # Prefixes of sources that may be added at run time, beside those that `adapters` and `xlora` name.
    sources: list[str] = ["hf://"]
    limits: SourceLimits = SourceLimits()

    @field_validator("sources")
    @classmethod
    def _prefixes(cls, prefixes: list[str]) -> list[str]:
        for prefix in prefixes:
            if not prefix.startswith(("/", "~")) and re.match(r"[a-z][a-z0-9+.-]*://", prefix) is None:
                raise ValueError(f"{prefix!r} is neither a folder (/… or ./…) nor a URL (hf://org, s3://bucket/path)")
        return prefixes


class LogSettings(_Section):
    """What the router, the replicas and the store log."""

    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    requests: bool = False  # a line at the end of each request


class TraceSettings(_Section):
    """OpenTelemetry traces over router and replicas, sent by OTLP."""

    endpoint: str | None = None  # None: no traces
    protocol: Literal["http", "grpc"] = "http"
    sample: float = Field(1.0, ge=0, le=1)  # share of the traces that begin here

    @field_validator("endpoint")
    @classmethod
    def _plain_url(cls, endpoint: str | None) -> str | None:
        if endpoint is None:
            return None
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{endpoint!r} is no URL of a collector, such as http://collector:4318")
        if "@" in url.netloc or url.query:
            raise ValueError("the URL must hold no secret: set OTEL_EXPORTER_OTLP_HEADERS where Ray runs")
        return endpoint


class ObservabilitySettings(_Section):
    """Logs and traces."""

    logs: LogSettings = LogSettings()
    traces: TraceSettings = TraceSettings()


class Settings(_Section):
    """A deployment."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    isq: IsqSettings | None = None  # None: the weights as they are
    adapters: list[AdapterSettings] = []
    xlora: list[XLoraSettings] = []
    replicas: ReplicaSettings = ReplicaSettings()
    router: RouterSettings = RouterSettings()
    store: StoreSettings = StoreSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    @field_validator("xlora", "adapters")
    @classmethod
    def _unique(cls, entries: list[Any]) -> list[Any]:
        names = [entry.name for entry in entries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is used {names.count(name)} times")
        return entries

    @model_validator(mode="after")
    def _names_apart(self) -> Settings:
        seen = {self.model.served_name: "the base model"}
        for entry in [*self.adapters, *self.xlora]:
            if entry.name in seen:
                raise ValueError(f"the name {entry.name!r} is already that of {seen[entry.name]}")
            seen[entry.name] = "an adapter"
        return self

    @property
    def xlora_enabled(self) -> bool:
        """Whether the engine is started ready for X-LoRA bundles."""
        return bool(self.xlora) if self.engine.enable_xlora == "auto" else self.engine.enable_xlora


def _known_keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Settings
    for part in location:
        if isinstance(part, int):
            continue
        annotation: Any = section.model_fields[part].annotation
        arguments = getattr(annotation, "__args__", ())
        section = arguments[0] if arguments else annotation
    return section


def _explain(error: ValidationError) -> str:
    lines = []
    for detail in error.errors():
        location = detail["loc"]
        path = ".".join(str(part) for part in location)
        if detail["type"] == "extra_forbidden":
            known = _known_keys(_section_at(location[:-1]))
            nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
            lines.append(f"unknown key {path!r}; did you mean {nearest[0]!r}? Known keys there: {', '.join(known)}.")
        else:
            lines.append(f"{path or 'settings'}: {detail['msg'].removeprefix('Value error, ')}.")
    return " ".join(lines)


def parse_settings(data: dict[str, Any], *, with_keys: bool = True) -> Settings:
    """Validate settings given as plain data; keys they lack come from the environment, unless told otherwise.

    Raises `XloomError` (invalid_settings) naming each wrong key.
    """
    try:
        settings = Settings.model_validate(data)
    except ValidationError as error:
        raise XloomError("invalid_settings", _explain(error), "Mend the settings file and start again.") from None
    if not with_keys:
        return settings
    keys = {
        "api_key": settings.router.api_key or _secret("XLOOM_API_KEY"),
        "admin_key": settings.router.admin_key or _secret("XLOOM_ADMIN_KEY"),
    }
    return settings.model_copy(update={"router": settings.router.model_copy(update=keys)})


def _secret(variable: str) -> SecretStr | None:
    value = os.environ.get(variable)
    return SecretStr(value) if value else None


def forget_keys() -> None:
    """Take the endpoint's keys out of this process's environment, so that what it starts does not get them."""
    for variable in ("XLOOM_API_KEY", "XLOOM_ADMIN_KEY"):
        os.environ.pop(variable, None)


def client_key() -> str | None:
    """The key in a command-line client's own environment: XLOOM_ADMIN_KEY, else XLOOM_API_KEY."""
    secret = _secret("XLOOM_ADMIN_KEY") or _secret("XLOOM_API_KEY")
    return secret.get_secret_value() if secret else None


def load_settings(path: Path | None, *, with_keys: bool = True) -> Settings:
    """Read a YAML settings file, or the sample's own when `path` is None. Raises `XloomError`."""
    file = path or SAMPLE / "settings.yaml"
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise XloomError("settings_not_found", f"There is no settings file {file}.", "Name an existing file.") from None
    except yaml.YAMLError as error:
        raise XloomError("invalid_settings", f"{file} is not YAML: {error}", "Mend the file.") from None
    if not isinstance(data, dict):
        raise XloomError("invalid_settings", f"{file} must hold a mapping of settings.", "See docs/settings.md.")
    return parse_settings(_absolute_sources(data, file.parent), with_keys=with_keys)


def _absolute_sources(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Resolve relative local sources against the settings file's own folder."""

    def resolve(entry: Any) -> Any:
        source = entry.get("source") if isinstance(entry, dict) else None
        if isinstance(source, str) and source.startswith("."):
            return entry | {"source": str((folder / source).resolve())}
        return entry

    resolved = dict(data)
    if "model" in data:
        resolved["model"] = resolve(data["model"])
    for key in ("adapters", "xlora"):
        if isinstance(data.get(key), list):
            resolved[key] = [resolve(entry) for entry in data[key]]
    store = data.get("store")
    if isinstance(store, dict) and isinstance(store.get("sources"), list):
        given = [resolve({"source": prefix})["source"] for prefix in store["sources"]]
        resolved["store"] = store | {"sources": given}
    return resolved

"""The typed settings of a deployment, and their one validation. No other file reads settings from the environment."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from xloom.protocol import XloomError, name_of_source
from xloom.settings_file import read_settings_file, with_paths, with_variables

SAMPLE = Path(__file__).parent / "sample"
GREATEST = 2**31 - 1  # of any whole number here
# A name, or org/name as on the hub: a slash, and still nothing that leads anywhere as a path.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?$"
FOLDER_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$"

MixingMode = Literal["additive", "concatenate", "gated"]
IsqMethod = Literal["awq", "gptq", "rtn", "smoothquant"]
Rank = Annotated[int, Field(ge=1, le=512)]  # 512: vLLM's greatest (vllm.config.lora.MaxLoRARanks, 0.32)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """What pydantic takes too kindly: true for 1, and endless digits; an empty section or list is one of none."""
        field = cls.model_fields[info.field_name or ""]
        kinds = {field.annotation, *get_args(field.annotation)}
        if value is None and type(None) not in kinds and isinstance(field.default, (list, dict, BaseModel)):
            return [] if isinstance(field.default, list) else {}
        if isinstance(value, bool) and bool not in kinds and Any not in kinds:
            wanted = "a number" if kinds & {int, float} else "what stands here (put a word in quotes)"
            raise ValueError(f"{str(value).lower()} is not {wanted}")
        if isinstance(value, int) and abs(value) > GREATEST:
            raise ValueError(f"the number has {len(str(abs(value)))} digits; at most {GREATEST} is taken")
        return value


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
    enable_xlora: Literal["auto"] | bool = "auto"  # auto: when a bundle or mixture is configured
    # On a GPU, the kernel that makes gates of a linear's input (arrow, linear); auto: when such a mixture is there.
    input_gates: Literal["auto"] | bool = "auto"
    max_adapters: int = Field(8, ge=1)  # in a replica's slots; others wait in its memory, or on its node's disk
    max_lora_rank: Literal["auto"] | Rank = "auto"  # a bundle's rank is the sum of its adapters' ranks
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
    subfolder: str | None = Field(None, pattern=FOLDER_PATTERN)  # of the source, where the adapter lies
    verify: bool = False  # a replica proves it before serving it: docs/check.md

    @property
    def location(self) -> str:
        """Source and sub-folder as one address, as the store reads it."""
        source, folder = self.source, self.subfolder
        if folder is None:
            return source
        if source.startswith(("/", ".", "~")) or ("://" not in source and Path(source).is_dir()):
            return f"{source.rstrip('/')}/{folder}"
        scheme, separator, _ = source.partition("://")
        if separator and scheme != "hf":
            return f"{source.rstrip('/')}/{folder}"
        repository, at, revision = source.removeprefix("hf://").partition("@")
        return f"hf://{repository.rstrip('/')}/{folder}{at}{revision}"


class XLoraSettings(AdapterSettings):
    """An X-LoRA bundle; what is set here overrides what the bundle says."""

    top_k: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, gt=0)
    mixing_mode: MixingMode | None = None  # None: the bundle's own, else additive
    routing_passes: Literal[1, 2] | None = None  # 1: another model at half the price: docs/x-lora.md; None: 2
    prefill: Literal["exact", "lagged"] | None = None  # of one pass; None: exact


class MixtureSettings(_Section):
    """A mixture of adapters without a trained router: docs/mixtures.md."""

    name: str = Field(pattern=NAME_PATTERN)
    adapters: list[str] = Field(min_length=2)  # names under `adapters`, or sources
    routing: Literal["arrow", "fixed"] = "arrow"
    weights: dict[str, float] = {}  # of fixed, by adapter; empty: alike, and together 1
    top_k: int | None = Field(None, ge=1)  # of arrow; None: all
    temperature: float | None = Field(None, gt=0)  # of arrow; None: 1
    subtract: list[str] = []  # of arrow: adapters whose mean is taken from each of those mixed
    verify: bool = False  # a replica proves it before serving it: docs/check.md


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
    stuck_timeout_s: float = Field(10, ge=1)  # of a stopped or silent process: replicas', routers', the store's

    @model_validator(mode="after")
    def _ordered(self) -> ReplicaSettings:
        if self.max < self.min:
            raise ValueError(f"replicas.max ({self.max}) must not be below replicas.min ({self.min})")
        return self


class LimitSettings(_Section):
    """What one request may ask of the endpoint, refused before any work is done."""

    connections: int = Field(2048, ge=1)
    header_bytes: int = Field(65536, ge=1024)  # request line and headers
    header_timeout_s: float = Field(10, gt=0)  # to send them
    keep_alive_s: float = Field(620, gt=0)  # of an idle connection: longer than load balancers keep theirs
    body_bytes: int = Field(4 * 2**20, ge=1024)
    body_timeout_s: float = Field(30, gt=0)  # to send it
    json_depth: int = Field(64, ge=4)
    json_values: int = Field(20_000, ge=16)  # beside token ids
    token_ids: int = Field(300_000, ge=1)  # of all prompts of a request
    prompt_characters: int = Field(524_288, ge=1)  # text of all prompts or messages of a request
    prompts: int = Field(128, ge=1)  # or conversations, of one request
    messages: int = Field(512, ge=1)
    message_parts: int = Field(4096, ge=1)  # with the messages themselves and their calls of tools
    n: int = Field(128, ge=1)  # answers to a prompt
    sequences: int = Field(512, ge=1)  # prompts times n
    logprobs: int = Field(128, ge=0)  # candidates of one token
    logprob_values: int = Field(131_072, ge=1)  # in one answer: of its prompts, or of what is generated
    gate_values: int = Field(131_072, ge=1)  # of a mixture's, in one answer: tokens times adapters, times layers
    stop_strings: int = Field(64, ge=0)  # and as many bad words
    stop_characters: int = Field(1024, ge=1)  # of one of them
    logit_bias: int = Field(1024, ge=0)
    tools: int = Field(128, ge=0)
    schema_bytes: int = Field(131_072, ge=1)  # of a JSON schema, a regular expression, a grammar, or all tools
    grammar_timeout_s: float = Field(1, gt=0)  # of processor time, to compile one; an engine gives up after 5
    grammar_bytes: int = Field(2 * 2**30, ge=256 * 2**20)  # memory of the process that does


class RouterSettings(_Section):
    """The HTTP endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    replicas: int = Field(1, ge=1)
    max_per_node: int | None = Field(None, ge=1, le=100)  # of these on one Ray node; None: as many as fit
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}  # Ray resources of a router, which keep it where they are
    api_key: SecretStr | None = None  # or XLOOM_API_KEY
    admin_key: SecretStr | None = None  # or XLOOM_ADMIN_KEY; without it nobody changes adapters
    console: bool = True  # the page at /console
    allow_anonymous: bool = False  # start without an API key at an address that others reach
    front_end_args: dict[str, Any] = {}  # options of vLLM's OpenAI front end: chat_template, tool_call_parser, ...
    limits: LimitSettings = LimitSettings()

    @field_validator("api_key", "admin_key")
    @classmethod
    def _a_key(cls, key: SecretStr | None) -> SecretStr | None:
        """An empty key would open the endpoint, and a variable as a shell writes it would be the key itself."""
        if key is not None and not key.get_secret_value():
            raise ValueError("the key is empty: leave it out for an endpoint without one")
        if key is not None and re.fullmatch(r"\$\w+", key.get_secret_value()):
            raise ValueError("a variable is written ${NAME}, with braces")
        return key


class SourceLimits(_Section):
    """The most that one source may bring in."""

    files: int = Field(2000, ge=1)
    bytes: int = Field(8 * 2**30, ge=1)  # of all its files
    depth: int = Field(8, ge=0)  # folders in folders
    seconds: float = Field(600, gt=0)
    stall_s: float = Field(30, gt=0)  # seconds without a byte


class RequestMixtureSettings(_Section):
    """What is kept for requests that mix adapters by weights of their own."""

    most: int = Field(16, ge=1)  # sets of adapters
    idle_s: float = Field(600, ge=60)  # until one that no request has used is taken out
    wait_s: float = Field(60, gt=0)  # the first request for one waits so long


class StoreSettings(_Section):
    """The adapter store's folders, and what may be added to it at run time."""

    path: str = "~/.cache/xloom/store"  # manifest and prepared adapters; must outlive the actor
    cache: str = "~/.cache/xloom/nodes"  # node-local copies
    max_rank: Rank = 256  # of one adapter, or of a bundle's sum
    # Prefixes of sources that may be added at run time, beside those that `adapters` and `xlora` name.
    sources: list[str] = ["hf://"]
    limits: SourceLimits = SourceLimits()
    request_mixtures: RequestMixtureSettings = RequestMixtureSettings()

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
    mixtures: list[MixtureSettings] = []
    replicas: ReplicaSettings = ReplicaSettings()
    router: RouterSettings = RouterSettings()
    store: StoreSettings = StoreSettings()
    observability: ObservabilitySettings = ObservabilitySettings()

    @field_validator("xlora", "adapters", "mixtures")
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
        for name in self.names:
            if name in seen:
                raise ValueError(f"the name {name!r} is already that of {seen[name]}")
            seen[name] = "an adapter"
        return self

    @model_validator(mode="after")
    def _mixtures_of_adapters(self) -> Settings:
        for mixture in self.mixtures:
            named = self.sources_of(mixture.adapters)
            if len(named) < len(mixture.adapters) or len(self.sources_of(mixture.subtract)) < len(mixture.subtract):
                raise ValueError(f"mixtures: {mixture.name!r} names an adapter twice")
            arrow = mixture.routing == "arrow"
            if arrow and mixture.weights:
                raise ValueError(f"mixtures: the weights of {mixture.name!r} are for routing: fixed")
            if not arrow and (mixture.top_k is not None or mixture.temperature is not None):
                raise ValueError(f"mixtures: top_k and temperature of {mixture.name!r} are for routing: arrow")
            if not arrow and mixture.subtract:
                raise ValueError(f"mixtures: subtract of {mixture.name!r} is for routing: arrow")
            if odd := [name for name in mixture.weights if name not in named]:
                raise ValueError(f"mixtures: {mixture.name!r} has a weight of {odd[0]!r}, which it does not mix")
            if mixture.top_k is not None and mixture.top_k > len(named):
                raise ValueError(f"mixtures: top_k of {mixture.name!r} is {mixture.top_k}, of {len(named)} adapters")
            if arrow and self.engine.tensor_parallel_size > 1:
                raise ValueError(f"mixtures: {mixture.name!r}: routing arrow needs engine.tensor_parallel_size: 1")
        return self

    @property
    def names(self) -> list[str]:
        """The names of what is served beside the base model."""
        return [*(entry.name for entry in (*self.adapters, *self.xlora)), *(entry.name for entry in self.mixtures)]

    def sources_of(self, adapters: list[str]) -> dict[str, str]:
        """Adapters of a mixture: their names in it, and where each is read from.

        What is no name under `adapters` is a source, and called by its last part.
        """
        known = {adapter.name: adapter.location for adapter in self.adapters}
        return {(each if each in known else name_of_source(each)): known.get(each, each) for each in adapters}

    @property
    def input_gates_enabled(self) -> bool:
        """Whether the settings ask for gates that are made of a linear's input."""
        found = any(mixture.routing == "arrow" for mixture in self.mixtures)
        return found if self.engine.input_gates == "auto" else self.engine.input_gates

    @property
    def xlora_enabled(self) -> bool:
        """Whether the engine is started ready for mixtures."""
        found = bool(self.xlora or self.mixtures)
        return found if self.engine.enable_xlora == "auto" else self.engine.enable_xlora


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
    lines: dict[str, list[str]] = {}  # by path: of a key that may be of several kinds, what each asks for
    for detail in error.errors():
        unknown = detail["type"] == "extra_forbidden"
        location = detail["loc"] if unknown else _keys(detail["loc"])
        path = ".".join(str(part) for part in location) or "settings"
        if unknown:
            known = _known_keys(_section_at(location[:-1]))
            nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
            text = f"unknown key {path!r}; did you mean {nearest[0]!r}? Known keys there: {', '.join(known)}"
        else:
            text = f"{path}: {detail['msg'].removeprefix('Value error, ')}"
        told = lines.setdefault(path, [])
        told.append(text.removeprefix(f"{path}: ") if told else text)
    return " ".join(f"{' or '.join(texts)}." for texts in lines.values())


def _keys(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Where it is in the file: without the kinds that pydantic adds for a key that may be of several."""
    return tuple(
        part
        for part in location
        if isinstance(part, int) or not re.search(r"literal\[|^constrained-|^int$|^bool$", part)
    )


def parse_settings(data: dict[str, Any], *, with_keys: bool = True, folder: Path | None = None) -> Settings:
    """Validate settings given as plain data; keys they lack come from the environment, unless told otherwise.

    `${NAME}` in them stands for an environment variable; relative local paths are taken from `folder`, where there is
    one. Raises `XloomError` (invalid_settings) naming each wrong key.
    """
    try:
        data = with_variables(data, os.environ)
        settings = Settings.model_validate(data if folder is None else with_paths(data, folder))
    except RecursionError:
        raise XloomError(
            "invalid_settings", "The settings are nested without end.", "Mend the settings file."
        ) from None
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
    return parse_settings(read_settings_file(file), with_keys=with_keys, folder=file.parent)

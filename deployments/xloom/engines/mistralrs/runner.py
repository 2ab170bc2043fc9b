"""A loaded `mistralrs.Runner`: settings as the wheel's arguments (0.9.5), and its refusals as ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloom.engines.mistralrs.folder import served_folder
from xloom.protocol import XloomError

if TYPE_CHECKING:
    from xloom.settings import EngineSettings

CACHED_SEQUENCES = 16  # mistral.rs's own default for prefix_cache_n


def load_runner(source: Path, engine: EngineSettings, max_lora_rank: int, isq: str | None) -> Any:
    """Load the model. Raises `XloomError` when mistral.rs refuses it or the arguments."""
    os.environ.setdefault("RUST_LOG", "warn")  # read at import
    import mistralrs

    dtypes = mistralrs.ModelDType
    names = {"auto": dtypes.Auto, "float32": dtypes.F32, "float16": dtypes.F16, "bfloat16": dtypes.BF16}
    which: Any = mistralrs.Which.Lora(  # its stubs don't say that this is a Which
        model_id=str(served_folder(source)),
        adapters=[],
        dtype=names[engine.dtype],
        max_adapters=engine.max_adapters,
        max_rank=max_lora_rank,
    )
    arguments: dict[str, Any] = {
        "max_seqs": engine.max_num_seqs,
        "prefix_cache_n": CACHED_SEQUENCES if engine.paged_attention.enable_prefix_caching else 0,
        "token_source": "none",
        "in_situ_quant": isq,
    }
    try:
        return mistralrs.Runner(which=which, **(arguments | engine.extra_args))
    except TypeError as error:
        raise XloomError(
            "unknown_engine_argument",
            f"mistral.rs refuses engine.extra_args: {error}",
            "See the arguments of mistralrs.Runner.",
        ) from error
    except Exception as error:  # its errors are ValueErrors of many kinds
        raise XloomError(
            "model_not_loadable", f"mistral.rs can't serve {source}: {error}", "Use another backend."
        ) from error

"""Compiles grammars in a process that may be killed: `python -m xloom.vllm.front_end.grammar_worker SECONDS BYTES`.

The first line on stdin is the tokeniser, as `xgrammar.TokenizerInfo.serialize_json` writes it; each line after it a
JSON object with `kind`, `spec` and `compact`. Each is answered by a line on stdout: `{"error": null}`, or what xgrammar
said. As `vllm.v1.structured_output.backend_xgrammar.XgrammarBackend.compile_grammar`, 0.32, does in the engine.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def main(seconds: float, memory: int) -> None:
    """Serve stdin until it ends. A grammar that takes longer than `seconds`, or more `memory`, ends the process."""
    os.nice(10)  # the router and engines of this machine come first
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import xgrammar

    tokenizer = xgrammar.TokenizerInfo.deserialize_json(sys.stdin.buffer.readline().decode())
    compiler = xgrammar.GrammarCompiler(tokenizer, max_threads=1, cache_enabled=False)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    most = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, 2 * seconds)  # should nobody be left to end this process
        try:
            _compile(compiler, **json.loads(line))
            error = None
        except MemoryError:
            os._exit(1)
        except Exception as raised:  # xgrammar's errors have no common type
            error = str(raised)[:1000]
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"error": error}), file=answers, flush=True)


def _compile(compiler: Any, kind: str, spec: str, compact: bool) -> None:
    if kind == "json":
        separators = (",", ":") if compact else None
        compiler.compile_json_schema(spec, any_whitespace=not compact, separators=separators)
    elif kind == "structural_tag":
        compiler.compile_structural_tag(spec)
    else:
        {"regex": compiler.compile_regex, "lark": compiler.compile_lark, "grammar": compiler.compile_grammar}[kind](
            spec
        )


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
